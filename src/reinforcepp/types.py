"""The records that flow through the training loop, in the order of their creation.

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
"""Number of a row in its file, as ``data`` counts; with the file's name if several files are read: ``b.csv:5``."""


@dataclass(frozen=True)
class Preference:
    """One human preference between two responses to ``prompt``: ``chosen`` was preferred to ``rejected``.

    ``row`` is its number in the file, and ``weight`` its weight in training.
    """

    prompt: str
    chosen: str
    rejected: str
    row: RowId = 0
    weight: float = 1.0


@dataclass(frozen=True)
class ScoredPair:
    """A preference with a reward model's scores of both responses.

    Lengths are those of the responses in tokens, including EOS, without prompt and chat template.
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
        """Score of the chosen response minus that of the other; below 0 the model disagrees."""
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy sees it.

    ``key`` identifies the prompt: it groups the samples of one prompt, and random seeds derive from it. ``ids`` is the
    formatted, tokenized prompt; ``columns`` holds the other columns of the data row, for reward functions.
    """

    text: str
    ids: tuple[int, ...]
    key: int
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. The defaults sample the policy's full distribution, as training needs.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 disable it. The random numbers of a completion derive only from
    (``seed``, prompt key, sample index), so completions don't depend on the other rows of a batch.
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
    """One sample of the policy for a prompt. ``ids`` includes EOS if, and only if, it was sampled.

    ``logprobs[i]`` is the engine's log-probability of ``ids[i]`` under the distribution that was sampled. If generation runs
    ahead of training, ``old_logprobs`` and ``entropy`` are the trainer's values for the weights that sampled it; otherwise
    they are empty.
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
