"""The environment of the process: launcher, installed versions, event loop, Hugging Face Hub. Loads no torch."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies


def started() -> int:
    """Return the number of processes of this job."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and prints messages."""
    return started() == 1 or int(os.environ.get("RANK") or 0) == 0


def is_first_here() -> bool:
    """Return whether this is the first process of its node, which reports problems of the node."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


_version = cache(version)  # Each lookup parses a file, and every checkpoint records ten versions.


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package in ``packages`` that is installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = _version(package)
    return found


def own_version() -> str:
    """Return the version of this package, which also runs from a clone without being installed."""
    package = sys.modules["reinforcepp"]  # An import of the package in a module of its root would be a cycle.
    return str(package.__version__)


def python_path() -> str:
    """Return a PYTHONPATH with which a process finds this package, also one started with -P from a clone.

    With -P, -m and -c import no modules of the current folder, which can be that of an untrusted model.
    """
    source = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))


def add_to_path(folder: Path) -> None:
    """Let this process import the modules of ``folder``, before those of other folders."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def hide_unloadable_packages() -> None:
    """Make media packages built for CUDA look uninstalled next to a CPU build of torch. Call it before transformers loads.

    vLLM depends on them, so pip installs them even if torch is a CPU build. They can't load then, and transformers, which uses
    them if they are installed, fails with them ("operator torchvision::nms does not exist"). Text models don't need them.
    """
    versions = versions_of(["torch", *MEDIA_PACKAGES])
    if not versions.get("torch", "").endswith("+cpu"):
        return
    for package in MEDIA_PACKAGES:
        if package in versions and not versions[package].endswith("+cpu") and package not in sys.modules:
            sys.modules[package] = None  # type: ignore[assignment]  # find_spec and import then report it as missing


def user_cache(name: str) -> Path:
    """Return the folder ``name`` for files of this package that the user's later runs reuse.

    ``REINFORCEPP_CACHE`` chooses the folder that it is in; default: ``reinforcepp`` in the user's cache.
    """
    if chosen := os.environ.get("REINFORCEPP_CACHE"):
        return Path(chosen).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reinforcepp" / name


def protect_compiled_code() -> None:
    """Keep the code that torch compiles in the user's cache, unless the user chose a place. Call it before torch compiles.

    The default of torch is a predictable name in the temporary folder. Another user could create it first, with pickles and
    code that torch would load.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = user_cache("torchinductor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home folder
        folder = Path(mkdtemp(prefix="reinforcepp-torchinductor-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this node's own, which no other node can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silence(silent: bool = True) -> Iterator[None]:
    """In this block, print no progress, as a function that returns its results; warnings become Python warnings."""
    before = _silent.set(silent)
    try:
        yield
    finally:
        _silent.reset(before)


def is_silent() -> bool:
    """Return whether this is a block of :func:`silence`."""
    return _silent.get()


T = TypeVar("T")


def outcome(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to completion and return its result, even within a running event loop.

    An exception of a signal handler, such as KeyboardInterrupt, cancels ``work``.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    from anyio.from_thread import start_blocking_portal  # rarely used

    async def run() -> T:
        return await work

    with start_blocking_portal() as portal:  # A running loop can't run another coroutine to completion.
        return portal.call(run)


def look_for_hub() -> None:
    """Go offline if the Hugging Face Hub can't be reached, because its library would retry each file for half a minute.

    Cached files still load. Behind a proxy, a direct connection proves nothing, so the check is skipped.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
