"""Damaged text: decoded with the wrong encoding (mojibake), or with control characters.

The most common damage is UTF-8 decoded as Windows-1252 or Latin-1: ``ü`` becomes ``Ã¼``, an apostrophe ``â€™``. Encoded
back to bytes, such a run of characters is valid UTF-8, which real text hardly ever is. Runs that occur in real text, a
capital letter before a quotation mark (``CAFÉ»``, ``AMANHÃ…``), stay unchanged.
"""

from __future__ import annotations

import re
import unicodedata

REPLACEMENT = "\ufffd"
_KEPT = "\n\t"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_TYPOGRAPHIC = "…‘’‚“”„‹›«»–—"  # noqa: RUF001
_LOST = re.compile(rf"{REPLACEMENT}|ï¿½|â€(?!\w)")
_LATIN_END = 0x180  # Below are the letters and signs of western and central European languages.


def _as_bytes() -> dict[str, int]:
    """Return the byte that each character was decoded from; bytes that Windows-1252 lacks count as Latin-1."""
    table = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        try:
            table[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:
            continue
    return table


_BYTES = _as_bytes()
# Latin-1 has control characters in place of the typographic punctuation of Windows-1252. Escape sequences of terminals
# begin with U+009B, which is therefore not restored.
_PUNCTUATION = {byte: character for character, byte in _BYTES.items() if ord(character) > 0xFF and byte != 0x9B}
_TAIL = "[" + "".join(re.escape(character) for character, byte in _BYTES.items() if byte < 0xC0) + "]"
_SEQUENCE = f"[\xc2-\xdf]{_TAIL}|[\xe0-\xef]{_TAIL}{{2}}|[\xf0-\xf4]{_TAIL}{{3}}"
_RUN = re.compile(f"(?:{_SEQUENCE})+")


def repair_encoding(text: str) -> str:
    """Return ``text`` with every run of mojibake decoded as UTF-8, and the punctuation of Windows-1252."""
    while (repaired := _RUN.sub(_decode_run, text)) != text:
        text = repaired
    return restore_punctuation(text)


def restore_punctuation(text: str) -> str:
    """Return ``text`` with Windows-1252 punctuation that was decoded as Latin-1: U+0092 becomes an apostrophe."""
    return text.translate(_PUNCTUATION) if has_controls(text) else text


def strip_controls(text: str) -> str:
    """Return ``text`` without terminal escapes, control characters and byte order marks; whitespace becomes a space."""
    if not has_controls(text):
        return text
    text = _ESCAPE.sub("", text)
    return "".join(" " if is_control(c) and c.isspace() else c for c in text if not is_control(c) or c.isspace())


def clean_text(text: str) -> str:
    """Return ``text`` with repaired encoding and without control characters; the function is idempotent."""
    while (cleaned := strip_controls(repair_encoding(text))) != text:
        text = cleaned
    return text


def is_control(character: str) -> bool:
    """Return whether a character doesn't belong in a text."""
    return (unicodedata.category(character) == "Cc" and character not in _KEPT) or character == "\ufeff"


def has_controls(text: str) -> bool:
    """Return whether ``text`` has a control character."""
    return any(map(is_control, set(text)))


def find_lost(text: str) -> int:
    """Return the index of the first lost character in the repaired text, -1 if none.

    A lost character shows as a replacement character or as the rest of a byte sequence.
    """
    match = _LOST.search(repair_encoding(text))
    return match.start() if match else -1


def _decode_run(match: re.Match[str]) -> str:
    run = match.group()
    try:
        decoded = bytes(_BYTES[character] for character in run).decode("utf-8")
    except UnicodeDecodeError:
        return run
    return decoded if REPLACEMENT not in decoded and _is_likely(decoded, match) else run


def _is_likely(decoded: str, match: re.Match[str]) -> bool:
    """Return whether ``decoded`` is more likely than the characters in the text."""
    run, text = match.group(), match.string
    if len(decoded) > 1:
        return True
    if len(run) == 2:
        before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
        after_capital = before.isupper() or not (before.islower() or run[0] == "Â")
        is_real = run[1] in _TYPOGRAPHIC and after_capital and not after.isalpha()
        return ord(decoded) < _LATIN_END and not is_real
    return run[0] in "â\xefð"  # First bytes of punctuation and signs, of a byte order mark, and of emoji.
