"""The process and its surroundings: launcher, installed versions, asynchronous work, the Hugging Face Hub. Loads no torch."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies


def started() -> int:
    """How many processes do this job together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the one that writes files and talks to the user."""
    return started() == 1 or int(os.environ.get("RANK") or 0) == 0


def is_first_here() -> bool:
    """Whether this is the first of the processes on its machine: it tells what can't be agreed on with other machines."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


_version = cache(version)  # each reads and parses a file, and every checkpoint asks for ten of them


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``packages`` that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = _version(package)
    return found


def own_version() -> str:
    """Of this package, here; nothing where it is used without being installed."""
    return versions_of(["reinforcepp"]).get("reinforcepp", "")


T = TypeVar("T")


def outcome(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, when it is done."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as other:  # a loop that runs can't be waited for from within
        return other.submit(asyncio.run, work).result()


def look_for_hub() -> None:
    """Go offline if the hub can't be reached: its library would retry every file for half a minute.

    What was fetched before still loads then. Behind a proxy a look of our own says nothing.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
