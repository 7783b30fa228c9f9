"""HTML pages: one file each that opens offline, in light and dark, and loads nothing from elsewhere.

Pages are jinja2 templates. Every value that a template prints is escaped, and its control characters are replaced, so model
output stays text. As a second defense the Content-Security-Policy forbids all requests and all scripts except those passed
to :func:`render`, which it lists by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reinforcepp.monitoring.turns import turns
from reinforcepp.runtime.terminal import printable

# Name of each color -> in light and in dark. Text has a contrast of at least 4.5 to ground and raised, edges have 3.
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


def asset(name: str) -> str:
    """Return a style sheet or a script of this package, by its path in it."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def themed(colors: Mapping[str, tuple[str, str]]) -> str:
    """Return CSS that sets ``--NAME`` to the light or dark color, following the system or the page's theme button."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colors.items()) for i in range(2))
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}\n"
    )


STYLE = themed(COLORS) + asset("static/page.css")


def _plain(value: object) -> object:
    return value if isinstance(value, Markup) else printable(str(value))


def environment(*folders: Path) -> Environment:
    """Return the environment of the templates in ``folders`` and of this package's: it escapes every value."""
    made = Environment(
        loader=FileSystemLoader([*folders, _FOLDER / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["turns"] = turns
    return made


_environment = environment()


def _trusted(html: str) -> Markup:
    return Markup(html)  # nosec B704  # callers pass constants, files of this package and hashes


def render(template: str, *, title: str, style: str = "", scripts: Sequence[str] = (), **values: Any) -> str:
    """Return the page that ``template``, which extends ``base.html``, makes of ``values``.

    Args:
        template: file name in ``templates``.
        title: of the window.
        style: CSS in addition to the style of all pages.
        scripts: run in this order after the body is loaded. A page with scripts also has the theme button.
        values: what the template prints. Text is escaped; only ``Markup`` is inserted as HTML.
    """
    sources = [asset("static/theme.js"), *scripts] if scripts else []
    assert not any(ending in source for source in sources for ending in ("</script", "<!--", "\r"))
    allowed = " ".join(f"'sha256-{_digest(source)}'" for source in sources) or "'none'"
    return _environment.get_template(template).render(
        title=title,
        policy=_trusted(f"{POLICY}; script-src {allowed}"),
        generator=_trusted(GENERATOR),
        style=_trusted(STYLE + style),
        scripts=[_trusted(source) for source in sources],
        **values,
    )


def macro(template: str, name: str) -> Callable[..., Markup]:
    """Return a macro of ``template`` as a function."""
    found: Callable[..., Markup] = getattr(_environment.get_template(template).module, name)
    return found


def embedded(name: str, value: Any) -> Markup:
    """Return ``value`` as JSON for a script to read, under the id ``name`` unless that is empty.

    The JSON is ASCII without angle brackets, so no text in it can end the element. Numbers that aren't finite become null.
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    attribute = f' id="{escape(name)}"' if name else ""
    return Markup(f'<script type="application/json"{attribute}>{text}</script>')  # nosec B704  # both parts are escaped


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
