"""Rollout workers of a Ray pool killed at random: is every prompt answered once, and does training learn the same?

    python benchmarks/ray_kill.py [--steps 24] [--every 5]

A cluster of three nodes on this machine, a worker on each of two. The same training runs twice: left alone, and with a worker
killed every few seconds, in the middle of its answers, by a signal that can't be
caught. What is sampled depends on seed and prompt alone, so both have to
end with the same weights, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from results import write_result

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.data import load_prompts
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_policy, load_tokenizer, weights_hash
from reinforcepp.monitoring import read_metrics
from reinforcepp.rollout.ray.engine import RayEngine
from reinforcepp.types import Completion, Prompt, Sampling

MODEL = "builtin:tiny"


class Watched(RayEngine):
    """Counts how often each prompt that was asked was answered."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.asked = self.answered_once = 0
        super().__init__(*arguments, **settings)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        completions = super().generate(prompts, sampling)
        answers = Counter(completion.prompt.key for completion in completions)
        self.asked += len(prompts)
        self.answered_once += sum(answers[prompt.key] == sampling.num_samples for prompt in prompts)
        return completions


def answering() -> list[psutil.Process]:
    """Processes of workers in the middle of a chunk, by the names that Ray gives them."""
    started = psutil.Process().children(recursive=True)
    return [p for p in started if p.cmdline() and p.cmdline()[0].startswith("ray::Worker.process")]


def killing(every: float, stop: threading.Event, killed: list[int]) -> None:
    draw = random.Random(0)
    while not stop.wait(draw.uniform(0.5, 1.5) * every):
        while not (there := answering()) and not stop.wait(0.01):
            pass
        if there:
            victim = draw.choice(there)
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)


def training(address: str, steps: int, every: float | None) -> dict[str, Any]:
    """One training; ``every`` is the mean time between two kills."""
    config = ReinforceConfig(
        max_steps=steps,
        batch_size=16,
        num_generations=4,
        estimator="reinforce_plus_plus_baseline",
        max_new_tokens=256,
        learning_rate=1e-4,
        eval_prompts=0,
        output_dir=tempfile.mkdtemp(),
    )
    model, tokenizer = load_policy(MODEL), with_chat_template(load_tokenizer(MODEL), config)
    engine = Watched(address, model, tokenizer, engine="transformers", workers=2, max_length=400, batch_size=32)
    rows = load_prompts("builtin:network", heldout_fraction=0, seed=0)[1]
    trainer = ReinforceTrainer(model, ["builtin:judge"], config, rows, processing_class=tokenizer, engine=engine)
    stop, killed = threading.Event(), list[int]()
    killer = threading.Thread(target=killing, args=(every or 0.0, stop, killed), daemon=True)
    if every:
        killer.start()
    trainer.train()
    metrics = read_metrics(trainer.folder)
    stop.set()
    engine.close()
    return {
        "prompts": engine.asked,
        "answered_once": engine.answered_once,
        "actors_killed": len(killed),
        "given_out_again": sum(stats.requeued for stats in engine.dispatches),
        "reward_first": metrics[0]["reward"],
        "reward_last": metrics[-1]["reward"],
        "weights": weights_hash(trainer.policy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=float, default=5.0)
    settings = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")  # by default they give way to everything else
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    alone = training(cluster.address, settings.steps, None)
    disturbed = training(cluster.address, settings.steps, settings.every)
    cluster.shutdown()
    write_result(
        "ray_kill",
        {name: disturbed[name] for name in ("prompts", "answered_once", "actors_killed", "given_out_again")}
        | {"same_weights": alone["weights"] == disturbed["weights"], "undisturbed": alone, "disturbed": disturbed},
    )


if __name__ == "__main__":
    main()
