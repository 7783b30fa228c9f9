"""Parse the setting ``rewards``, for example ``0.5*rule:length?max=200``. Imports no torch and loads nothing.

builtin:judge                        the built-in data's judge
rule:NAME?OPTION=VALUE&...           a rule of ``reward_rules``
http://HOST:PORT/get_reward          a reward server
MODULE:FUNCTION, FILE.py:FUNCTION    a Python function, unless a folder has that name
anything else                        the folder of a reward model
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from reinforcepp.config.reward_rules import RULES, make_rule
from reinforcepp.errors import ConfigError, nearest

JUDGE = "builtin:judge"
WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.*)", re.DOTALL)
FUNCTION = re.compile(r"(.+):([A-Za-z_]\w*)", re.DOTALL)
SECRET = re.compile(r"token|key|secret|passw|auth|sig", re.IGNORECASE)
TOKEN_VARIABLE = "REINFORCEPP_REWARD_TOKEN"

Kind = Literal["judge", "rule", "server", "function", "model"]


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
            return self.target
        module = self.target.rpartition(":")[0]
        return module if self.kind == "function" and module.endswith(".py") else None


def parse_source(text: str) -> RewardSource:
    """Return the reward source in ``text``, without reading a file.

    Raises:
        ConfigError: If the text is empty, a rule or built-in reward doesn't exist, or a URL isn't valid or holds a secret.
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
    if target.startswith("builtin:"):
        if target != JUDGE:
            raise ConfigError(f"Reward {target!r} not found.{nearest(target, [JUDGE])}")
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
    function = FUNCTION.fullmatch(target) and not Path(target).expanduser().is_dir()
    return RewardSource("function" if function else "model", target, weight)


def check_url(url: str) -> None:
    """Check that ``url`` is valid and holds no secret, because settings are saved."""
    fix = f"Put it in the environment variable {TOKEN_VARIABLE}, because settings are saved."
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        shown = "The URL (hidden because of its @)" if "@" in url else url.partition("?")[0]
        raise ConfigError(
            f"{shown} isn't the address of a reward server. Write it as in http://127.0.0.1:5000/get_reward."
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"The address of the reward server {parts.hostname} holds a password. {fix}")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if SECRET.search(name):
            raise ConfigError(f"The address of the reward server {parts.hostname} holds a secret, {name}. {fix}")
