"""Metrics of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.config.reward_rules import repeated_share
from reinforcepp.monitoring.completion_log import columns_of
from reinforcepp.rewards.functions import RewardScores
from reinforcepp.types import RolloutBatch

NGRAM_LENGTH = 4


def step_metrics(batch: RolloutBatch, scores: RewardScores, reward_clip: float | None = None) -> dict[str, float]:
    """Return metrics of one rollout batch after its update, under TRL's keys; ``kl`` is the token mean of k3, in nats.

    ``completions/left_out_ratio`` is the share of skipped completions: no reward scored them, or they remained alone in a
    group whose estimator compares completions. The key is present only if there are any; other metrics exclude them.
    ``completions/repeated_ratio`` is the mean share of word 4-grams that repeat within a completion, ``reward_top_ratio`` is
    the share of completions with the highest reward of the batch.
    """
    rewards_B = torch.tensor(scores.known)
    lengths = [len(c.ids) for c in batch.completions]
    clipped = [c.finish_reason == "length" for c in batch.completions]
    kl_BT = kl_estimate(batch.old_logprobs_BT, batch.ref_logprobs_BT, "k3")
    return {
        "reward": float(rewards_B.mean()),
        "reward_std": float(rewards_B.std(correction=0)),
        "reward_top_ratio": float((rewards_B == rewards_B.max()).float().mean()),
        **(
            {}
            if reward_clip is None
            else {"reward_clipped_ratio": float((rewards_B.abs() > reward_clip).float().mean())}
        ),
        **_groups_without_signal(batch, rewards_B),
        **_by_function(scores),
        **scores.metrics,
        "kl": float(masked_mean(kl_BT, batch.mask_BT)),
        "entropy": float(masked_mean(batch.entropy_BT, batch.mask_BT)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(clipped) / len(clipped),
        "completions/distinct_ratio": len({c.ids for c in batch.completions}) / len(lengths),
        "completions/repeated_ratio": sum(repeated_share(c.text, NGRAM_LENGTH) for c in batch.completions)
        / len(lengths),
        "num_tokens": float(sum(lengths) + sum(len(c.prompt.ids) for c in batch.completions)),
        **_sampling_gap(batch),
    }


def rollout_columns(batch: RolloutBatch, scores: RewardScores, step: int) -> dict[str, Sequence[Any]]:
    """Return the batch as a table with one row per completion, see ``completion_log``."""
    kl_BT = kl_estimate(batch.old_logprobs_BT, batch.ref_logprobs_BT, "k3") * batch.mask_BT
    kl_B = kl_BT.sum(1) / batch.mask_BT.sum(1).clamp(min=1)
    known = columns_of(batch.completions)
    return {
        "step": [step] * len(batch.completions),
        **{name: known.pop(name) for name in ("prompt", "completion")},
        "reward": scores.total,
        **{f"reward/{name}": values for name, values in scores.by_function.items()},
        **{f"extra/{name}": values for name, values in scores.extra.items()},
        "kl": [round(value, 8) for value in kl_B.tolist()],
        **known,
    }


def _by_function(scores: RewardScores) -> dict[str, float]:
    """Return each function's unweighted mean over the completions that it scored, and the share of skipped completions."""
    known = {name: [score for score in values if score is not None] for name, values in scores.by_function.items()}
    means = {f"rewards/{name}/mean": sum(values) / len(values) for name, values in known.items() if values}
    if not scores.skipped:
        return means
    return means | {"completions/left_out_ratio": scores.skipped / (scores.skipped + len(scores.total))}


def _groups_without_signal(batch: RolloutBatch, rewards_B: torch.Tensor) -> dict[str, float]:
    """Return the share of groups whose completions all have the same reward, if groups have several completions."""
    groups: dict[int, list[float]] = {}
    for key, reward in zip(batch.group_ids_B.tolist(), rewards_B.tolist(), strict=True):
        groups.setdefault(key, []).append(reward)
    compared = [rewards for rewards in groups.values() if len(rewards) > 1]
    if not compared:
        return {}
    return {"frac_reward_zero_std": sum(min(rewards) == max(rewards) for rewards in compared) / len(compared)}


def _sampling_gap(batch: RolloutBatch) -> dict[str, float]:
    """Return the gap between the engine's and the trainer's log-probabilities of the sampled tokens."""
    gap_BT = batch.rollout_logprobs_BT - batch.old_logprobs_BT
    return {
        "sampling/logprob_gap_mean": float(masked_mean(gap_BT.abs(), batch.mask_BT)),
        "sampling/logprob_gap_max": float(gap_BT.abs().max()),
        "sampling/kl": float(masked_mean(kl_estimate(gap_BT, torch.zeros_like(gap_BT), "k3"), batch.mask_BT)),
    }
