"""Check that an engine's samples have the log-probabilities that the model itself computes, before anything is trained on them.

Padding, caches and recurrent states work otherwise in each model family. A family for which an engine gets them wrong still
generates fluent tokens, but with log-probabilities of another distribution. So the first batch of a run is compared with an
unpadded forward pass without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.errors import RolloutError, option
from reinforcepp.models.lora import base_model
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.sampling import filter_logits
from reinforcepp.rollout.weight_sync_check import NEW_TOKENS, rounding_tolerance, unpadded_logits
from reinforcepp.types import Completion, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 4
"""Largest number of rows that :func:`check_samples` compares."""
SHARE_OF_STEP = 0.02
PASSES = 5
"""Passes per token of a training step, in forward passes: rollout, reference, and forward and backward of the update."""
MIN_AGREEMENT = 0.9
"""Share of sampled tokens within the tolerance. In half precision, single unlikely tokens and tokens of a mixture of experts
exceed it without a fault."""


@dataclass(frozen=True)
class SampleReport:
    """Differences between an engine's log-probabilities of its samples and the model's, in nats."""

    tokens: int
    """Number of compared tokens."""
    agreement: float
    """Share of tokens whose difference is within the tolerance."""
    gap_mean: float
    gap_max: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether rounding error explains the differences."""
        return self.agreement >= MIN_AGREEMENT and self.gap_mean <= self.tolerance / 4


def check_samples(
    engine: RolloutEngine, model: PreTrainedModel, completions: Sequence[Completion], sampling: Sampling
) -> None:
    """Compare an engine's log-probabilities of its own samples with an unpadded forward pass of the model, without a cache.

    A few rows with different prompt lengths are compared, up to 2% of the work of a training step.

    Args:
        engine: The engine that sampled.
        model: The model with the weights that sampled; its training mode is restored.
        completions: A batch of the engine.
        sampling: How it was sampled.

    Raises:
        RolloutError: They differ by more than rounding error; the message names the model's family.
    """
    chosen = choose_rows(completions)
    if not chosen:
        return
    report = compare_samples(model, chosen, sampling, dtype=getattr(engine, "dtype", None))
    if not report.exact:
        family = base_model(model).config.model_type
        raise RolloutError(
            f"The {engine.name} engine doesn't generate what this model (family {family}) computes. On {report.tokens} sampled "
            f"tokens their log-probabilities differ by up to {report.gap_max:.3g} nats (mean "
            f"{report.gap_mean:.3g}, tolerance {report.tolerance:g}). Use {_other_engine(engine.name)}, or a model of "
            "another family."
        )


def choose_rows(completions: Sequence[Completion]) -> list[Completion]:
    """Return up to ``ROWS`` completions with different prompt lengths, truncated to ``NEW_TOKENS``, the shortest prompt first.

    The shortest prompt has the most padding. At most ``SHARE_OF_STEP`` of a step's token passes are compared, but at
    least one row.
    """
    budget = SHARE_OF_STEP * PASSES * sum(len(c.prompt.ids) + len(c.ids) for c in completions)
    longest_first = sorted(completions, key=lambda c: -min(len(c.ids), NEW_TOKENS))
    by_length: dict[int, Completion] = {}
    for completion in longest_first:
        by_length.setdefault(len(completion.prompt.ids), completion)
    chosen: list[Completion] = []
    for length in sorted(by_length)[:ROWS]:
        row = by_length[length]
        budget -= length + min(len(row.ids), NEW_TOKENS)
        if chosen and budget < 0:
            break
        chosen.append(replace(row, ids=row.ids[:NEW_TOKENS], logprobs=row.logprobs[:NEW_TOKENS]))
    return chosen


def compare_samples(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    sampling: Sampling | None = None,
    dtype: torch.dtype | None = None,
) -> SampleReport:
    """Return how far the log-probabilities of ``completions`` are from those of an unpadded forward pass.

    Args:
        model: The model that sampled; its training mode is restored.
        completions: Completions with the engine's log-probabilities.
        sampling: How they were sampled; by default from the full distribution.
        dtype: Data type of the engine, by default the model's.
    """
    sampling = sampling or Sampling(NEW_TOKENS)
    tolerance = rounding_tolerance(model, dtype or model.dtype)
    was_training = model.training
    model.eval()
    gaps = []
    for completion in completions:
        logits_TV = unpadded_logits(model, completion)
        ids_T1 = torch.tensor(completion.ids, device=logits_TV.device)[:, None]
        filtered_TV = filter_logits(logits_TV, _seen(completion, logits_TV), sampling)
        # A token at the edge of the top k or top p may fall outside by rounding error; its own logit is restored.
        kept_T1 = logits_TV.gather(-1, ids_T1) / (sampling.temperature or 1.0)
        edge_T1 = filtered_TV.gather(-1, ids_T1).isneginf()
        filtered_TV = torch.where(edge_T1, filtered_TV.scatter(-1, ids_T1, kept_T1), filtered_TV)
        expected_T = filtered_TV.log_softmax(-1).gather(-1, ids_T1).squeeze(-1).double().cpu()
        gaps.append((torch.tensor(completion.logprobs, dtype=torch.float64) - expected_T).abs())
    model.train(was_training)
    gap_N = torch.cat(gaps).nan_to_num(nan=float("inf"))
    return SampleReport(
        tokens=len(gap_N),
        agreement=float((gap_N <= tolerance).double().mean()),
        gap_mean=float(gap_N.mean()),
        gap_max=float(gap_N.max()),
        tolerance=tolerance,
    )


def _seen(completion: Completion, logits_TV: Tensor) -> Tensor:
    """Return which tokens of the vocabulary precede each sampled token. -> (T, V)"""
    seen_TV = torch.zeros(logits_TV.shape, dtype=torch.bool, device=logits_TV.device)
    seen_TV[:, list(completion.prompt.ids)] = True
    for t, token in enumerate(completion.ids[:-1]):
        seen_TV[t + 1 :, token] = True
    return seen_TV


def _other_engine(name: str) -> str:
    return "another version of transformers" if name == "transformers" else option("rollout", "transformers")
