"""The rules, one function each: a sheet in, findings out. All but the first look at usable rows only."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from reinforcepp.commands.lint.damage import cleaned, has_controls, lost_at, mended
from reinforcepp.commands.lint.findings import (
    Entry,
    Finding,
    Severity,
    Sheet,
    examples,
    excerpt,
    first_few,
    named,
    several,
)
from reinforcepp.commands.lint.similar import across, near_duplicates
from reinforcepp.data import Skipped, contradictions_in, count, split_by_prompt, words
from reinforcepp.types import Preference, RowId

ENOUGH, LEAST = 20, 2  # usable rows
REPEATED_WORDS = 4  # a shorter prompt occurs in an answer by chance
BIASED, SURE = 0.7, 0.01  # share of pairs in which one side is the longer one, and the p-value it takes
FEW_LETTERS = 8  # say nothing about the language
TOLERATED = 0.1  # share of rows that resemble another, as in data made from templates
MIXED = 0.25  # a larger share of rows in another script is meant to be there
SIGNS = {"MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SCRIPT", "FEMININE", "MASCULINE", "MICRO", "OHM", "KELVIN"}
EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"}


def check_sheet(sheet: Sheet, near_duplicate: float) -> list[Finding]:
    """What every rule finds that needs no more than one file."""
    found = [*left_out(sheet), *contradictions(sheet), *near_duplicate_rows(sheet, near_duplicate)]
    for rule in (damaged_text, control_characters, lost_characters, other_script, repeated_prompts, length_bias):
        found += rule(sheet)
    return [*found, *too_little(sheet)]


# --- rows that say nothing, or the same, or the opposite ----------------------------------------------------------------


def left_out(sheet: Sheet) -> list[Finding]:
    """Empty cells, chosen equal to rejected, other shapes, exact duplicates: the rows that training leaves out."""
    same = f"with {' equal to '.join(sheet.columns[1:])}"
    empty = [each for each in sheet.skipped if each.reason.startswith("empty ")]
    equal = [each for each in sheet.skipped if each.reason == same]
    other = [each for each in sheet.skipped if each.reason.startswith("with ") and each.reason != same]
    again = [each for each in sheet.skipped if each.duplicate_of is not None]
    found = []
    if empty:
        cells = first_few(f"{each.reason.removeprefix('empty ')} in row {each.row}" for each in empty)
        found.append(_skip("empty", "error", sheet, empty, f"an empty cell ({cells})", "fill it in or remove the row"))
    if equal:
        what = f"{' equal to '.join(sheet.columns[1:])} ({named(_rows(equal))})"
        found.append(_skip("equal", "error", sheet, equal, what, "remove them, or correct the answer that was copied"))
    if other:
        cells = first_few(f"{each.reason.removeprefix('with ')} in row {each.row}" for each in other)
        cure = "bring them into the shape of a prompt and two answers, or remove them"
        found.append(_skip("shape", "error", sheet, other, f"another shape ({cells})", cure))
    if again:
        shown = first_few(f"{each.row} as {each.duplicate_of}" for each in again)
        message = f"{several(len(again), 'row', 'says', 'say')} the same as an earlier row ({shown})"
        pairs = tuple((each.row, each.duplicate_of) for each in again if each.duplicate_of is not None)
        found.append(
            Finding("duplicate", "warning", sheet.name, message, "remove them", _rows(again), pairs, fixable=True)
        )
    return found


def _skip(rule: str, severity: Severity, sheet: Sheet, skipped: Sequence[Skipped], what: str, cure: str) -> Finding:
    message = f"{several(len(skipped), 'row', 'has', 'have')} {what}"
    return Finding(rule, severity, sheet.name, message, cure, _rows(skipped), fixable=True)


def _rows(skipped: Iterable[Skipped]) -> tuple[RowId, ...]:
    return tuple(each.row for each in skipped)


def contradicting(sheet: Sheet) -> tuple[tuple[RowId, RowId], ...]:
    """The rows of each two pairs that prefer the same two answers in opposite ways."""
    if sheet.noun == "prompt":
        return ()
    pairs = tuple(Preference(e.texts[0], e.texts[1], e.texts[2], e.row) for e in sheet.entries)
    return contradictions_in(pairs)


def contradictions(sheet: Sheet) -> list[Finding]:
    """The same two answers, preferred both ways."""
    found = contradicting(sheet)
    if not found:
        return []
    shown = first_few(f"rows {first} and {second}" for first, second in found)
    message = f"The same two answers to a prompt are preferred both ways, {count(len(found), 'time')} ({shown})"
    involved = {row for pair in found for row in pair}
    rows = tuple(entry.row for entry in sheet.entries if entry.row in involved)
    pairs = tuple((second, first) for first, second in found)
    return [
        Finding(
            "contradiction",
            "error",
            sheet.name,
            message,
            "decide which one is right and remove the other",
            rows=rows,
            pairs=pairs,
            examples=_prompts_of(sheet, rows[:1]),
            fixable=True,
        )
    ]


def near_duplicate_rows(sheet: Sheet, threshold: float) -> list[Finding]:
    """Rows that are nearly an earlier row."""
    matches = near_duplicates([entry.texts for entry in sheet.entries], threshold)
    if not matches:
        return []
    pairs = tuple((sheet.entries[m.place].row, sheet.entries[m.like].row) for m in matches)
    shown = first_few(f"{row} and {like}: {m.similarity:.2f}" for (row, like), m in zip(pairs, matches, strict=True))
    share = several(len(matches), "row", "shares", "share")
    message = f"{share} {threshold:.0%} or more of the three-word runs with an earlier row (rows {shown})"
    rows = tuple(row for row, _ in pairs)
    cure = "keep the better one of each two, for they count as often as they occur"
    severity: Severity = "warning" if len(rows) > TOLERATED * len(sheet.entries) else "info"
    return [Finding("near-duplicate", severity, sheet.name, message, cure, rows, pairs, _prompts_of(sheet, pairs[0]))]


def _prompts_of(sheet: Sheet, rows: Sequence[RowId]) -> tuple[str, ...]:
    return examples((entry.row, entry.prompt) for entry in sheet.entries if entry.row in rows)


# --- damage -------------------------------------------------------------------------------------------------------------


def damaged_text(sheet: Sheet) -> list[Finding]:
    """UTF-8 that was read as another encoding."""
    return _harm(
        sheet,
        "damaged-text",
        lambda text: mended(text) != text,
        "text that was read with the wrong encoding",
        cure="mend it with --fix, and export the file as UTF-8 next time",
    )


def control_characters(sheet: Sheet) -> list[Finding]:
    """Terminal escapes, control characters, byte order marks."""
    return _harm(
        sheet,
        "control-characters",
        lambda text: has_controls(mended(text)),
        "control characters",
        cure="strip them with --fix",
    )


def lost_characters(sheet: Sheet) -> list[Finding]:
    """What can't be mended."""
    return _harm(
        sheet,
        "lost-characters",
        lambda text: lost_at(text) >= 0,
        "characters that an earlier conversion destroyed",
        cure="type them again, or take the text from its origin",
        fixable=False,
    )


def _before_and_after(text: str) -> str:
    better = cleaned(text)
    same = (a == b for a, b in zip(text, better, strict=False))
    place = next((i for i, alike in enumerate(same) if not alike), 0)
    return f"{excerpt(text, place)} -> {excerpt(better, place)}"


def _harm(
    sheet: Sheet,
    rule: str,
    harmed: Callable[[str], bool],
    what: str,
    *,
    cure: str,
    fixable: bool = True,
) -> list[Finding]:
    """One finding for all rows in which a text is ``harmed``; ASCII without control characters never is."""
    hits = [(e.row, text) for e in sheet.entries for text in e.texts if not _plain(text) and harmed(text)]
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _ in hits))
    message = f"{several(len(rows), 'row', 'has', 'have')} {what} ({named(rows)})"
    show = _before_and_after if fixable else lambda text: excerpt(mended(text), lost_at(text))
    shown = tuple(f"row {row}: {show(text)}" for row, text in hits[:3])
    return [Finding(rule, "warning", sheet.name, message, cure, rows, examples=shown, fixable=fixable)]


def _plain(text: str) -> bool:
    return text.isascii() and (text.isprintable() or not has_controls(text))


# --- what the texts say ---------------------------------------------------------------------------------------------------


def other_script(sheet: Sheet) -> list[Finding]:
    """Texts most of whose letters aren't of the script that dominates the file."""
    counted = [(entry.row, text, _scripts(text)) for entry in sheet.entries for text in entry.texts]
    total: Counter[str] = sum((scripts for _, _, scripts in counted), Counter())
    if not total:
        return []
    main, letters = total.most_common(1)[0]
    hits = [
        (row, text)
        for row, text, scripts in counted
        if scripts.total() >= FEW_LETTERS and 2 * scripts[main] < scripts.total()
    ]
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _ in hits))
    message = (
        f"{several(len(rows), 'row', 'has', 'have')} text in another script than {main.title()}, "
        f"that of {letters / total.total():.0%} of the letters ({named(rows)})"
    )
    meant = len(rows) > MIXED * len(sheet.entries)
    cure = "nothing is wrong if the file is meant to mix languages" if meant else "check that they belong in this file"
    return [Finding("script", "info" if meant else "warning", sheet.name, message, cure, rows, (), examples(hits))]


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has."""
    found: Counter[str] = Counter()
    for character, number in Counter(text).items():
        if script := _script(character):
            found[script] += number
    return found


@cache
def _script(character: str) -> str:
    """``LATIN``, ``CYRILLIC``, ...; empty for what is no letter or a sign made of one."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    if first == "FULLWIDTH":
        return "LATIN"
    return "" if first in SIGNS else "EAST ASIAN" if first in EAST_ASIAN else first


def repeated_prompts(sheet: Sheet) -> list[Finding]:
    """Answers that hold the whole prompt again."""
    hits = []
    for entry in sheet.entries:
        prompt = words(entry.prompt)
        asked = f" {' '.join(prompt)} "
        for column, answer in zip(sheet.columns[1:], entry.texts[1:], strict=True):
            said = f" {' '.join(words(answer))} "
            if prompt and (said == asked or (len(prompt) >= REPEATED_WORDS and asked in said)):
                hits.append((entry.row, column, answer))
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _, _ in hits))
    shown = first_few(f"{column} in row {row}" for row, column, _ in hits)
    message = f"{several(len(hits), 'answer', 'repeats', 'repeat')} the prompt ({shown})"
    cure = "cut the prompt off, or the policy learns to say it again"
    found = examples((row, answer) for row, _, answer in hits)
    return [Finding("repeated-prompt", "warning", sheet.name, message, cure, rows, (), found)]


def length_bias(sheet: Sheet) -> list[Finding]:
    """Chosen answers that are longer, or shorter, too often for chance: a reward model learns that first."""
    if sheet.noun == "prompt":
        return []
    differences = [len(chosen) - len(rejected) for _, chosen, rejected in (entry.texts for entry in sheet.entries)]
    longer, unequal = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    if not unequal:
        return []
    share = max(longer, unequal - longer) / unequal
    if share < BIASED or binomial_p(longer, unequal) > SURE:
        return []
    which = "longer" if 2 * longer > unequal else "shorter"
    message = f"{sheet.columns[1]} is the {which} answer in {share:.0%} of {count(unequal, 'pair')} of unequal length"
    cure = f"add pairs in which the {which} answer is worse, or length is what the reward model learns"
    return [Finding("length-bias", "warning", sheet.name, message, cure)]


def binomial_p(successes: int, trials: int) -> float:
    """Two-sided p-value of that many heads of a fair coin: normal approximation with continuity correction."""
    distance = max(0.0, abs(successes - trials / 2) - 0.5)
    return math.erfc(distance / math.sqrt(trials / 2))


def too_little(sheet: Sheet) -> list[Finding]:
    """Less than a training needs, or than can teach anything."""
    usable = len(sheet.entries) - 2 * len(contradicting(sheet))
    if usable >= ENOUGH:
        return []
    least = LEAST if sheet.noun == "pair" else 1
    message = f"{count(usable, f'usable {sheet.noun}')} in all"
    if usable < least:
        return [Finding("too-little", "error", sheet.name, message, f"at least {least} are needed: add rows")]
    cure = f"add rows until there are {ENOUGH} and better hundreds, or no figure will tell anything"
    return [Finding("too-little", "warning", sheet.name, message, cure)]


# --- across the split -----------------------------------------------------------------------------------------------------


def leakage(train: Sheet, heldout: Sheet, threshold: float) -> list[Finding]:
    """Held-out prompts that nearly are a training prompt."""
    known, asked = _distinct(train.entries), _distinct(heldout.entries)
    matches = across([entry.prompt for entry in asked], [entry.prompt for entry in known], threshold)
    if not matches:
        return []
    pairs = tuple((asked[match.place].row, known[match.like].row) for match in matches)
    shown = first_few(f"{row} and {like}: {m.similarity:.2f}" for (row, like), m in zip(pairs, matches, strict=True))
    among = "" if train.name == heldout.name else f" of {train.name}"
    message = (
        f"{len(matches)} of {count(len(asked), 'held-out prompt')} {'resembles' if len(matches) == 1 else 'resemble'} "
        f"a training prompt{among} (rows {shown})"
    )
    cure = "give both one wording, which puts them on one side, or remove one, for held-out figures flatter otherwise"
    first = (asked[matches[0].place], known[matches[0].like])
    shown_prompts = examples((entry.row, entry.prompt) for entry in first)
    rows = tuple(row for row, _ in pairs)
    return [Finding("leakage", "warning", heldout.name, message, cure, rows, pairs, shown_prompts)]


def halves(sheet: Sheet, heldout_fraction: float, seed: int) -> tuple[Sheet, Sheet]:
    """The training and the held-out part of a sheet, as training will split it."""
    parts = split_by_prompt(sheet.entries, heldout_fraction, seed)
    train, heldout = (Sheet(sheet.name, sheet.columns, len(part), tuple(part), ()) for part in parts)
    return train, heldout


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    """The first entry with each prompt."""
    found: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        found.setdefault(tuple(words(entry.prompt)) or (entry.prompt,), entry)
    return list(found.values())
