"""The comparison of two models as one page: metrics, and responses side by side with hidden model names to vote on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from reinforcepp.data import count
from reinforcepp.reports.comparison import text as report
from reinforcepp.reports.comparison.result import ModelComparison, Pair
from reinforcepp.reports.html import asset, embedded, render
from reinforcepp.runtime.terminal import printable
from reinforcepp.types import Conversation


def as_page(comparison: ModelComparison) -> str:
    """Return the page as HTML."""
    names = {"A": comparison.settings["model_a"], "B": comparison.settings["model_b"]}
    pairs = [pair for pair in comparison.pairs if pair.answer_a != pair.answer_b]
    equal = len(comparison.pairs) - len(pairs)
    prompts = list({repr(pair.prompt): pair.prompt for pair in pairs}.values())
    return render(
        "comparison.html",
        title="Two models compared",
        style=asset("static/comparison.css"),
        scripts=(asset("static/fold.js"), asset("static/comparison.js")) if pairs else (),
        verdict=report.verdict(comparison),
        names=names,
        wins=report.wins(comparison),
        lines=report.lines(comparison),
        rates=report.rates(comparison),
        setup=_setup(comparison),
        notes=comparison.notes,
        skipped=f"{count(equal, 'pair')} of equal responses {'is' if equal == 1 else 'are'} skipped." if equal else "",
        prompts=prompts,
        data=embedded("data", _data(comparison, names, pairs, prompts)) if pairs else "",
    )


def _setup(comparison: ModelComparison) -> str:
    settings = comparison.settings
    return (
        f"{count(comparison.outcome.prompts, 'prompt')} of {settings['data']}, {count(settings['num_samples'], 'response')} of "
        f"each model per prompt, up to {settings['max_new_tokens']} tokens; temperature {settings['temperature']:g}, top-p "
        f"{settings['top_p']:g}, top-k {settings['top_k']}, seed {settings['seed']}. Intervals come from "
        f"{settings['bootstrap_samples']:,} bootstrap samples of the prompts."
    )


def _data(
    comparison: ModelComparison, names: dict[str, str], pairs: Sequence[Pair], prompts: Sequence[Conversation]
) -> dict[str, Any]:
    """Return the data of the script. ``id`` identifies the responses, so that votes on others don't count for them.

    Saved votes are lines for ``reinforcepp label import``, which therefore need the prompts.
    """
    draw = random.Random(comparison.settings["seed"])
    positions = {repr(prompt): i for i, prompt in enumerate(prompts)}
    shown = [_shown(pair, positions[repr(pair.prompt)], swapped=draw.random() < 0.5) for pair in pairs]
    digest = hashlib.sha256(repr((names, prompts, shown)).encode("utf-8", "surrogatepass")).hexdigest()
    named = {side: printable(name) for side, name in names.items()}
    temperature = comparison.settings["temperature"]
    return {"id": digest[:16], "names": named, "temperature": temperature, "prompts": prompts, "pairs": shown}


def _shown(pair: Pair, prompt: int, *, swapped: bool) -> dict[str, Any]:
    responses = [
        {"side": side, "text": printable(text), "truncated": finish == "length", "score": f"{score:.3g}"}
        for side, text, finish, score in (
            ("A", pair.answer_a, pair.finish_a, pair.score_a),
            ("B", pair.answer_b, pair.finish_b, pair.score_b),
        )
    ]
    return {
        "prompt": prompt,
        "better": pair.better,
        "responses": responses[::-1] if swapped else responses,
        "kwargs": dict(pair.chat_template_kwargs),
    }
