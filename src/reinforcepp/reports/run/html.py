"""Pieces of the report as HTML. Whatever comes from a run goes through ``text``, so that it is shown and never obeyed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from reinforcepp.monitoring import printable

LONGEST = 3000  # characters of a text
FOLDED = (320, 6)  # characters or lines from which a text is folded


def text(value: object) -> str:
    """Any text as text: markup and control characters inert."""
    return escape(printable(str(value)))


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with a heading, to which the list of contents leads."""
    heading = f'<h2 id="{name}-title">{text(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{"".join(parts)}</section>'


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Cells are HTML; the first of a row is its heading. A wide table scrolls in itself, not the page."""
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in titles)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and what they stand for."""
    return "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows).join(
        ('<dl class="facts">', "</dl>")
    )


def missing(sentence: str) -> str:
    """What isn't there, and why."""
    return f'<p class="missing">{text(sentence)}</p>'


def said(value: str) -> str:
    """What a model has said, or was asked; a long text folds, with a button for the rest."""
    cut = value[:LONGEST]
    more = f" … ({len(value) - LONGEST:,} more characters)" if len(value) > LONGEST else ""
    shown = text(cut + more) if value.strip() else '<span class="empty">(empty)</span>'
    if len(cut) <= FOLDED[0] and cut.count("\n") < FOLDED[1]:
        return f'<div class="said" dir="auto">{shown}</div>'
    return (
        f'<div class="said long" dir="auto">{shown}</div>'
        '<button type="button" class="more" aria-expanded="true" hidden>More</button>'
    )


def copyable(name: str, value: str) -> str:
    """A block of text with a button that copies it."""
    return (
        f'<div class="copyable"><button type="button" class="copy" hidden>Copy<span class="unseen"> {text(name)}</span></button>'
        f'<pre tabindex="0" role="region" aria-label="{text(name)}">{text(value)}</pre></div>'
    )


def within(parts: Iterable[str], budget: int) -> list[str]:
    """As many of ``parts``, from the first, as have room in ``budget`` bytes."""
    kept = []
    for part in parts:
        budget -= len(part.encode())
        if budget < 0:
            break
        kept.append(part)
    return kept
