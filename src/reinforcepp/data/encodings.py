"""Open compressed text files, and name the encoding of a file that isn't UTF-8."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from reinforcepp.config.data_spec import COMPRESSED
from reinforcepp.data.limits import ROW_BYTES, Growth
from reinforcepp.errors import DataError

_SAMPLE_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_TOOLS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Programs that decompress a file, by its extension."""
# Encodings of spreadsheets and editors, the most common first.
_ENCODINGS = (
    "cp1252",
    "gb18030",
    "shift_jis",
    "cp949",
    "big5",
    "euc_jp",
    "cp1251",
    "cp1250",
    "cp1253",
    "cp1254",
    "cp1256",
)


def data_suffix(path: Path) -> str:
    """Return the extension of the format: ``.jsonl`` for ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


class Readable(Protocol):
    """Anything that bytes can be read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, or all that are left."""
        ...


@contextmanager
def open_text_bytes(path: Path) -> Iterator[tuple[Readable, IO[bytes]]]:
    """Yield the uncompressed bytes of a file, and the file itself, whose position shows the progress.

    Raises:
        DataError: A compressed file is damaged, or grows too much.
        OSError: The file can't be read.
    """
    with open(path, "rb") as file:
        try:
            with _decompressed(path.suffix.lower(), file) as stream:
                yield _Counted(path, stream, file) if stream is not file else stream, file
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the compressed file is damaged ({error}). Copy or compress it again.") from error


class _Counted:
    """A decompressed stream that ends with a DataError if it grows far beyond its file."""

    def __init__(self, path: Path, stream: IO[bytes], file: IO[bytes]) -> None:
        tool = _TOOLS[path.suffix.lower()]
        fix = f"If you trust the file, decompress it first with `{tool} -dk {path}`."
        self._stream, self._growth = stream, Growth(path, os.fstat(file.fileno()).st_size, fix)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, or all that are left."""
        found = bytearray()
        while len(found) < size or size < 0:
            wanted = _READ_BYTES if size < 0 else min(_READ_BYTES, size - len(found))
            if not (chunk := self._stream.read(wanted)):
                break
            self._growth.add(len(chunk) + ROW_BYTES * chunk.count(b"\n"))
            found += chunk
        return bytes(found)


def _decompressed(suffix: str, file: IO[bytes]) -> Any:
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".bz2":
        return bz2.open(file)
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


def guess_encoding(data: bytes, position: int) -> str:
    """Return the likely encoding of text that isn't UTF-8, from the bytes around the first invalid one."""
    from charset_normalizer import from_bytes

    start = max(0, data.rfind(b"\n", 0, max(0, position - _SAMPLE_BYTES // 2)) + 1)
    sample = data[start : start + _SAMPLE_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    # Mostly ASCII means a western text: its few other bytes are quotation marks and accents.
    others = sum(byte >= 0x80 for byte in sample)
    western = others < 0.1 * len(sample) and _decodes(sample, "cp1252")
    best = None if western else from_bytes(sample, cp_isolation=list(_ENCODINGS)).best()
    return "cp1252" if western else best.encoding if best is not None else "latin1"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def looks_like_utf16(data: bytes) -> str | None:
    """Return the variant of UTF-16 whose zero bytes are in ``data``, which has no byte order mark; None for others."""
    sample = data[:_SAMPLE_BYTES]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if len(sample) < 8 or max(even, odd) < 0.4 * (len(sample) // 2):
        return None
    return "utf-16be" if even > odd else "utf-16le"
