"""A data file from its name to the report: reading, the rules, and lengths by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reinforcepp.commands.lint import rules
from reinforcepp.commands.lint.findings import SEVERITIES, Checked, Entry, Finding, Report, Sheet, named, several
from reinforcepp.config import Columns, LintConfig
from reinforcepp.data import ColumnNames, Row, Table, filter_rows, read_table, resolve_data
from reinforcepp.types import RowId


def lint(config: LintConfig) -> Report:
    """Everything that is wrong with ``config.data``.

    Raises:
        ConfigError: Two of the column settings are the same.
        DataError: The file can't be read as a table, or lacks a column.
        ModelError: The model, where one is named, has no tokenizer that can be used.
    """
    files = resolve_data(config.data)
    read = [read_sheet(path, config) for path in (files.train, files.heldout) if path is not None]
    sheets = [sheet for _, sheet in read]
    findings = [finding for table, sheet in read for finding in _guessed(table, sheet)]
    findings += [finding for sheet in sheets for finding in rules.check_sheet(sheet, config.near_duplicate)]
    findings += _without_answers(sheets[0], config)
    train, heldout = sheets if len(sheets) > 1 else rules.halves(sheets[0], config.heldout_fraction, config.seed)
    findings += rules.leakage(train, heldout, config.near_duplicate)
    if config.model is not None:
        findings += _lengths(sheets, config.model, config)
    ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
    checked = tuple(Checked(sheet.name, sheet.noun, sheet.rows, len(sheet.entries)) for sheet in sheets)
    return Report(config.data, checked, tuple(ordered))


def read_sheet(path: Path, columns: Columns) -> tuple[Table, Sheet]:
    """A file as it is and as the rules see it: pairs if it has columns of answers, else prompts alone."""
    table = read_table(path, ColumnNames(*columns.column_names.values()), pairs=None)
    return table, sheet_of(Path(table.source).name, table.rows, table.columns)


def sheet_of(name: str, rows: Sequence[Row], columns: tuple[str, ...]) -> Sheet:
    """The rows as the rules see them."""

    def fault(texts: Sequence[str]) -> str | None:
        return f"with {' equal to '.join(columns[1:])}" if len(texts) > 1 and texts[1] == texts[2] else None

    kept, skipped = filter_rows(rows, columns, fault)
    entries = tuple(Entry(row.number, row.texts) for row in kept)
    return Sheet(name, columns, len(rows), entries, skipped)


def _guessed(table: Table, sheet: Sheet) -> list[Finding]:
    """What reading the file took for granted."""
    if not table.notes:
        return []
    cure = "name the columns with --prompt_column, --chosen_column and --rejected_column if that isn't what is meant"
    return [Finding("read-as", "info", sheet.name, f"Of how this is read: {'; '.join(table.notes)}", cure)]


def _without_answers(sheet: Sheet, columns: Columns) -> list[Finding]:
    if sheet.noun == "pair":
        return []
    _, chosen, rejected = columns.column_names.values()
    message = f"There are no columns {chosen!r} and {rejected!r}, so this was checked as a file of prompts"
    cure = "if it has answers, name their columns with --chosen_column and --rejected_column"
    return [Finding("prompts-only", "info", sheet.name, message, cure)]


def _lengths(sheets: Sequence[Sheet], model: str, config: LintConfig) -> list[Finding]:
    """What training would cut or leave out; here, for once, a tokenizer and with it torch is loaded."""
    from reinforcepp.models.loading import context_length, load_config, load_tokenizer
    from reinforcepp.models.tokenization import encode_example, encode_prompts

    tokenizer = load_tokenizer(model)
    limit = min(config.max_length, context_length(load_config(model)) or config.max_length)
    found = []
    for sheet in sheets:
        _, places = encode_prompts(
            tokenizer, sheet.entries, max_prompt_length=config.max_prompt_length, long_prompts="drop"
        )
        limited = f"over max_prompt_length {config.max_prompt_length} in tokens of {model}"
        cure = "shorten or raise the limit, or training cuts them from the left"
        found += _too_long(sheet, "long-prompt", "prompt", [sheet.entries[i].row for i in places], limited, cure)
        lengths = {
            entry.row: max(
                (len(encode_example(tokenizer, entry.prompt, answer)) for answer in entry.texts[1:]), default=0
            )
            for entry in sheet.entries
        }
        longest = max(lengths.values(), default=0)
        limited = f"over max_length {limit} in tokens of {model}, the longest with {longest}"
        cure = "shorten them or raise max_length as far as the model's context goes, or the reward model won't see them"
        rows = [row for row, length in lengths.items() if length > limit]
        found += _too_long(sheet, "long-pair", "pair", rows, limited, cure)
    return found


def _too_long(sheet: Sheet, rule: str, noun: str, rows: Sequence[RowId], limited: str, cure: str) -> list[Finding]:
    if not rows:
        return []
    message = f"{several(len(rows), noun, 'is', 'are')} {limited} ({named(rows)})"
    return [Finding(rule, "warning", sheet.name, message, cure, tuple(rows))]
