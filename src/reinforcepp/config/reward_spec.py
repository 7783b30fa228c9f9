"""Parse the setting ``rewards``, for example ``0.5*rule:length?max=200``. Imports no torch and loads nothing.

builtin:judge                        the built-in data's judge
environment                          the sum of the rewards that the environment gave in an episode
reasoning_gym                        the verifiers of reasoning-gym, for data of its tasks; see ``data_spec``
rule:NAME?OPTION=VALUE&...           a rule of ``reward_rules``
judge:MODEL?OPTION=VALUE&...         a language model that scores by a rubric, see ``judge_spec``
http://HOST:PORT/get_reward          a reward server
MODULE:FUNCTION, FILE.py:FUNCTION    a Python function, unless a folder has that name
FOLDER, ORG/NAME                     a reward model; ?output=1, ?outputs=0.7,0.3, ?dtype=bfloat16 or ?load_in_4bit=true
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from reinforcepp.config.data_spec import REASONING_GYM
from reinforcepp.config.judge_spec import PREFIX, parse_judge
from reinforcepp.config.reward_rules import RULES, make_rule
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.runtime.redaction import HIDDEN, SECRET_QUERY, redacted

JUDGE, ENVIRONMENT = "builtin:judge", "environment"
WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.*)", re.DOTALL)
FUNCTION = re.compile(r"(.+):([A-Za-z_]\w*)", re.DOTALL)
TOKEN_VARIABLE = "REINFORCEPP_REWARD_TOKEN"
MODEL_OPTIONS = ("output", "outputs", "dtype", "load_in_4bit")
DTYPES = ("float32", "bfloat16", "float16")

Kind = Literal["builtin", "environment", "reasoning_gym", "judge", "rule", "server", "function", "model"]


@dataclass(frozen=True)
class RewardSource:
    """One term of the reward: ``weight`` times the score of ``target``."""

    kind: Kind
    target: str
    weight: float = 1.0

    @property
    def path(self) -> str | None:
        """The file or folder of the source, if any."""
        if self.kind == "model":
            return parse_model(self.target).name
        if self.kind == "judge":
            return parse_judge(self.target).rubric_file
        module = self.target.rpartition(":")[0]
        return module if self.kind == "function" and module.endswith(".py") else None


@dataclass(frozen=True)
class ModelSource:
    """A reward model's folder or name on the Hugging Face Hub, and how it is used.

    ``output`` is the number or label of the output that is the score. ``outputs`` holds the weight of each output or label in a
    weighted sum; a weight without a label is that of the output at its position.
    """

    name: str
    output: str | None = None
    outputs: tuple[tuple[str | None, float], ...] = ()
    dtype: str | None = None
    load_in_4bit: bool = False


def parse_model(text: str) -> ModelSource:
    """Return the reward model in ``NAME?OPTION=VALUE&OPTION=VALUE``. A folder can have a name with a question mark.

    Raises:
        ConfigError: If an option isn't found or its value isn't valid.
    """
    name, _, query = text.partition("?")
    if not query or Path(text).expanduser().is_dir():
        return ModelSource(text)
    given: dict[str, str] = {}
    for part in query.split("&"):
        option, _, value = part.partition("=")
        if option not in MODEL_OPTIONS:
            raise ConfigError(
                f"{text}: option {option!r} not found, only {', '.join(MODEL_OPTIONS)}.{nearest(option, MODEL_OPTIONS)}"
            )
        if not value or option in given:
            raise ConfigError(f"{text}: option {option} {'is given twice' if value else 'is empty'}. Give one value.")
        given[option] = value
    if "output" in given and "outputs" in given:
        raise ConfigError(f"{text}: output and outputs are both given. Remove one.")
    if (dtype := given.get("dtype")) not in (None, *DTYPES):
        raise ConfigError(f"{text}: dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    in_4bit = given.get("load_in_4bit", "false").lower()
    if in_4bit not in ("true", "false"):
        raise ConfigError(f"{text}: load_in_4bit must be true or false, not {in_4bit!r}.")
    weights = tuple(_output_weight(text, part) for part in given.get("outputs", "").split(",") if "outputs" in given)
    return ModelSource(name, given.get("output"), weights, dtype, in_4bit == "true")


def _output_weight(text: str, part: str) -> tuple[str | None, float]:
    label, colon, number = part.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or (colon and not label):
        raise ConfigError(
            f"{text}: {part!r} isn't a weight. Write one number per output, as in outputs=0.7,0.3, or LABEL:NUMBER."
        )
    return label or None, weight


def _is_model(target: str) -> bool:
    """Return whether ``target`` is a reward model, although it ends as MODULE:FUNCTION does."""
    name, options, _ = target.partition("?")
    is_file = Path(target.rpartition(":")[0]).expanduser().is_file()
    return Path(target).expanduser().is_dir() or Path(name).expanduser().is_dir() or (bool(options) and not is_file)


def parse_source(text: str) -> RewardSource:
    """Return the reward source in ``text``, without reading a file.

    Raises:
        ConfigError: If the text is empty, a rule, a built-in reward or an option doesn't exist, or a URL isn't valid or holds a
            secret.
    """
    weight, target = 1.0, text.strip()
    if found := WEIGHT.fullmatch(target):
        weight, target = float(found[1]), found[2].strip()
    if not target:
        raise ConfigError(
            f"The reward in {text!r} is empty. Give the folder of a reward model, a rule, a function or a server."
        )
    if not math.isfinite(weight):
        raise ConfigError(f"{target}: the weight must be a finite number, not {weight}.")
    if target == ENVIRONMENT:
        return RewardSource("environment", target, weight)
    if target.startswith("builtin:"):
        if target != JUDGE:
            raise ConfigError(f"Reward {target!r} not found.{nearest(target, [JUDGE])}")
        return RewardSource("builtin", target, weight)
    if target == REASONING_GYM:
        return RewardSource("reasoning_gym", target, weight)
    if target.startswith(PREFIX):
        target = target.removeprefix(PREFIX)
        parse_judge(target)
        return RewardSource("judge", target, weight)
    if target.startswith("rule:"):
        target = target.removeprefix("rule:")
        make_rule(target)
        return RewardSource("rule", target, weight)
    if target.startswith(("http://", "https://")):
        check_url(target)
        return RewardSource("server", target, weight)
    if target.partition("?")[0] in RULES:
        raise ConfigError(f"{target} is a rule. Write rule:{target}, or ./{target} for a folder of that name.")
    if FUNCTION.fullmatch(target) and not _is_model(target):
        return RewardSource("function", target, weight)
    parse_model(target)
    return RewardSource("model", target, weight)


def path_of_judge(judge: str | None) -> str | None:
    """Return the file or folder of a judge, without its options; None if it has none."""
    return None if judge in (None, "auto", "none", JUDGE) else parse_source(str(judge)).path


def check_url(url: str) -> None:
    """Check that ``url`` is valid and holds no password or token, which belong in a header."""
    fix = (
        f"Put it in the environment variable {TOKEN_VARIABLE}, because every user of this node can read a command line."
    )
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"{redacted(url)} isn't the address of a reward server. Write it as in http://127.0.0.1:5000/get_reward."
        )
    if HIDDEN in url:
        raise ConfigError(f"The address of the reward server {url} has {HIDDEN} for a secret. Write the secret there.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"The address of the reward server {parts.hostname} holds a password. {fix}")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if re.search(SECRET_QUERY, name, re.IGNORECASE):
            raise ConfigError(f"The address of the reward server {parts.hostname} holds a secret, {name}. {fix}")
