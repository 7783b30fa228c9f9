"""What is measured at a step, and the log it goes to: one JSON object per line and step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from reinforcepp.algorithm import kl_estimate, masked_mean
from reinforcepp.rewards import RewardScores
from reinforcepp.types import RolloutBatch


def step_metrics(batch: RolloutBatch, scores: RewardScores) -> dict[str, float]:
    """Figures of one rollout batch after its update, under the keys that TRL uses; ``kl`` is the token mean of k3, in nats."""
    rewards_B = torch.tensor(scores.total)
    lengths = [len(c.ids) for c in batch.completions]
    clipped = [c.finish_reason == "length" for c in batch.completions]
    kl_BT = kl_estimate(batch.old_logprobs_BT, batch.ref_logprobs_BT, "k3")
    return {
        "reward": float(rewards_B.mean()),
        "reward_std": float(rewards_B.std(correction=0)),
        **{f"rewards/{name}/mean": sum(s) / len(s) for name, s in scores.by_function.items()},
        "kl": float(masked_mean(kl_BT, batch.mask_BT)),
        "entropy": float(masked_mean(batch.entropy_BT, batch.mask_BT)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(clipped) / len(clipped),
        "num_tokens": float(sum(lengths) + sum(len(c.prompt.ids) for c in batch.completions)),
        **_sampling_gap(batch),
    }


def _sampling_gap(batch: RolloutBatch) -> dict[str, float]:
    """How far the engine's log-probabilities of what it sampled are from the trainer's."""
    gap_BT = batch.rollout_logprobs_BT - batch.old_logprobs_BT
    return {
        "sampling/logprob_gap_mean": float(masked_mean(gap_BT.abs(), batch.mask_BT)),
        "sampling/logprob_gap_max": float(gap_BT.abs().max()),
        "sampling/kl": float(masked_mean(kl_estimate(gap_BT, torch.zeros_like(gap_BT), "k3"), batch.mask_BT)),
    }


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self._laps[f"time/{phase}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """``time/PHASE`` for each phase, and ``step_time`` for all."""
        return {**self._laps, "step_time": self._last - self._begin}


class MetricLog:
    """Appends to ``metrics.jsonl``; opened at a byte position, it forgets what came after it."""

    def __init__(self, path: Path, position: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
        self._file.truncate(position)

    @property
    def position(self) -> int:
        """Length of the log in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, metrics: dict[str, float]) -> None:
        """Append one step's metrics, rounded to what a float32 holds."""
        line = {key: round(v, 8) if isinstance(v, float) else v for key, v in metrics.items()}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All steps of a metric log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
