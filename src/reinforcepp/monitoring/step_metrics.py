"""Metrics of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.config.reward_rules import repeated_share
from reinforcepp.environments.tools.environment import tool_metrics
from reinforcepp.monitoring.completion_log import columns_of
from reinforcepp.rewards.functions import BATCHES_KEY, RewardScores
from reinforcepp.types import Completion, RolloutBatch

NGRAM_LENGTH = 4


def step_metrics(
    batch: RolloutBatch, scores: RewardScores, reward_bounds: tuple[float, float] | None = None
) -> dict[str, float]:
    """Return metrics of one rollout batch after its update, under TRL's keys.

    ``kl`` is the token mean of k3 in nats, if the reference policy was needed; ``entropy`` needs an unmasked token.

    ``completions/left_out_ratio`` is the share of skipped completions: no reward scored them, or they remained alone in a
    group whose estimator compares completions. The key is present only if there are any; other metrics exclude them.
    ``completions/repeated_ratio`` is the mean share of word 4-grams that repeat within a completion, ``reward_top_ratio`` is
    the share of completions with the highest reward of the batch.
    """
    rewards_B = torch.tensor(scores.known)
    kl_BT = kl_estimate(batch.old_logprobs_BT, batch.ref_logprobs_BT, "k3")
    return {
        **reward_metrics(scores),
        **_dropped_metrics(scores),
        "reward_top_ratio": float((rewards_B == rewards_B.max()).float().mean()),
        **(
            {}
            if reward_bounds is None
            else {"reward_clipped_ratio": float((rewards_B != rewards_B.clamp(*reward_bounds)).float().mean())}
        ),
        **_groups_without_signal(batch, rewards_B),
        **({} if kl_BT.isnan().any() else {"kl": float(masked_mean(kl_BT, batch.mask_BT))}),
        **({"entropy": float(masked_mean(batch.entropy_BT, batch.mask_BT))} if batch.mask_BT.any() else {}),
        **completion_metrics(batch.completions),
        "num_tokens": float(sum(len(c.ids) + len(c.prompt.ids) for c in batch.completions)),
        **_sampling_gap(batch),
    }


def reward_metrics(scores: RewardScores) -> dict[str, float]:
    """Return mean and sample standard deviation of the rewards and of each function's unweighted scores.

    The metrics that functions logged follow, and the share of skipped completions, if there are any. A function without a
    score has no metrics, and a single score has the standard deviation 0.
    """
    found = {"reward": fmean(scores.known), "reward_std": _std(scores.known)}
    for name, values in scores.by_function.items():
        if known := [score for score in values if score is not None]:
            found |= {f"rewards/{name}/mean": fmean(known), f"rewards/{name}/std": _std(known)}
    if scores.skipped:
        found["completions/left_out_ratio"] = scores.skipped / (scores.skipped + len(scores.total))
    return found | scores.metrics | scores.counts


def _dropped_metrics(scores: RewardScores) -> dict[str, float]:
    """Return what dynamic sampling dropped, and the mean reward of all completions that it generated, if it is on."""
    if BATCHES_KEY not in scores.counts:
        return {}
    return {
        "dynamic_sampling/dropped_groups": float(len({each.key for each in scores.dropped})),
        "dynamic_sampling/dropped_completions": float(len(scores.dropped)),
        "dynamic_sampling/dropped_tokens": float(sum(each.tokens for each in scores.dropped)),
        "dynamic_sampling/reward": fmean([*scores.known, *(each.reward for each in scores.dropped)]),
    }


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Return lengths in sampled tokens, the share of truncated completions, and shares of repetition.

    ``completions/*_terminated_length`` are those of the completions that weren't truncated, 0 if all were.
    """
    lengths, terminated = [], []
    for completion in completions:
        length = len(completion.sampled_ids)
        lengths.append(length)
        if completion.finish_reason != "length":
            terminated.append(length)
    ended = terminated or [0]
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "completions/clipped_ratio": (len(lengths) - len(terminated)) / len(lengths),
        "completions/distinct_ratio": len({c.ids for c in completions}) / len(lengths),
        "completions/repeated_ratio": fmean(repeated_share(c.text, NGRAM_LENGTH) for c in completions),
        **_episode_metrics(completions),
    }


def _episode_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Return the means of turns that the policy wrote, and of the environment's tokens, if completions are episodes."""
    if not any(c.turns for c in completions):
        return {}
    return {
        "episodes/mean_turns": fmean(sum(turn.sampled for turn in c.turns) for c in completions),
        "episodes/mean_environment_tokens": fmean(len(c.ids) - len(c.sampled_ids) for c in completions),
        **(tool_metrics(completions) if any("tools" in c.prompt.chat_template_kwargs for c in completions) else {}),
    }


def _std(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


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
        **({} if kl_B.isnan().any() else {"kl": [round(value, 8) for value in kl_B.tolist()]}),
        **known,
    }


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
    """Return the gap between the engine's and the trainer's log-probabilities of the sampled tokens, also under TRL's keys."""
    gap_BT = torch.where(batch.mask_BT.bool(), batch.rollout_logprobs_BT - batch.old_logprobs_BT, 0.0)
    mean, largest = float(masked_mean(gap_BT.abs(), batch.mask_BT)), float(gap_BT.abs().max())
    return {
        "sampling/logprob_gap_mean": mean,
        "sampling/logprob_gap_max": largest,
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": largest,
        "sampling/kl": float(masked_mean(kl_estimate(gap_BT, torch.zeros_like(gap_BT), "k3"), batch.mask_BT)),
    }
