"""The interface of ``reinforce_cli.py``: its modes and flag names, translated to commands of ``reinforcepp``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from reinforcepp.commands import cli
from reinforcepp.commands.table import COMMANDS
from reinforcepp.config.aliases import aliases_of
from reinforcepp.config.values import accepted_values
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.runtime.terminal import print_output

USAGE = "usage: reinforce_cli.py --mode {train_sft,train_reward,train_rlhf,generate} [--FLAG VALUE ...]"

# For each mode: the command, and the flags of this interface with another name in that command.
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "train_sft": ("sft", {"model_name": "model", "data_path": "data", "sft_model_path": "output_dir"}),
    "train_reward": ("reward", {"model_name": "model", "data_path": "data", "reward_model_path": "output_dir"}),
    "train_rlhf": (
        "train",
        {
            "model_name": "model",
            "data_path": "data",
            "reward_model_path": "reward_model",
            "rlhf_model_path": "output_dir",
        },
    ),
    "generate": ("generate", {"rlhf_model_path": "model", "model_name": "model"}),
}
# Defaults of this interface that differ from those of the command, by the names of the command.
DEFAULTS = {
    "train_sft": {"model": "distilgpt2", "data": "example_feedback_diverse.csv", "output_dir": "models/sft_model"},
    "train_reward": {"model": "distilgpt2", "data": "example_feedback_diverse.csv"},
    "train_rlhf": {"model": "distilgpt2", "data": "example_feedback_diverse.csv", "output_dir": "models/rlhf_model"},
    "generate": {"model": "models/rlhf_model"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Translate the flags, run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.guarded(lambda: _dispatch(arguments), arguments)


def _dispatch(arguments: list[str]) -> int:
    mode, rest = _take_mode(arguments)
    if mode is None:
        if {"-h", "--help"} & set(rest):
            print_output(_help())
            return 0
        raise ConfigError(f"--mode is missing. Choose from {', '.join(MODES)}. See reinforce_cli.py --help.")
    if mode not in MODES:
        raise ConfigError(f"--mode: mode {mode!r} not found.{nearest(mode, MODES)} Choose from {', '.join(MODES)}.")
    command = MODES[mode][0]
    return cli.run(command, cli.parse(command, _translate(mode, rest), DEFAULTS[mode]))


def _take_mode(arguments: list[str]) -> tuple[str | None, list[str]]:
    rest, mode = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--mode":
            mode = value if equals else next(remaining, None)
        else:
            rest.append(argument)
    return mode, rest


def _translate(mode: str, arguments: list[str]) -> list[str]:
    """Return the flags under the names of the command.

    Raises:
        ConfigError: If the mode doesn't have a flag. The message uses the flag names of this interface.
    """
    command, names = MODES[mode]
    settings = accepted_values(COMMANDS[command].config)
    known = {*names, *settings, *aliases_of(COMMANDS[command].config), "config", "help"}
    # generate loads the trained model, so the name of its base model is dropped.
    has_trained = any(a.partition("=")[0] == "--rlhf_model_path" for a in arguments)
    translated: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--"):
            translated.append(argument)
        elif name not in known and name.removeprefix("no_") not in known:
            others = [
                other
                for other in MODES
                if name in (*MODES[other][1], *_flags(other), *aliases_of(COMMANDS[MODES[other][0]].config))
            ]
            elsewhere = f" It belongs to {' and '.join(others)}." if others else ""
            raise ConfigError(f"In {mode}: {cli.about_unknown(argument, () if others else known)}{elsewhere}")
        elif mode == "generate" and name == "model_name" and has_trained:
            if not equals:
                next(remaining, None)
        else:
            translated.append(f"--{names.get(name, name)}{equals}{value}")
    return translated


def _flags(mode: str) -> list[str]:
    """Return the flags of a mode under the names of this interface, in the order of the command."""
    command, names = MODES[mode]
    old_names = {target: flag for flag, target in names.items()}
    return [old_names.get(name, name) for name in accepted_values(COMMANDS[command].config)]


def _help() -> str:
    lines = [USAGE, ""]
    for mode, (command, _) in MODES.items():
        flags = " ".join(f"--{flag}" for flag in _flags(mode))
        wrapped = textwrap.fill(flags, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        lines += [f"{mode} (reinforcepp {command}):", wrapped, ""]
    lines.append(
        "To see the settings of a mode, under the names of the reinforcepp command: reinforce_cli.py --mode MODE --help"
    )
    return "\n".join(lines)
