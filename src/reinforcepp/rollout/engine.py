"""What the trainer asks of whatever generates its completions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from reinforcepp.errors import RolloutError
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutEngine(Protocol):
    """Generates completions with given weights; ``tests/rollout/contract.py`` says what every engine must hold to."""

    name: str
    """What the user calls it: ``transformers`` or ``vllm``."""

    shares_trainer_forward: bool
    """Whether its log-probabilities come from the very model object that is trained, so no correction is due."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """``sampling.num_samples`` completions of each prompt, in the order of the prompts.

        Raises ``RolloutError`` for an empty prompt or one that leaves no room in the model's context.
        """

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """What ``generate`` gives for one prompt, as far as it has come after each token; the last one is whole.

        Closed before, it gives the answer up, and the engine is as it was.
        """

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with ``model``'s present weights from now on."""

    def close(self) -> None:
        """Give back memory and processes; the engine can't be used afterwards."""


def request_seed(seed: int, key: int, sample: int) -> int:
    """A 63-bit seed for one completion, from nothing but what names it."""
    digest = hashlib.blake2b(f"{seed}/{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_prompts(prompts: Sequence[Prompt], max_new_tokens: int, context_length: int | None) -> None:
    """Refuse what no engine can generate from, naming the prompt and the cure."""
    for prompt in prompts:
        if not prompt.ids:
            raise RolloutError("An empty prompt can't be continued: give at least one token of text.")
        if context_length is not None and len(prompt.ids) + max_new_tokens > context_length:
            raise RolloutError(
                f"A prompt of {len(prompt.ids)} tokens and max_new_tokens {max_new_tokens} exceed the model's context "
                f"of {context_length}: lower max_new_tokens or max_prompt_length. The prompt begins {prompt.text[:60]!r}."
            )


def completed(
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    prompt: Prompt,
    ids: Sequence[int],
    logprobs: Sequence[float],
) -> Completion:
    """The record of what was sampled; its text leaves out the id that ended it."""
    ended = ids[-1] in eos_ids
    text = tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True)
    return Completion(prompt, tuple(ids), tuple(logprobs), str(text).strip(), "stop" if ended else "length")


def grown(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], whole: Completion) -> Iterator[Completion]:
    """What a stream of ``whole`` would have been, where an engine gives answers only when they are whole."""
    for length in range(1, len(whole.ids) + 1):
        yield completed(tokenizer, eos_ids, whole.prompt, whole.ids[:length], whole.logprobs[:length])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put back the global random state of torch, NumPy and Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
