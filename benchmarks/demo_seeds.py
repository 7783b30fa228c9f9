"""The demo with seeds 0 to 4: what it reaches on held-out prompts, into benchmarks/results/demo_seeds.json.

python benchmarks/demo_seeds.py [--rollout vllm] [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from results import write_result

from reinforcepp.commands.demo import run_demo
from reinforcepp.config import DemoConfig

TARGETS = {"rm_accuracy": 0.90, "gold_before": 0.60, "gold_after": 0.90, "length_factor": 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rollout", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--name", default="demo_seeds", help="name of the result file")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = DemoConfig(output_dir=str(Path(folder) / "demo"), seed=seed, rollout=arguments.rollout)
            rows.append(asdict(run_demo(config)))
    met = all(
        row["rm_accuracy"] >= TARGETS["rm_accuracy"]
        and row["gold_before"] <= TARGETS["gold_before"]
        and row["gold_after"] >= TARGETS["gold_after"]
        and 1 / TARGETS["length_factor"] <= row["length_ratio"] <= TARGETS["length_factor"]
        for row in rows
    )
    write_result(arguments.name, {"rollout": arguments.rollout, "targets": TARGETS, "targets_met": met, "rows": rows})


if __name__ == "__main__":
    main()
