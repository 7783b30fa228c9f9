"""Compare vLLM with transformers: the same prompts and settings, with each generation method in its own process.

Every round runs all methods. The order rotates from round to round, so that a change in the load of the computer affects
all methods equally. The results are the median, minimum and maximum of the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from reinforcepp.errors import RolloutError
from reinforcepp.runtime.process import python_path
from reinforcepp.runtime.terminal import Console, echo
from reinforcepp.types import Sampling

WAYS = {
    "one_by_one": "one by one",
    "batched": "batched",
    "engine": "our engine",
    "vllm": "vLLM",
}
"""Generation methods with their titles.

``one_by_one`` and ``batched`` call ``generate`` of transformers. ``engine`` is the transformers engine of this package.
"""
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """Inputs of the comparison: a saved model, tokenized prompts, and the sampling."""

    model: str
    prompts: Prompts
    sampling: Sampling
    dtype: str = "float32"
    batch_sizes: Sequence[int] = (1, 8, 32)
    rounds: int = 3
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of ``VllmEngine``."""

    @property
    def sizes(self) -> list[int]:
        """Batch sizes to measure: the requested ones and the number of prompts."""
        return sorted({*self.batch_sizes, len(self.prompts)})

    @property
    def headline(self) -> int:
        """Batch size of the speed ratios: the number of prompts or, with one prompt, the largest batch of copies."""
        return len(self.prompts) if len(self.prompts) > 1 else self.sizes[-1]

    def batch(self, size: int) -> list[list[int]]:
        """Return ``size`` prompts, starting again with the first one if there are fewer."""
        return [list(self.prompts[i % len(self.prompts)]) for i in range(size)]


class Process:
    """The worker process of a generation method, which stays alive between rounds."""

    def __init__(self, way: str, comparison: Comparison) -> None:
        self.way = way
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed below
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "reinforcepp.commands.engine_benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env=_environment(),
        )
        start = time.perf_counter()
        longest = max(map(len, comparison.prompts)) + comparison.sampling.max_new_tokens
        self.base_rss_mib = self.ask(
            way=way,
            model=comparison.model,
            dtype=comparison.dtype,
            max_length=longest,
            largest=comparison.sizes[-1],
            vllm=dict(comparison.vllm),
        )["peak_rss_mib"]
        self.startup_seconds = time.perf_counter() - start

    def ask(self, **job: Any) -> dict[str, Any]:
        """Send a job to the worker and return its result.

        Raises:
            RolloutError: If the worker fails or exits.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise RolloutError(f"The process for {WAYS[self.way]} ended with code {self._process.wait()}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RolloutError(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def _environment() -> dict[str, str]:
    """Return environment variables with which a worker finds this package, and its idle threads sleep soon."""
    return {"GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": python_path()}


# --- measurement ----------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, ways: Sequence[str] = tuple(WAYS)) -> dict[str, Any]:
    """Measure the methods ``ways``, which must include ``one_by_one``, and return all results, ready for JSON."""
    with ExitStack() as stack:
        processes = {}
        for way in ways:
            echo(f"Starting {WAYS[way]} ...")
            processes[way] = Process(way, comparison)
            stack.callback(processes[way].close)
        quality = _greedy(processes, comparison)
        rounds: list[Any] = []
        for turn in range(comparison.rounds):
            echo(f"Round {turn + 1} of {comparison.rounds} ...")
            order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            rounds += [_run(processes[way], comparison, size, turn) for size in comparison.sizes for way in order]
        rounds = [measured for measured in rounds if measured is not None]
        memory = processes["one_by_one"].ask(do="bandwidth")  # It allocates memory, so it comes last.
    rows = _summary(rounds, memory)
    started = {way: p.startup_seconds for way, p in processes.items()}
    peaks = {way: max(row["peak_rss_mib"] for row in rows if row["way"] == way) for way in ways}
    return {
        **_headline(rows, comparison, quality),
        "quality": quality,
        "startup_seconds": started,
        "first_run_seconds": {way: q["first_run_seconds"] for way, q in quality.items()},
        "peak_rss_mib": peaks,
        "memory_bandwidth_gb_per_second": memory["bytes_per_second"] / 1e9,
        "weight_bytes": memory["weight_bytes"],
        "headline_batch_size": comparison.headline,
        "summary": rows,
        "rounds": rounds,
        "settings": {
            **asdict(comparison.sampling),
            "model": comparison.model,
            "dtype": comparison.dtype,
            "prompts": len(comparison.prompts),
            "longest_prompt": max(map(len, comparison.prompts)),
            "batch_sizes": comparison.sizes,
            "rounds": comparison.rounds,
        },
    }


def _run(process: Process, comparison: Comparison, size: int, turn: int) -> dict[str, Any] | None:
    """Measure one method with one batch size once; return None for one-by-one generation with another batch size.

    One by one, a batch is only a longer queue, so only the given prompts are measured.
    """
    if process.way == "one_by_one" and size != len(comparison.prompts):
        return None
    sampling = asdict(comparison.sampling) | {"seed": comparison.sampling.seed + turn}
    answer = process.ask(do="run", prompts=comparison.batch(size), sampling=sampling)
    latencies = sorted(answer["latencies"])
    return {
        "way": process.way,
        "batch_size": size,
        "round": turn,
        "seconds": answer["seconds"],
        "tokens": answer["tokens"],
        "tokens_per_second": answer["tokens"] / answer["seconds"],
        "latency_median": median(latencies),
        "latency_p95": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        "longest_answer": max(map(len, answer["ids"])),
        "peak_rss_mib": answer["peak_rss_mib"],
        "peak_gpu_mib": answer["peak_gpu_mib"],
    }


def _greedy(processes: Mapping[str, Process], comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Generate greedily once, as a warmup, and return how well each method agrees with one-by-one generation."""
    sampling = asdict(comparison.sampling) | {"temperature": 0.0, "num_samples": 1}
    prompts = [list(ids) for ids in comparison.prompts]
    answers = {way: process.ask(do="run", prompts=prompts, sampling=sampling) for way, process in processes.items()}
    plain = answers["one_by_one"]["ids"]
    quality: dict[str, dict[str, Any]] = {}
    for way, answer in answers.items():
        agreeing = sum(_common(a, b) for a, b in zip(plain, answer["ids"], strict=True))
        quality[way] = {
            "first_run_seconds": answer["seconds"],
            "greedy_agreement": agreeing / sum(map(len, plain)),
            "same_answers": sum(a == b for a, b in zip(plain, answer["ids"], strict=True)) / len(plain),
        }
        if answer["logprobs"] is not None:
            plain_logprobs = processes["one_by_one"].ask(do="score", prompts=prompts, completions=answer["ids"])[
                "logprobs"
            ]
            gaps = [
                abs(a - b)
                for x, y in zip(plain_logprobs, answer["logprobs"], strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            quality[way] |= {"max_logprob_gap": max(gaps), "mean_logprob_gap": sum(gaps) / len(gaps)}
    return quality


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens before the first difference. Later tokens have different contexts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _summary(rounds: Sequence[Mapping[str, Any]], memory: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return medians over the rounds by method and batch size.

    ``bandwidth_fraction`` is steps/second * bytes of weights / memory bandwidth, because each decoding step reads the
    weights at least once. The time to process the prompts is included.
    """
    rows = []
    for way, size in sorted(
        {(r["way"], r["batch_size"]) for r in rounds}, key=lambda k: (k[1], list(WAYS).index(k[0]))
    ):
        matching = [r for r in rounds if (r["way"], r["batch_size"]) == (way, size)]
        rates = [r["tokens_per_second"] for r in matching]
        steps = [(r["tokens"] if way == "one_by_one" else r["longest_answer"]) / r["seconds"] for r in matching]
        rows.append(
            {
                "way": way,
                "batch_size": size,
                "tokens_per_second": median(rates),
                "tokens_per_second_min": min(rates),
                "tokens_per_second_max": max(rates),
                **{k: median(r[k] for r in matching) for k in ("seconds", "latency_median", "latency_p95")},
                "peak_rss_mib": max(r["peak_rss_mib"] for r in matching),
                "bandwidth_fraction": median(steps) * memory["weight_bytes"] / memory["bytes_per_second"],
            }
        )
    return rows


def _headline(
    rows: Sequence[Mapping[str, Any]], comparison: Comparison, quality: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return the five main metrics of the comparison; they are None if vLLM wasn't measured."""
    rate = {(row["way"], row["batch_size"]): row["tokens_per_second"] for row in rows}
    size = comparison.headline
    if ("vllm", size) not in rate:
        return dict.fromkeys(
            ["vllm_over_one_by_one", "vllm_over_batched", "greedy_agreement", "max_logprob_gap", "bandwidth_fraction"]
        )
    smallest = next(row for row in rows if row["way"] == "vllm")
    return {
        "vllm_over_one_by_one": rate["vllm", size] / rate["one_by_one", len(comparison.prompts)],
        "vllm_over_batched": rate["vllm", size] / rate["batched", size] if ("batched", size) in rate else None,
        "greedy_agreement": quality["vllm"]["greedy_agreement"],
        "max_logprob_gap": quality["vllm"]["max_logprob_gap"],
        "bandwidth_fraction": smallest["bandwidth_fraction"],
    }


# --- output ---------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    """Print the summary as a table, followed by the metrics without a batch size."""
    from rich.table import Table

    settings = result["settings"]
    table = Table(title=f"{settings['model']}, {settings['dtype']}, {settings['max_new_tokens']} new tokens")
    table.add_column("method")
    for name in ("batch", "tokens/s", "min to max", "total, s", "latency, s", "p95, s", "bandwidth"):
        table.add_column(name, justify="right")
    for row in result["summary"]:
        spread = f"{row['tokens_per_second_min']:.0f} to {row['tokens_per_second_max']:.0f}"
        seconds = [f"{row[key]:.2f}" for key in ("seconds", "latency_median", "latency_p95")]
        size = "1" if row["way"] == "one_by_one" else str(row["batch_size"])
        share = f"{row['bandwidth_fraction']:.0%}"
        table.add_row(WAYS[row["way"]], size, f"{row['tokens_per_second']:.1f}", spread, *seconds, share)
    console = Console()
    console.print(table)
    for way, start in result["startup_seconds"].items():
        quality = result["quality"][way]
        gap = f", log-probs within {quality['max_logprob_gap']:.2g}" if "max_logprob_gap" in quality else ""
        console.print(
            f"{WAYS[way]}: start {start:.1f} s, first run {quality['first_run_seconds']:.1f} s, peak memory "
            f"{result['peak_rss_mib'][way]:.0f} MiB, {quality['greedy_agreement']:.1%} of greedy tokens agree{gap}"
        )
    if result["vllm_over_one_by_one"] is not None:
        over = result["vllm_over_batched"]
        batched = f" and {over:.1f} times as fast as batched transformers" if over is not None else ""
        console.print(
            f"At batch size {result['headline_batch_size']}, vLLM is {result['vllm_over_one_by_one']:.1f} times as fast as "
            f"one-by-one generation{batched}.",
            style="bold",
        )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot tokens per second by batch size to ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for way, color in zip(WAYS, ("#777777", "#1f5fa8", "#2a9d6f", "#d1495b"), strict=True):
        rows = [row for row in result["summary"] if row["way"] == way]
        if not rows:
            continue
        if way == "one_by_one":
            axes.axhline(rows[0]["tokens_per_second"], color=color, linestyle="--", label=WAYS[way])
            continue
        sizes, rates = [r["batch_size"] for r in rows], [r["tokens_per_second"] for r in rows]
        axes.plot(sizes, rates, marker="o", color=color, label=WAYS[way])
        low, high = ([r[f"tokens_per_second_{end}"] for r in rows] for end in ("min", "max"))
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    sizes = sorted({row["batch_size"] for row in result["summary"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="batch size", ylabel="tokens per second", title=result["settings"]["dtype"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
