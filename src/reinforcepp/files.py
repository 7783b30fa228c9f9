"""Files that are whole or absent, and the proof that they still are what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from reinforcepp.errors import ConfigError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old or the new one, never half of it."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to fill: at the end of the block it is on the disk and takes the name ``path``, or nothing does."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def check_output_file(name: str, setting: str = "output") -> Path:
    """The path of a file that the user names in ``setting``; a ConfigError if it can't be written there."""
    output = Path(name).expanduser()
    if not name or output.is_dir():
        raise ConfigError(f"{setting} must be the name of a file, not {name or 'empty'!r}.")
    if not output.parent.is_dir():
        raise ConfigError(f"{name} can't be written: there is no folder {output.parent}; create it first.")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"{name} can't be written: there is no permission to write in {output.parent}.")
    return output


def flush(path: Path) -> None:
    """Return when a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appearing_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``final`` at the end of the block.

    Whatever happens before leaves nothing but, after a power cut or a kill, a folder with another name.
    """
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An :func:`appearing_folder` that gets a manifest and is on the disk before it appears."""
    with appearing_folder(final) as partial:
        yield partial
        inside = sorted(partial.rglob("*"))
        paths = [path for path in inside if path.is_file()]
        described = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in paths
        }
        write_json(partial / MANIFEST, {"files": described})
        for path in [*inside, partial]:
            flush(path)


def move(source: Path, target: Path) -> None:
    """Give a folder another name, that of an older folder included."""
    if target.exists():
        older = target.with_name(target.name + ".older" + PARTIAL)
        shutil.rmtree(older, ignore_errors=True)
        target.rename(older)
        source.rename(target)
        shutil.rmtree(older)
    else:
        source.rename(target)
    flush(target.parent)


def damage(folder: Path) -> str | None:
    """What differs between ``folder`` and its manifest, in words; None if nothing does."""
    try:
        described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in described.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"the contents of {name} have changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return None


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the safetensors library raises when the disk is full, as the system's own error."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        for code in DISK_FULL:
            if f"os error {code})" in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise
