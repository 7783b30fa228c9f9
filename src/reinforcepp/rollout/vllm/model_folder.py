"""Folders from which vLLM starts, by paths that are equal for equal models. A live model's has no weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from reinforcepp.files import remove, sha256
from reinforcepp.runtime.process import user_cache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@contextmanager
def model_folder(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a folder with ``config`` and ``tokenizer``, in the user's cache under a hash of its files.

    vLLM looks compiled code up by a key that includes the folder's name, so equal models must get the same name. If the
    cache can't be used, the folder is temporary and vLLM compiles again.
    """
    cache = _private_cache()
    with TemporaryDirectory(prefix="reinforcepp-vllm-", dir=cache, ignore_cleanup_errors=True) as new:
        config.save_pretrained(new)
        with _without_last_call(tokenizer):
            tokenizer.save_pretrained(new)
        yield new if cache is None else str(_published(Path(new), cache))


@contextmanager
def stable_path(folder: Path, model: str) -> Iterator[str]:
    """Yield a path of a temporary ``folder`` that is the same for each start with ``model``: a link in the user's cache.

    If the cache can't be used, or another process has the link, this is the path of ``folder``, and vLLM compiles again.
    """
    from filelock import FileLock, Timeout  # takes a tenth of a second

    cache = _private_cache()
    with ExitStack() as held:
        path = folder
        if cache is not None:
            link = cache / f"serve-{hashlib.sha256(model.encode()).hexdigest()[:32]}"
            with suppress(Timeout, OSError):
                held.enter_context(FileLock(link.with_suffix(".lock"), timeout=0))
                link.unlink(missing_ok=True)
                link.symlink_to(folder.absolute())
                held.callback(link.unlink, missing_ok=True)
                path = link
        yield str(path)


@contextmanager
def _without_last_call(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """In this block, ``tokenizer`` has no padding and truncation, which it otherwise saves from its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _private_cache() -> Path | None:
    """Return the cache folder; None if it can't be created, or other users can write to it."""
    cache = user_cache("vllm_models")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.lstat()
    except OSError:  # no home folder
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & 0o022 and not cache.is_symlink()
    return cache if private and os.access(cache, os.W_OK) else None


def _published(new: Path, cache: Path) -> Path:
    """Rename ``new`` to a hash of its files and return that folder, or one with the same files from an earlier start.

    Another process can do the same at the same time; one of them renames its folder, and both use it.
    """
    files = _files(new)
    folder = cache / hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]
    for _ in range(2):
        with suppress(OSError):  # It exists.
            new.rename(folder)
        if _files(folder) == files:
            return folder
        with suppress(OSError):
            remove(folder)  # Its files were changed.
    return new


def _files(folder: Path) -> list[tuple[str, str]]:
    """Return the name and SHA-256 of each file; a link counts as a changed file."""
    paths = [] if folder.is_symlink() else sorted(folder.rglob("*"))
    return [
        (path.relative_to(folder).as_posix(), "link" if path.is_symlink() else sha256(path))
        for path in paths
        if path.is_symlink() or path.is_file()
    ]
