"""The ``reinforcepp`` command: parse, call, exit code. No torch is loaded before the settings are known to be good."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from reinforcepp.config import VERBS, read_yaml
from reinforcepp.errors import ConfigError, ReinforceError, TrainingDiverged, nearest
from reinforcepp.run_dir import RENAMED_SETTINGS, has_checkpoint, rename_settings
from reinforcepp.runtime import is_main

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
# Read when torch is loaded. An idle thread looks about 30 microseconds for new work before it sleeps: the usual
# milliseconds cost several times the time on a busy CPU, and none at all a tenth on a quiet one. C++ warnings, which no
# user can act on, stay away.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "TORCH_CPP_LOG_LEVEL": "ERROR"}
MAY_STAND_ALONE = ("resume",)  # flags with or without a value
# Settings whose values may stand without their flags, in this order
POSITIONAL = {
    "lint": ("data",),
    "doctor": ("run",),
    "report": ("runs",),
    "compare": ("model_a", "model_b"),
    "recipes": ("action", "name", "file"),
    **dict.fromkeys(("serve-reward", "chat", "serve", "export", "push"), ("model",)),
}
NOT_STARTED = "\nInterrupted before anything was started.\n"

SUMMARY = {
    "sft": "fine-tune a language model on answers or plain text, as a warm-up before the rest",
    "reward": "train a reward model from a preference file",
    "train": "train a policy against it with REINFORCE++",
    "generate": "answer prompts with a trained model",
    "chat": "talk with a trained model on the terminal, and note which answers are better",
    "serve": "serve a trained model with vLLM to OpenAI's clients",
    "export": "write a trained model to a plain folder, with a model card",
    "push": "export a trained model and upload it to the Hugging Face hub",
    "compare": "tell which of two models answers better, with a page to judge for yourself",
    "compare-algorithms": "train with every estimator and compare the outcomes",
    "plan": "tell, before anything is loaded, whether a training fits into memory and how long a step takes",
    "lint": "find what is wrong with a data file, and clean it",
    "doctor": "say in plain words what went wrong in a training",
    "report": "show what became of a training, or of several, on one page",
    "serve-reward": "answer requests for a reward model's scores over HTTP",
    "recipes": "list and copy the configuration files that ship with the package",
    "demo": "the whole job, offline, on the built-in model and data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 wrong input, 1 failed or found fault, 130 or 143 stopped by a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments))


def guarded(job: Callable[[], int]) -> int:
    """Do ``job``; what goes wrong on purpose becomes one line and an exit code instead of a traceback."""
    code = _outcome(job)
    if (distributed := sys.modules.get("reinforcepp.distributed.ranks")) is not None:
        distributed.exit_process(code)
    return code


def _outcome(job: Callable[[], int]) -> int:
    try:
        return job()
    except ReinforceError as error:
        _report_failure(f"error: {error}")
        return FAILED if isinstance(error, TrainingDiverged) else USAGE_ERROR
    except KeyboardInterrupt:
        if is_main():
            print(NOT_STARTED, end="", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else USAGE_ERROR
    verb, *rest = arguments
    if verb == "--version":
        print(f"reinforcepp {import_module('reinforcepp').__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"There is no verb {verb!r}.{nearest(verb, VERBS)} See reinforcepp --help.")
    return run(verb, parse(verb, rest))


def parse(verb: str, arguments: list[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The verb's configuration: flags win over the file that ``--config`` names, and that over ``defaults``."""
    import tyro

    config_class = VERBS[verb]
    flags, path = _take_config_flag(_with_values(_with_current_names(arguments, config_class)))
    values = dict(defaults or {}) | (read_yaml(path, config_class) if path is not None else {})
    # tyro would put the sentences of our checks into a box of its own, so it fills a class that doesn't check yet.
    unchecked = type(config_class.__name__, (config_class,), {"__post_init__": lambda self: None})
    parsed: tuple[Any, list[str]] = tyro.cli(
        unchecked,
        args=_as_flags(values) + flags,
        prog=f"reinforcepp {verb}",
        description=f"{config_class.__doc__} Every setting can also stand in a YAML file: --config FILE.",
        use_underscores=True,
        return_unknown_args=True,
    )
    settings, unknown = vars(parsed[0]), parsed[1]
    for name in POSITIONAL.get(verb, ()):
        if unknown and not unknown[0].startswith("-") and not _is_given(name, flags):
            several = isinstance(settings[name], tuple)
            words = list(takewhile(lambda word: not word.startswith("-"), unknown)) if several else unknown[:1]
            settings[name] = tuple(words) if several else words[0]
            unknown = unknown[len(words) :]
    if unknown:
        raise ConfigError(f"{about_unknown(unknown[0], list(settings))} See reinforcepp {verb} --help.")
    return config_class(**settings)


def _is_given(name: str, flags: Iterable[str]) -> bool:
    return any(flag.partition("=")[0] == f"--{name}" for flag in flags)


def about_unknown(argument: str, known: Iterable[str]) -> str:
    """What is wrong with an ``argument`` that is no flag out of ``known``."""
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no setting: write --SETTING VALUE, and a value with spaces in quotes."
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    return f"There is no setting --{name}.{nearest(f'--{name}', [f'--{flag}' for flag in known])}"


def run(verb: str, config: Any) -> int:
    """Do what ``config`` says; only here are the heavy libraries loaded. An action may name the exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for more packages
    with _exit_on_interrupt():
        from reinforcepp.commands.table import ACTIONS, LOADS

        if verb in LOADS:
            import_module(LOADS[verb])
    try:
        outcome = ACTIONS[verb](config)
    except KeyboardInterrupt as interrupt:
        reason = f" {interrupt}" if str(interrupt) else ""
        if is_main():
            print(f"\nInterrupted{reason}. {_how_to_go_on(config)}", file=sys.stderr)
        return getattr(interrupt, "exit_code", INTERRUPTED)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or not error.strerror:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _report_failure(f"error: {error.strerror}{where}; what was saved before stays as it is.")
        return USAGE_ERROR
    return outcome if isinstance(outcome, int) else 0


def _report_failure(text: str) -> None:
    """Once, where several processes run; before they have met only arguments were looked at, which are the same in all."""
    distributed = sys.modules.get("reinforcepp.distributed.ranks")
    if distributed is not None:
        distributed.report_failure(text)
    elif is_main():
        print(text, file=sys.stderr)


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once.

    As an exception in the middle of an import it may get lost and leave a library half loaded, to fail later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if is_main():
            os.write(2, NOT_STARTED.encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _how_to_go_on(config: Any) -> str:
    folder = Path(getattr(config, "output_dir", "")).expanduser()
    if hasattr(config, "resume") and has_checkpoint(folder):
        instead = " instead of --overwrite" if config.overwrite else ""
        return f"A checkpoint is saved in {folder}; the same command with --resume{instead} goes on from it."
    held = hasattr(config, "output_dir") and folder.is_dir() and any(folder.iterdir())
    return "Nothing was saved; run the same command again to start over" + (", with --overwrite." if held else ".")


def _take_config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
        elif (path := value if equals else next(remaining, None)) is None:
            raise ConfigError("--config needs the name of a YAML file.")
    return rest, path


def _with_current_names(arguments: list[str], config_class: type) -> list[str]:
    """Return ``arguments`` with flags of renamed settings under the current names.

    Raises:
        ConfigError: If a setting is given by its old and its current name.
    """
    current = list(arguments)
    known = {field.name for field in fields(config_class)}
    given: dict[str, bool] = {}
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--"):
            given[name] = True
        if flag.startswith("--") and RENAMED_SETTINGS.get(name) in known:
            current[index] = f"--{RENAMED_SETTINGS[name]}{equals}{value}"
    rename_settings(given, known)
    return current


def _with_values(arguments: list[str]) -> list[str]:
    """``--resume`` without a path as ``--resume=True``, so that every flag that may have a value has one."""
    shown = list(arguments)
    for place, argument in enumerate(arguments):
        name = argument.removeprefix("--")
        after = arguments[place + 1] if place + 1 < len(arguments) else "--"
        if argument.startswith("--no_") and (plain := name.removeprefix("no_")) in MAY_STAND_ALONE:
            shown[place] = f"--{plain}=False"
        elif argument.startswith("--") and name in MAY_STAND_ALONE and after.startswith("--"):
            shown[place] = f"{argument}=True"
    return shown


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if key in MAY_STAND_ALONE:
            flags.append(f"--{key}={value}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _usage() -> str:
    verbs = "\n".join(f"  {verb:19} {text}" for verb, text in SUMMARY.items())
    return (
        "usage: reinforcepp VERB [--config FILE.yaml] [--SETTING VALUE ...]\n\n"
        "From a CSV of human preferences to an aligned language model, with REINFORCE++.\n\n"
        f"verbs:\n{verbs}\n\nreinforcepp VERB --help tells the verb's settings and their defaults."
    )
