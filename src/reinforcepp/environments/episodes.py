"""Run episodes: in each round, every episode in progress gets a message of the policy, then its environment answers.

The ids of an episode are the tokens that were sampled, with those of the environment's messages between them. No token is
decoded and encoded again, whatever the chat template would do with earlier messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reinforcepp.environments.calls import MAX_HANGING, TimedCalls, TimedOut
from reinforcepp.environments.protocol import Environment, EnvironmentFactory, StepResult, checked_prompt, checked_step
from reinforcepp.errors import ConfigError, EnvironmentFailed, ModelError, setting
from reinforcepp.models.tokenization import encode_prompt, encode_turn
from reinforcepp.rewards.user_code import raised
from reinforcepp.rollout.engine import request_seed
from reinforcepp.run_dir import FAILED_EPISODES
from reinforcepp.runtime.terminal import logger, warn_once
from reinforcepp.types import Completion, EpisodeTurn, FinishReason, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAILURES_IN_A_ROW = 32
"""Episodes that fail one after another, after which the run stops."""
WITHOUT_CALLS = 64
"""First episodes without a call of a tool, after which a warning is logged."""

log = logger(__name__)
Generate = Callable[[Sequence[Prompt], Sampling], list[Completion]]


@dataclass(eq=False)
class Episode:
    """An episode in progress.

    Attributes:
        prompt: of the data row; after the reset, what the policy sees.
        sample: its number among the episodes of the row.
        limit: most tokens after the prompt.
        environment: None until it is made, and after it is closed.
    """

    prompt: Prompt
    sample: int
    limit: int
    environment: Environment | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[EpisodeTurn] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    """Time of the environment's calls."""
    finish: FinishReason | None = None
    """None while it is in progress."""
    error: str = ""

    @property
    def active(self) -> bool:
        """Whether the policy writes the next message."""
        return self.finish is None

    @property
    def replies(self) -> int:
        """Messages of the policy so far."""
        return sum(turn.sampled for turn in self.turns)

    def fail(self, reason: str) -> None:
        """End the episode without a reward."""
        self.error, self.finish = reason, "stop"

    def next_prompt(self) -> Prompt:
        """Return all tokens so far as a prompt, whose key gives each turn of each episode other random numbers."""
        key = request_seed(self.prompt.key, self.sample, self.replies)
        remaining = self.limit - len(self.ids)
        return replace(self.prompt, ids=(*self.prompt.ids, *self.ids), key=key, max_new_tokens=remaining)

    def add_reply(self, reply: Completion) -> None:
        """Add a message that the policy sampled; one that reaches the limit of tokens ends the episode."""
        message = {"role": "assistant", "content": self.prompt.prefill + reply.text}
        start = len(self.ids)
        self.ids += reply.ids
        self.logprobs += reply.logprobs
        truncated = reply.finish_reason == "length"
        self.turns.append(EpisodeTurn((message,), start, len(self.ids), sampled=True, truncated=truncated))
        self.text = reply.text
        if truncated:
            self.finish = "length"

    def add_step(self, result: StepResult, tokens: Callable[[Episode, StepResult], list[int]], max_turns: int) -> None:
        """Add what the environment returned for the last message; ``tokens`` encodes its observation."""
        self.turns[-1] = replace(self.turns[-1], reward=result.reward)
        if result.done:
            self.finish = self.finish or "stop"
        elif self.replies >= max_turns:
            self.finish = "length"
        start = len(self.ids)
        if self.active:
            ids = tokens(self, result)
            if start + len(ids) < self.limit:
                self.ids += ids
                self.logprobs += [0.0] * len(ids)
            else:  # no token is left for an answer
                self.finish = "length"
        if result.observation:
            self.turns.append(EpisodeTurn(result.observation, start, len(self.ids), sampled=False))

    def completion(self) -> Completion:
        """Return the finished episode."""
        ids, logprobs = tuple(self.ids), tuple(self.logprobs)
        finish = self.finish or "length"
        return Completion(self.prompt, ids, logprobs, self.text, finish, turns=tuple(self.turns), error=self.error)


@dataclass(eq=False)
class EpisodeRunner:
    """Runs the episodes of many prompts together.

    Attributes:
        name: the environment's name, for messages.
        make: makes the environment of an episode.
        tokenizer: encodes the environment's messages.
        max_turns: messages of the policy after which an episode ends.
        timeout: seconds for each call of an environment; None: no limit.
        episode_timeout: seconds for all calls of an episode's environment; None: no limit.
        max_prompt_length: most tokens of the prompt that ``reset`` returns.
        log_failures: saves the failed episodes of a batch.
        has_tools: whether a longer episode means that the policy called a tool.
    """

    name: str
    make: EnvironmentFactory
    tokenizer: PreTrainedTokenizerBase
    max_turns: int
    timeout: float | None
    max_prompt_length: int
    log_failures: Callable[[list[Completion]], None] | None = None
    has_tools: bool = False
    episode_timeout: float | None = None

    def __post_init__(self) -> None:
        self._calls = TimedCalls()
        self._failures_in_a_row = 0
        self._succeeded = self._warned = False
        self._without_calls = 0

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        generate: Generate,
        any_rank: Callable[[bool], bool] = lambda active: active,
    ) -> list[Completion]:
        """Return ``sampling.num_samples`` episodes per prompt, in the order of the prompts.

        Args:
            prompts: of the data rows.
            sampling: ``max_new_tokens`` counts all tokens after the prompt, those of the environment, too.
            generate: returns one completion per prompt.
            any_rank: whether any rank has episodes in progress, for an engine that all ranks must call together.

        Raises:
            EnvironmentFailed: all episodes failed, or too many one after another.
            ConfigError: ``reset`` gave the episodes of a row different prompts.
        """
        one = replace(sampling, num_samples=1)
        episodes = [
            Episode(prompt, i, sampling.max_new_tokens) for prompt in prompts for i in range(sampling.num_samples)
        ]
        try:
            self._reset(episodes)
            if different := _begin_differently(episodes):
                for episode in episodes:  # other ranks can be in the loop
                    episode.fail("reset returned different prompts for the episodes of one row")
            while any_rank(bool(active := [episode for episode in episodes if episode.active])):
                replies = generate([episode.next_prompt() for episode in active], one)
                for episode, reply in zip(active, replies, strict=True):
                    episode.add_reply(reply)
                self._step(active)
        finally:
            self._close(episodes)
        if different:
            raise ConfigError(
                f"environment {self.name}: reset returned different prompts for the episodes of one row, but their rewards are "
                "compared with each other. Let reset depend on its row alone."
            )
        finished = [episode.completion() for episode in episodes]
        self._report(finished)
        return finished

    def close(self) -> None:
        """Release threads and processes; no episode is in progress."""
        self._calls.close()
        getattr(self.make, "close", lambda: None)()

    # --- rounds -------------------------------------------------------------------------------------------------------

    def _reset(self, episodes: Sequence[Episode]) -> None:
        def begin(episode: Episode) -> Any:
            episode.environment = self.make()
            return episode.environment.reset(_row(episode.prompt))

        for episode, value in self._call("reset", begin, episodes):
            try:
                conversation = checked_prompt(value)
                if conversation is not None:
                    episode.prompt = self._prompt(episode.prompt, conversation)
            except (ValueError, ModelError) as error:
                episode.fail(f"environment {self.name}: {error}")

    def _prompt(self, prompt: Prompt, conversation: Any) -> Prompt:
        ids = encode_prompt(self.tokenizer, conversation, **prompt.chat_template_kwargs)
        if len(ids) > self.max_prompt_length:
            raise ValueError(
                f"reset returned a prompt of {len(ids)} tokens, more than {self.max_prompt_length}; shorten it, or raise "
                "max_prompt_length"
            )
        if isinstance(conversation, str):
            return replace(prompt, ids=tuple(ids), text=conversation, messages=())
        text = str(conversation[-1]["content"])
        return replace(prompt, ids=tuple(ids), text=text, messages=tuple(conversation))

    def _step(self, episodes: Sequence[Episode]) -> None:
        def step(episode: Episode) -> Any:
            assert episode.environment is not None
            return episode.environment.step(dict(episode.turns[-1].messages[0]))

        for episode, value in self._call("step", step, episodes):
            try:
                episode.add_step(checked_step(value), self._observation_ids, self.max_turns)
            except (ValueError, ModelError) as error:
                episode.fail(f"environment {self.name}: {error}")

    def _observation_ids(self, episode: Episode, result: StepResult) -> list[int]:
        prompt = episode.prompt
        return encode_turn(self.tokenizer, prompt.conversation, result.observation, prompt.chat_template_kwargs)

    def _close(self, episodes: Sequence[Episode]) -> None:
        opened = [episode for episode in episodes if episode.environment is not None]
        closing = [getattr(episode.environment, "close", lambda: None) for episode in opened]
        results = self._calls.run(closing, [self.timeout] * len(opened))
        for episode, (result, _) in zip(opened, results, strict=True):
            episode.environment = None
            if isinstance(result, Exception):
                warn_once(f"environment {self.name}: {self._problem('close', result)}.")

    def _call(
        self, method: str, function: Callable[[Episode], Any], episodes: Sequence[Episode]
    ) -> list[tuple[Episode, Any]]:
        """Return the results of the calls that succeeded; the other episodes fail."""
        succeeded = []
        functions, limits = [partial(function, episode) for episode in episodes], list(map(self._limit, episodes))
        for episode, (value, seconds) in zip(episodes, self._calls.run(functions, limits), strict=True):
            episode.seconds += seconds
            if isinstance(value, Exception):
                if isinstance(value, TimedOut):
                    episode.environment = None  # a thread is still in it
                episode.fail(f"environment {self.name}: {self._problem(method, value, episode.seconds)}")
            else:
                succeeded.append((episode, value))
        return succeeded

    def _limit(self, episode: Episode) -> float | None:
        """Return the seconds for the next call of an episode."""
        if self.episode_timeout is None:
            return self.timeout
        remaining = max(0.0, self.episode_timeout - episode.seconds)
        return remaining if self.timeout is None else min(self.timeout, remaining)

    def _problem(self, method: str, error: Exception, seconds: float = 0.0) -> str:
        late = isinstance(error, TimedOut)
        if late and self.episode_timeout is not None and seconds >= self.episode_timeout:
            return f"the calls of an episode took longer than {self.episode_timeout:g} s (episode_timeout)"
        return f"{method} didn't return within {self.timeout:g} s" if late else f"{method} failed{raised(error)}"

    # --- failures -----------------------------------------------------------------------------------------------------

    def _report(self, episodes: list[Completion]) -> None:
        failed = [episode for episode in episodes if episode.error]
        saved = f"{FAILED_EPISODES} in the run's folder has" if self.log_failures is not None else ""
        if failed and self.log_failures is not None:
            self.log_failures(failed)
        if self._calls.hanging > MAX_HANGING:
            raise EnvironmentFailed(
                f"environment {self.name}: {self._calls.hanging} calls didn't return in time. Give its calls "
                "time limits of their own, or raise environment_timeout."
            )
        for episode in episodes:
            self._failures_in_a_row = self._failures_in_a_row + 1 if episode.error else 0
            self._succeeded |= not episode.error
        if failed and (not self._succeeded or self._failures_in_a_row >= FAILURES_IN_A_ROW):
            reason, number = Counter(episode.error for episode in failed).most_common(1)[0]
            raise EnvironmentFailed(
                f"{reason}. {len(failed)} of {len(episodes)} episodes failed, {number} of them in this way. Correct the "
                f"environment{f'; {saved} the episodes' if saved else ''}."
            )
        if failed and not self._warned:
            self._warned = True
            log.warning(
                "%s. The episode isn't trained on. The metric episodes/failed counts such episodes%s.",
                failed[0].error,
                f", and {saved} them" if saved else "",
            )
        if self.has_tools:
            self._watch_calls(episodes)
        if episodes and all(_out_of_turns(episode, self.max_turns) for episode in episodes):
            warn_once(
                f"environment {self.name}: no episode of a batch ended within {self.max_turns} turns. Raise "
                f"{setting('max_turns')}, or return done."
            )

    def _watch_calls(self, episodes: Sequence[Completion]) -> None:
        if any(len(episode.turns) > 1 for episode in episodes):
            self.has_tools = False  # nothing to watch for any more
        self._without_calls += len(episodes)
        if self.has_tools and self._without_calls >= WITHOUT_CALLS:
            self.has_tools = False
            log.warning(
                "tools: none of the first %d completions called one (%s). Training can't improve calls that never occur. Say in "
                "the prompt or the system prompt when to call a tool, or train a few examples of calls first (reinforcepp sft).",
                self._without_calls,
                self.name,
            )


def _row(prompt: Prompt) -> dict[str, Any]:
    """Return a copy of the data row, because an environment can change it, and other episodes get it, too."""
    messages = [dict(message) for message in prompt.messages]
    return deepcopy({**prompt.columns, "prompt": messages or prompt.text})


def _begin_differently(episodes: Sequence[Episode]) -> bool:
    first: dict[int, tuple[int, ...]] = {}
    return any(
        first.setdefault(episode.prompt.key, episode.prompt.ids) != episode.prompt.ids
        for episode in episodes
        if not episode.error
    )


def _out_of_turns(episode: Completion, max_turns: int) -> bool:
    return episode.finish_reason == "length" and sum(turn.sampled for turn in episode.turns) >= max_turns
