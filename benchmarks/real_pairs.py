"""The shortest pairs of a preference file, for measurements on real data that must not take hours."""

from __future__ import annotations

import csv
from pathlib import Path

from reinforcepp.data import load_preferences
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.tokenization import encode_example


def write_short_pairs(file: str, model: str, count: int, target: Path, *, fewest: int = 0) -> dict[str, float]:
    """Write the ``count`` pairs whose longer text has the fewest tokens, but at least ``fewest``; return their lengths."""
    _, pairs, _ = load_preferences(file, heldout_fraction=0, seed=0)
    tokenizer = load_tokenizer(model)
    lengths = {
        pair: max(len(encode_example(tokenizer, pair.prompt, answer)) for answer in (pair.chosen, pair.rejected))
        for pair in pairs
    }
    chosen = sorted((pair for pair in pairs if lengths[pair] >= fewest), key=lambda pair: lengths[pair])[:count]
    chosen.sort(key=lambda pair: str(pair.row))
    with open(target, "w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["prompt", "chosen", "rejected"])
        rows.writerows((pair.prompt, pair.chosen, pair.rejected) for pair in chosen)
    picked = [lengths[pair] for pair in chosen]
    return {"pairs": len(picked), "mean_tokens": sum(picked) / len(picked), "max_tokens": max(picked)}
