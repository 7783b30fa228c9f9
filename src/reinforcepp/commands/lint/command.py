"""The ``lint`` command and function: check the data, print or write the report, write a cleaned copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reinforcepp.commands.lint import report as formats
from reinforcepp.commands.lint.check import check_data
from reinforcepp.commands.lint.findings import Change, LintReport
from reinforcepp.commands.lint.fix import log_path, write_fixed
from reinforcepp.config import LintConfig
from reinforcepp.data import GivenRows, count
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.locks import file_lock
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import Console, echo, one_message, print_json, print_output, printable

if TYPE_CHECKING:
    from datasets import Dataset

EXIT_FINDINGS = 1
GIVEN = "data"
"""Name of rows that are an argument."""


def run_lint(config: LintConfig) -> int:
    """Check ``config.data``, write the requested files, print the results, and return the exit code.

    Returns:
        1 if there are findings of ``fail_on`` or above, otherwise 0.

    Raises:
        ReinforceError: As :func:`lint`.
    """
    report = _lint(config)
    if config.output is None:
        _print_report(report, config.format)
    else:
        echo(f"{formats.summary(report)} Wrote {config.output}")
    if config.fix is not None:
        _print_changes(report.changes, Path(config.fix).expanduser())
    return EXIT_FINDINGS if report.fails(config.fail_on) else 0


def lint(
    data: str | Path | Dataset | Iterable[Mapping[str, Any]] = LintConfig.data,
    *,
    model: str | None = None,
    prompt_column: str = LintConfig.prompt_column,
    chosen_column: str = LintConfig.chosen_column,
    rejected_column: str = LintConfig.rejected_column,
    columns: Sequence[str] = (),
    heldout_fraction: float = LintConfig.heldout_fraction,
    seed: int = LintConfig.seed,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    near_duplicate: float = LintConfig.near_duplicate,
    fix: str | Path | None = None,
    format: Literal["text", "json", "html"] = "text",
    output: str | Path | None = None,
    verbose: bool = False,
) -> LintReport:
    """Find problems in preference pairs or prompts before training on them.

    Example:
        >>> from reinforcepp import lint
        >>> rows = [{"prompt": "What is an IP address?", "chosen": "A number.", "rejected": "A number."}]
        >>> report = lint(rows)
        >>> report.worst, report.rows
        ('error', (0,))

    Args:
        data: Rows (a ``Dataset`` or a list of dictionaries), a file, a folder, a Hub dataset, or ``builtin:network``. Rows are
            counted from 0; in files, a row's number is the line on which it starts.
        model: Model whose tokenizer measures lengths; default: lengths aren't checked.
        prompt_column: Column with the prompt.
        chosen_column: Column with the preferred response.
        rejected_column: Column with the other response.
        columns: Column names, NAME=COLUMN (prompt=question), also for reward functions.
        heldout_fraction: Fraction of prompts held out for evaluation; built-in data has its own split.
        seed: Seed of the split, as in training.
        max_prompt_length: Most tokens of a formatted prompt; needs model. Default: the context.
        max_length: Maximum length of prompt and response, in tokens. Default: context, up to 4096.
        near_duplicate: Fraction of shared word 3-grams that makes near-duplicates; from 0.5 to 1.
        fix: File for a fixed copy (CSV, TSV or JSONL); changes go to FIX.log.jsonl.
        format: Format of the report.
        output: File for the report; default: none is written.
        verbose: Print progress and notes to standard error.

    Returns:
        The findings, the most severe first: ``for finding in lint(data): print(finding)``.

    Raises:
        ConfigError: A setting is invalid, or a file to write would replace the data.
        DataError: The data can't be read, or lacks a column.
        ModelError: The model has no usable tokenizer.
    """
    config = LintConfig(
        data=str(data) if isinstance(data, (str, Path)) else GIVEN,
        model=model,
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
        columns=tuple(columns),
        heldout_fraction=heldout_fraction,
        seed=seed,
        max_prompt_length=max_prompt_length,
        max_length=max_length,
        near_duplicate=near_duplicate,
        fix=None if fix is None else str(fix),
        format=format,
        output=None if output is None else str(output),
    )
    with silence(not verbose):
        return _lint(config, None if isinstance(data, (str, Path)) else GivenRows.of(data, GIVEN))


def _lint(config: LintConfig, rows: GivenRows | None = None) -> LintReport:
    """Return the report, after writing the files that ``config`` asks for."""
    copy = _check_copy(config) if config.fix is not None else None
    output = _check_report(config, copy) if config.output is not None else None
    with ExitStack() as locks:
        for path, setting in ((copy, "fix"), (output, "output")):
            if path is not None:
                locks.enter_context(file_lock(path, setting))
        report = check_data(config, rows)
        if output is not None:
            with whole_file(output) as file:
                file.write(_as_text(report, config.format))
        if copy is None:
            return report
        return replace(report, changes=tuple(write_fixed(Path(config.data).expanduser(), copy, config)))


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


def _print_report(report: LintReport, form: str) -> None:
    if form == "text":
        terminal = Console()
        for line in formats.as_lines(report):
            terminal.print(line.text, style=line.style, soft_wrap=True)
    elif form == "json":
        print_json(formats.as_json(report))
    else:
        print_output(_as_text(report, form), end="")


def _as_text(report: LintReport, form: str) -> str:
    if form == "json":
        return formats.as_json(report)
    if form == "html":
        return printable(formats.as_page(report))
    return "".join(f"{one_message(line.text)}\n" for line in formats.as_lines(report))


def _print_changes(changes: Sequence[Change], copy: Path) -> None:
    actions = Counter(change.action for change in changes)
    echo(
        f"Wrote {copy}: {count(actions['dropped'], 'row')} dropped, {actions['changed']} changed. "
        f"{log_path(copy)} lists each one.",
        "green",
    )
