"""A language model behind an OpenAI-compatible server as a judge: it scores answers, and compares two answers.

    judge = Judge(parse_judge("Qwen/Qwen3-8B?rubric=helpful&base_url=http://127.0.0.1:8000/v1"))
    verdicts = judge.compare([Pair("What is DNS?", "A phone book for hosts.", "No idea.")])
    print(position_bias(verdicts))

Failures that can pass are retried (see ``endpoint``), and so are replies without a valid verdict, a few times. Any other failure
raises a RewardError: a judge never makes up a score.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import httpx2

from reinforcepp.config.judge_spec import RUBRICS, JudgeSpec, parse_judge
from reinforcepp.config.spec_options import NONE
from reinforcepp.errors import ConfigError, RewardError, shown
from reinforcepp.rewards.endpoint import FIRST_PAUSE_SECONDS, Endpoint, StatusError, TransientError, authorization
from reinforcepp.rewards.judge.prompts import (
    InvalidReply,
    Question,
    Truncated,
    comparison_question,
    harmless,
    score_question,
)
from reinforcepp.rewards.judge.store import BudgetSpent, Spending, VerdictStore
from reinforcepp.runtime.process import outcome, user_cache
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Conversation

DEFAULT_ATTEMPTS = 5
MAX_REPLIES = 3
"""Replies to a question before the judge gives up, if none is a verdict."""
MAX_RESPONSE_BYTES = 2**20
MAX_RUBRIC_BYTES = 2**16
MAX_LABELER_CHARACTERS = 100
"""As long as names in the feedback database."""
TEMPLATE_TOKENS = 1000
"""Most tokens that a chat template adds to a request."""
TOKENS_PER_PRICE = 1_000_000
UNSUPPORTED = re.compile(rb"response_format|json_schema|structured|guided|grammar", re.IGNORECASE)
"""What a server says that has no replies by a JSON schema."""
CONTENT_FILTER = b"content_filter"
"""In a response with status 400: the filter of a hosted model refused the text."""
STATUSES_OF_BAD_REQUESTS = (400, 404, 422, 501)

Winner = Literal["first", "second", "tie"]
log = logger(__name__)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, which is a text or a list of messages."""

    prompt: Conversation
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """The verdict on a pair of answers.

    ``votes`` are the winners with the first answer shown first, and with the second answer shown first; ``reasons`` are those
    of the votes.
    """

    votes: tuple[Winner, Winner]
    reasons: tuple[str, str]

    @property
    def changed(self) -> bool:
        """Whether the verdict depends on the order of the answers."""
        return self.votes[0] != self.votes[1]

    @property
    def winner(self) -> Winner:
        """The winner in both orders; a tie if they differ."""
        return "tie" if self.changed else self.votes[0]


@dataclass(frozen=True)
class PositionBias:
    """How the order of two answers influences a judge.

    ``pairs`` were compared in both orders; the verdicts on ``changed`` of them differ. Of the ``decided`` votes, which aren't
    ties, ``for_shown_first`` are for the answer that was shown first.
    """

    pairs: int
    changed: int
    decided: int
    for_shown_first: int

    @property
    def changed_share(self) -> float:
        """Share of the pairs whose verdict changes with the order; 0 is unbiased."""
        return self.changed / self.pairs if self.pairs else 0.0

    @property
    def first_share(self) -> float:
        """Share of the decided votes for the answer shown first; 0.5 is unbiased."""
        return self.for_shown_first / self.decided if self.decided else 0.5

    def __str__(self) -> str:
        """Return one sentence."""
        return (
            f"The order of the answers changed {self.changed} of {self.pairs} verdicts ({self.changed_share:.1%}), and "
            f"{self.first_share:.1%} of {self.decided} decided votes are for the answer shown first."
        )


def position_bias(found: Iterable[Comparison | None]) -> PositionBias:
    """Return the position bias of a judge in its verdicts; pairs without one don't count."""
    verdicts = [verdict for verdict in found if verdict is not None]
    votes = [vote for verdict in verdicts for vote in zip(verdict.votes, ("first", "second"), strict=True)]
    decided = [(vote, shown_first) for vote, shown_first in votes if vote != "tie"]
    return PositionBias(
        pairs=len(verdicts),
        changed=sum(verdict.changed for verdict in verdicts),
        decided=len(decided),
        for_shown_first=sum(vote == shown_first for vote, shown_first in decided),
    )


def load_judge(text: str) -> Judge:
    """Return the judge with the name ``judge:MODEL?OPTION=VALUE&OPTION=VALUE``.

    Raises:
        ConfigError: an option, the rubric, the server, the key or the cache can't be used.
    """
    return Judge(parse_judge(text.removeprefix("judge:")))


class NoVerdict(RewardError):
    """A judge gave no verdict on a question, several times in a row."""


@dataclass
class _Tally:
    """Requests, replies and hits of one call."""

    requests: int = 0
    cache_hits: int = 0
    unscored: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0
    budget_spent: list[BudgetSpent] = field(default_factory=list)


class Judge:
    """A judge, which is also a reward function: 0 for the lowest score of the scale, 1 for the highest.

    Args:
        spec: the model, its server, the rubric and the limits.
        timeout: seconds for a request, unless ``spec`` has its own.
        attempts: that of the setting reward_attempts, unless ``spec`` has its own; None if there is no such setting.
        first_pause: seconds before the first retry, plus random jitter of up to as much.

    Attributes:
        name: of the scores in the metrics.
        request_counts: requests, tokens and dollars of the last call, and answers whose verdict was already known, by metric.

    Raises:
        ConfigError: the rubric, the server, the key or the cache can't be used.
    """

    plain_text = True

    def __init__(
        self,
        spec: JudgeSpec,
        *,
        timeout: float = 60.0,
        attempts: int | None = None,
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self.spec = spec
        self.name = spec.metric
        self.request_counts: dict[str, float] = {}
        self.rubric = _rubric(spec)
        self.endpoint = Endpoint(
            spec.url,
            noun="judge",
            fix=self._fix,
            attempts_option="reward_attempts" if spec.attempts is None and attempts else "attempts",
            headers=authorization(spec.key_variable),
            timeout=spec.timeout or timeout,
            attempts=spec.attempts or attempts or DEFAULT_ATTEMPTS,
            first_pause=first_pause,
        )
        path = Path(spec.cache).expanduser() if spec.cache else user_cache("judges") / "verdicts.sqlite"
        self.store = VerdictStore(None if spec.cache == NONE else path)
        self._unsupported: set[str] = set()

    @property
    def identity(self) -> str:
        """A text that changes with everything that the scores depend on, except for weights behind the same model name."""
        return f"judge:{self.spec.model}#{self._key(score_question(self.spec, self.rubric, '', ''))[:12]}"

    @property
    def labeler(self) -> str:
        """The judge's name as a labeler, which is another one with another rubric or other options."""
        model, _, key = self.identity.rpartition("#")
        return f"{self.name} {model}"[: MAX_LABELER_CHARACTERS - len(key) - 1] + f"#{key}"

    @property
    def budget(self) -> str:
        """What the cache file records of the budget, as in "12 of 100 requests"; empty without a budget."""
        spent, spec = self.store.spent(self._account), self.spec
        limits = [f"{spent.requests} of {spec.max_requests} requests"] if spec.max_requests is not None else []
        limits += [f"${spent.dollars:.4f} of ${spec.max_dollars:g}"] if spec.max_dollars is not None else []
        return ", ".join(limits)

    async def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        log_extra: Any = None,
        conversations: Sequence[Conversation] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return the score of each completion, from 0 to 1; None without a verdict, if the option ``no_verdict`` is skip.

        Args:
            prompts: texts or lists of messages.
            completions: texts or lists of messages.
            conversations: the messages before each completion, instead of ``prompts``.
            log_extra: gets the reasons as a column of the tables of completions.

        Raises:
            RewardError: the server failed, a reply has no verdict, or the budget is used up.
        """
        answers = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        pairs = zip(conversations or prompts, answers, strict=True)
        questions = [score_question(self.spec, self.rubric, *pair) for pair in pairs]
        verdicts = await self._verdicts(questions, skip=self.spec.no_verdict == "skip")
        if log_extra is not None and self.spec.reason:
            log_extra(f"{self.name}_reason", [verdict and verdict["reason"] for verdict in verdicts])
        low, high = self.spec.bounds
        return [None if verdict is None else (verdict["score"] - low) / (high - low) for verdict in verdicts]

    def compare(
        self, pairs: Sequence[Pair], report: Callable[[int, Comparison | None], None] = lambda number, verdict: None
    ) -> list[Comparison | None]:
        """Return the verdict on each pair, which the model compares in both orders.

        Args:
            pairs: the pairs.
            report: gets the number of each pair and its verdict as soon as it is known, also if another pair fails later.

        Returns:
            The verdicts; None for a pair without one, if the option ``no_verdict`` is skip.

        Raises:
            RewardError: the server failed, a reply has no verdict, or the budget is used up.
        """
        asked = [
            comparison_question(self.spec, self.rubric, pair.prompt, *order)
            for pair in pairs
            for order in ((pair.first, pair.second), (pair.second, pair.first))
        ]
        keys = [self._key(question) for question in asked]
        both = list(zip(keys[::2], keys[1::2], strict=True))
        pairs_of = defaultdict[str, list[int]](list)
        for place, key in enumerate(keys):
            pairs_of[key].append(place // 2)
        replies: dict[str, dict[str, Any] | None] = {}
        verdicts: dict[int, Comparison | None] = {}

        def receive(key: str, reply: dict[str, Any] | None) -> None:
            replies[key] = reply
            for number in pairs_of[key]:
                if number not in verdicts and replies.keys() >= set(both[number]):
                    verdicts[number] = _comparison(*(replies[each] for each in both[number]))
                    report(number, verdicts[number])

        outcome(self._verdicts(asked, skip=self.spec.no_verdict == "skip", report=receive))
        return [verdicts[number] for number in range(len(pairs))]

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _verdicts(
        self,
        questions: Sequence[Question],
        *,
        skip: bool,
        report: Callable[[str, dict[str, Any] | None], None] = lambda key, verdict: None,
    ) -> list[dict[str, Any] | None]:
        """Return the verdict on each question, from the cache or from the server; equal questions are asked once.

        If ``skip``, None stands for a question without a verdict; otherwise it is an error. ``report`` gets the key of each
        distinct question and its verdict as soon as it is known.
        """
        keys = [self._key(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        found: dict[str, dict[str, Any] | None] = {}
        found |= {key: verdict for key, question in distinct.items() if (verdict := self._cached(key, question))}
        missing = [key for key in distinct if key not in found]
        tally = _Tally(cache_hits=len(keys) - len(missing))
        free = asyncio.Semaphore(self.spec.concurrency)

        def receive(key: str, verdict: dict[str, Any] | None) -> None:
            found[key] = verdict
            self._count(tally)
            report(key, verdict)

        async def ask(key: str) -> None:
            async with free:
                if tally.budget_spent:  # Requests in progress are finished and stored, new ones aren't sent.
                    return
                try:
                    verdict = await self._ask(client, distinct[key], tally)
                except BudgetSpent as error:
                    tally.budget_spent.append(error)
                except NoVerdict as error:
                    if not skip:
                        raise
                    tally.unscored += 1
                    log.warning("%s It is skipped.", error)
                    receive(key, None)
                else:
                    receive(key, self.store.put(key, verdict))

        for key, known in found.items():
            receive(key, known)
        try:
            if missing:
                async with self.endpoint.client() as client, asyncio.TaskGroup() as group:
                    for key in missing:
                        group.create_task(ask(key))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._count(tally)
        if tally.budget_spent:
            raise RewardError(
                f"judge:{self.spec.model}: {tally.budget_spent[0]}. Raise max_requests or max_dollars, or give another cache."
            )
        return [found[key] for key in keys]

    def _cached(self, key: str, question: Question) -> dict[str, Any] | None:
        """Return the stored verdict on a question, or None."""
        verdict = self.store.get(key)
        try:
            return None if verdict is None else question.read(json.dumps(verdict))
        except InvalidReply as invalid:
            raise RewardError(
                f"{self.store.path}: the judge's cache was changed, a verdict {invalid}. Delete the file, or give another cache."
            ) from invalid

    async def _ask(self, client: httpx2.AsyncClient, question: Question, tally: _Tally) -> dict[str, Any]:
        messages = list(question.messages)
        problem = ""
        for _ in range(MAX_REPLIES):
            text = ""
            try:
                content = await self.endpoint.retried(self._request, client, question, messages, tally)
                text = self._reply_text(content)
                return question.read(text)
            except InvalidReply as invalid:
                if isinstance(invalid, Truncated):  # Weak models repeat themselves in the reason without end.
                    text, question = invalid.text, replace(question, with_reason=False)
                problem = f"{invalid}: {shown(text)}" if text else str(invalid)
                if text:
                    how = "" if question.with_reason else ", without a reason"
                    correction = f"Your reply {invalid}. Reply only with the JSON object{how}."
                    reply = {"role": "assistant", "content": harmless(text[:1000])}
                    messages = [*question.messages, reply, {"role": "user", "content": correction}]
        raise NoVerdict(
            f"judge:{self.spec.model}: {MAX_REPLIES} replies in a row had no verdict, and no score is made up. The last reply "
            f"{problem}. Use a more capable model or a larger max_output, or skip such answers with no_verdict=skip."
        )

    async def _request(
        self, client: httpx2.AsyncClient, question: Question, messages: list[dict[str, str]], tally: _Tally
    ) -> bytes:
        """Return the response to one request, whose cost is recorded."""
        request = self._body(question, messages)
        for option in self._unsupported & request.keys():
            value = request.pop(option)
            request |= {"max_completion_tokens": value} if option == "max_tokens" else {}
        body = json.dumps(request).encode()
        spec = self.spec
        reserved = self._dollars(len(body) + TEMPLATE_TOKENS, spec.max_output)  # A token has at least a byte.
        self.store.reserve(self._account, reserved, spec.max_requests, spec.max_dollars)
        tally.requests += 1
        try:
            content = await self.endpoint.send(client, body, MAX_RESPONSE_BYTES)
        except TransientError as failure:
            if failure.status is not None:
                self.store.settle(self._account, reserved, Spending())
            else:  # The server may have replied, and will be paid.
                tally.dollars += reserved
            raise
        except StatusError as failure:
            self.store.settle(self._account, reserved, Spending())
            if self._learn(failure, request):
                return await self._request(client, question, messages, tally)
            if CONTENT_FILTER in failure.content:
                raise InvalidReply(f"was a refusal: {self.endpoint.shown(failure.content)}") from failure
            raise
        usage = _usage(content)
        dollars = reserved if usage is None else self._dollars(*usage)
        cost = Spending(1, *(usage or (0, 0)), dollars)
        self.store.settle(self._account, reserved, cost)
        tally.input_tokens += cost.input_tokens
        tally.output_tokens += cost.output_tokens
        tally.dollars += cost.dollars
        return content

    def _learn(self, failure: StatusError, request: dict[str, Any]) -> bool:
        """Return whether the server refused an option that it doesn't need; later requests won't have it."""
        if failure.status not in STATUSES_OF_BAD_REQUESTS:
            return False
        if "max_tokens" in request and b"max_completion_tokens" in failure.content:
            self._unsupported.add("max_tokens")
            return True
        if "response_format" in request and self.spec.format == "auto" and UNSUPPORTED.search(failure.content):
            if "response_format" not in self._unsupported:
                log.warning(
                    "Judge %s: the server has no replies by a JSON schema, so they are read from text.", self.spec.model
                )
            self._unsupported.add("response_format")
            return True
        return False

    def _reply_text(self, content: bytes) -> str:
        """Return the text of a reply.

        Raises:
            InvalidReply: the response has none.
        """
        try:
            choice = json.loads(content)["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise InvalidReply(f"isn't a chat completion: {self.endpoint.shown(content)}") from error
        reason = choice.get("finish_reason")
        if refusal or reason == "content_filter":
            raise InvalidReply(f"was a refusal: {shown(refusal or 'content filter')}")
        if reason == "length":
            raise Truncated(f"was truncated at max_output, {self.spec.max_output} tokens", str(text or ""))
        if not isinstance(text, str) or not text.strip():
            raise InvalidReply("has no text")
        return text

    # --- requests and their cost ----------------------------------------------------------------------------------------

    def _body(self, question: Question, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.spec.model,
            "messages": list(messages),
            "max_tokens": self.spec.max_output,
        }
        if self.spec.temperature is not None:
            body["temperature"] = self.spec.temperature
        if self.spec.format != "text":
            schema = {"name": "verdict", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _key(self, question: Question) -> str:
        """Return the key of a verdict: a hash of the whole request, so that nothing can be forgotten, and the address."""
        request = [self.endpoint.url, self._body(question, question.messages), self.spec.format]
        return sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    @property
    def _account(self) -> str:
        return f"{self.spec.model} {self.endpoint.url}"

    def _dollars(self, input_tokens: int, output_tokens: int) -> float:
        prices = self.spec.input_price or 0.0, self.spec.output_price or 0.0
        return (input_tokens * prices[0] + output_tokens * prices[1]) / TOKENS_PER_PRICE

    def _count(self, tally: _Tally) -> None:
        names = ["requests", "cache_hits", "unscored", "input_tokens", "output_tokens"]
        names += ["dollars"] if None not in (self.spec.input_price, self.spec.output_price) else []
        self.request_counts = {f"judges/{self.name}/{name}": float(getattr(tally, name)) for name in names}

    def _fix(self, status: int) -> str:
        if status in (401, 403):
            return f"Set {self.spec.key_variable} to the server's key."
        if status == 404:
            return f"Check base_url, which most servers end with /v1, and the model's name, {self.spec.model}."
        if status in STATUSES_OF_BAD_REQUESTS:
            return "Check the options of the judge, and the context length of its model."
        return "Check the server's log."


def _comparison(one: dict[str, Any] | None, other: dict[str, Any] | None) -> Comparison | None:
    """Return the verdict of the replies on a pair and on the same pair in the other order; None if one is missing."""
    if one is None or other is None:
        return None
    winners: tuple[dict[str, Winner], ...] = ({"A": "first", "B": "second"}, {"A": "second", "B": "first"})
    votes = winners[0].get(one["better"], "tie"), winners[1].get(other["better"], "tie")
    return Comparison(votes, (one["reason"], other["reason"]))


def _rubric(spec: JudgeSpec) -> str:
    if spec.rubric in RUBRICS:
        return RUBRICS[spec.rubric]
    if spec.rubric_file is None:
        return spec.rubric
    try:
        content = Path(spec.rubric_file).expanduser().read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise ConfigError(f"rubric {spec.rubric_file}: can't be read ({reason}). Give a text file.") from error
    if not text.strip() or len(content) > MAX_RUBRIC_BYTES:
        raise ConfigError(
            f"rubric {spec.rubric_file}: has {len(content):,} bytes. Write a rubric of 1 to {MAX_RUBRIC_BYTES:,} bytes."
        )
    return text


def _usage(content: bytes) -> tuple[int, int] | None:
    """Return the tokens of request and reply that a response reports, or None."""
    try:
        usage = json.loads(content)["usage"]
        tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    valid = all(isinstance(number, int) and 0 <= number < 2**40 for number in tokens)
    return tokens if valid else None
