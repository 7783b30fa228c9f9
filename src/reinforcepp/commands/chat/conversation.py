"""What has been said: turns, the answers to the last question, and which of them the conversation goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reinforcepp.data import conversation_text
from reinforcepp.errors import DataError
from reinforcepp.models.tokenization import encode, format_conversation
from reinforcepp.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """A conversation of at most ``room`` tokens, including the chat template.

    The oldest turns are skipped, a question and its answer at a time; ``skipped_turns`` counts them. ``answers``
    are those to ``question``, and the one at ``current`` is what the next question follows.
    """

    tokenizer: PreTrainedTokenizerBase
    room: int
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    question: str | None = None
    answers: list[Completion] = field(default_factory=list)
    current: int = 0
    skipped_turns: int = 0
    asked: int = 0
    """Answers begun so far; each is drawn with random numbers of its own."""
    judged: set[frozenset[int]] = field(default_factory=set)
    """The pairs of answers to the question of which it has been said which is better."""

    def ask(self, question: str) -> Prompt:
        """Go on with another question; returns the prompt to be answered.

        Raises:
            DataError: the question alone is too long; the conversation stays as it was.
        """
        turns = self.turns
        if self.question is not None and self.answers:
            turns = [*turns, (self.question, self.answers[self.current].text)]
        prompt, skipped_turns = self._fitted(turns, question)
        self.turns, self.question, self.skipped_turns = turns, question, skipped_turns
        self.answers, self.current, self.judged = [], 0, set()
        return prompt

    def ask_again(self) -> Prompt:
        """The prompt for another answer to the last question.

        Raises:
            DataError: there is no question, or a new system message makes it too long.
        """
        if self.question is None:
            raise DataError("There is no question yet: ask one first.")
        prompt, self.skipped_turns = self._fitted(self.turns, self.question)
        return prompt

    def answered(self, completion: Completion) -> int:
        """Take an answer, from which the conversation goes on; returns its number, counted from 1."""
        self.answers.append(completion)
        self.current = len(self.answers) - 1
        return len(self.answers)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns, self.question, self.answers = [], None, []
        self.current, self.skipped_turns, self.judged = 0, 0, set()

    def prefer(self, number: int | None, save: Callable[[Messages, str, str], None]) -> tuple[int, int]:
        """``save`` the answer of this number, by default the last, as better than the last, or the one before it.

        The conversation goes on from the better one.

        Returns:
            The numbers of the better and of the worse answer.

        Raises:
            DataError: there are no two answers that differ, or they were compared before.
        """
        last = len(self.answers)
        if last < 2:
            raise DataError("There are no two answers to choose from: /regenerate gives another one.")
        chosen = last if number is None else number
        if not 1 <= chosen <= last:
            raise DataError(f"There is no answer {chosen}: the last question has answers 1 to {last}.")
        rejected = last if chosen != last else last - 1
        both = " and ".join(map(str, sorted((chosen, rejected))))
        better, worse = self.answers[chosen - 1], self.answers[rejected - 1]
        if frozenset((chosen, rejected)) in self.judged:
            raise DataError(f"Answers {both} have been compared already.")
        if better.prompt.text != worse.prompt.text:
            raise DataError(f"Answers {both} are to different conversations: /regenerate gives another.")
        if " ".join(better.text.split()) == " ".join(worse.text.split()):
            raise DataError(f"Answers {both} say the same: /regenerate gives another one.")
        if not (better.text and worse.text):
            raise DataError("One of the two answers is empty, and nothing can be learned from that: /regenerate.")
        save(better.prompt.columns["messages"], better.text, worse.text)
        self.judged.add(frozenset((chosen, rejected)))
        self.current = chosen - 1
        return chosen, rejected

    def _fitted(self, turns: Sequence[tuple[str, str]], question: str) -> tuple[Prompt, int]:
        """The prompt that fits into ``room``, and the number of turns skipped for it."""
        for skipped_turns in range(self.skipped_turns, len(turns) + 1):
            messages = _messages(self.system, turns[skipped_turns:], question)
            ids = encode(self.tokenizer, format_conversation(self.tokenizer, messages))
            if len(ids) <= self.room:
                self.asked += 1
                text = conversation_text(messages)
                return Prompt(text, tuple(ids), self.asked, {"messages": messages}), skipped_turns
        raise DataError(f"The question is too long: with its frame it has {len(ids)} tokens, and {self.room} fit.")


def _messages(system: str | None, turns: Sequence[tuple[str, str]], question: str) -> Messages:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answer in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]
