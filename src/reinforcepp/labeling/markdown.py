"""Markdown of models as safe HTML.

Two defenses, each of which would do alone: the parser escapes HTML in the text, and the result keeps only harmless elements.
Images aren't loaded, because a request for one tells its server who reads the page.
"""

from __future__ import annotations

from functools import cache

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

from reinforcepp.runtime.terminal import printable

MAX_CHARACTERS = 50_000
"""Longer texts are shown as plain text."""
TAGS = {
    *("a", "blockquote", "br", "code", "del", "em", "hr", "li", "ol", "p", "pre", "s", "strong", "ul"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20})
    return parser.enable(["table", "strikethrough"]).disable("image")


def to_html(text: str) -> Markup:
    """Return Markdown as HTML without scripts, styles, images, forms and identifiers."""
    text = printable(text)
    if len(text) > MAX_CHARACTERS:
        return Markup("<pre>{}</pre>").format(text)
    if not text.strip():
        return Markup('<p class="empty">(empty)</p>')
    html = nh3.clean(
        _parser().render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return Markup(html)  # nosec B704  # sanitized by nh3
