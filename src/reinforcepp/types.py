"""Records of the training loop, in the order in which the loop creates them.

Dimension suffixes of tensor names in the whole package:
``B`` sequences of a batch, ``T`` response tokens, ``L`` all tokens of a row, ``V`` vocabulary, ``G`` samples per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
RowId = int | str
"""Row number in its file, as the ``data`` package counts; with several files, prefixed by the file: ``b.csv:5``."""

Messages = tuple[Mapping[str, Any], ...]
"""Messages with ``role`` and ``content``, and what else the chat template reads, such as ``tool_calls``."""
Conversation = str | Sequence[Mapping[str, Any]]
"""A prompt as the chat template takes it: messages, or a text, which is a user message."""


class Judgment(NamedTuple):
    """A preference by one criterion: ``side`` is 1 if ``chosen`` is better, -1 if ``rejected`` is, 0 for a tie, None if unknown.

    ``margin`` is the difference of scores that training asks for.
    """

    side: int | None
    margin: float = 0.0


@dataclass(frozen=True)
class Preference:
    """One human preference between two responses to ``prompt``: ``chosen`` was preferred to ``rejected``.

    ``row`` is its row in the file, and ``weight`` is how often it counts in training. ``messages`` are those of a prompt that is
    a list of messages; ``prompt`` is then its text for people. ``chat_template_kwargs`` are the row's variables of the chat
    template. ``margin`` is the difference of scores that training asks for. A ``tie`` has two equally good responses.
    ``judgments`` are the preferences by criterion, if criteria were read; they can disagree with ``chosen``. ``loss_weight``
    multiplies the loss of the pair.
    """

    prompt: str
    chosen: str
    rejected: str
    row: RowId = 0
    weight: float = 1.0
    messages: Messages = field(default=(), hash=False)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    margin: float = 0.0
    tie: bool = False
    judgments: tuple[Judgment, ...] = ()
    loss_weight: float = 1.0

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.prompt

    @property
    def by_output(self) -> tuple[Judgment, ...]:
        """One judgment per output of a reward model: those of the criteria, or the pair's own."""
        return self.judgments or (Judgment(0 if self.tie else 1, self.margin),)


@dataclass(frozen=True)
class ScoredPair:
    """A preference with a reward model's scores of both responses.

    Lengths are response lengths in tokens, including EOS, without the prompt and the chat template. ``messages`` are those of a
    prompt that is a list of messages. ``criterion`` is the one by which ``chosen`` is better, if the model has several
    outputs.
    """

    row: RowId
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    messages: Messages = field(default=(), hash=False)
    criterion: str = ""

    @property
    def margin(self) -> float:
        """Score of the chosen response minus the score of the rejected one; negative if the model disagrees."""
        return self.chosen_score - self.rejected_score

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt, formatted and tokenized for the policy.

    ``key`` identifies the prompt: it groups the samples of a prompt, and random seeds derive from it. ``ids`` is the
    formatted, tokenized prompt; ``columns`` holds the other columns of the data row, for reward functions. ``prefill`` is the
    start of the answer that the chat template wrote, such as ``<think>``. ``messages`` are those of a prompt that is a list of
    messages; ``text`` is then its text for people. ``chat_template_kwargs`` are its variables of the chat template.
    ``max_new_tokens`` limits its completions, in addition to that of :class:`Sampling`. ``source`` is the name of its dataset, if
    training uses several by name.
    """

    text: str
    ids: tuple[int, ...]
    key: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    messages: Messages = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    source: str = ""

    @property
    def conversation(self) -> Conversation:
        """The prompt as the chat template takes it."""
        return self.messages or self.text

    @property
    def cells(self) -> dict[str, Any]:
        """The prompt as columns of a data file, in TRL's format; training on that file encodes the same prompt."""
        variables = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        return {"prompt": list(map(dict, self.messages)) or self.text, **variables}


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. The defaults sample the policy's full distribution, as training needs.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 disable truncated sampling. ``extra`` holds arguments of
    one engine, by their names in transformers' ``GenerationConfig`` or vLLM's ``SamplingParams``. The random numbers of a
    completion derive only from (``seed``, prompt key, sample index), so completions don't depend on the other rows of a batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    min_p: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class EpisodeTurn:
    """One turn of an episode: a message of the policy, or what the environment wrote after it.

    Attributes:
        messages: the policy's message, or the environment's, which can be several.
        start: its first token in ``Completion.ids``.
        stop: the token after its last one; equal to ``start`` if the policy never saw these messages.
        sampled: whether the policy wrote it. Other tokens are masked in training.
        reward: what the environment gave for the policy's message; None if nothing.
        truncated: whether the policy's message reached the limit of tokens.
    """

    messages: Messages
    start: int
    stop: int
    sampled: bool
    reward: float | None = None
    truncated: bool = False


@dataclass(frozen=True)
class Completion:
    """One sample of the policy for a prompt. ``ids`` includes EOS if, and only if, it was sampled.

    ``logprobs[i]`` is the engine's log-probability of ``ids[i]`` under the distribution it was sampled from. If generation runs
    ahead of training, ``old_logprobs`` and ``entropy`` are the trainer's values with the weights that generated it; otherwise
    they are empty.

    A completion of several ``turns`` is an episode in an environment: ``ids`` are all tokens after the prompt, exactly as they
    were sampled, with those of the environment between them, whose ``logprobs`` are 0. ``text`` is then the policy's last
    message, and ``error`` says why the episode failed, if it did.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    old_logprobs: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()
    turns: tuple[EpisodeTurn, ...] = ()
    error: str = ""

    @property
    def mask(self) -> list[bool]:
        """Which tokens of ``ids`` the policy sampled."""
        if not self.turns:
            return [True] * len(self.ids)
        return [turn.sampled for turn in self.turns for _ in range(turn.start, turn.stop)]

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The tokens that the policy sampled."""
        return tuple(compress(self.ids, self.mask)) if self.turns else self.ids

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages after the prompt."""
        if self.turns:
            return [dict(message) for turn in self.turns for message in turn.messages]
        return [{"role": "assistant", "content": self.prompt.prefill + self.text}]

    @property
    def text_finish_reason(self) -> FinishReason:
        """Whether ``text`` was truncated; an episode that reaches a limit of turns can have a whole last message."""
        sampled = [turn for turn in self.turns if turn.sampled]
        return self.finish_reason if not sampled else "length" if sampled[-1].truncated else "stop"

    @property
    def context(self) -> Conversation:
        """The messages before ``text``: the prompt, and in an episode all turns before the policy's last one."""
        sampled = [number for number, turn in enumerate(self.turns) if turn.sampled]
        if len(sampled) < 2:
            return self.prompt.conversation
        conversation = self.prompt.conversation
        start = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        return [*start, *(message for turn in self.turns[: sampled[-1]] for message in turn.messages)]

    @property
    def environment_reward(self) -> float | None:
        """The sum of the turns' rewards, None if no turn has one."""
        rewards = [turn.reward for turn in self.turns if turn.reward is not None]
        return math.fsum(rewards) if rewards else None


@dataclass(frozen=True)
class RolloutBatch:
    """One rollout batch, scored and ready for the update. ``mask_BT`` is 1 on sampled tokens, EOS included.

    ``turn_rewards_BT`` has the part of ``rewards_B`` that an environment gave for turns before the last, each at the last token
    of its turn; None without such rewards.

    Log-probabilities come from the rollout engine (``rollout``), from the trainer before the update (``old``) and from the
    reference policy (``ref``, nan if the settings don't need it); masked tokens have 0. ``old`` and ``entropy`` are empty at
    first if the forward pass of the update computes them: see ``PolicyUpdate.on_policy``.
    """

    completions: list[Completion]
    mask_BT: torch.Tensor
    rollout_logprobs_BT: torch.Tensor
    old_logprobs_BT: torch.Tensor
    ref_logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    rewards_B: torch.Tensor
    group_ids_B: torch.Tensor
    turn_rewards_BT: torch.Tensor | None = None
