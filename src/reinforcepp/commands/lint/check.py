"""From a data file to its report: reading, the rules, and lengths in tokens of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.commands.lint import rules
from reinforcepp.commands.lint.findings import (
    SEVERITIES,
    CheckedFile,
    FileSummary,
    Finding,
    LintReport,
    UsableRow,
    count_with_verb,
    list_rows,
)
from reinforcepp.config import DEFAULT_MAX_LENGTH, ColumnConfig, LintConfig
from reinforcepp.data import ColumnNames, DataSource, Row, RowSource, Table, filter_rows, read_table, resolve_data
from reinforcepp.errors import setting
from reinforcepp.monitoring import PROGRESS_ROWS, reading_progress
from reinforcepp.types import RowId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256


def check_data(config: LintConfig, data: DataSource | None = None) -> LintReport:
    """Return all findings on ``data``, which is ``config.data`` by default.

    Raises:
        ConfigError: Two of the column settings are the same.
        DataError: The data can't be read as a table, or lacks a column.
        ModelError: The configured model has no usable tokenizer.
    """
    source = data if data is not None else config.data
    paths = resolve_data(source)
    read = [_read(path, config) for path in (paths.train, paths.heldout) if path is not None]
    files = [file for file, _ in read]
    findings = [finding for _, found in read for finding in found]
    findings += [finding for file in files for finding in rules.check_file(file, config.near_duplicate)]
    findings += _without_answers(files[0], config)
    train, heldout = files if len(files) > 1 else rules.split_file(files[0], config.heldout_fraction, config.seed)
    findings += rules.leakage(train, heldout, config.near_duplicate)
    if config.model is not None:
        findings += _lengths(files, config.model, config)
    ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
    summaries = tuple(FileSummary(file.name, file.noun, file.num_rows, len(file.rows)) for file in files)
    return LintReport(str(source), summaries, tuple(ordered))


def _read(path: RowSource, config: LintConfig) -> tuple[CheckedFile, list[Finding]]:
    """Return a checked file and how it was read, without its table, which holds every cell."""
    table, file = read_file(path, config)
    return file, _assumptions(table, file)


def read_file(path: RowSource, columns: ColumnConfig) -> tuple[Table, CheckedFile]:
    """Return a file's table and its checked form: pairs if it has answer columns, otherwise prompts."""
    table = read_table(path, ColumnNames(*columns.column_names.values()), pairs=None, max_bad_rows=None)
    file = to_checked_file(Path(table.source).name, table.rows, table.columns)
    return table, replace(file, num_rows=table.num_records)


def to_checked_file(name: str, rows: Sequence[Row], columns: tuple[str, ...]) -> CheckedFile:
    """Divide the rows into usable and skipped ones, as training does."""

    def find_problem(texts: Sequence[str]) -> str | None:
        return f"with {' equal to '.join(columns[1:])}" if len(texts) > 1 and texts[1] == texts[2] else None

    kept, skipped = filter_rows(rows, columns, find_problem)
    return CheckedFile(
        name,
        columns,
        len(rows),
        tuple(UsableRow(row.number, row.texts, row.messages, row.chat_template_kwargs) for row in kept),
        skipped,
    )


def _assumptions(table: Table, file: CheckedFile) -> list[Finding]:
    """Report how the file was read, if that wasn't obvious."""
    if not table.notes:
        return []
    columns = f"{setting('prompt_column')}, {setting('chosen_column')} and {setting('rejected_column')}"
    fix = f"If that is wrong, name the columns with {columns}"
    return [Finding("read-as", "info", file.name, f"Read as follows: {'; '.join(table.notes)}", fix)]


def _without_answers(file: CheckedFile, columns: ColumnConfig) -> list[Finding]:
    if file.noun == "pair":
        return []
    _, chosen, rejected = columns.column_names.values()
    message = f"No columns {chosen!r} and {rejected!r}, so the file was checked as prompts"
    fix = f"If it has answers, name their columns with {setting('chosen_column')} and {setting('rejected_column')}"
    return [Finding("prompts-only", "info", file.name, message, fix)]


def _lengths(files: Sequence[CheckedFile], model: str, config: LintConfig) -> list[Finding]:
    """Find rows that training would truncate or skip."""
    # Imported here because only this check needs torch.
    from reinforcepp.models.loading import context_length, load_config, load_tokenizer

    tokenizer = load_tokenizer(model)
    context = context_length(load_config(model))
    limit = min(config.max_length or DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    prompt_limit = config.max_prompt_length or context or DEFAULT_MAX_LENGTH
    name = "max_prompt_length" if config.max_prompt_length else "the context of"
    found = []
    for file in files:
        long_prompts, long_pairs, longest = _measure(file, tokenizer, prompt_limit, limit)
        over = f"over {name} {prompt_limit} in tokens of {model}"
        fix = "Shorten them or raise max_prompt_length, because training drops their oldest turns or the start of their text"
        found += _too_long(file, "long-prompt", "prompt", long_prompts, over, fix)
        over = f"over max_length {limit} in tokens of {model}, the longest with {longest}"
        fix = "Shorten them, or raise max_length up to the model's context, because reward training skips them"
        found += _too_long(file, "long-pair", "pair", long_pairs, over, fix)
    return found


def _measure(
    file: CheckedFile, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, max_length: int
) -> tuple[list[RowId], list[RowId], int]:
    """Return the rows of too long prompts and pairs, and the number of tokens of the longest pair."""
    from reinforcepp.models.tokenization import Answers, count_tokens

    long_prompts: list[RowId] = []
    long_pairs: list[RowId] = []
    longest = 0
    with reading_progress(len(file.rows) >= PROGRESS_ROWS, "tokenizing") as report:
        for start in range(0, len(file.rows), BATCH_ROWS):
            batch = file.rows[start : start + BATCH_ROWS]
            answers = [Answers(row.conversation, row.texts[1:], row.chat_template_kwargs) for row in batch]
            lengths = list(zip(batch, count_tokens(tokenizer, answers), strict=True))
            long_prompts += [row.row for row, (prompt, _) in lengths if prompt > max_prompt_length]
            long_pairs += [row.row for row, (_, pair) in lengths if pair > max_length]
            longest = max(longest, *(pair for _, (_, pair) in lengths))
            report((start + len(batch)) / len(file.rows))
    return long_prompts, long_pairs, longest


def _too_long(file: CheckedFile, rule: str, noun: str, rows: Sequence[RowId], over: str, fix: str) -> list[Finding]:
    if not rows:
        return []
    message = f"{count_with_verb(len(rows), noun, 'is', 'are')} {over} ({list_rows(rows)})"
    return [Finding(rule, "warning", file.name, message, fix, tuple(rows))]
