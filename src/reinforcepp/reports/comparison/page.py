"""The comparison as one page that opens offline: the figures, and the answers side by side without their names.

The script and the style are the files of their names beside this one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from reinforcepp.data import count
from reinforcepp.monitoring import printable
from reinforcepp.reports.comparison import text as report
from reinforcepp.reports.comparison.result import ModelComparison, Pair
from reinforcepp.reports.html import embedded, page

HERE = Path(__file__).parent

VOTING = """
<section aria-labelledby="yourself">
<h2 id="yourself">Judge for yourself</h2>
<p>Which answer is better? Their order is random, and the names are hidden until you choose. Keys: <kbd>1</kbd>,
<kbd>2</kbd>, <kbd>0</kbd> for a tie, <kbd>→</kbd> and <kbd>←</kbd> to move on and back. {left_out}</p>
<noscript><p>The answers are shown by a script, which is switched off here; answers.jsonl beside this page holds them, too.</p>
</noscript>
<div id="voting" hidden>
<div class="bar"><span id="place"></span><label><input id="reveal" type="checkbox"> Show all names and scores</label></div>
<h3 id="prompt" dir="auto" tabindex="-1"></h3>
<div id="answers">
<article aria-labelledby="head-1"><h4 id="head-1">Answer 1</h4><p id="text-1" class="text" dir="auto"></p>
<p id="cut-1" class="aside"></p><p id="name-1" class="name"></p></article>
<article aria-labelledby="head-2"><h4 id="head-2">Answer 2</h4><p id="text-2" class="text" dir="auto"></p>
<p id="cut-2" class="aside"></p><p id="name-2" class="name"></p></article>
</div>
<div id="choices" role="group" aria-label="Which answer is better?">
<button type="button" data-vote="1">Answer 1 <kbd>1</kbd></button>
<button type="button" data-vote="0">Tie <kbd>0</kbd></button>
<button type="button" data-vote="2">Answer 2 <kbd>2</kbd></button>
</div>
<p id="told" role="status" aria-live="polite"></p>
<div class="bar"><button id="previous" type="button">Previous</button><button id="next" type="button">Next</button></div>
<p class="tally"><span id="tally"></span> <button id="forget" type="button">Forget my votes</button></p>
</div>
</section>
"""


def as_page(comparison: ModelComparison) -> str:
    """Verdict, figures and answers; what a model or a file says is shown as the text it is."""
    names = {"A": comparison.settings["model_a"], "B": comparison.settings["model_b"]}
    title = "Two models compared"
    pairs = [pair for pair in comparison.pairs if pair.answer_a != pair.answer_b]
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="verdict">{_text(report.verdict(comparison))}</p>',
        f"<p>A is <b>{_text(names['A'])}</b>, B is <b>{_text(names['B'])}</b>.</p>",
        f"<p>{_text(report.wins(comparison))}</p>",
        _table(comparison),
        f"<p>{_text(_how(comparison))}</p>",
        *(f'<p class="note">Note: {_text(note)}</p>' for note in comparison.notes),
    ]
    if pairs:
        equal = len(comparison.pairs) - len(pairs)
        left_out = f"{count(equal, 'pair')} of equal answers {'is' if equal == 1 else 'are'} left out." if equal else ""
        sections += [VOTING.format(left_out=left_out), embedded("data", _data(comparison, names, pairs))]
    else:
        sections.append("<p>The two models gave the same answers, so there is nothing to choose between.</p>")
    style, script = ((HERE / f"blind.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return page(title, "\n".join(sections), style, script if pairs else "")


def _how(comparison: ModelComparison) -> str:
    settings = comparison.settings
    return (
        f"{count(comparison.outcome.prompts, 'prompt')} of {settings['data']}, {count(settings['num_samples'], 'answer')} of "
        f"each model to each, of up to {settings['max_new_tokens']} tokens; temperature {settings['temperature']:g}, top-p "
        f"{settings['top_p']:g}, top-k {settings['top_k']}, seed {settings['seed']}. The intervals are read from "
        f"{settings['bootstrap_samples']:,} resamples of the prompts."
    )


def _table(comparison: ModelComparison) -> str:
    rows = ['<tr><td></td><th scope="col">A</th><th scope="col">B</th></tr>']
    rows += [
        f'<tr><th scope="row">{_text(line.name)}</th><td>{_text(line.a)}</td><td>{_text(line.b)}</td></tr>'
        for line in report.lines(comparison)
    ]
    rows += [
        f'<tr><th scope="row">{_text(name)}</th><td colspan="2">{_text(rate)}</td></tr>'
        for name, rate in report.rates(comparison)
    ]
    return f"<table>{''.join(rows)}</table>"


def _data(comparison: ModelComparison, names: dict[str, str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the script shows; ``id`` is of these very answers, so that votes on others are not taken for votes on them."""
    draw = random.Random(comparison.settings["seed"])
    shown = [_shown(pair, swapped=draw.random() < 0.5) for pair in pairs]
    digest = hashlib.sha256(repr((names, shown)).encode("utf-8", "surrogatepass")).hexdigest()
    return {"id": digest[:16], "names": {side: printable(name) for side, name in names.items()}, "pairs": shown}


def _shown(pair: Pair, *, swapped: bool) -> dict[str, Any]:
    answers = [
        {
            "side": "A",
            "text": printable(pair.answer_a),
            "cut": pair.finish_a == "length",
            "score": f"{pair.score_a:.3g}",
        },
        {
            "side": "B",
            "text": printable(pair.answer_b),
            "cut": pair.finish_b == "length",
            "score": f"{pair.score_b:.3g}",
        },
    ]
    return {"prompt": printable(pair.prompt), "better": pair.better, "answers": answers[::-1] if swapped else answers}


def _text(text: str) -> str:
    return escape(printable(text))
