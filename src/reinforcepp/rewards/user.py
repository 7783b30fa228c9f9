"""Reward functions out of the user's own Python: ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from reinforcepp.errors import ConfigError, ReinforceError, nearest
from reinforcepp.files import sha256
from reinforcepp.rewards.functions import RewardFunction, reward_error


def load_function(source: str) -> RewardFunction:
    """The function that ``source`` names. This runs the module, as importing it does.

    Raises:
        ConfigError: if there is no such module or function.
        RewardError: if the module raises an exception.
    """
    where, _, name = source.rpartition(":")
    module = _loaded(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "holds no function" if function is None else "holds something that can't be called as"
        raise ConfigError(f"{where} {what} {name!r}.{nearest(name, there)}")
    return function


def source_digest(source: str) -> str:
    """``source`` and what its code is now, in one word, so that a resumed run notices a change."""
    file = getattr(_loaded(source.rpartition(":")[0]), "__file__", None)
    return f"{source}@{sha256(Path(file))[:16]}" if file is not None else source


def _loaded(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _of_file(Path(where).expanduser())
    _look_in(Path.cwd())
    try:
        return import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):  # something that the module imports
            raise reward_error(where, error) from error
        raise ConfigError(
            f"There is no Python module {where}, neither in {Path.cwd()} nor installed: give the function as "
            "path/to/file.py:function, or the folder of a reward model that exists."
        ) from error
    except ReinforceError:
        raise
    except Exception as error:  # the user's own code, in which anything may go wrong
        raise reward_error(where, error) from error


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"There is no file {path} to take a reward function from.")
    name = f"reinforcepp_reward_{sha256(path)[:16]}"  # its own name may be that of another module
    if name in sys.modules:
        return sys.modules[name]
    _look_in(path.resolve().parent)  # for what it imports
    spec: Any = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code, in which anything may go wrong
        del sys.modules[name]
        if isinstance(error, ReinforceError):
            raise
        raise reward_error(str(path), error) from error
    return module


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
