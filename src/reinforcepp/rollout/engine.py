"""The rollout engine: the generator of completions, as the trainer sees it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch

from reinforcepp.errors import RolloutError
from reinforcepp.models.conversations import answer_text
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class RolloutEngine(Protocol):
    """Generates completions with given weights. Every engine passes the tests in ``tests/rollout/contract.py``."""

    name: str
    """The engine's name for users: ``transformers``, ``vllm`` or ``ray``."""

    shares_trainer_forward: bool
    """Whether the log-probabilities come from the trained model object itself, so no importance correction is needed."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return ``sampling.num_samples`` completions per prompt, in the order of the prompts.

        Raises:
            RolloutError: A prompt is empty or leaves no room in the model's context.
        """

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of one prompt after each token; the last one equals that of ``generate``.

        Closing the generator early drops the completion and leaves the engine unchanged.
        """

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with ``model``'s current weights from now on."""

    def close(self) -> None:
        """Release memory and processes; the engine can't be used afterwards."""


def call(function: Callable[[], T]) -> T:
    """Return the result of ``function``, for a single rank."""
    return function()


def request_seed(seed: int, key: int, sample: int) -> int:
    """Return a 63-bit seed that depends only on run seed, prompt key and sample index."""
    digest = hashlib.blake2b(f"{seed}/{key}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def token_limit(prompt: Prompt, sampling: Sampling) -> int:
    """Return the maximum length of a completion of ``prompt``, in tokens."""
    return min(sampling.max_new_tokens, prompt.max_new_tokens or sampling.max_new_tokens)


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, context_length: int | None) -> None:
    """Raise a RolloutError for a prompt from which no engine can generate."""
    for prompt in prompts:
        max_new_tokens = token_limit(prompt, sampling)
        if not prompt.ids:
            raise RolloutError("The prompt is empty. Give it at least one token of text.")
        if context_length is not None and len(prompt.ids) + max_new_tokens > context_length:
            raise RolloutError(
                f"A prompt of {len(prompt.ids)} tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
                f"{context_length}. Lower max_new_tokens or max_prompt_length. The prompt starts with {prompt.text[:60]!r}."
            )


def to_completion(
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    prompt: Prompt,
    ids: Sequence[int],
    logprobs: Sequence[float],
) -> Completion:
    """Return the completion of sampled ``ids``.

    Its text omits the end token, padding tokens, and whitespace that the chat template writes around an answer. Other special
    tokens stay, because tags such as ``<think>`` can be special tokens, and reward functions must see them.
    """
    finished = ids[-1] in eos_ids
    kept = [i for i in (ids[:-1] if finished else ids) if i != tokenizer.pad_token_id]
    text = str(tokenizer.decode(kept, skip_special_tokens=False))
    text = answer_text(tokenizer, text, finished, prompt.chat_template_kwargs)
    return Completion(prompt, tuple(ids), tuple(logprobs), text, "stop" if finished else "length")


def partial_completions(
    tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], completion: Completion
) -> Iterator[Completion]:
    """Yield ``completion`` as a stream would have, for engines that return only whole completions."""
    for length in range(1, len(completion.ids) + 1):
        ids, logprobs = completion.ids[:length], completion.logprobs[:length]
        yield to_completion(tokenizer, eos_ids, completion.prompt, ids, logprobs)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the global random state of torch, NumPy and Python afterwards; among GPUs, only the current one's."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # torch would initialize every GPU
    with torch.random.fork_rng(gpus, device_type="cuda"):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def preserve_current_device() -> AbstractContextManager[None]:
    """Restore the current GPU of this thread afterwards, on which the trainer's collectives run."""
    return torch.cuda.device(torch.cuda.current_device() if torch.cuda.is_available() else -1)


def select_device(device: torch.device) -> None:
    """Make ``device``, if it is a GPU, the current one of this thread; a new thread begins with GPU 0 on every rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
