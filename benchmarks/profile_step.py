"""Where the time of a training step goes, before and after the optimisations of benchmarks/ablation.py.

python benchmarks/profile_step.py

The work is that of benchmarks/peers.py, in bfloat16: one step with every optimisation taken out, one with all of them, both
under torch's profiler. Written to benchmarks/results/profile_cpu.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from ablation import WITHOUT, one_step, trainer_in
from peer_worker import SHAPES, make_models
from results import write_result
from torch.profiler import ProfilerActivity, profile

from reinforcepp import ReinforceTrainer

GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkldnn"),
    "attention": ("scaled_dot_product", "attention"),
    "softmax and logarithms": ("softmax", "logsumexp", "exp", "log"),
    "drawing tokens": ("cumsum", "searchsorted", "sort", "topk", "multinomial"),
    "layer norm and activation": ("layer_norm", "gelu", "tanh", "pow"),
    "AdamW": ("adam", "foreach", "lerp", "addcmul", "addcdiv", "sqrt"),
    "copies and conversions": (
        "copy",
        "cat",
        "clone",
        "contiguous",
        "index",
        "gather",
        "scatter",
        "fill",
        "zero",
        "where",
    ),
    "sums and products of elements": ("add", "mul", "sub", "div", "sum", "mean", "neg", "max", "min", "clamp"),
}
REST = "everything else, Python among it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="82m", choices=SHAPES)
    parser.add_argument("--name", default="profile_cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), SHAPES[arguments.shape])
        trainer = trainer_in(Path(folder))
        result = {when: profiled(trainer, plain=when == "before") for when in ("before", "after")}
    write_result(arguments.name, {"shape": SHAPES[arguments.shape]} | result)


def profiled(trainer: ReinforceTrainer, *, plain: bool) -> dict[str, Any]:
    """Seconds of a step's phases without the profiler, and, with it, of each group of operations."""
    with ExitStack() as stack:
        for _, without, _ in WITHOUT.values() if plain else ():
            stack.enter_context(without(trainer))
        one_step(trainer, 0)
        phases = one_step(trainer, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.profiler.record_function("step"):
            one_step(trainer, 2)
    events = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    groups: Counter[str] = Counter()
    for name, seconds in events.items():
        groups[group_of(name)] += seconds
    largest = sorted(events.items(), key=lambda pair: -pair[1])[:15]
    return {"phases": phases, "groups": dict(groups), "operations": dict(largest)}


def group_of(name: str) -> str:
    """Which group an operation's time is counted in."""
    package, _, short = name.rpartition("::")
    if package not in ("aten", "mkldnn"):
        return "AdamW" if "adam" in name.lower() else REST
    parts = set(short.strip("_").split("_"))
    return next(
        (g for g, words in GROUPS.items() if any(w in parts or (len(w) > 4 and w in short) for w in words)), REST
    )


if __name__ == "__main__":
    main()
