"""Report words that this project's prose and names avoid, and suggest others.

Run ``python scripts/check_words.py [FILE_OR_FOLDER ...]``; without arguments it checks ``src/``. In Python files it reads
comments, strings, and identifiers; other files are prose as a whole. A comment ``# words: ok`` (``<!-- words: ok -->``)
exempts its line and, after a string of several lines, the whole string.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".md", ".html")
SKIPPED = ("vendor", "__pycache__")
ALLOWED = re.compile(r"(?:#|<!--)\s*words: ok\b")

STEMS = (
    "optim normal token initial serial regular general minim maxim random synchron parallel visual util summar organ "
    "recogn real standard vector quant penal final local cust emphas memor"
)
BANNED = {
    r"told": "report, print, or log; metrics as a name",
    r"(?:left|leaves?|leaving) (?:\S+ )?out": "skip or omit",
    r"what (?:has )?(?:became|becomes?)": "results, outcome",
    r"whoever": "the rank, worker, or user that",
    r"learnt": "trained, learned",
    r"by heart": "overfit, memorized",
    r"(?:runs?|ran|running) off": "diverge",
    r"deal(?:s|t|ing)? (?:\S+ )?out": "dispatch",
    r"(?<!there )(?:is|are) no (?!longer\b|more\b)": "isn't a, doesn't have, or not found",
    r"beside": "next to, in addition to, or compared with",
    rf"(?:re|un|de|pre)?(?:{STEMS.replace(' ', '|')})is(?:e|ed|er|ers|es|ing|ation|ations)": "the American spelling with z",
    r"(?:behavi|col|fav|neighb|hon|lab)our\w*": "the American spelling with -or",
}
PATTERN = re.compile("|".join(rf"(?P<b{i}>\b{banned}(?:\b|(?<= )))" for i, banned in enumerate(BANNED)), re.IGNORECASE)
ADVICE = list(BANNED.values())


class Finding(NamedTuple):
    """A banned word."""

    line: int
    word: str
    advice: str


class Passage:
    """Prose that can span several lines, with runs of white space read as one space."""

    def __init__(self, text: str = "", line: int = 1) -> None:
        self._text = ""
        self._lines: list[int] = []
        self.add(text, line)

    def add(self, text: str, line: int) -> None:
        """Append ``text``, which begins on ``line``."""
        for number, part in enumerate(text.split("\n")):
            words = re.sub(r"\s+", " ", f"\n{part}" if number else part)
            if self._text.endswith(" "):
                words = words.removeprefix(" ")
            self._text += words
            self._lines += [line + number] * len(words)

    def findings(self) -> Iterator[Finding]:
        """Yield the banned words."""
        for match in PATTERN.finditer(self._text):
            group = match.lastgroup
            assert group is not None
            yield Finding(self._lines[match.start()], match[0].strip(), ADVICE[int(group[1:])])


def python_passages(source: str) -> Iterator[Passage]:
    """Yield each identifier, each run of comment lines, and each string, joined if strings follow each other."""
    passage, kind = Passage(), tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.NAME:
            yield Passage(re.sub(r"_+|(?<=[a-z0-9])(?=[A-Z])", " ", token.string), line)
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            if token.type != kind:
                yield passage
                passage, kind = Passage(), token.type
            comment = token.type == tokenize.COMMENT
            passage.add(re.sub("^#+:?", " ", token.string) if comment else _content(token.string), line)
        elif token.type != tokenize.NL:
            kind = tokenize.NEWLINE
    yield passage


def _content(literal: str) -> str:
    """Return the text of a string literal without prefix and quotes."""
    text = literal.lstrip("rRbBfFuU")
    quotes = 3 if text[:3] in ('"""', "'''") else 1
    return text[quotes:-quotes].replace("\\n", "  ")


def allowed_lines(source: str) -> set[int]:
    """Return the lines of Python source that ``# words: ok`` exempts."""
    lines: set[int] = set()
    string = range(0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING:
            string = range(token.start[0], token.end[0] + 1)
        elif token.type == tokenize.COMMENT and ALLOWED.search(token.string):
            lines |= {token.start[0]} | (set(string) if token.start[0] in string else set())
    return lines


def findings_in(path: Path) -> list[Finding]:
    """Return the banned words of a file, by line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        passages, allowed = python_passages(text), allowed_lines(text)
    else:
        passages = iter([Passage(text)])
        allowed = {number for number, line in enumerate(text.split("\n"), 1) if ALLOWED.search(line)}
    found = {finding for passage in passages for finding in passage.findings()}
    return sorted(finding for finding in found if finding.line not in allowed)


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files among ``paths`` and, of folders, those in them that can hold prose."""
    for path in paths:
        if path.is_file():
            yield path
        else:
            for suffix in SUFFIXES:
                yield from (f for f in sorted(path.rglob(f"*{suffix}")) if not set(SKIPPED) & set(f.parts))


def main(arguments: Sequence[str]) -> int:
    """Print each finding as FILE:LINE; returns 1 if there are any."""
    paths = [Path(argument) for argument in arguments] or [ROOT / "src"]
    if missing := [str(path) for path in paths if not path.exists()]:
        print(f"{missing[0]}: No such file or folder.", file=sys.stderr)
        return 2
    count = 0
    for path in files(paths):
        for finding in findings_in(path):
            count += 1
            print(f"{path}:{finding.line}: {finding.word!r}. Use {finding.advice}.")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
