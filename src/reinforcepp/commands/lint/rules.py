"""The rules, one function each: a file in, findings out. All rules except the first look at usable rows only."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from reinforcepp.commands.lint.damage import clean_text, find_lost, has_controls, repair_encoding
from reinforcepp.commands.lint.findings import (
    CheckedFile,
    Finding,
    Severity,
    UsableRow,
    count_with_verb,
    examples,
    excerpt,
    first_few,
    list_rows,
    prompt_examples,
)
from reinforcepp.commands.lint.similar import across, near_duplicates
from reinforcepp.data import UNPAIRED, Skipped, contradictions_in, count, split_by_prompt, text_digest, words
from reinforcepp.errors import setting
from reinforcepp.monitoring import PROGRESS_ROWS, reading_progress
from reinforcepp.types import Preference, RowId

MIN_RECOMMENDED_ROWS = 20
MIN_PAIRS = 2
# A shorter prompt occurs in an answer by chance.
MIN_REPEATED_WORDS = 4
# Share of pairs in which the same side is longer, and the p-value, from which a file is length-biased.
LENGTH_BIAS_SHARE, LENGTH_BIAS_P = 0.7, 0.01
# Fewer letters don't identify a language.
MIN_LETTERS = 8
# Data made from templates has up to this share of near-duplicates.
TOLERATED_NEAR_DUPLICATES = 0.1
# If a larger share of rows is in another script, that is probably intended.
MIXED_SCRIPTS_SHARE = 0.25
# First words of the Unicode names of letters that are used as signs.
SIGNS = {"MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SCRIPT", "FEMININE", "MASCULINE", "MICRO", "OHM", "KELVIN"}
EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"}


def check_file(file: CheckedFile, near_duplicate: float) -> list[Finding]:
    """Return the findings of every rule that needs a single file."""
    found = [*skipped_rows(file), *contradictions(file), *near_duplicate_rows(file, near_duplicate)]
    checks = (damaged_text, control_characters, lost_characters, other_script, repeated_prompts, length_bias)
    with reading_progress(len(file.rows) >= PROGRESS_ROWS, "checking texts") as on_progress:
        for number, check in enumerate(checks, 1):
            found += check(file)
            on_progress(number / len(checks))
    return [*found, *too_little(file)]


# --- skipped, contradictory and near-duplicate rows -------------------------------------------------------------------


def skipped_rows(file: CheckedFile) -> list[Finding]:
    """Find the rows that training skips: empty cells, chosen equal to rejected, other shapes, exact duplicates."""
    equal_reason = f"with {' equal to '.join(file.columns[1:])}"
    empty = [each for each in file.skipped if each.reason.startswith("empty ")]
    equal = [each for each in file.skipped if each.reason == equal_reason]
    single = [each for each in file.skipped if each.reason in UNPAIRED]
    other = [
        each
        for each in file.skipped
        if each.reason.startswith("with ") and each.reason not in (equal_reason, *UNPAIRED)
    ]
    repeated = [each for each in file.skipped if each.duplicate_of is not None]
    found = []
    if empty:
        cells = first_few(f"{each.reason.removeprefix('empty ')} in row {each.row}" for each in empty)
        found.append(_skipped("empty", file, empty, f"an empty cell ({cells})", "Fill it in or remove the row"))
    if equal:
        problem = f"{' equal to '.join(file.columns[1:])} ({list_rows(_numbers(equal))})"
        found.append(_skipped("equal", file, equal, problem, "Remove them, or correct the copied answer"))
    if other:
        problems = first_few(f"{each.reason.removeprefix('with ')} in row {each.row}" for each in other)
        fix = "Convert them to one prompt and two answers, or remove them"
        found.append(_skipped("shape", file, other, f"an unusable shape ({problems})", fix))
    if single:
        message = (
            f"{count_with_verb(len(single), 'answer', 'has', 'have')} no answer of the other kind to the same prompt "
            f"({list_rows(_numbers(single))})"
        )
        fix = "Add good or bad answers to the same prompts, because reward training skips these. SFT uses the good ones"
        found.append(Finding("unpaired", "warning", file.name, message, fix, _numbers(single)))
    if repeated:
        listed = first_few(f"{each.row} and {each.duplicate_of}" for each in repeated)
        message = f"{count_with_verb(len(repeated), 'row', 'repeats', 'repeat')} an earlier row (rows {listed})"
        pairs = tuple((each.row, each.duplicate_of) for each in repeated if each.duplicate_of is not None)
        rows = _numbers(repeated)
        found.append(Finding("duplicate", "warning", file.name, message, "Remove them", rows, pairs, fixable=True))
    return found


def _skipped(rule: str, file: CheckedFile, skipped: Sequence[Skipped], problem: str, fix: str) -> Finding:
    message = f"{count_with_verb(len(skipped), 'row', 'has', 'have')} {problem}"
    return Finding(rule, "error", file.name, message, fix, _numbers(skipped), fixable=True)


def _numbers(skipped: Iterable[Skipped]) -> tuple[RowId, ...]:
    return tuple(each.row for each in skipped)


def contradicting_rows(file: CheckedFile) -> tuple[tuple[RowId, RowId], ...]:
    """Return the row numbers of each two pairs that prefer the same two answers in opposite ways."""
    if file.noun == "prompt":
        return ()
    pairs = tuple(
        Preference(prompt, chosen, rejected, row.row, chat_template_kwargs=row.chat_template_kwargs)
        for row in file.rows
        for prompt, chosen, rejected in [row.texts]
    )
    return contradictions_in(pairs)


def contradictions(file: CheckedFile) -> list[Finding]:
    """Find pairs that prefer the same two answers in opposite ways."""
    found = contradicting_rows(file)
    if not found:
        return []
    listed = first_few(f"rows {first} and {second}" for first, second in found)
    message = f"{count_with_verb(len(found), 'pair', 'contradicts', 'contradict')} another pair ({listed})"
    involved = {row for pair in found for row in pair}
    rows = tuple(row.row for row in file.rows if row.row in involved)
    pairs = tuple((second, first) for first, second in found)
    return [
        Finding(
            "contradiction",
            "error",
            file.name,
            message,
            "Decide which one is right and remove the other",
            rows=rows,
            pairs=pairs,
            examples=_prompts_of(file, rows[:1]),
            fixable=True,
        )
    ]


def near_duplicate_rows(file: CheckedFile, threshold: float) -> list[Finding]:
    """Find rows that nearly repeat an earlier row."""
    with reading_progress(len(file.rows) >= PROGRESS_ROWS, "searching near-duplicates") as on_progress:
        matches = near_duplicates([row.texts for row in file.rows], threshold, on_progress)
    if not matches:
        return []
    pairs = tuple((file.rows[m.position].row, file.rows[m.other].row) for m in matches)
    listed = first_few(f"{row} and {other}: {m.similarity:.2f}" for (row, other), m in zip(pairs, matches, strict=True))
    share = count_with_verb(len(matches), "row", "shares", "share")
    message = f"{share} at least {threshold:.0%} of the word 3-grams with an earlier row (rows {listed})"
    rows = tuple(row for row, _ in pairs)
    fix = "Keep the better row of each pair, because repeated rows count several times"
    severity: Severity = "warning" if len(rows) > TOLERATED_NEAR_DUPLICATES * len(file.rows) else "info"
    return [Finding("near-duplicate", severity, file.name, message, fix, rows, pairs, _prompts_of(file, pairs[0]))]


def _prompts_of(file: CheckedFile, rows: Sequence[RowId]) -> tuple[str, ...]:
    return prompt_examples(row for row in file.rows if row.row in rows)


# --- damaged text -----------------------------------------------------------------------------------------------------


def damaged_text(file: CheckedFile) -> list[Finding]:
    """Find UTF-8 text that was decoded with another encoding."""
    return _damage(
        file,
        "damaged-text",
        lambda text: repair_encoding(text) != text,
        "text that was decoded with the wrong encoding",
        fix=f"Repair it with {setting('fix')}, and export the file as UTF-8 next time",
    )


def control_characters(file: CheckedFile) -> list[Finding]:
    """Find terminal escapes, control characters and byte order marks."""
    return _damage(
        file,
        "control-characters",
        lambda text: has_controls(repair_encoding(text)),
        "control characters",
        fix=f"Strip them with {setting('fix')}",
    )


def lost_characters(file: CheckedFile) -> list[Finding]:
    """Find damage that can't be repaired."""
    return _damage(
        file,
        "lost-characters",
        lambda text: find_lost(text) >= 0,
        "characters that an earlier conversion destroyed",
        fix="Type them again, or get the original text",
        fixable=False,
    )


def _damage(
    file: CheckedFile,
    rule: str,
    is_damaged: Callable[[str], bool],
    problem: str,
    *,
    fix: str,
    fixable: bool = True,
) -> list[Finding]:
    """Return one finding for all rows with a damaged text; ASCII without control characters is never damaged."""
    hits = [(row.row, text) for row in file.rows for text in row.texts if not _is_plain(text) and is_damaged(text)]
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _ in hits))
    message = f"{count_with_verb(len(rows), 'row', 'has', 'have')} {problem} ({list_rows(rows)})"
    show = _before_and_after if fixable else lambda text: excerpt(repair_encoding(text), find_lost(text))
    shown = tuple(f"row {row}: {show(text)}" for row, text in hits[:3])
    return [Finding(rule, "warning", file.name, message, fix, rows, examples=shown, fixable=fixable)]


def _before_and_after(text: str) -> str:
    cleaned = clean_text(text)
    equal = (a == b for a, b in zip(text, cleaned, strict=False))
    position = next((i for i, same in enumerate(equal) if not same), 0)
    return f"{excerpt(text, position)} -> {excerpt(cleaned, position)}"


def _is_plain(text: str) -> bool:
    return text.isascii() and (text.isprintable() or not has_controls(text))


# --- content ----------------------------------------------------------------------------------------------------------


def other_script(file: CheckedFile) -> list[Finding]:
    """Find texts whose letters are mostly of another script than the file's main script."""
    total: Counter[str] = Counter()
    # Texts are grouped by the scripts of at least half of their letters, because all counts take more memory than the texts.
    groups: dict[tuple[str, ...], list[tuple[int, RowId, str]]] = {}
    texts = ((row.row, text) for row in file.rows for text in row.texts)
    for position, (row, text) in enumerate(texts):
        scripts = _scripts(text)
        total.update(scripts)
        if (size := scripts.total()) >= MIN_LETTERS:
            frequent = tuple(script for script, number in scripts.items() if 2 * number >= size)
            groups.setdefault(frequent, []).append((position, row, text))
    if not total:
        return []
    main, letters = total.most_common(1)[0]
    others = sorted(each for frequent, group in groups.items() if main not in frequent for each in group)
    hits = [(row, text) for _, row, text in others]
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _ in hits))
    message = (
        f"{count_with_verb(len(rows), 'row', 'has', 'have')} text in another script than {main.title()}, "
        f"the script of {letters / total.total():.0%} of the letters ({list_rows(rows)})"
    )
    intended = len(rows) > MIXED_SCRIPTS_SHARE * len(file.rows)
    fix = "Ignore this if the file mixes languages on purpose" if intended else "Check that they belong in this file"
    return [Finding("script", "info" if intended else "warning", file.name, message, fix, rows, (), examples(hits))]


def _scripts(text: str) -> Counter[str]:
    """Return the number of letters by script."""
    found: Counter[str] = Counter()
    for character, number in Counter(text).items():
        if script := _script(character):
            found[script] += number
    return found


@cache
def _script(character: str) -> str:
    """Return ``LATIN``, ``CYRILLIC`` and so on; "" if the character isn't a letter or is used as a sign."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    if first == "FULLWIDTH":
        return "LATIN"
    return "" if first in SIGNS else "EAST ASIAN" if first in EAST_ASIAN else first


def repeated_prompts(file: CheckedFile) -> list[Finding]:
    """Find answers that contain the whole prompt."""
    hits = []
    for row in file.rows:
        prompt = words(row.prompt)
        prompt_text = f" {' '.join(prompt)} "
        for column, answer in zip(file.columns[1:], row.texts[1:], strict=True):
            answer_text = f" {' '.join(words(answer))} "
            is_long = len(prompt) >= MIN_REPEATED_WORDS
            if prompt and (answer_text == prompt_text or (is_long and prompt_text in answer_text)):
                hits.append((row.row, column, answer))
    if not hits:
        return []
    rows = tuple(dict.fromkeys(row for row, _, _ in hits))
    listed = first_few(f"{column} in row {row}" for row, column, _ in hits)
    message = f"{count_with_verb(len(hits), 'answer', 'repeats', 'repeat')} the prompt ({listed})"
    fix = "Remove the prompt from the answer, or the policy learns to repeat it"
    found = examples((row, answer) for row, _, answer in hits)
    return [Finding("repeated-prompt", "warning", file.name, message, fix, rows, (), found)]


def length_bias(file: CheckedFile) -> list[Finding]:
    """Find out whether chosen answers are longer, or shorter, too often for chance; a reward model learns that first."""
    if file.noun == "prompt":
        return []
    differences = [len(chosen) - len(rejected) for _, chosen, rejected in (row.texts for row in file.rows)]
    longer, unequal = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    if not unequal:
        return []
    share = max(longer, unequal - longer) / unequal
    if share < LENGTH_BIAS_SHARE or binomial_p(longer, unequal) > LENGTH_BIAS_P:
        return []
    which = "longer" if 2 * longer > unequal else "shorter"
    message = f"{file.columns[1]} is the {which} answer in {share:.0%} of {count(unequal, 'pair')} of unequal length"
    fix = f"Add pairs in which the {which} answer is worse, or the reward model learns length"
    return [Finding("length-bias", "warning", file.name, message, fix)]


def binomial_p(successes: int, trials: int) -> float:
    """Return the two-sided p-value for a fair coin: normal approximation with continuity correction."""
    distance = max(0.0, abs(successes - trials / 2) - 0.5)
    return math.erfc(distance / math.sqrt(trials / 2))


def too_little(file: CheckedFile) -> list[Finding]:
    """Find out whether the file has fewer rows than training needs, or than is recommended."""
    usable = len(file.rows) - 2 * len(contradicting_rows(file))
    if usable >= MIN_RECOMMENDED_ROWS:
        return []
    minimum = MIN_PAIRS if file.noun == "pair" else 1
    message = f"The file has {count(usable, f'usable {file.noun}')}"
    if usable < minimum:
        return [Finding("too-little", "error", file.name, message, f"Add rows: training needs at least {minimum}")]
    fix = f"Add rows: metrics need at least {MIN_RECOMMENDED_ROWS}, better hundreds"
    return [Finding("too-little", "warning", file.name, message, fix)]


# --- across the split -------------------------------------------------------------------------------------------------


def leakage(train: CheckedFile, heldout: CheckedFile, threshold: float) -> list[Finding]:
    """Find held-out prompts that nearly repeat a training prompt."""
    train_rows, heldout_rows = _distinct(train.rows), _distinct(heldout.rows)
    prompts = ([row.prompt for row in heldout_rows], [row.prompt for row in train_rows])
    with reading_progress(len(heldout_rows) + len(train_rows) >= PROGRESS_ROWS, "searching leakage") as on_progress:
        matches = across(*prompts, threshold, on_progress)
    if not matches:
        return []
    pairs = tuple((heldout_rows[m.position].row, train_rows[m.other].row) for m in matches)
    listed = first_few(f"{row} and {other}: {m.similarity:.2f}" for (row, other), m in zip(pairs, matches, strict=True))
    origin = "" if train.name == heldout.name else f" of {train.name}"
    message = (
        f"{len(matches)} of {count(len(heldout_rows), 'held-out prompt')} "
        f"{'resembles' if len(matches) == 1 else 'resemble'} a training prompt{origin} (rows {listed})"
    )
    fix = "Give both the same wording, which puts them on one side, or remove one. Otherwise held-out metrics are too good"
    first = (heldout_rows[matches[0].position], train_rows[matches[0].other])
    shown = prompt_examples(first)
    rows = tuple(row for row, _ in pairs)
    return [Finding("leakage", "warning", heldout.name, message, fix, rows, pairs, shown)]


def split_file(file: CheckedFile, heldout_fraction: float, seed: int) -> tuple[CheckedFile, CheckedFile]:
    """Split a file into its training and its held-out part, as training does."""
    parts = split_by_prompt(file.rows, heldout_fraction, seed)
    train, heldout = (CheckedFile(file.name, file.columns, len(part), tuple(part), ()) for part in parts)
    return train, heldout


def _distinct(rows: Iterable[UsableRow]) -> list[UsableRow]:
    """Return the first row with each prompt."""
    found: dict[bytes, UsableRow] = {}
    for row in rows:
        found.setdefault(text_digest(*(words(row.prompt) or [row.prompt])), row)
    return list(found.values())
