"""Load what users write in Python: reward functions, environments, tools."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from reinforcepp.errors import ConfigError, ReinforceError, RewardError, nearest
from reinforcepp.files import sha256
from reinforcepp.runtime.process import add_to_path

REWARD = "reward function"


def load_object(source: str, what: str = REWARD) -> Callable[..., Any]:
    """Return the function or class that ``MODULE:NAME`` or ``FILE.py:NAME`` names. This imports the module.

    ``what`` it is appears in messages.

    Raises:
        ConfigError: the module or the function doesn't exist.
        RewardError: the module of a reward function raised an exception; a ConfigError for anything else.
    """
    module_name, colon, name = source.rpartition(":")
    if not colon:
        raise ConfigError(f"{what} {source}: give it as module:name or path/to/file.py:name.")
    module = _load_module(module_name, what)
    found = getattr(module, name, None)
    if not callable(found):
        own = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
        available = [key for key, value in own.items() if getattr(value, "__module__", None) == module.__name__]
        problem = f"has no {_kind(what)} {name!r}" if found is None else f"{name!r} can't be called"
        raise ConfigError(f"{module_name}: {problem}.{nearest(name, available)}")
    return found


def source_digest(source: str, what: str = REWARD) -> str:
    """Return ``source`` with a hash of its file, so that a resumed run notices a change."""
    file = getattr(_load_module(source.rpartition(":")[0], what), "__file__", None)
    return f"{source}@{sha256(Path(file))[:16]}" if file is not None else source


def raised(error: BaseException) -> str:
    """Return the file, line and message of an exception of users' code, to follow a verb: `` (a.py, line 3): KeyError: 'x'``."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (frames[-1].filename, frames[-1].lineno) if frames else None
    if isinstance(error, SyntaxError) and error.filename:  # the last frame is in the importer
        place = error.filename, error.lineno
    where = f" ({place[0]}, line {place[1]})" if place else ""
    message = traceback.format_exception_only(error)[-1].strip()
    return f"{where}: {message.rstrip('.')}"


def _kind(what: str) -> str:
    return "function" if what == REWARD else what


def _failed(name: str, what: str, error: Exception) -> ReinforceError:
    failure = RewardError if what == REWARD else ConfigError
    return failure(f"{what.capitalize()} {name}: failed{raised(error)}.")


def _load_module(name: str, what: str) -> ModuleType:
    if name.endswith(".py"):
        return _load_file(Path(name).expanduser(), what)
    add_to_path(Path.cwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # the module imports a missing one
            raise _failed(name, what, error) from error
        other = ", or the folder of a reward model" if what == REWARD else ""
        raise ConfigError(
            f"{name}: Python module not found, neither in {Path.cwd()} nor installed. Give the {_kind(what)} as "
            f"path/to/file.py:{_kind(what)}{other}."
        ) from error
    except ReinforceError:
        raise
    except Exception as error:  # user code can raise anything
        raise _failed(name, what, error) from error


def _load_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        article = "an" if what[0] in "aeiou" else "a"
        raise ConfigError(f"{path}: file not found. Give the path of a Python file with {article} {what}.")
    name = f"reinforcepp_user_{sha256(path)[:16]}"  # the file's own name can hide another module
    if name in sys.modules:
        return sys.modules[name]
    add_to_path(path.resolve().parent)  # for the file's own imports
    spec: Any = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise anything
        del sys.modules[name]
        if isinstance(error, ReinforceError):
            raise
        raise _failed(str(path), what, error) from error
    return module
