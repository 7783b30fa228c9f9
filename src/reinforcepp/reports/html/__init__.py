"""What all pages have in common: one file that opens offline, in light and dark, and that loads and runs nothing else.

The Content-Security-Policy forbids every fetch and every script but those that are given to ``page``, by their hashes:
even if a text of a model got into the markup, nothing in it would run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Name of each colour -> in light and in dark. Text has a contrast of at least 4.5 to ground and raised, edges have 3.
COLORS: Mapping[str, tuple[str, str]] = {
    "ground": ("#ffffff", "#12161c"),
    "raised": ("#f5f7f9", "#1b212a"),
    "text": ("#1b1f24", "#e4e8ed"),
    "quiet": ("#57606a", "#a0abb7"),
    "line": ("#d8dee4", "#323b46"),
    "edge": ("#848d97", "#6b7683"),
    "accent": ("#0a5cad", "#6cb2f7"),
    "good": ("#1a7037", "#5dc37a"),
    "bad": ("#b42332", "#ff8f8f"),
    "warn": ("#8a5300", "#e3b04b"),
}

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
GENERATOR = '<meta name="generator" content="reinforcepp">'

_FOLDER = Path(__file__).parent
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def themed(colors: Mapping[str, tuple[str, str]]) -> str:
    """CSS that sets ``--NAME`` to the light or the dark colour, as the system or the button on the page says."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colors.items()) for i in range(2))
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}\n"
    )


STYLE = themed(COLORS) + (_FOLDER / "page.css").read_text(encoding="utf-8")


def page(title: str, body: str, style: str = "", scripts: str | Sequence[str] = ()) -> str:
    """A page with ``body``, which is HTML, and ``style`` on top of what all pages look like.

    ``scripts`` run in this order when the body is there. A page with scripts also has the button for light and dark.
    """
    given = [scripts] if isinstance(scripts, str) else list(scripts)
    sources = [(_FOLDER / "theme.js").read_text(encoding="utf-8"), *given] if any(given) else []
    assert not any(ending in source for source in sources for ending in ("</script", "<!--", "\r"))
    allowed = " ".join(f"'sha256-{_digest(source)}'" for source in sources) or "'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}; script-src {allowed}">'
        f'{GENERATOR}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body>{body}{''.join(f'<script>{source}</script>' for source in sources)}</body></html>\n"
    )


def embedded(name: str, value: Any) -> str:
    """``value`` as JSON in the page, for a script to read, by the id ``name`` if that isn't empty.

    It is ASCII without brackets, so no text in it can end it. What isn't finite, for which JSON has no word, is null.
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    called = f' id="{escape(name)}"' if name else ""
    return f'<script type="application/json"{called}>{text}</script>'


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_finite(value) for value in data]
    return data


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
