"""The ``reinforcepp`` command: parse, call, exit code. The settings are checked before torch is loaded."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import FrameType, NoneType
from typing import Any

from reinforcepp.commands.table import COMMANDS, Command, split_command
from reinforcepp.config import read_yaml
from reinforcepp.config.aliases import aliases_of, hint, layered, names_of, take_aliases
from reinforcepp.config.foreign_names import foreign_hint
from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.config.shared import DeviceConfig
from reinforcepp.config.values import accepted_values, converted, fields_of
from reinforcepp.errors import ConfigError, ReinforceError, TrainingDiverged, command_line, nearest, with_flags
from reinforcepp.models.devices import choose_device, hide_gpus
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.run_dir import REMOVED_SETTINGS, has_checkpoint
from reinforcepp.runtime.process import is_first_here, is_main
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import guarded_streams, print_at_once, print_error, print_output, warn_once

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
# torch reads these variables when it is loaded. With this spin count, an idle thread waits for work for about 30
# microseconds before it sleeps. The default of several milliseconds multiplies the run time on a busy CPU and saves only
# 10% on an idle one. C++ warnings are hidden because users can't act on them.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "TORCH_CPP_LOG_LEVEL": "ERROR"}
OPTIONAL_VALUE = ("resume",)
"""Flags that can have a value or none."""
NOT_STARTED = "\nInterrupted before anything was started."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for wrong input, 1 for a failure or for problems that were found, and 130 or 143 if a
    signal stopped the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), arguments)


def guarded(job: Callable[[], int], arguments: Sequence[str]) -> int:
    """Run ``job`` with the command line's ``arguments`` and return its exit code; print an expected error as one line."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A terminal that can't show a character must not end the command.
    with command_line(), guarded_streams():
        code = _exit_code(job, arguments)
    if (distributed := sys.modules.get("reinforcepp.distributed.ranks")) is not None:
        distributed.exit_process(code)
    return code


def _exit_code(job: Callable[[], int], arguments: Sequence[str]) -> int:
    try:
        return job()
    except ReinforceError as error:
        names = {name for command in COMMANDS.values() for name in names_of(command.config)}
        _print_failure(f"error: {with_flags(error, names, arguments)}")
        return FAILED if isinstance(error, TrainingDiverged) else USAGE_ERROR
    except FileNotFoundError:
        if not _in_deleted_folder():
            raise
        _print_failure("error: The current folder was deleted. Change to another one, and run the command again.")
        return USAGE_ERROR
    except KeyboardInterrupt:
        if is_main():
            print_error(NOT_STARTED)
        return INTERRUPTED
    except BrokenPipeError:  # The reader of the output, for example head, closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _in_deleted_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print_output(_usage())
        return 0 if arguments else USAGE_ERROR
    name, rest = split_command(arguments)
    if name == "--version":
        print_output(f"reinforcepp {import_module('reinforcepp').__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"Command {name!r} not found.{nearest(name, COMMANDS)} See reinforcepp --help.")
    return run(name, parse(name, rest))


def parse(name: str, arguments: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration of the command ``name``.

    Flags override the file of ``--config``, which overrides ``defaults``.
    """
    import tyro

    command = COMMANDS[name]
    config_class = command.config
    rest, aliases = take_aliases(config_class, arguments)
    flags, path = _take_config_flag(_with_values(rest))
    flags = _checked(config_class, flags)
    given = dict.fromkeys(name for name in accepted_values(config_class) if _is_given(name, flags)) | aliases
    values = dict(defaults or {}) | (read_yaml(path, config_class) if path is not None else {})
    values = layered(config_class, values, given)
    aliases = {alias: values.pop(alias) for alias in aliases_of(config_class) if alias in values}
    every = {field.name: field for field in fields_of(config_class)}
    # tyro would print the errors of our checks in a box, so it fills a class without checks.
    unchecked = type(
        config_class.__name__, (config_class,), {"__post_init__": lambda self: None, "__dataclass_fields__": every}
    )
    parsed: tuple[Any, list[str]] = tyro.cli(
        unchecked,
        args=_as_flags(values) + flags,
        prog=f"reinforcepp {name}",
        description=_description(command),
        use_underscores=True,
        return_unknown_args=True,
    )
    settings, unknown = vars(parsed[0]), parsed[1]
    # A positional argument of tyro can't also be a flag, but each of these settings is both.
    for setting in command.positional:
        if unknown and not unknown[0].startswith("-") and not _is_given(setting, flags):
            several = isinstance(settings[setting], tuple)
            words = list(takewhile(lambda word: not word.startswith("-"), unknown)) if several else unknown[:1]
            settings[setting] = tuple(words) if several else words[0]
            unknown = unknown[len(words) :]
    if unknown:
        raise ConfigError(f"{about_unknown(unknown[0], names_of(config_class))} See reinforcepp {name} --help.")
    _warn_about_secrets(arguments)
    unset = {n for n, value in settings.items() if value == getattr(config_class, n) and n not in given | values}
    return config_class(**{n: value for n, value in settings.items() if n not in unset}, **aliases)


def _warn_about_secrets(arguments: Iterable[str]) -> None:
    """Print a warning if an argument holds a secret: every user of the node can read the command line."""
    for argument in arguments:
        if (shown := redacted(argument)) != argument and is_first_here():
            warn_once(
                f"{shown}: every user of this node can read a secret in the command line. For a reward server, use the "
                f"environment variable {TOKEN_VARIABLE}. Otherwise write the setting into a YAML file: --config FILE."
            )


def _description(command: Command) -> str:
    summary = (command.config.__doc__ or "").partition("\n\n")[0]
    text = f"{summary} Every setting can also be in a YAML file: --config FILE."
    if command.positional:
        words = " ".join(f"[{setting.upper()}]" for setting in command.positional)
        text += f" Without flags: reinforcepp {command.name} {words}."
    return text


def _is_given(name: str, flags: Iterable[str]) -> bool:
    return any(flag.partition("=")[0].replace("-", "_") in (f"__{name}", f"__no_{name}") for flag in flags)


def about_unknown(argument: str, known: Iterable[str]) -> str:
    """Return the problem and the fix for an ``argument`` that isn't a flag in ``known``."""
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    if not argument.startswith("-") and not foreign_hint(name):
        return (
            f"{argument!r} doesn't belong to a setting. Write --SETTING VALUE, with quotes around a value with spaces."
        )
    if name in REMOVED_SETTINGS:
        return f"--{name}: {REMOVED_SETTINGS[name]}"
    commands = [command.name for command in COMMANDS.values() if name in names_of(command.config)]
    if commands and not foreign_hint(name):
        return f"Setting --{name} not found. It is a setting of {', '.join(commands)}."
    return f"Setting --{name} not found.{hint(name, known, prefix='--')}"


def run(name: str, config: Any) -> int:
    """Run the command ``name`` and return its exit code. Heavy libraries are loaded here, not earlier."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # On a CPU, bitsandbytes recommends more packages.
    computes = isinstance(config, DeviceConfig) and config.uses_this_node
    with _exit_on_interrupt():
        if computes and config.use_cpu:
            hide_gpus()  # Some libraries look for GPUs when they are loaded.
        function = COMMANDS[name].load(config)
        if computes:
            choose_device(config.use_cpu)
    try:
        result = function(config)
    except ReinforceError as error:
        error.given = tuple(_texts(vars(config).values()))
        raise
    except KeyboardInterrupt as interrupt:
        reason = f" {interrupt}" if str(interrupt) else ""
        if is_main():
            print_error(f"\nInterrupted{reason}. {_next_step(config)}")
        return getattr(interrupt, "exit_code", INTERRUPTED)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or not error.strerror:
            raise
        path = f" ({error.filename})" if error.filename else ""
        _print_failure(f"error: {error.strerror}{path}. Files saved earlier are intact.")
        return USAGE_ERROR
    return result if isinstance(result, int) else 0


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple | list):
            yield from _texts(value)


def _print_failure(text: str) -> None:
    """Print an error once, even if several ranks run: until the ranks have joined, all of them see the same error."""
    distributed = sys.modules.get("reinforcepp.distributed.ranks")
    if distributed is not None:
        distributed.report_failure(text)
    elif is_main():
        print_error(text)


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """End the process at once on Ctrl-C.

    An exception in the middle of an import could get lost and leave a library half loaded, to fail later.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if is_main():
            print_at_once(NOT_STARTED)
        os._exit(INTERRUPTED)

    with handle_signals(leave, signal.SIGINT):
        yield


def _next_step(config: Any) -> str:
    folder = Path(getattr(config, "output_dir", "")).expanduser()
    if hasattr(config, "resume") and has_checkpoint(folder):
        instead = " instead of --overwrite" if config.overwrite else ""
        return f"Saved a checkpoint in {folder}. To resume, run the same command with --resume{instead}."
    has_files = hasattr(config, "output_dir") and folder.is_dir() and any(folder.iterdir())
    return "Nothing was saved. To start over, run the same command again" + (" with --overwrite." if has_files else ".")


def _take_config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
        elif (path := value if equals else next(remaining, None)) is None:
            raise ConfigError("--config: the name of a YAML file is missing. Write --config FILE.")
    return rest, path


def _with_values(arguments: list[str]) -> list[str]:
    """Return ``arguments`` with ``--resume`` alone as ``--resume=True``, so that every such flag has a value."""
    complete = list(arguments)
    for index, argument in enumerate(arguments):
        name = argument.removeprefix("--")
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if argument.startswith("--no_") and (plain := name.removeprefix("no_")) in OPTIONAL_VALUE:
            complete[index] = f"--{plain}=False"
        elif argument.startswith("--") and name in OPTIONAL_VALUE and following.startswith("--"):
            complete[index] = f"{argument}=True"
    return complete


def _checked(config_class: type, flags: Sequence[str]) -> list[str]:
    """Return ``flags`` with numbers as tyro reads them (1e6 in digits, none as None), after checking numbers and choices.

    Messages of tyro show its types instead of the problem.

    Raises:
        ConfigError: If a value isn't a number, or isn't one of the choices.
    """
    complete, known = list(flags), accepted_values(config_class)
    for index, argument in enumerate(flags):
        flag, equals, word = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not equals:
            word = flags[index + 1] if index + 1 < len(flags) else "--"
        if not flag.startswith("--") or word.startswith("--") or name not in known:
            continue
        kinds = known[name]
        if kinds.kinds & {bool, tuple} or not (kinds.choices or kinds.kinds & {int, float}):
            continue
        none = word.lower() == "none" and NoneType in kinds.kinds and word not in kinds.choices
        value = None if none else converted(name, word, kinds)
        if value is None or (isinstance(value, int) and not word.isdigit()):
            complete[index if equals else index + 1] = f"{flag}={value}" if equals else str(value)
    return complete


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if key in OPTIONAL_VALUE:
            flags.append(f"--{key}={value}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _usage() -> str:
    commands = "\n".join(f"  {command.name:19} {command.help}" for command in COMMANDS.values())
    return (
        "usage: reinforcepp COMMAND [--config FILE.yaml] [--SETTING VALUE ...]\n\n"
        "From a CSV of human preferences to an aligned language model, with REINFORCE++.\n\n"
        f"commands:\n{commands}\n\nSettings and defaults of a command: reinforcepp COMMAND --help"
    )
