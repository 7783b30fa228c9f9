"""The records that flow through the training loop, in the order in which they come to be.

Dimension suffixes used on tensor names everywhere in the package:
``B`` sequences of a batch, ``T`` response tokens, ``L`` all tokens of a row, ``V`` vocabulary, ``G`` samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
RowId = int | str
"""A row's number in its file, as ``data`` counts; where several files are read, a text with the file's name: ``b.csv:5``."""


@dataclass(frozen=True)
class Preference:
    """One human judgement: of two answers to ``prompt``, ``chosen`` was preferred.

    ``row`` is its number in the file, ``weight`` how often it counts in training.
    """

    prompt: str
    chosen: str
    rejected: str
    row: RowId = 0
    weight: float = 1.0


@dataclass(frozen=True)
class ScoredPair:
    """A judgement beside what a reward model says of both answers.

    Lengths are those of the answers in tokens, EOS included, without prompt and frame.
    """

    row: RowId
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int

    @property
    def margin(self) -> float:
        """By how much the chosen answer is ahead; below 0 the model disagrees, at 0 it is undecided."""
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy sees it.

    ``key`` names the prompt for good: samples of one prompt form a group by it, and random seeds derive from it.
    ``ids`` is the framed, tokenised prompt; ``columns`` holds the data row's other columns for reward functions.
    """

    text: str
    ids: tuple[int, ...]
    key: int
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults sample the policy's full distribution, as training needs.

    ``temperature`` 0 means greedy; ``top_k`` 0 and ``top_p`` 1 mean off. The random numbers of a completion derive
    from (``seed``, prompt key, sample index) alone, so the make-up of a batch doesn't change what is drawn.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What the policy sampled for one prompt: EOS is among ``ids`` if, and only if, it was sampled.

    ``logprobs[i]`` is the log-probability of ``ids[i]`` under the distribution it was drawn from, as the engine computed
    it. Of one that was sampled ahead of time, ``old_logprobs`` and ``entropy`` are the trainer's figures for the weights
    that sampled it; of others they are empty.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    old_logprobs: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()


@dataclass(frozen=True)
class RolloutBatch:
    """One rollout batch, scored and ready for the update. ``mask_BT`` is 1 on sampled tokens, EOS included.

    Log-probabilities are the sampling engine's (``rollout``), the trainer's own before the update (``old``) and the
    reference's; all are 0 where masked. ``old`` and ``entropy`` are empty at first where the update's own forward pass
    will give them: see ``PolicyUpdate.on_policy``.
    """

    completions: list[Completion]
    mask_BT: torch.Tensor
    rollout_logprobs_BT: torch.Tensor
    old_logprobs_BT: torch.Tensor
    ref_logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    rewards_B: torch.Tensor
    group_ids_B: torch.Tensor
