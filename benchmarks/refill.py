"""Tokens per CPU second with and without refilling the batch, for completions of uneven length.

python benchmarks/refill.py

One process decodes the same 256 completions in turns: waiting rows enter when rows finish, or only when the whole batch has
finished. The lengths are geometric and clipped, as those of sampled answers roughly are; they are fixed by per-row limits, so
both ways decode equal tokens. A row-step is one row in one forward pass; each one beyond a completion's tokens is wasted.
The model is the 82-million-parameter GPT-2 shape of benchmarks/generation.py. Times are CPU times of one thread, so other
load on the machine matters little. Written to benchmarks/results/refill_cpu.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generation import SHAPES, random_prompts, save_random_model
from results import write_result
from transformers import PreTrainedModel

from reinforcepp.models.loading import load_policy
from reinforcepp.models.mkldnn_linear import packed
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.decoding import LADDER
from reinforcepp.rollout.running_batch import RunningBatch
from reinforcepp.types import Prompt, Sampling

DECODINGS = {"refilled": LADDER[0], "unrefilled": replace(LADDER[0], refills=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="82m", choices=SHAPES, help="tiny only shows that the benchmark runs")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=8)
    parser.add_argument("--mean_tokens", type=int, default=48, help="mean of the geometric distribution of lengths")
    parser.add_argument("--new_tokens", type=int, default=256, help="largest length")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="refill_cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = save_random_model(Path(folder), SHAPES[arguments.shape])
        work = make_work(arguments, vocabulary)
        for dtype in arguments.dtypes:
            model = load_policy(folder, getattr(torch, dtype)).eval()
            for size in arguments.batch_sizes:
                rounds = [measure_round(model, *work, size, flip=bool(i % 2)) for i in range(arguments.rounds)]
                rows.append({"dtype": dtype, "batch_size": size} | summary(rounds))
                print(rows[-1], flush=True)
    write_result(arguments.name, {"shape": SHAPES[arguments.shape], "lengths": describe(work[1]), "rows": rows})


def make_work(arguments: argparse.Namespace, vocabulary: int) -> tuple[list[Prompt], list[int], Sampling]:
    """Prompts of 16 to 48 tokens, a length for each completion, and the sampling parameters."""
    ids = random_prompts(arguments.prompts, 48, vocabulary)
    prompts = [Prompt("", tuple(row[: 16 + key % 33]), key) for key, row in enumerate(ids)]
    generator = torch.Generator().manual_seed(0)
    count = arguments.prompts * arguments.num_samples
    lengths = torch.empty(count).geometric_(1 / arguments.mean_tokens, generator=generator).long()
    sampling = Sampling(arguments.new_tokens, num_samples=arguments.num_samples)
    return prompts, lengths.clamp(1, arguments.new_tokens).tolist(), sampling


def measure_round(
    model: PreTrainedModel, prompts: list[Prompt], lengths: list[int], sampling: Sampling, size: int, *, flip: bool
) -> dict[str, Any]:
    """Decode the work in both ways; return seconds and row-steps of each."""
    result = {}
    for name in reversed(DECODINGS) if flip else DECODINGS:
        samples = range(sampling.num_samples)
        limits = iter(lengths)
        rows = [BatchRow.start(prompt, sample, sampling, next(limits)) for prompt in prompts for sample in samples]
        passes = 0
        begin = time.process_time()
        with packed(model, size):
            (queue,) = DECODINGS[name].queues(rows)
            batch = RunningBatch(model, queue, size, sampling, DECODINGS[name], frozenset(), pad_id=0)
            for _ in batch.decode():
                passes += len(batch.rows)
        result[name] = {"seconds": time.process_time() - begin, "row_steps": passes, "ids": [row.ids for row in rows]}
    return result


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median ratio of tokens per CPU second with its range, and the share of wasted row-steps."""
    tokens = sum(map(len, rounds[0]["refilled"]["ids"]))
    ratios = [each["unrefilled"]["seconds"] / each["refilled"]["seconds"] for each in rounds]
    return {
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_cpu_second": {
            name: tokens / median(each[name]["seconds"] for each in rounds) for name in DECODINGS
        },
        "wasted_row_steps": {name: 1 - tokens / rounds[0][name]["row_steps"] for name in DECODINGS},
        "equal_completions": sum(a == b for a, b in zip(*(rounds[0][name]["ids"] for name in DECODINGS), strict=True)),
    }


def describe(lengths: list[int]) -> dict[str, float]:
    """Return count, mean, median and maximum of the completions' lengths."""
    return {
        "completions": len(lengths),
        "mean": sum(lengths) / len(lengths),
        "median": median(lengths),
        "max": max(lengths),
    }


if __name__ == "__main__":
    main()
