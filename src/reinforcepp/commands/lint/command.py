"""The verb: check, clean, tell."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from reinforcepp.commands.lint import report as forms
from reinforcepp.commands.lint.check import lint
from reinforcepp.commands.lint.findings import Report
from reinforcepp.commands.lint.fix import Change, log_path, write_fixed
from reinforcepp.config import LintConfig
from reinforcepp.data import count
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.monitoring import echo, printable

FAILED = 1


def run_lint(config: LintConfig) -> int:
    """Check ``config.data``, write what was asked for and return the exit code: 1 for findings of ``fail_on``, else 0.

    Raises:
        ConfigError: A file to be written would replace the data or, as a cleaned copy, any file.
        ReinforceError: As ``lint`` and ``write_fixed``.
    """
    copy = _check_copy(config) if config.fix is not None else None
    output = _check_report(config, copy) if config.output is not None else None
    report = lint(config)
    if output is None:
        _show(report, config.format)
    else:
        with whole_file(output) as file:
            file.write(_as_text(report, config.format))
        echo(f"{forms.summary(report)} Wrote {output}")
    if copy is not None:
        _tell_changes(write_fixed(Path(config.data), copy, config), copy)
    return FAILED if report.fails(config.fail_on) else 0


def _check_copy(config: LintConfig) -> Path:
    copy = check_output_file(str(config.fix), "fix")
    if copy.resolve() == Path(config.data).resolve():
        raise ConfigError(f"fix {config.fix} is the data itself, which is never overwritten: give another name.")
    for path in (copy, log_path(copy)):
        if path.exists():
            raise ConfigError(f"fix: there is a file {path} already, which is never overwritten: give another name.")
    return copy


def _check_report(config: LintConfig, copy: Path | None) -> Path:
    output = check_output_file(str(config.output))
    data = Path(config.data)
    if output.resolve() == data.resolve() or (output.exists() and data.exists() and output.samefile(data)):
        raise ConfigError(f"output {config.output} is the data itself, which is never overwritten: give another name.")
    if copy is not None and output.resolve() in (copy.resolve(), log_path(copy).resolve()):
        raise ConfigError(f"output {config.output} is a file that fix writes: give output another name.")
    return output


def _show(report: Report, form: str) -> None:
    """The report on standard output."""
    if form == "text":
        terminal = Console(highlight=False)
        for line in forms.as_lines(report):
            terminal.print(printable(line.text), style=line.style, markup=False, soft_wrap=True)
    else:
        sys.stdout.write(_as_text(report, form))
    sys.stdout.flush()  # so that a reader that has gone shows here, not when Python ends


def _as_text(report: Report, form: str) -> str:
    if form == "json":
        return forms.as_json(report)
    if form == "html":
        return printable(forms.as_page(report))
    return "".join(f"{printable(line.text)}\n" for line in forms.as_lines(report))


def _tell_changes(changes: Sequence[Change], copy: Path) -> None:
    done = Counter(change.action for change in changes)
    echo(
        f"Wrote {copy}: {count(done['dropped'], 'row')} dropped, {done['changed']} changed, each told in {log_path(copy)}",
        "green",
    )
