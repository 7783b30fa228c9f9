"""Rows of a batch that is decoded: the completions in progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from reinforcepp.rollout.engine import request_seed, token_limit
from reinforcepp.rollout.sampling import uniforms
from reinforcepp.types import Prompt, Sampling


@dataclass
class BatchRow:
    """A completion in progress: its prompt, its random numbers, and the tokens sampled so far."""

    prompt: Prompt
    uniforms: Tensor
    """One random number per token, (T,)."""
    limit: int
    """Number of tokens at which it ends."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def start(cls, prompt: Prompt, sample: int, sampling: Sampling, limit: int | None = None) -> BatchRow:
        """Return sample number ``sample`` of ``prompt``, without tokens."""
        seed = request_seed(sampling.seed, prompt.key, sample)
        return cls(prompt, uniforms(seed, sampling.max_new_tokens), limit or token_limit(prompt, sampling))

    def append(self, token: int, logprob: float, end_ids: frozenset[int]) -> None:
        """Add a token, unless the completion is finished and its row only stays in the batch."""
        if self.finished:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.finished = token in end_ids or len(self.ids) == self.limit

    def prompt_length(self) -> int:
        """Return the number of tokens of its prompt."""
        return len(self.prompt.ids)

    def length(self) -> int:
        """Return the number of tokens of its prompt and its completion."""
        return len(self.prompt.ids) + len(self.ids)
