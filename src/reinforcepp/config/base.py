"""The base of configurations with settings that had another name in an earlier version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reinforcepp.run_dir import RENAMED_SETTINGS, rename_settings


class _AcceptsOldNames(type):
    """Classes whose keyword arguments can have the old names of settings.

    ``dataclass`` writes ``__init__`` after the class exists, so the call of the class is where every subclass can be
    reached without a decorator of its own.
    """

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        return super().__call__(*args, **rename_settings(settings))


class Config(metaclass=_AcceptsOldNames):
    """Base of configurations: accepts the settings in ``RENAMED_SETTINGS`` under their old names, and reads them."""

    if not TYPE_CHECKING:  # a type checker would take every unknown name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Return the setting whose old name is ``name``."""
            if name not in RENAMED_SETTINGS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            return getattr(self, RENAMED_SETTINGS[name])
