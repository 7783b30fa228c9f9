"""The rollout phase of a training step with either engine: hand over the weights, generate, score what came out.

python benchmarks/rollout.py [--precisions no bf16] [--rounds 3]

On the 82-million-parameter shape of benchmarks/generation.py. Each engine runs in a separate process, in turns, so
that load on the machine meets both alike; written to benchmarks/results/rollout_cpu.json. ``limit`` is what no engine could
beat: one that takes no longer for generating than the matrix products alone take at the machine's peak, measured beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from generation import SHAPES, random_prompts, save_random_model
from results import write_result

from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice
from reinforcepp.types import Prompt, Sampling

ENGINES = ("transformers", "vllm")
PHASES = ("sync", "generate", "score")
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="82m", choices=SHAPES, help="tiny only shows that the benchmark runs")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="rollout_cpu")
    parser.add_argument("--worker", help="used by the benchmark itself")
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(measure(**json.loads(arguments.worker))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = save_random_model(Path(folder), SHAPES[arguments.shape])
        for turn in range(arguments.rounds):
            for precision in arguments.precisions:
                for engine in ENGINES if turn % 2 == 0 else ENGINES[::-1]:
                    job = {
                        "folder": folder,
                        "engine": engine,
                        "precision": precision,
                        "prompts": random_prompts(arguments.prompts, arguments.prompt_tokens, vocabulary),
                        "new_tokens": arguments.new_tokens,
                    }
                    rows.append({"round": turn, "precision": precision, "engine": engine} | in_a_process(job))
                    print(rows[-1], flush=True)
    write_result(arguments.name, {"shape": SHAPES[arguments.shape]} | summary(rows) | {"rounds": rows})


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per precision: median seconds by engine and phase, their ratio, and what the engine needs beside the trainer."""
    result: dict[str, Any] = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of = {e: [r for r in rows if (r["precision"], r["engine"]) == (precision, e)] for e in ENGINES}
        totals = {e: [sum(row[phase] for phase in PHASES) for row in of[e]] for e in ENGINES}
        ratios = [slow / fast for slow, fast in zip(totals["transformers"], totals["vllm"], strict=True)]
        sync = median(row["sync"] for row in of["vllm"])
        result[precision] = {
            "transformers_over_vllm": median(ratios),
            "transformers_over_vllm_range": [min(ratios), max(ratios)],
            "seconds": {e: {phase: median(row[phase] for row in of[e]) for phase in PHASES} for e in ENGINES},
            "sync_seconds_per_100m_parameters": sync / of["vllm"][0]["parameters"] * 1e8,
            "added_mib": {e: median(row["added_mib"] for row in of[e]) for e in ENGINES},
            "added_beyond_weights_mib": median(r["added_mib"] - r["engine_weights_mib"] for r in of["vllm"]),
            "limit": limit(of["vllm"], median(totals["transformers"])),
        }
    return result


def limit(rows: list[dict[str, Any]], transformers: float) -> dict[str, float]:
    """What the ratio would be if generating were nothing but products of matrices at the fastest rate that was seen."""
    rate = max(row["operations_per_second"] for row in rows)
    generate = median(row["operations"] for row in rows) / rate
    at_best = transformers / (generate + median(row["score"] for row in rows))
    return {"operations_per_second": rate, "generate_seconds": generate, "transformers_over_vllm": at_best}


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run :func:`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stderr)
    return json.loads(lines[0].removeprefix("RESULT "))


def measure(folder: str, engine: str, precision: str, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Seconds of each phase after a warm-up round, and the memory that the engine added to the trainer's."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, tokenizer = load_policy(folder, dtype), load_tokenizer(folder)
    process = psutil.Process()
    requests = [Prompt("", tuple(ids), key) for key, ids in enumerate(prompts)]
    score(model, requests[:1], [[1] * new_tokens])
    before = process.memory_info().rss
    choice = EngineChoice(engine, "asked for")
    rollout = start_engine(choice, model, tokenizer, max_length=len(prompts[0]) + new_tokens, batch_size=len(prompts))
    seconds: dict[str, float] = {}
    for sampling in (Sampling(8), Sampling(new_tokens, seed=1)):
        start = time.perf_counter()
        rollout.load_weights(model)
        seconds["sync"] = time.perf_counter() - start
        completions = rollout.generate(requests, sampling)
        seconds["generate"] = time.perf_counter() - start - seconds["sync"]
        added = process.memory_info().rss - before
        begin = time.perf_counter()
        score(model, requests, [completion.ids for completion in completions])
        seconds["score"] = time.perf_counter() - begin
    parameters = sum(p.numel() for p in model.parameters())
    own = parameters * dtype.itemsize / MIB if engine == "vllm" else 0.0
    tokens = sum(len(c.ids) for c in completions)
    head, places = (model.get_parameter(f"transformer.{name}.weight").numel() for name in ("wte", "wpe"))
    layers = parameters - head - places
    operations = 2 * (layers * (tokens + sum(len(p.ids) for p in requests)) + head * tokens)
    return {
        **seconds,
        "tokens": tokens,
        "added_mib": added / MIB,
        "engine_weights_mib": own,
        "parameters": parameters,
        "operations": operations,
        "operations_per_second": product_rate(dtype),
    }


def product_rate(dtype: torch.dtype) -> float:
    """Additions and multiplications a second in a product that is large enough to reach the machine's peak."""
    a, b = torch.randn(4096, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * a.numel() * b.shape[1] / min(seconds)


@torch.no_grad()
def score(model: Any, prompts: list[Prompt], completions: list[list[int]]) -> None:
    """Log-probabilities in micro-batches of 8, as the trainer computes them."""
    for first in range(0, len(prompts), 8):
        rows = slice(first, first + 8)
        response_logprobs(model, [p.ids for p in prompts[rows]], completions[rows], pad_id=0)


if __name__ == "__main__":
    main()
