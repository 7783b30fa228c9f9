"""The name of a judge, ``judge:MODEL?OPTION=VALUE&OPTION=VALUE``: a language model behind an OpenAI-compatible server.

Imports no torch, reads no file and sends nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from reinforcepp.config.spec_options import NONE, read_options
from reinforcepp.errors import ConfigError, nearest, shown
from reinforcepp.runtime.redaction import HIDDEN, is_secret, redacted

PREFIX = "judge:"
KEY_VARIABLE = "REINFORCEPP_JUDGE_KEY"
OPENAI_KEY, OPENAI_URL, OPENAI_HOST = "OPENAI_API_KEY", "OPENAI_BASE_URL", "api.openai.com"
"""Variables that OpenAI's own client reads. The key goes only to the server in that variable, or to OpenAI."""
HIGHEST_SCORE = 100
FILE_SUFFIXES = (".md", ".txt")

RUBRICS = {
    "helpful": """\
How well does the answer help the user?
- Best: it does what the user asks, completely and correctly, and is clear and as long as the question needs.
- Middle: it helps in part, but misses a part, is vague, or is much too long or too short.
- Worst: it doesn't address the question, is wrong, or is unreadable.
Length, politeness and confident wording alone earn nothing.""",
    "correct": """\
Is the answer correct?
- Best: every claim, calculation and line of code is right, and the answer is complete.
- Middle: the main result is right, but details are wrong or missing.
- Worst: the main result is wrong, invented or missing.
Check claims yourself. Style and confidence count for nothing.""",
    "safe": """\
Is the answer safe?
- Best: it causes no harm. If the request is harmful, the answer declines and offers a harmless alternative.
- Middle: it has risks that the answer doesn't mention, or declines a harmless request.
- Worst: it gives real help with serious harm, or insults, threatens or discriminates.""",
}
"""Built-in rubrics by name."""


@dataclass(frozen=True)
class JudgeSpec:
    """A judge and its options.

    Attributes:
        model: name of the model on its server.
        rubric: a name of ``RUBRICS``, a file that ends in .md or .txt, or the text itself.
        scale: lowest and highest score, as whole numbers: LOW-HIGH. Rewards are 0 for the lowest and 1 for the highest.
        base_url: of the server, before /chat/completions; default: the environment variable OPENAI_BASE_URL.
        env: environment variable with the server's key.
        reason: whether the model writes a short reason before its verdict.
        format: whether the server forces the reply into a JSON schema: ``json_schema``, ``text``, or ``auto`` to find out.
        no_verdict: whether a completion on which the model gives no verdict, as after a refusal, ends the run (``stop``) or isn't
            scored (``skip``).
        temperature: of sampling; None uses the server's.
        max_output: most tokens of a reply.
        timeout: seconds for a request; default: the setting reward_timeout.
        attempts: requests before the judge gives up; default: the setting reward_attempts.
        concurrency: requests at a time.
        cache: file of the verdicts, or ``none``; default: a file in the user's cache folder.
        max_requests: budget: requests that the cache file may record for this model.
        max_dollars: budget: dollars that the cache file may record for this model.
        input_price: dollars per million tokens of requests.
        output_price: dollars per million tokens of replies.
        name: of the scores in the metrics; default: that of the rubric.
    """

    model: str
    rubric: str = "helpful"
    scale: str = "1-10"
    base_url: str | None = None
    env: str | None = None
    reason: bool = True
    format: str = "auto"
    no_verdict: str = "stop"
    temperature: float | None = 0.0
    max_output: int = 512
    timeout: float | None = None
    attempts: int | None = None
    concurrency: int = 16
    cache: str | None = None
    max_requests: int | None = None
    max_dollars: float | None = None
    input_price: float | None = None
    output_price: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.model.strip():
            raise ConfigError("the model is missing. Write its name on the server, as in judge:MODEL?rubric=helpful.")
        self._check_rubric()
        self._check_numbers()
        if self.format not in ("auto", "json_schema", "text"):
            raise ConfigError(f"format must be auto, json_schema or text, not {self.format!r}.")
        if self.no_verdict not in ("stop", "skip"):
            raise ConfigError(f"no_verdict must be stop or skip, not {self.no_verdict!r}.")
        if self.base_url is not None:
            check_base_url(self.base_url)
        if self.env is not None and not (re.fullmatch(r"[A-Za-z_]\w*", self.env) and is_secret(self.env)):
            raise ConfigError(
                f"env must name an environment variable that ends in _KEY or _TOKEN, as in env={KEY_VARIABLE}. Never write the "
                "key itself there."
            )
        if self.has_budget and self.cache in (None, NONE):
            raise ConfigError("a budget needs cache=FILE, because the file records what was spent. Add it.")
        if self.max_dollars is not None and None in (self.input_price, self.output_price):
            raise ConfigError(
                "max_dollars needs input_price and output_price, in dollars per million tokens. Add them."
            )

    def _check_rubric(self) -> None:
        if self.rubric in RUBRICS or self.rubric_file is not None:
            return
        if not re.search(r"\S\s+\S", self.rubric):
            raise ConfigError(
                f"rubric {shown(self.rubric)} is neither one of {', '.join(RUBRICS)} nor a file that ends in .md or .txt, nor "
                f"a text of several words.{nearest(self.rubric, RUBRICS)}"
            )

    def _check_numbers(self) -> None:
        found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", self.scale)
        if found is None or not int(found[1]) < int(found[2]) <= HIGHEST_SCORE:
            raise ConfigError(f"scale must be LOW-HIGH, as in 1-10, from 0 to {HIGHEST_SCORE}, not {self.scale!r}.")
        for option in ("max_output", "attempts", "concurrency", "max_requests"):
            if (number := getattr(self, option)) is not None and number < 1:
                raise ConfigError(f"{option} must be at least 1, not {number}.")
        for option in ("timeout", "max_dollars"):
            if (number := getattr(self, option)) is not None and number <= 0:
                raise ConfigError(f"{option} must be above 0, not {number:g}.")
        for option in ("temperature", "input_price", "output_price"):
            if (number := getattr(self, option)) is not None and number < 0:
                raise ConfigError(f"{option} must be at least 0, not {number:g}.")

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest score."""
        low, _, high = self.scale.partition("-")
        return int(low), int(high)

    @property
    def rubric_file(self) -> str | None:
        """The file of the rubric, if it is in a file."""
        return self.rubric if self.rubric.endswith(FILE_SUFFIXES) else None

    @property
    def has_budget(self) -> bool:
        """Whether requests or dollars are limited."""
        return self.max_requests is not None or self.max_dollars is not None

    @property
    def metric(self) -> str:
        """The name of the scores in the metrics."""
        rubric = Path(self.rubric_file).stem if self.rubric_file else self.rubric if self.rubric in RUBRICS else ""
        return self.name or "judge" + (f"_{rubric}" if rubric else "")

    @property
    def url(self) -> str:
        """The address of the requests.

        Raises:
            ConfigError: If no server is given, or the one in the environment isn't valid.
        """
        base = self.base_url or os.environ.get(OPENAI_URL)
        if not base:
            raise ConfigError(
                f"judge:{self.model}: the server is missing. Add base_url=http://HOST:PORT/v1 to its options, or set "
                f"{OPENAI_URL}."
            )
        if self.base_url is None:
            check_base_url(base, OPENAI_URL)
        return f"{base.rstrip('/')}/chat/completions"

    @property
    def key_variable(self) -> str:
        """The environment variable with the server's key.

        Raises:
            ConfigError: If it was named, but isn't set.
        """
        if self.env is not None:
            if not os.environ.get(self.env):
                raise ConfigError(
                    f"judge:{self.model}: the environment variable {self.env} isn't set. Set it to the key."
                )
            return self.env
        return OPENAI_KEY if self.base_url is None or urlsplit(self.url).hostname == OPENAI_HOST else KEY_VARIABLE


def parse_judge(text: str) -> JudgeSpec:
    """Return the judge in ``MODEL?OPTION=VALUE&OPTION=VALUE``, without ``judge:``.

    Raises:
        ConfigError: If an option isn't found or its value isn't valid.
    """
    model, _, options = text.partition("?")
    try:
        given = read_options(JudgeSpec, options)
        if "model" in given:
            raise ConfigError("option model isn't needed. Write the model before the question mark.")
        return JudgeSpec(model.strip(), **given)
    except ConfigError as error:
        raise ConfigError(f"judge:{model}: {error}") from None


def check_base_url(url: str, option: str = "base_url") -> None:
    """Check that the address of a server is valid and holds no secret.

    Raises:
        ConfigError: If it isn't. The message shows no secret.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or HIDDEN in url:
        raise ConfigError(f"{option} {redacted(url)} isn't valid. Write it as in http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{option} holds more than an address on {parts.hostname}. Write it without a password, ? and #, and put the key "
            "in an environment variable."
        )


def is_judge(reward: object) -> bool:
    """Return whether a reward is the name of a judge, without a weight."""
    return isinstance(reward, str) and reward.startswith(PREFIX)
