"""A long training: does memory, the number of open files or disk use grow?

python benchmarks/soak.py [--steps 600]

The built-in model and data with the demo's reward model, small batches, a checkpoint every 20 steps. After every step the
resident memory, the open files and the size of the run's folder are noted. Written to benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

from reinforcepp.commands.demo import demo_settings
from reinforcepp.config import DemoConfig, TrainConfig
from reinforcepp.data import load_prompts
from reinforcepp.training.reinforce_trainer import ReinforceTrainer
from reinforcepp.training.reward_trainer import train_reward_model

SETTLED = 50
"""Steps after which memory should have stopped growing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rollout", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--name", default="soak")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = train(Path(folder), arguments)
    write_result(arguments.name, summary(rows) | {"rows": rows})


def train(folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train, and look at the process after every step."""
    reward, demo = demo_settings(DemoConfig(), folder)
    train_reward_model(reward)
    own = {
        "batch_size": arguments.batch_size,
        "micro_batch_size": arguments.batch_size,
        "max_steps": arguments.steps,
        "max_new_tokens": 32,
        "eval_prompts": 8,
        "eval_every": 100,
        "save_every": 20,
        "rollout": arguments.rollout,
    }
    config = TrainConfig(**(vars(demo) | own))
    _, prompts, heldout = load_prompts(config.data, heldout_fraction=0, seed=0)
    trainer = ReinforceTrainer(config.model, config.reward_model, config, prompts, eval_dataset=heldout)
    rows: list[dict[str, float]] = []
    record = trainer.run.record

    def look(*positional: Any) -> None:
        record(*positional)
        rows.append(
            {
                "step": len(rows) + 1,
                "rss_mib": resident_mib(),
                "open_files": len(os.listdir("/proc/self/fd")),
                "disk_mib": sum(p.stat().st_size for p in trainer.folder.rglob("*") if p.is_file()) / 2**20,
            }
        )

    trainer.run.record = look  # type: ignore[method-assign]
    trainer.train()
    trainer.engine.close()
    return rows


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """How each figure moves once the run has settled."""
    settled = rows[SETTLED:]
    steps = np.array([row["step"] for row in settled])
    memory = np.array([row["rss_mib"] for row in settled])
    return {
        "steps": len(rows),
        "rss_slope_mib_per_100_steps": float(np.polyfit(steps, memory, 1)[0] * 100),
        "rss_mib": {
            "settled": float(memory[:20].mean()),
            "end": float(memory[-20:].mean()),
            "peak": float(memory.max()),
        },
        "fd_growth": settled[-1]["open_files"] - settled[0]["open_files"],
        "disk_mib": {"settled": max(row["disk_mib"] for row in settled[:40]), "end": settled[-1]["disk_mib"]},
    }


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
