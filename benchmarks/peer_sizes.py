"""How a training step's time and memory grow with the work: ours and TRL's GRPO, the fastest of the peers.

python benchmarks/peer_sizes.py

From the work of benchmarks/peers.py, one thing at a time is made larger: completions, tokens per completion, parameters.
One step is measured of each, the first, when AdamW has no moments yet; benchmarks/peers.py has figures of later steps.
Written to benchmarks/results/peer_sizes_cpu.json, with a plot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peer_worker import SHAPES, make_models
from peers import measured
from results import FOLDER, write_result

TRAINERS = {"ours": "weights", "trl_grpo": "weights"}  # all weights in bfloat16: TRL's faster way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["20m", "82m", "124m"], choices=SHAPES)
    parser.add_argument("--base_shape", default="82m", choices=SHAPES, help="where something else is varied")
    parser.add_argument("--name", default="peer_sizes_cpu")
    arguments = parser.parse_args()
    base = {"shape": arguments.base_shape, "completions": 16, "new_tokens": 64}
    varied = {"completions": arguments.completions, "new_tokens": arguments.new_tokens, "shape": arguments.shapes}
    rows: list[dict[str, Any]] = []
    known: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, values in varied.items():
            for value in values:
                work = base | {what: value}
                models = Path(folder) / str(work["shape"])
                if not models.is_dir():
                    make_models(models, SHAPES[work["shape"]])
                for name, setting in TRAINERS.items():
                    size = argparse.Namespace(**work, steps=1, warm_up=0)
                    place = json.dumps([name, work])
                    if place not in known:
                        found = measured(name, setting, str(models), size)
                        known[place] = {"seconds": median(found["seconds"]), "peak_rss_mib": found["peak_rss_mib"]}
                    rows.append({"varied": what, "trainer": name, **work, **known[place]})
                    print(json.dumps(rows[-1]), flush=True)
    write_result(arguments.name, {"rows": rows})
    plot(rows, varied, FOLDER / f"{arguments.name}.png")


def plot(rows: list[dict[str, Any]], varied: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Seconds and memory of a step against each thing that was varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, len(varied))
    for column, (what, values) in enumerate(varied.items()):
        for axes, key, unit in zip(
            grid[:, column], ("seconds", "peak_rss_mib"), ("seconds of the first step", "peak MiB in it"), strict=True
        ):
            for name, color in zip(TRAINERS, ("#1f5fa8", "#d1812e"), strict=True):
                own = [row[key] for row in rows if (row["varied"], row["trainer"]) == (what, name)]
                axes.plot(range(len(values)), own, marker="o", color=color, label=name)
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set(xlabel=what, ylabel=unit)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    grid[0][0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
