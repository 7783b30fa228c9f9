"""Files and folders that are written completely or not at all, with manifests that detect later changes."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from reinforcepp.errors import ConfigError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
LFS_POINTER = b"version https://git-lfs"
MAX_LFS_POINTER_BYTES = 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON. An interruption leaves either the old file or the complete new file."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_file(path: Path, mode: Literal["x", "xb"] = "x") -> Iterator[Any]:
    """Yield a new file that is flushed to the disk and renamed to ``path`` at the end of the block, or removed on an error.

    Args:
        path: Name of the complete file.
        mode: ``x`` for text in UTF-8, ``xb`` for bytes.
    """
    partial = free_partial(path)
    # Undecodable bytes in a path and half of a surrogate pair in JSON can't be UTF-8. In JSON, the escape has the same value.
    text = {} if mode == "xb" else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with open(partial, mode, **text) as file:  # type: ignore[call-overload]
            yield file
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file. An interruption leaves either the old ``target`` or the complete new one."""
    with open(source, "rb") as original, whole_file(target, "xb") as copied:
        shutil.copyfileobj(original, copied)


def free_partial(path: Path) -> Path:
    """Return the name under which ``path`` is written until it is complete, after deleting a file or folder with that name.

    A killed process can leave one. In a shared folder, another user can place a link there. So create the result
    exclusively, with ``open(..., "x")`` or ``mkdir``: both fail if somebody creates the name again.
    """
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    return partial


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists. A link is deleted, but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def no_link(path: str, flags: int) -> int:
    """Open a file unless it is a link, as the ``opener`` of ``open``, for a predictable name that is written in place."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def check_output_file(name: str, setting: str = "output") -> Path:
    """Return the path of a file that the user names in ``setting``.

    Raises:
        ConfigError: If the file can't be written.
    """
    output = Path(name).expanduser()
    if not name or output.is_dir():
        raise ConfigError(f"{setting} must be the name of a file, not {name or 'empty'!r}.")
    if not output.parent.is_dir():
        raise ConfigError(
            f"{setting}: {name} can't be written, because the folder {output.parent} doesn't exist. Create the folder first."
        )
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"{setting}: {name} can't be written, because you have no permission to write in {output.parent}. Name a file in "
            "another folder."
        )
    return output


def flush(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appearing_folder(final: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to ``final`` at the end of the block, or removed on an error.

    A power failure or a kill can leave a folder whose name ends in ``.partial``.
    """
    partial = free_partial(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        move(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield an :func:`appearing_folder` that gets a manifest and is flushed to the disk before it is renamed."""
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
    """Rename ``source`` to ``target``, and replace an older folder with that name."""
    if target.exists():
        older = free_partial(target.with_name(target.name + ".older"))
        target.rename(older)
        source.rename(target)
        remove(older)
    else:
        source.rename(target)
    flush(target.parent)


def damage(folder: Path, *needed: str) -> str | None:
    """Return a description of the first difference between ``folder`` and its manifest, or None.

    The manifest must name every file, so that none can be added or lost. Hidden files don't count, because file systems
    and desktops create some, and nothing here reads them.

    Args:
        folder: Written by :func:`whole_folder`.
        needed: Patterns of file names; the manifest must name a file for each.
    """
    try:
        if not (folder / MANIFEST).is_file():
            return f"{MANIFEST} is missing"
        described = _plain_json((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        for name, expected in described.items():
            if (path := files.pop(name, None)) is None:
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"the contents of {name} have changed"
        if added := [name for name in files if name != MANIFEST and not any(map(_is_hidden, Path(name).parts))]:
            return f"{added[0]} isn't in {MANIFEST}"
        if lost := [pattern for pattern in needed if not fnmatch.filter(described, pattern)]:
            return f"{lost[0]} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _plain_json(text: str) -> Any:
    """Return the value of ``text``; a name that occurs twice in an object is an error, because readers differ on it."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=object_of)


def lfs_pointer(folder: Path) -> str | None:
    """Return the name of a file in ``folder`` that is a Git LFS pointer instead of the file itself, or None."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size < MAX_LFS_POINTER_BYTES and path.read_bytes().startswith(LFS_POINTER):
            return path.name
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Convert the safetensors error for a full disk to the OSError of the system."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        for code in DISK_FULL:
            if f"os error {code})" in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise
