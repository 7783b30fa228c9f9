"""Versions of installed packages."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

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
