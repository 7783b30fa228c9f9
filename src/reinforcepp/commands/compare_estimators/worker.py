"""The worker process of ``compare_algorithms``: one run of one estimator.

Its standard input is JSON with the settings of the training, and its argument a folder, to which it writes ``result.json`` and
the metric log.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

from reinforcepp.config import TrainConfig
from reinforcepp.data import load_prompts
from reinforcepp.errors import TrainingDiverged
from reinforcepp.files import write_json
from reinforcepp.monitoring import LOGS, read_metrics
from reinforcepp.training.reinforce_trainer import ReinforceTrainer

PHASES = ("rollout", "score", "update", "sync")


def run(config: TrainConfig, *, split_seed: int) -> dict[str, Any]:
    """Train with ``config`` and return the metrics of every evaluation and of the steps, and whether training diverged.

    ``split_seed`` selects the held-out prompts, which are the same in all compared runs.
    """
    _, train_rows, heldout_rows = load_prompts(
        config.data,
        heldout_fraction=config.heldout_fraction,
        seed=split_seed,
        **config.column_names,
        renamed=config.renamed,
        max_bad_rows=config.max_bad_rows,
        streaming=config.streaming,
    )
    trainer = ReinforceTrainer(
        config.model, config.reward_sources, config, train_rows, eval_dataset=heldout_rows, judge=config.judge_name
    )
    diverged = None
    try:
        trainer.train()
    except TrainingDiverged as error:
        diverged = str(error)
    finally:
        trainer.engine.close()
    log = read_metrics(Path(config.output_dir))
    steps = {name: _step(name, len(log)) for name in trainer.evaluations}
    return {
        "estimator": config.estimator,
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "completions": config.completions_per_step,
        "diverged": diverged,
        "evaluations": [
            {
                "step": steps[name],
                "seconds": sum(m["step_time"] for m in log[: steps[name]]),
                "tokens": log[steps[name] - 1]["num_tokens"] if steps[name] else 0.0,
                **evaluation.metrics(),
            }
            for name, evaluation in trainer.evaluations.items()
        ],
        "phase_seconds": {phase: median(m.get(f"time/{phase}", 0.0) for m in log) for phase in PHASES} if log else {},
        "step_seconds": median(m["step_time"] for m in log) if log else None,
        "largest_kl": max((m["kl"] for m in log if "kl" in m), default=0.0),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1024 if sys.platform != "darwin" else 2**20),
    }


def _step(name: str, last: int) -> int:
    """Return the step of the evaluation ``before``, ``step N`` or ``after``."""
    if name.startswith("step "):
        return int(name.removeprefix("step "))
    return 0 if name == "before" else last


def main() -> None:
    """Run the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    config = TrainConfig(**job["settings"])
    result = run(config, split_seed=job["split_seed"])
    for name in LOGS:
        shutil.copy(Path(config.output_dir) / name, folder)
    shutil.rmtree(config.output_dir)  # the trained models of many runs would fill the disk
    write_json(folder / "result.json", result)


if __name__ == "__main__":
    main()
