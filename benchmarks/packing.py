"""Padding of forward and backward passes before and after packing, into benchmarks/results/packing.json.

    python benchmarks/packing.py [--data PAIRS.json --tokenizer FOLDER] [--rows 64] [--timed 32] [--rounds 5]

``padding``: the share of tokens that are padding in steps of ``--rows`` rows, for passes of 8 rows of similar length (before),
for passes limited by tokens, and packed (after); also the passes per step. The lengths are those of preference pairs: of
``--data``, and of the built-in task. ``equality``: the largest difference of log-probabilities and gradients between packed and
padded rows, in float32. ``seconds``: an update of ``--timed`` rows of ``--data`` on a small model, in alternating rounds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from results import write_result
from transformers import Qwen2Config, Qwen2ForCausalLM

from reinforcepp.data import load_preferences
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.micro_batches import Lengths, MicroBatchLimit, micro_batches

TOKENS, LONGEST, VOCABULARY = 2048, 1024, 4096
KINDS = {
    "8 rows, padded": MicroBatchLimit(None, 8),
    f"{TOKENS} tokens, padded": MicroBatchLimit(TOKENS),
    f"{TOKENS} tokens, packed": MicroBatchLimit(TOKENS, packed=True),
}
"""Before, between, and after."""
BEFORE, _, AFTER = KINDS


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="builtin:network", help="preference pairs, as `reinforcepp reward` takes them"
    )
    parser.add_argument("--tokenizer", default="builtin:tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--timed", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    lengths = pair_lengths(given.data, given.tokenizer)
    sets = {"pairs": lengths, "built-in task": pair_lengths("builtin:network", given.tokenizer)}
    measured = {
        "padding": [
            {"lengths": name, "mean": round(sum(map(sum, found)) / len(found)), **padding(found, given.rows)}
            for name, found in sets.items()
        ],
        **timed(random.Random(1).sample(lengths, given.timed), given.rounds),
    }
    write_result("packing", measured)


def pair_lengths(data: str, tokenizer_name: str) -> list[Lengths]:
    """Return the tokens of prompt and answer of every answer in preference pairs that fits the limit."""
    tokenizer = load_tokenizer(tokenizer_name)
    _, pairs, _ = load_preferences(data, heldout_fraction=0, seed=0)
    lengths = []
    for pair in pairs:
        prompt = len(tokenizer(pair.prompt)["input_ids"])
        lengths += [(prompt, len(tokenizer(answer)["input_ids"]) + 1) for answer in (pair.chosen, pair.rejected)]
    return [length for length in lengths if sum(length) <= LONGEST]


def padding(lengths: Sequence[Lengths], rows: int) -> dict[str, dict[str, float]]:
    """Return the share of padding and the passes per step for each kind, over steps of shuffled rows."""
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    steps = [order[start : start + rows] for start in range(0, len(order) - rows + 1, rows)]
    shares, passes = {}, {}
    for kind, limit in KINDS.items():
        batches = [[lengths[i] for i in batch] for step in steps for batch in micro_batches(lengths, step, limit)]
        real, used = sum(sum(map(sum, batch)) for batch in batches), sum(map(limit.tokens_of, batches))
        shares[kind], passes[kind] = round(1 - real / used, 4), round(len(batches) / len(steps), 1)
    return {"share": shares, "passes": passes}


def timed(lengths: Sequence[Lengths], rounds: int) -> dict[str, Any]:
    """Return the gap between packed and padded rows, and the seconds of each kind relative to the first."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, vocab_size=VOCABULARY)).eval()
    rows = [tuple(torch.randint(VOCABULARY, (count,)).tolist() for count in pair) for pair in lengths]

    def update(limit: MicroBatchLimit) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logprobs = torch.zeros(len(rows), max(new for _, new in lengths))
        start = time.perf_counter()
        for batch in micro_batches(lengths, range(len(rows)), limit):
            prompts, responses = zip(*(rows[i] for i in batch), strict=True)
            found, _, mask = response_logprobs(
                model, prompts, responses, pad_id=0, width=logprobs.shape[1], padding_free=limit.packed
            )
            (found * mask).sum().backward()
            logprobs[batch] = found.detach()
        seconds = time.perf_counter() - start
        return seconds, logprobs, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    found = {kind: update(limit) for kind, limit in KINDS.items()}  # also warms up
    (_, padded, before), (_, packed, after) = (found[kind] for kind in (BEFORE, AFTER))
    scale = max(float(gradient.abs().max()) for gradient in before)
    gap = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True)) / scale
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, limit in KINDS.items():
            times[kind].append(update(limit)[0])
    first = times[BEFORE]
    return {
        "equality": {"logprobs": float((padded - packed).abs().max()), "gradients_relative": gap},
        "seconds": {
            "rows": len(lengths),
            "tokens": sum(map(sum, lengths)),
            "padding": padding(lengths, len(lengths))["share"],
            "median": {kind: round(median(each), 3) for kind, each in times.items()},
            "relative": {
                kind: round(median(b / a for a, b in zip(first, each, strict=True)), 3) for kind, each in times.items()
            },
        },
    }


if __name__ == "__main__":
    main()
