"""What a reward is made of, as the user writes it: ``0.5*rule:length?max=200``. Imports no torch and loads nothing.

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
    """One part of the reward: ``weight`` times what ``target``, of this ``kind``, says."""

    kind: Kind
    target: str
    weight: float = 1.0

    @property
    def path(self) -> str | None:
        """The file or folder that it is read from, if any."""
        if self.kind == "model":
            return self.target
        module = self.target.rpartition(":")[0]
        return module if self.kind == "function" and module.endswith(".py") else None


def parse_source(text: str) -> RewardSource:
    """What ``text`` means; no file is read for that, and nothing is loaded.

    Raises:
        ConfigError: if it is empty or means nothing, if a rule is wrong, or if a URL is one that can't be asked or holds
            a secret.
    """
    weight, target = 1.0, text.strip()
    if found := WEIGHT.fullmatch(target):
        weight, target = float(found[1]), found[2].strip()
    if not target:
        raise ConfigError(f"A reward is empty in {text!r}: name a model's folder, a rule, a function or a server.")
    if not math.isfinite(weight):
        raise ConfigError(f"The weight of {target} must be a finite number, not {weight}.")
    if target.startswith("builtin:"):
        if target != JUDGE:
            raise ConfigError(f"There is no reward {target!r}.{nearest(target, [JUDGE])}")
        return RewardSource("judge", target, weight)
    if target.startswith("rule:"):
        target = target.removeprefix("rule:")
        make_rule(target)
        return RewardSource("rule", target, weight)
    if target.startswith(("http://", "https://")):
        check_url(target)
        return RewardSource("server", target, weight)
    if target.partition("?")[0] in RULES:
        raise ConfigError(f"{target} is a rule: write rule:{target}, or ./{target} for a folder of that name.")
    function = FUNCTION.fullmatch(target) and not Path(target).expanduser().is_dir()
    return RewardSource("function" if function else "model", target, weight)


def check_url(url: str) -> None:
    """Check that ``url`` can be asked and may be written down: settings are saved, so it must hold no secret."""
    cure = f"settings are saved, so it must stand in the environment variable {TOKEN_VARIABLE} instead."
    try:
        parts = urlsplit(url)
        there = bool(parts.hostname) and parts.port != 0
    except ValueError:
        there = False
    if not there:
        shown = "What has an @ in it" if "@" in url else url.partition("?")[0]
        raise ConfigError(
            f"{shown} isn't the address of a reward server: write it like http://127.0.0.1:5000/get_reward."
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"The address of the reward server {parts.hostname} holds a password: {cure}")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if SECRET.search(name):
            raise ConfigError(f"The address of the reward server {parts.hostname} holds a secret, {name}: {cure}")
