"""What all pages have in common: one file that opens offline, in light and dark."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #8886; }
"""


def page(title: str, body: str, style: str) -> str:
    """A page with ``body``, which is HTML, and ``style`` on top of what all pages look like."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{body}</body></html>\n"
    )
