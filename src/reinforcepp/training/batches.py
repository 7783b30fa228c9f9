"""The batches of a step: the scored rollout batch, and its optimizer batches.

Rows are chosen by pure functions of seed, step and lengths. A resumed run therefore uses the same rows, and no
row is lost or repeated, whether or not the sizes divide each other.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reinforcepp.algorithm.advantages import compute_advantages
from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.config import ReinforceConfig
from reinforcepp.files import write_json
from reinforcepp.models.tokenization import pad_values
from reinforcepp.rewards.functions import Dropped, RewardScores, join_scores
from reinforcepp.rollout.engine import request_seed
from reinforcepp.rollout.serialization import as_rows, from_rows
from reinforcepp.types import Completion, Prompt, RolloutBatch

if TYPE_CHECKING:
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.rewards.sources import RewardSum
    from reinforcepp.training.checkpoint import Checkpoint

TENSORS_FILE, DETAILS_FILE = "rollout", "rollout.json"
SKIPPED_KEY = "left_out"
"""The name of ``RewardScores.skipped`` in a checkpoint, which keeps the format of version 0.1.0."""
UPDATE_TENSORS = ("advantages_BT", "returns_BT", "values_BT")


def optimizer_batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield the row numbers of each optimizer step; shuffled if there are several steps. The last one can be short."""
    order = list(range(rows))
    if size < rows:
        random.Random(seed).shuffle(order)
    for start in range(0, rows, size):
        yield order[start : start + size]


def planned_batches(config: ReinforceConfig, rows: int, step: int) -> list[list[int]]:
    """Return the row numbers of each optimizer step of a training step, over all iterations."""
    size = config.optimizer_batch_size
    return [
        chosen
        for iteration in range(config.num_iterations)
        for chosen in optimizer_batches(rows, size, request_seed(config.seed, step, iteration))
    ]


def turn_rewards(episodes: Sequence[Completion], rewards: RewardSum) -> Tensor:
    """Return the part of the reward that each turn of the policy but the last earned, at its last token. -> (B, T)"""
    rewards_BT = pad_values([[0.0] * len(episode.ids) for episode in episodes])
    for row, episode in enumerate(episodes):
        weight = rewards.turn_weight(episode)
        for turn in [turn for turn in episode.turns if turn.sampled][:-1]:
            rewards_BT[row, turn.stop - 1] = weight * (turn.reward or 0.0)
    return rewards_BT


def batch_advantages(
    batch: RolloutBatch,
    config: ReinforceConfig,
    kl_coef: float,
    *,
    on_policy: bool,
    values_BT: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """Return ``(advantages_BT, returns_BT)`` by the estimator that ``config`` names, normalized over all ranks.

    With ``on_policy`` the engine's log-probabilities stand for the policy's, which the update has yet to compute.
    """
    policy_BT = batch.rollout_logprobs_BT if on_policy else batch.old_logprobs_BT
    return compute_advantages(
        batch.rewards_B,
        kl_estimate(policy_BT, batch.ref_logprobs_BT, "k1"),
        batch.mask_BT,
        kl_coef=0.0 if config.estimator_spec.kl_in_loss else kl_coef,
        gamma=config.gamma,
        discount_per=config.discount_per,
        turn_rewards_BT=batch.turn_rewards_BT,
        estimator=config.estimator,
        group_ids_B=batch.group_ids_B,
        scale=config.advantage_scale,
        normalize_over=config.normalize_over,
        values_BT=values_BT,
        gae_lambda=config.gae_lambda,
        sum_over_ranks=sum_over_ranks,
    )


@dataclass
class UpdateBatch:
    """The rollout batch of all ranks with its advantages, and the statistics of the optimizer steps made so far.

    Each rank generates and scores its own prompts. Then every rank gets the whole batch, because the choice of rows, the
    metrics and the guardrails must not depend on the number of ranks. A checkpoint in the middle of a step holds this
    batch; ``returns_BT`` are the critic's targets, ``values_BT`` its values before the update.
    """

    rollout: RolloutBatch
    scores: RewardScores
    advantages_BT: Tensor
    returns_BT: Tensor
    values_BT: Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def mean_stats(self) -> dict[str, float]:
        """Return the mean of each statistic over the optimizer steps, and the number of skipped steps."""
        stats: dict[str, list[float]] = {}
        for row in self.history:
            for name, value in row.items():
                stats.setdefault(name, []).append(value)
        mean = {name: sum(values) / len(values) for name, values in stats.items()}
        return mean | {"skipped_updates": sum(stats["skipped_updates"])}

    def gather(self, ranks: Ranks) -> UpdateBatch:
        """Return the rows of all ranks, in the order of the ranks."""
        if ranks.count == 1:
            return self
        parts = ranks.gather((self.rollout.completions, self.scores, self._tensors()))
        width = max(tensors["mask_BT"].shape[1] for _, _, tensors in parts)
        joined = {
            name: torch.cat([_padded(tensors[name], width) for _, _, tensors in parts]).to(ranks.device)
            for name in parts[0][2]
        }
        return _update_batch(
            [completion for completions, _, _ in parts for completion in completions],
            join_scores([scores for _, scores, _ in parts]),
            joined,
            [],
        )

    def save(self, folder: Path) -> None:
        """Write the batch to two files; the prompts are omitted, because data, seed and step determine them."""
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        save_file(tensors, folder / f"{TENSORS_FILE}.safetensors")
        rows = as_rows(self.rollout.completions)
        scores = {
            "total": self.scores.total,
            "by_function": self.scores.by_function,
            SKIPPED_KEY: self.scores.skipped,
            "metrics": self.scores.metrics,
            "extra": self.scores.extra,
            "counts": self.scores.counts,
            "dropped": self.scores.dropped,
        }
        write_json(folder / DETAILS_FILE, {"completions": rows, "scores": scores, "history": self.history})

    @staticmethod
    def load(saved: Checkpoint, prompts: Sequence[Prompt], device: torch.device) -> UpdateBatch | None:
        """Read the batch from a checkpoint, None if it holds none; ``prompts`` are those of the step."""
        if not (saved.folder / DETAILS_FILE).is_file():
            return None
        details = json.loads((saved.folder / DETAILS_FILE).read_text(encoding="utf-8"))
        tensors = {name: value.to(device) for name, value in saved.tensors(TENSORS_FILE).items()}
        completions, scores = from_rows(details["completions"], prompts), details["scores"]
        logged = scores.get("metrics", {}), scores.get("extra", {}), scores.get("counts", {})
        dropped = [Dropped(*each) for each in scores.get("dropped", ())]
        reward_scores = RewardScores(scores["total"], scores["by_function"], scores[SKIPPED_KEY], *logged, dropped)
        return _update_batch(completions, reward_scores, tensors, details["history"])

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, on the CPU."""
        tensors = {f.name: getattr(self.rollout, f.name) for f in fields(RolloutBatch) if f.name != "completions"}
        tensors |= {name: getattr(self, name) for name in UPDATE_TENSORS}
        return {name: value.detach().cpu() for name, value in tensors.items() if value is not None}


def _update_batch(
    completions: list[Completion], scores: RewardScores, tensors: dict[str, Tensor], history: list[dict[str, float]]
) -> UpdateBatch:
    update = {name: tensors.pop(name) for name in UPDATE_TENSORS if name in tensors}
    return UpdateBatch(RolloutBatch(completions=completions, **tensors), scores, history=history, **update)


def _padded(tensor: Tensor, width: int) -> Tensor:
    return nn.functional.pad(tensor, (0, width - tensor.shape[1])) if tensor.ndim == 2 else tensor
