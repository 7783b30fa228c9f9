"""The state of a chat: its turns, the responses to the last question, and the one that the next question follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reinforcepp.data import conversation_text
from reinforcepp.errors import DataError
from reinforcepp.models.conversations import prefill
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.types import Completion, Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Conversation:
    """A conversation of at most ``room`` tokens, including the chat template.

    If the conversation is longer, its oldest turns are skipped, and ``skipped_turns`` counts them. A turn is a question
    and its response. ``answers`` are the responses to ``question``. The next question follows the response at
    ``current``.
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
    """Prompts built so far. The count is the key of the prompt, so that each response has different random numbers."""
    judged: set[frozenset[int]] = field(default_factory=set)
    """The pairs of responses to the question that were already compared."""

    def ask(self, question: str) -> Prompt:
        """Continue with another question and return its prompt.

        Raises:
            DataError: If the question alone is too long. The conversation stays unchanged.
        """
        turns = self.turns
        if self.question is not None and self.answers:
            turns = [*turns, (self.question, self.answers[self.current].text)]
        prompt, skipped_turns = self._fitted(turns, question)
        self.turns, self.question, self.skipped_turns = turns, question, skipped_turns
        self.answers, self.current, self.judged = [], 0, set()
        return prompt

    def ask_again(self) -> Prompt:
        """Return the prompt for another response to the last question.

        Raises:
            DataError: If no question was asked, or a new system message makes the prompt too long.
        """
        if self.question is None:
            raise DataError("/regenerate: no question was asked yet. Type a question first.")
        prompt, self.skipped_turns = self._fitted(self.turns, self.question)
        return prompt

    def answered(self, completion: Completion) -> int:
        """Add a response, which the next question follows, and return its number, counted from 1."""
        self.answers.append(completion)
        self.current = len(self.answers) - 1
        return len(self.answers)

    def reset(self) -> None:
        """Clear everything except the system message."""
        self.turns, self.question, self.answers = [], None, []
        self.current, self.skipped_turns, self.judged = 0, 0, set()

    def prefer(self, number: int | None, save: Callable[[Prompt, str, str], None]) -> tuple[int, int]:
        """``save`` a pair with response ``number``, by default the last one, as the better response.

        The worse response is the last one or, if the last one is the better, the one before it. The next question follows
        the better response.

        Returns:
            The numbers of the better and of the worse response.

        Raises:
            DataError: If the two responses don't exist, don't differ, or were compared before, or as ``save``.
        """
        last = len(self.answers)
        if last < 2:
            raise DataError("/prefer: two responses to one question are needed. Type /regenerate first.")
        chosen = last if number is None else number
        if not 1 <= chosen <= last:
            raise DataError(f"/prefer: response {chosen} not found. Choose from 1 to {last}.")
        rejected = last if chosen != last else last - 1
        both = " and ".join(map(str, sorted((chosen, rejected))))
        better, worse = self.answers[chosen - 1], self.answers[rejected - 1]
        if frozenset((chosen, rejected)) in self.judged:
            raise DataError(f"/prefer: responses {both} were already compared. Type /regenerate for another one.")
        if better.prompt.text != worse.prompt.text:
            raise DataError(f"/prefer: responses {both} belong to different prompts. Type /regenerate for another one.")
        if " ".join(better.text.split()) == " ".join(worse.text.split()):
            raise DataError(f"/prefer: responses {both} are the same. Type /regenerate for another one.")
        if not (better.text.strip() and worse.text.strip()):
            raise DataError(f"/prefer: one of the responses {both} is empty. Type /regenerate for another one.")
        save(better.prompt, better.text, worse.text)
        self.judged.add(frozenset((chosen, rejected)))
        self.current = chosen - 1
        return chosen, rejected

    def _fitted(self, turns: Sequence[tuple[str, str]], question: str) -> tuple[Prompt, int]:
        """Return the prompt that fits into ``room``, and the number of turns skipped for it."""
        for skipped_turns in range(self.skipped_turns, len(turns) + 1):
            messages = _messages(self.system, turns[skipped_turns:], question)
            ids = encode_prompt(self.tokenizer, messages)
            if len(ids) <= self.room:
                self.asked += 1
                text = conversation_text(messages)
                prompt = Prompt(text, tuple(ids), self.asked, prefill=prefill(self.tokenizer), messages=messages)
                return prompt, skipped_turns
        raise DataError(
            f"The question is too long: {len(ids)} tokens with the chat template, but only {self.room} fit. Shorten it."
        )


def _messages(system: str | None, turns: Sequence[tuple[str, str]], question: str) -> Messages:
    messages: list[Mapping[str, str]] = [{"role": "system", "content": system}] if system else []
    for asked, answer in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return (*messages, {"role": "user", "content": question})
