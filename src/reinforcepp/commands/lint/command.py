"""The ``lint`` command: check the data, print or write the report, write a cleaned copy."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from reinforcepp.commands.lint import report as formats
from reinforcepp.commands.lint.check import lint
from reinforcepp.commands.lint.findings import Report
from reinforcepp.commands.lint.fix import Change, log_path, write_fixed
from reinforcepp.config import LintConfig
from reinforcepp.data import count
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.locks import file_lock
from reinforcepp.monitoring import echo, printable

EXIT_FINDINGS = 1


def run_lint(config: LintConfig) -> int:
    """Check ``config.data``, write the requested files, and return the exit code.

    Returns:
        1 if there are findings of ``fail_on`` or above, otherwise 0.

    Raises:
        ConfigError: A file to write would replace the data, or the cleaned copy any file.
        ReinforceError: As ``lint`` and ``write_fixed``.
    """
    copy = _check_copy(config) if config.fix is not None else None
    output = _check_report(config, copy) if config.output is not None else None
    with ExitStack() as locks:
        for path, setting in ((copy, "fix"), (output, "output")):
            if path is not None:
                locks.enter_context(file_lock(path, setting))
        return _lint(config, copy, output)


def _lint(config: LintConfig, copy: Path | None, output: Path | None) -> int:
    report = lint(config)
    if output is None:
        _print_report(report, config.format)
    else:
        with whole_file(output) as file:
            file.write(_as_text(report, config.format))
        echo(f"{formats.summary(report)} Wrote {output}")
    if copy is not None:
        _print_changes(write_fixed(Path(config.data).expanduser(), copy, config), copy)
    return EXIT_FINDINGS if report.fails(config.fail_on) else 0


def _check_copy(config: LintConfig) -> Path:
    copy = check_output_file(str(config.fix), "fix")
    if copy.resolve() == Path(config.data).expanduser().resolve():
        raise ConfigError(f"--fix {config.fix}: the file is the data, which is never overwritten. Give another name.")
    for path in (copy, log_path(copy)):
        if path.exists():
            raise ConfigError(f"--fix {config.fix}: {path} exists and is never overwritten. Give another name.")
    return copy


def _check_report(config: LintConfig, copy: Path | None) -> Path:
    output = check_output_file(str(config.output))
    data = Path(config.data).expanduser()
    if output.resolve() == data.resolve() or (output.exists() and data.exists() and output.samefile(data)):
        raise ConfigError(
            f"--output {config.output}: the file is the data, which is never overwritten. Give another name."
        )
    if copy is not None and output.resolve() in (copy.resolve(), log_path(copy).resolve()):
        raise ConfigError(f"--output {config.output}: --fix writes the same file. Give --output another name.")
    return output


def _print_report(report: Report, form: str) -> None:
    if form == "text":
        terminal = Console(highlight=False)
        for line in formats.as_lines(report):
            terminal.print(printable(line.text), style=line.style, markup=False, soft_wrap=True)
    else:
        sys.stdout.write(_as_text(report, form))
    # A closed pipe raises an error here, where it is handled, instead of at the exit of Python.
    sys.stdout.flush()


def _as_text(report: Report, form: str) -> str:
    if form == "json":
        return formats.as_json(report)
    if form == "html":
        return printable(formats.as_page(report))
    return "".join(f"{printable(line.text)}\n" for line in formats.as_lines(report))


def _print_changes(changes: Sequence[Change], copy: Path) -> None:
    actions = Counter(change.action for change in changes)
    echo(
        f"Wrote {copy}: {count(actions['dropped'], 'row')} dropped, {actions['changed']} changed. "
        f"{log_path(copy)} lists each one.",
        "green",
    )
