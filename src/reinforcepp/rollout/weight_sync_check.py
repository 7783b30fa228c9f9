"""Check that a rollout engine generates with the trainer's current weights.

The engine completes fixed probe prompts greedily, and the trainer scores the completions. If both hold the same weights, each
token is the trainer's own first choice, and both compute the same log-probability for it, except for rounding error. The probes
never change and are longer than a cache block, so the check also detects a KV cache of older weights. It can't distinguish an
update that moves log-probabilities by less than the tolerance from rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.errors import RolloutError, option
from reinforcepp.models import tokenization as tokens
from reinforcepp.models.loading import context_length
from reinforcepp.models.lora import is_4bit
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of two log-probabilities, in nats, that rounding error explains, by the coarser of the two dtypes."""

PROBES = (
    "A router forwards packets between networks and picks the next hop by the longest matching prefix. ",
    "Le facteur apporte une lettre chaque matin, sauf le dimanche, et parle du temps qu'il fera demain. ",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4), area(5, 6), area(7, 8))\n",
    "0 1 1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765 10946 17711 28657 46368 ",
)
PROBE_TOKENS = 72
NEW_TOKENS = 16


@dataclass(frozen=True)
class SyncReport:
    """Differences between engine and trainer on the probe prompts, in nats."""

    tokens: int
    """Number of compared tokens."""
    agreement: float
    """Share of the engine's greedy tokens that are the trainer's first choice, or as likely within the tolerance."""
    logprob_gap_mean: float
    logprob_gap_max: float
    tolerance: float

    @property
    def in_sync(self) -> bool:
        """Whether rounding error explains the differences."""
        return (
            self.agreement == 1
            and self.logprob_gap_max <= self.tolerance
            and self.logprob_gap_mean <= self.tolerance / 4
        )


def check_sync(
    engine: RolloutEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tolerance: float | None = None
) -> SyncReport:
    """Compare ``engine`` with ``model`` on the probe prompts.

    Args:
        engine: The rollout engine.
        model: The trained model; its training mode is restored.
        tokenizer: The tokenizer of both.
        tolerance: Largest difference of log-probabilities, in nats; by default it depends on the coarser dtype of the two.

    Raises:
        RolloutError: They differ by more than rounding error.
    """
    if tolerance is None:
        tolerance = rounding_tolerance(model, getattr(engine, "dtype", model.dtype))
    generate = getattr(engine, "generate_everywhere", engine.generate)  # a pool's workers are all checked
    completions = generate(probe_prompts(model, tokenizer), Sampling(NEW_TOKENS, temperature=0))
    chosen_N, best_N = _trainer_logprobs(model, completions)
    engine_N = torch.tensor([logprob for c in completions for logprob in c.logprobs], dtype=torch.float64)
    gap_N = (engine_N - chosen_N).abs().nan_to_num(nan=float("inf"))
    report = SyncReport(
        tokens=len(gap_N),
        agreement=float((best_N - chosen_N <= tolerance).double().mean()),
        logprob_gap_mean=float(gap_N.mean()),
        logprob_gap_max=float(gap_N.max()),
        tolerance=tolerance,
    )
    if not report.in_sync:
        raise RolloutError(
            f"The {engine.name} engine is out of sync with the trainer: it generates with other weights. On {report.tokens} "
            f"probe tokens they agree on {report.agreement:.0%}, and their log-probabilities differ by up to "
            f"{report.logprob_gap_max:.3g} nats (mean {report.logprob_gap_mean:.3g}, tolerance {tolerance:g}). Use "
            f"{option('rollout', 'transformers')}, and report the model's family."
        )
    return report


def probe_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the fixed prompts, truncated to fit into the model's context."""
    context = context_length(model.config)
    length = PROBE_TOKENS if context is None else max(1, min(PROBE_TOKENS, context - NEW_TOKENS))
    return [
        Prompt(text, tuple(tokens.encode(tokenizer, text * PROBE_TOKENS)[:length]), key)
        for key, text in enumerate(PROBES)
    ]


@torch.no_grad()
def unpadded_logits(model: PreTrainedModel, completion: Completion) -> Tensor:
    """Return the logits, in float32, at the position before each token of ``completion``. -> (T, V)"""
    ids = torch.tensor([[*completion.prompt.ids, *completion.ids]], device=model.device)
    count = len(completion.ids) + 1
    logits_TV: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0, -count:-1]
    return logits_TV.float()


@torch.no_grad()
def _trainer_logprobs(model: PreTrainedModel, completions: list[Completion]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of each sampled token and of the trainer's first choice at its position. -> (N,), (N,)"""
    was_training = model.training
    model.eval()
    chosen, best = [], []
    for completion in completions:
        logprobs_TV = unpadded_logits(model, completion).log_softmax(-1).double().cpu()
        chosen.append(logprobs_TV.gather(-1, torch.tensor(completion.ids)[:, None]).squeeze(-1))
        best.append(logprobs_TV.max(-1).values)
    model.train(was_training)
    return torch.cat(chosen), torch.cat(best)


def rounding_tolerance(model: PreTrainedModel, engine_dtype: torch.dtype) -> float:
    """Return the largest difference, in nats, that rounding error explains, by the coarser dtype of model and engine."""
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in (model.dtype, engine_dtype))
    if model.device.type == "cuda":  # float32 kernels there may round to TF32, which has float16's precision
        tolerance = max(tolerance, TOLERANCES[torch.float16])
    if is_4bit(model):  # kernels for one token and for many round differently
        tolerance = max(tolerance, TOLERANCES[torch.bfloat16])
    return tolerance
