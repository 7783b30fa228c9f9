"""Versions of installed packages."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``packages`` that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def own_version() -> str:
    """Of this package, here; nothing where it is used without being installed."""
    return versions_of(["reinforcepp"]).get("reinforcepp", "")
