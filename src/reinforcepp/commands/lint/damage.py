"""Text that was harmed on its way: read with the wrong encoding, or full of control characters.

The commonest harm is UTF-8 read as Windows-1252 or Latin-1: ``ü`` comes out as ``Ã¼``, an apostrophe as ``â€™``. Turned
back into bytes, such a run of characters is valid UTF-8, which real text hardly ever is. What real text can be, a
capital before a quotation mark (``CAFÉ»``, ``AMANHÃ…``), is left alone.
"""

from __future__ import annotations

import re
import unicodedata

REPLACEMENT = "\ufffd"
_KEPT = "\n\t"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_TYPOGRAPHIC = "…‘’‚“”„‹›«»–—"  # noqa: RUF001
_LOST = re.compile(rf"{REPLACEMENT}|ï¿½|â€(?!\w)")
_WHOLE_LATIN = 0x180  # below: letters and signs of western and central European languages


def _as_bytes() -> dict[str, int]:
    """The byte that each character may have been read from; the bytes that Windows-1252 lacks are taken as Latin-1."""
    table = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        try:
            table[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:
            continue
    return table


_BYTES = _as_bytes()
_TAIL = "[" + "".join(re.escape(character) for character, byte in _BYTES.items() if byte < 0xC0) + "]"
_SEQUENCE = f"[\xc2-\xdf]{_TAIL}|[\xe0-\xef]{_TAIL}{{2}}|[\xf0-\xf4]{_TAIL}{{3}}"
_RUN = re.compile(f"(?:{_SEQUENCE})+")


def mended(text: str) -> str:
    """``text`` with every run of characters turned back that a round trip shows to be UTF-8 read as something else."""
    while (better := _RUN.sub(_turned_back, text)) != text:
        text = better
    return text


def without_controls(text: str) -> str:
    """``text`` without terminal escapes, control characters and byte order marks; a break of some kind is a space."""
    if not has_controls(text):
        return text
    text = _ESCAPE.sub("", text)
    return "".join(" " if is_control(c) and c.isspace() else c for c in text if not is_control(c) or c.isspace())


def cleaned(text: str) -> str:
    """What a fix makes of a cell: mended, without control characters; cleaning it again changes nothing."""
    while (better := without_controls(mended(text)).strip()) != text:
        text = better
    return text


def is_control(character: str) -> bool:
    """Whether a character has no place in a text."""
    return (unicodedata.category(character) == "Cc" and character not in _KEPT) or character == "\ufeff"


def has_controls(text: str) -> bool:
    """Whether there is such a character."""
    return any(map(is_control, set(text)))


def lost_at(text: str) -> int:
    """Where characters are gone for good, once the text is mended: a replacement character, or the rest of a sequence.

    -1 if none are.
    """
    match = _LOST.search(mended(text))
    return match.start() if match else -1


def _turned_back(match: re.Match[str]) -> str:
    run = match.group()
    try:
        decoded = bytes(_BYTES[character] for character in run).decode("utf-8")
    except UnicodeDecodeError:
        return run
    return decoded if REPLACEMENT not in decoded and _likely(decoded, match) else run


def _likely(decoded: str, match: re.Match[str]) -> bool:
    run, text = match.group(), match.string
    if len(decoded) > 1:
        return True
    if len(run) == 2:
        before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
        could_be_real = before.isupper() or not (before.islower() or run[0] == "Â")
        real = run[1] in _TYPOGRAPHIC and could_be_real and not after.isalpha()
        return ord(decoded) < _WHOLE_LATIN and not real
    return run[0] in "â\xefð"  # punctuation and signs, a byte order mark, emoji
