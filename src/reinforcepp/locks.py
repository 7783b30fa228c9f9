"""Locks that keep two processes from writing the same output. Loads no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from reinforcepp.errors import ConfigError
from reinforcepp.files import no_link
from reinforcepp.runtime.terminal import WARNING, echo

if TYPE_CHECKING:
    from filelock import BaseFileLock

RUN_LOCK = "run.lock"
"""File in an output folder that exists while a process writes the folder, or after that process was killed."""
WAIT_SECONDS = 0.5
"""Longer than another process holds a lock only to check it."""


class OutputLock:
    """The lock of an output; ``with`` holds it for a block.

    The operating system releases the lock when its process ends, also if the process is killed. The lock file names the
    process and its host for the error message of the next one, and is deleted at the end.

    Args:
        path: The lock file.
        output: The folder or file that it protects.
        setting: The setting that names the output.
    """

    def __init__(self, path: Path, output: Path, setting: str) -> None:
        self.path, self.output, self.setting = path, output, setting
        self._lock: BaseFileLock | None = None
        self._new_folders: list[Path] = []

    def acquire(self) -> OutputLock:
        """Take the lock, unless this object holds it already.

        Raises:
            ConfigError: If another process holds it.
        """
        if self._lock is not None:
            return self
        from filelock import FileLock, Timeout  # takes a tenth of a second

        folder = self.path.parent
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path, timeout=WAIT_SECONDS, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.setting}: {self.output} is being written by another process{_holder(self.path)}. Wait until it ends, "
                f"or give another {self.setting}."
            ) from None
        except OSError as error:
            if not os.access(folder, os.W_OK):
                raise
            echo(
                f"{self.setting}: {self.output} can't be locked ({error.strerror}). Make sure that no other process writes "
                "it.",
                WARNING,
            )
            return self
        self._lock = lock
        with open(self.path, "w", encoding="utf-8", opener=no_link) as file:
            file.write(f"{os.getpid()} {socket.gethostname()}\n")
        return self

    def release(self) -> None:
        """Delete the lock file, and the folders that were made for it if they are empty, and release the lock."""
        if self._lock is None:
            return
        self.path.unlink(missing_ok=True)  # before the release, so that it can't be the file of the next process
        self._lock.release()
        self._lock = None
        for folder in self._new_folders:
            if not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()

    def __enter__(self) -> OutputLock:
        """Take the lock."""
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock."""
        self.release()


def folder_lock(folder: Path, setting: str = "output_dir") -> OutputLock:
    """Return the lock of a folder, whose lock file is in the folder."""
    return OutputLock(folder / RUN_LOCK, folder, setting)


def file_lock(output: Path, setting: str = "output") -> OutputLock:
    """Return the lock of a file, or of a folder that appears when it is complete; the lock file is next to it."""
    return OutputLock(output.with_name(output.name + ".lock"), output, setting)


def check_unlocked(folder: Path, setting: str = "output_dir") -> None:
    """Check that no process writes ``folder``; change nothing, except for deleting the lock file of a killed process.

    Raises:
        ConfigError: If a process does.
    """
    if (folder / RUN_LOCK).is_file() and os.access(folder, os.W_OK):
        folder_lock(folder, setting).acquire().release()


def _holder(path: Path) -> str:
    """Return the process and host in a lock file, for an error message."""
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # The process is just writing it.
        return ""
    return f" (process {process} on {host})"
