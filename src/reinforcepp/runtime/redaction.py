"""Hide secrets in texts that leave the process: settings, commands, logs, errors and reports. Imports nothing of this package.

A URL keeps its host and the words of its path. Everything in it that can be a secret becomes ``***``: the part before an @, each
value of the query, the fragment, and parts of the path that aren't words, such as the token of a webhook.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST_SECRET = 8
"""Characters of the shortest secret that is searched in a text; a shorter one could be part of a word."""

_SCHEME = r"[a-z][a-z0-9+.-]{0,30}://"
_OF_THIS_URL = rf"(?!,{_SCHEME})"  # a comma and a scheme begin the next URL of a list
URL = re.compile(rf"({_SCHEME})((?:{_OF_THIS_URL}[^\s\"'<>])+)", re.IGNORECASE)
"""A URL in a sentence: its scheme, and the rest."""
WHOLE_URL = re.compile(rf"((?:[-+\d.e]+\s*\*\s*)?{_SCHEME})((?:{_OF_THIS_URL}\S)+)", re.IGNORECASE)
"""A text that is a URL, perhaps with the weight of a reward. In it, unlike in a sentence, quotes are part of the URL."""
IN_JUDGE = re.compile(r"(judge:(?:(?!://)[^\n]){0,4000}?[?&]base_url=)([^\s\"'<>&]+)")
"""The name of a judge up to the address of its server, which ends before the next option, and the address."""
USER = re.compile(
    r"""
    [^/?#]*@                           # user:password@
    | [^/?#@]*:(?!\d+(?:[/?#]|$)).*@    # A password can hold / ? or #, which end it by the standard; a port isn't one.
    """,
    re.VERBOSE,
)
"""User and password."""
WORD = re.compile(
    r"""
    v?\d{1,8}                                                 # a number, a version: 2026, v1
    | [A-Za-z]?\d{1,3}[A-Za-z]{1,2} | [A-Za-z]{1,8}\d{1,2}     # 7b, qwen3
    | [A-Z]{1,8} | [a-z]{1,14}                                # API, score
    | [A-Z]?[a-z]{2,13}(?:[A-Z][a-z]{2,13})*                  # RewardModel
    """,
    re.VERBOSE,
)
"""A word of a path; the words are separated by ``-``, ``_`` or a dot."""
LONGEST_WORDS = 48
"""Characters of the longest part of a path that consists of words."""
BEFORE_SECRET = re.compile(r"(?:web)?hooks?|(?:api)?(?:tokens?|keys?)|secrets?|auth", re.IGNORECASE)
"""A part of a path before a secret."""
HOOK_HOST = re.compile(r"(?:[^/?#]*\.)?(?:web)?hooks?\.", re.IGNORECASE)
"""The start of a host whose whole path is secret, such as hooks.slack.com."""
SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|(?:API)?KEY|SECRET|PASSWORD|PASSWD|PASS|PASSPHRASE|CREDENTIAL|PAT)S?$", re.IGNORECASE
)
"""Name of an environment variable with a secret."""
SECRET_QUERY = r"token|key|secret|passw|auth|sig"
"""Parts of the names of secrets in the query of a URL."""
SHAPES = re.compile(
    r"""
    (?<![A-Za-z0-9])
    (?: hf_[A-Za-z0-9]{20,}                                                         # Hugging Face
    | gh[a-z]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}              # GitHub, GitLab
    | pypi-[\w-]{20,}                                                               # PyPI
    | sk-(?=[\w-]{0,60}\d)(?=[\w-]{0,60}[A-Z])[\w-]{20,} | sk-[0-9a-f]{32,}         # OpenAI and others
    | nvapi-[\w-]{20,} | gsk_[A-Za-z0-9]{20,}                                       # NVIDIA, Groq
    | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,}                                    # AWS, Google
    | xox[a-z]-[\w-]{10,} | SG\.[\w-]{16,}\.[\w-]{16,}                              # Slack, SendGrid
    | [rs]k_(?:live|test)_[A-Za-z0-9]{16,} | npm_[A-Za-z0-9]{30,}                   # Stripe, npm
    | eyJ[\w-]{8,999}\.[\w-]{8,}(?:\.[\w-]*)?                                       # JSON Web Token
    )
    """,
    re.VERBOSE,
)
"""Tokens of well-known services."""
NAMED = re.compile(
    rf"""
    (?P<name>[?&](?:[\w.-]{{0,40}}(?:{SECRET_QUERY})[\w.-]{{0,40}}|code|pw|pwd)=)[^\s&"'<>\#]+(?<![.,:;!?)\]}}])
    | (?P<scheme>
        authorization\W{{1,6}}(?:bearer|basic|token)\s+ | \bbearer\s+(?=\S{{0,99}}\d|\S{{20}}) | x-api-key["':=\s]{{1,6}}
      )[^\s"',;]+
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A secret that its name gives away: in a query without its host, or in a header."""
SENTENCE_END = ".,:;!?)]}"
"""Punctuation after a URL that belongs to the sentence around it."""


def redacted(text: str, *urls: str) -> str:
    """Return ``text`` with ``***`` for each secret in it.

    Hides secrets in URLs, tokens of well-known services, values of secret environment variables (``HF_TOKEN``, ``*_KEY``,
    ``*_PASSWORD``, ...), and authorization headers. Applying it twice changes nothing more.

    Args:
        text: of a message, or a setting.
        urls: addresses whose secrets are also hidden where they occur alone, for example in the response of that server.
    """
    return _hide(text, [*_environment_secrets(), *(secret for url in urls for secret in _secrets(url))])


def is_secret(variable: str) -> bool:
    """Return whether an environment variable with this name holds a secret."""
    return SECRET_VARIABLE.search(variable) is not None


def without_secrets(value: Any) -> Any:
    """Return ``value`` with every text in it redacted, at any depth of dictionaries, lists and tuples."""
    return _hide_in(value, list(_environment_secrets()))


def _hide_in(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _hide(value, secrets)
    if isinstance(value, dict):
        return {_hide_in(key, secrets): _hide_in(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        hidden = (_hide_in(each, secrets) for each in value)
        return tuple(hidden) if isinstance(value, tuple) else list(hidden)
    return value


def _hide(text: str, secrets: list[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        parts = IN_JUDGE.split(text) if "judge:" in text else [text]
        text = "".join(
            (URL if WHOLE_URL.fullmatch(part) is None else WHOLE_URL).sub(_without_secret_parts, part) for part in parts
        )
    return NAMED.sub(lambda found: (found["name"] or found["scheme"]) + HIDDEN, SHAPES.sub(HIDDEN, text))


def _without_secret_parts(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    shown = rest.rstrip(SENTENCE_END)
    hidden = "".join(HIDDEN if secret else text for text, secret in _parts(scheme, shown))
    return scheme + hidden + rest[len(shown) :]


def _secrets(url: str) -> Iterator[str]:
    """Yield the parts of ``url`` that :func:`redacted` hides, also decoded, if they are long enough to be searched."""
    for found in (URL if WHOLE_URL.fullmatch(url) is None else WHOLE_URL).finditer(url):
        for text, secret in _parts(*found.groups()):
            for part in {text, unquote(text), *text.split(":")} if secret else ():
                if len(part) >= SHORTEST_SECRET:
                    yield part


def _parts(scheme: str, rest: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a URL after its scheme, each with whether it can be a secret."""
    if "@" in rest and (user := USER.match(rest)) is not None:
        yield user[0][:-1], True
        yield "@", False
        rest = rest[user.end() :]
    address, *fragment = rest.split("#", 1)
    address, *query = address.split("?", 1)
    host, *segments = address.split("/")
    yield host, False
    before = "hook" if HOOK_HOST.match(host) else ""
    for segment in segments:
        after_name = BEFORE_SECRET.fullmatch(before) is not None
        yield "/", False
        yield segment, bool(segment) and (after_name or not (scheme.lower() == "file://" or _is_words(segment)))
        before = before if HOOK_HOST.match(host) else segment
    for index, pair in enumerate(re.split("([&;])", query[0]) if query else ()):
        name, equals, value = pair.partition("=")
        yield ("" if index else "?") + (name + equals if equals else ""), False
        yield (value, bool(value)) if equals else (pair, pair not in ("&", ";", ""))
    if fragment:
        yield "#", False
        yield fragment[0], bool(fragment[0])


def _is_words(segment: str) -> bool:
    return len(segment) <= LONGEST_WORDS and all(map(WORD.fullmatch, re.split("[-_.]", segment)))


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and is_secret(name):
            yield value
            if (quoted := quote(value, safe="")) != value:
                yield quoted
