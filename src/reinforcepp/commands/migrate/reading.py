"""Read a training of another framework from a script or a YAML file, without running it."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reinforcepp.config.files import parse_yaml
from reinforcepp.errors import ConfigError

Framework = Literal["trl-ppo", "trl-rloo", "trl-grpo", "openrlhf", "verl"]

TITLES: Mapping[Framework, str] = {
    "trl-ppo": "TRL's PPO",
    "trl-rloo": "TRL's RLOO",
    "trl-grpo": "TRL's GRPO",
    "openrlhf": "OpenRLHF",
    "verl": "verl",
}

PROGRAMS: Mapping[str, Framework] = {
    "openrlhf.cli.train_ppo_ray": "openrlhf",
    "verl.trainer.main_ppo": "verl",
    "trl.scripts.rloo": "trl-rloo",
    "trl.scripts.grpo": "trl-grpo",
    "rloo.py": "trl-rloo",
    "grpo.py": "trl-grpo",
    "gspo.py": "trl-grpo",
    "ppo.py": "trl-ppo",
    "ppo_tldr.py": "trl-ppo",
}
"""Frameworks by the module or the script that a command runs."""
SUBCOMMANDS: Mapping[str, Framework] = {"rloo": "trl-rloo", "grpo": "trl-grpo"}
"""Frameworks by the word after ``trl``."""
CLASSES: Mapping[str, Framework] = {"PPO": "trl-ppo", "RLOO": "trl-rloo", "GRPO": "trl-grpo"}
"""Frameworks by the first letters of TRL's classes."""
CLASS = re.compile(rf"({'|'.join(CLASSES)})(Config|Trainer)")
VERL_SECTIONS = ("actor_rollout_ref", "algorithm")
TRAINER_ARGUMENTS = ("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class")
"""First arguments of TRL's trainers, which scripts also give by position."""
LORA_DEFAULTS = {name: ast.Constant(value) for name, value in {"use_peft": True, "r": 8, "lora_alpha": 8}.items()}
"""Arguments that a call of peft's LoraConfig implies."""
PASSED_ON = {"args", "processing_class", "peft_config", "quantization_config", "value_model", "ref_model", "callbacks"}
"""Arguments of trainers that hold other objects of the script, which are read where they are created."""
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}$]*))?\}|(\w+))")
ARRAY = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
ARRAY_OF_WORDS = re.compile(r"(?<!\w)(\w+)=\(((?:[^()]|\$\(\([^()]*\)\))*)\)")
ARITHMETIC = re.compile(r"\$\(\(([^$]*?)\)\)(?!\))")
OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
}
MOST_NESTED = 8
"""Largest number of variables within variables."""
END_OF_COMMAND = re.compile(r"[;|&]+|\d?&?>.*|\)")


@dataclass(frozen=True)
class Training:
    """A training of another framework.

    Attributes:
        framework: The framework, with the method if its settings depend on it.
        given: Values by the framework's names; names in nested sections are joined by dots.
        unread: Names whose values can't be read without running the source, each with the expression.
    """

    framework: Framework
    given: Mapping[str, Any]
    unread: Mapping[str, str]


def read_training(path: Path, framework: Framework | None) -> Training:
    """Return the training in a Python script, a shell script or a YAML file.

    Args:
        path: the file; its suffix is .py, .yaml, .yml, or that of a shell script.
        framework: of a YAML file that doesn't show it.

    Raises:
        ConfigError: the file can't be read, or holds no training of one of the frameworks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8"
        raise ConfigError(f"{path}: can't be read ({reason}). Give a script or a YAML file.") from error
    match path.suffix.lower():
        case ".py":
            found = _from_python(path, text)
        case ".yaml" | ".yml":
            found = _from_yaml(path, text, framework)
        case _:
            found = _from_shell(text)
    if found is None:
        raise ConfigError(
            f"{path}: found no training with TRL (PPO, RLOO, GRPO), OpenRLHF (train_ppo_ray) or verl (main_ppo). Give the file "
            "that starts it."
        )
    return found


# --- Python ---------------------------------------------------------------------------------------------------------


def _from_python(path: Path, text: str) -> Training | None:
    """Return the arguments of the configuration and the trainer of TRL that a script creates.

    A script that reads its settings from flags often shows a command in a text, whose flags are then part of the result.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid Python ({error.msg}). Correct the file.") from error
    nodes = list(ast.walk(tree))
    texts = [node.value.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    documented = _from_shell("\n".join(each for each in texts if isinstance(each, str)))
    framework: Framework | None = None
    arguments: dict[str, ast.expr] = {}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        if found := CLASS.fullmatch(name):
            framework = CLASSES[found[1]]
            order = TRAINER_ARGUMENTS if found[2] == "Trainer" else ("output_dir",)
            arguments |= dict(zip(order, call.args, strict=False))
        if name == "LoraConfig":
            arguments |= LORA_DEFAULTS
        if found or name == "LoraConfig":
            arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if framework is None:
        return documented
    names = _Names(path, nodes)
    given: dict[str, Any] = dict(documented.given) if documented is not None else {}
    unread: dict[str, str] = {}
    for name in arguments.keys() - PASSED_ON:
        try:
            given[name] = names.value(arguments[name])
        except ValueError:
            unread[name] = ast.unparse(arguments[name])
    if names.changes_rows:
        unread["train_dataset.map"] = ""
    return Training(framework, given, {name: text for name, text in unread.items() if name not in given})


class _Names:
    """What the names of a script stand for.

    Args:
        path: of the script.
        nodes: of its syntax tree.
    """

    def __init__(self, path: Path, nodes: Sequence[ast.AST]) -> None:
        self.assigned: dict[str, ast.expr] = {}
        self.functions: dict[str, str] = {}
        """Functions, as the setting ``rewards`` names them: FILE.py:FUNCTION or MODULE:FUNCTION."""
        self.changes_rows = False
        """Whether the script changes the rows of a dataset that it loads."""
        for node in nodes:
            match node:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        # A dataset and its test part are often assigned together.
                        first = target.elts[0] if isinstance(target, ast.Tuple) and target.elts else target
                        if isinstance(first, ast.Name):
                            self.assigned.setdefault(first.id, value)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    self.functions[name] = f"{path}:{name}"
                case ast.ImportFrom(module=str(module), names=imported):
                    self.functions |= {each.asname or each.name: f"{module}:{each.name}" for each in imported}

    def value(self, expression: ast.expr, depth: int = MOST_NESTED) -> Any:
        """Return the value of a literal or of a name for one; of a type, a function or a dataset, its name.

        Raises:
            ValueError: the source doesn't show the value.
        """
        match expression:
            case ast.Name(name) if name in self.functions:
                return self.functions[name]
            case ast.Name(name) if name in self.assigned and depth:
                return self.value(self.assigned[name], depth - 1)
            case ast.Attribute(ast.Name("torch"), name):
                return name
            case ast.List(elements) | ast.Tuple(elements):
                return [self.value(each, depth) for each in elements]
            case ast.Dict(keys, values):
                pairs = zip(keys, values, strict=True)
                return {self.value(key, depth): self.value(each, depth) for key, each in pairs if key is not None}
            case ast.Call(ast.Name("load_dataset"), [name, *_]):
                return self.value(name, depth)
            case ast.Call(ast.Attribute(dataset, "map" | "filter")) if depth:
                self.changes_rows = True
                return self.value(dataset, depth - 1)
        return ast.literal_eval(expression)


# --- shell ------------------------------------------------------------------------------------------------------------


def _from_shell(text: str) -> Training | None:
    """Return the arguments of the command in a shell script that starts a training."""
    text = re.sub(r"^[^\S\n]*#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n", " ", text)
    text = ARRAY_OF_WORDS.sub(lambda found: f"{found[1]}={shlex.quote(' '.join(found[2].split()))}", text)
    variables = {"HOME": "~", "PWD": "."}
    for line in text.splitlines():
        if (start := _program(_words(line))) is not None:
            framework, index = start
            arguments = list(_until_end(_words(_expanded(line, variables))[index:]))
            given = _overrides(arguments) if framework == "verl" else _flags(arguments)
            unread = {name: str(value) for name, value in given.items() if "$" in str(value)}
            return Training(framework, {name: given[name] for name in given if name not in unread}, unread)
        if assigned := re.fullmatch(r"\s*(?:export\s+)?(\w+)=((?!.*\$\([^(]).*)", line):
            variables[assigned[1]] = "".join(_words(_expanded(assigned[2], variables))[:1])
    return None


def _words(line: str) -> list[str]:
    """Return the words of a command, and of one that it quotes; those of a broken one are separated at spaces."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return line.replace('"', " ").split()
    return [part for word in words for part in (_words(word) if " -m " in word else [word])]


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """Return ``text`` with the values of variables that the script sets, of arithmetic, and of ``$HOME`` and ``$(pwd)``."""
    text = text.replace("$(pwd)", ".")
    for _ in range(MOST_NESTED):
        before = text
        text = ARRAY.sub(lambda found: variables.get(found[1], ""), text)
        text = VARIABLE.sub(lambda found: variables.get(found[1] or found[3], found[2] or found[0]), text)
        text = ARITHMETIC.sub(lambda found: _computed(found[1], variables) or found[0], text)
        if text == before:
            break
    return text


def _computed(formula: str, variables: Mapping[str, str]) -> str | None:
    """Return the value of a formula of whole numbers, or None."""
    formula = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), formula)
    try:
        return str(_number(ast.parse(formula.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _number(formula: ast.expr) -> int:
    match formula:
        case ast.Constant(int(value)):
            return value
        case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
            return OPERATIONS[type(operation)](_number(left), _number(right))
    raise ValueError(ast.unparse(formula))


def _program(words: Sequence[str]) -> tuple[Framework, int] | None:
    """Return the framework that a command starts, and the index of its first argument."""
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name in PROGRAMS:
            return PROGRAMS[name], index + 1
        if name == "trl" and index + 1 < len(words) and words[index + 1] in SUBCOMMANDS:
            return SUBCOMMANDS[words[index + 1]], index + 2
    return None


def _until_end(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if END_OF_COMMAND.fullmatch(word):
            return
        if word not in ("$@", "$*"):
            yield word


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of flags: True for one without a value, a list for several values."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(word.rstrip(","))
    typed = {name: [_typed(value) for value in found] for name, found in given.items()}
    return {name: True if not found else found[0] if len(found) == 1 else found for name, found in typed.items()}


def _typed(text: str) -> Any:
    """Return the number or truth value that a text writes, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of Hydra's overrides, ``name=value`` or ``+name=value``."""
    given = (word.lstrip("+").partition("=") for word in words if "=" in word)
    return {name: _yaml(value) for name, _, value in given}


# --- YAML -------------------------------------------------------------------------------------------------------------


def _yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _from_yaml(path: Path, text: str, framework: Framework | None) -> Training | None:
    """Return the settings of a file for TrlParser, or of one for verl, which has sections."""
    try:
        given = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct the file.") from error
    if not isinstance(given, dict):
        return None
    if any(name in given for name in VERL_SECTIONS):
        framework = framework or "verl"
    if framework is None:
        raise ConfigError(
            f"{path}: the settings of TRL's trainers have the same names, so the file doesn't show which one it is for. Add "
            f"--source {', --source '.join(get_args(Framework))}."
        )
    return Training(framework, dict(_flattened(given)) if framework in ("verl", "openrlhf") else given, {})


def _flattened(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
