"""Questions, answers and preference pairs, generated from the authored facts by seeded functions.

A question is a template filled with a task: ``How do I {task}?``. The split is by template: questions of a held-out template
occur neither in the language model's texts nor in the training pairs, while every fact occurs on both sides. Held-out
questions therefore measure whether the model finds a known fact under an unseen wording.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

Split = Literal["train", "heldout"]

TRAIN_TEMPLATES = (
    "How do I {task}?",
    "How can I {task}?",
    "How would you {task}?",
    "How do you {task}?",
    "How should I {task}?",
    "How does one {task}?",
    "What is the best way to {task}?",
    "What is the quickest way to {task}?",
    "What's a good way to {task}?",
    "What do I type to {task}?",
    "What should I run to {task}?",
    "What command do I use to {task}?",
    "Which command lets me {task}?",
    "Which tool helps me {task}?",
    "What steps are needed to {task}?",
    "I need to {task}. What should I run?",
    "I want to {task}. How does that work?",
    "I have to {task}. Which command is right?",
    "I'd like to {task}. Any advice?",
    "I am trying to {task}. What do you suggest?",
    "I was asked to {task}. Where do I start?",
    "My task is to {task}. What is the command?",
    "My goal is to {task}. How do I get there?",
    "Can you tell me how to {task}?",
    "Could you explain how to {task}?",
    "Can you show me how to {task}?",
    "Do you know how to {task}?",
    "Is there a way to {task}?",
    "Tell me how to {task}.",
    "Explain how to {task}.",
    "Show me a way to {task}.",
    "Help me {task}.",
)

HELDOUT_TEMPLATES = (
    "What would be the right way to {task}?",
    "I must {task}. What is the usual tool?",
    "Which steps let me {task}?",
    "Could you help me {task}?",
    "Please describe how to {task}.",
    "I'm not sure how to {task}. Can you help?",
    "What do experts use to {task}?",
    "We need to {task}. Which command would you run?",
)

_GREETINGS = ("", "", "", "", "Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ")
_CLOSINGS = ("", "", "", "", " Thanks.", " Thank you.", " Please.")
BAD_KINDS = ("vague", "wrong", "unsafe")
_PAIR_KINDS = (*BAD_KINDS, "elsewhere")


@dataclass(frozen=True)
class Fact:
    """One fact: ways to ask for it, good answers, a bad answer of each kind, and the judge's patterns."""

    id: str
    tasks: tuple[str, ...]
    good: tuple[str, ...]
    bad: Mapping[str, str]
    must: tuple[str, ...]
    must_not: tuple[str, ...]


@dataclass(frozen=True)
class PreferenceRow:
    """One row of a preference file; ``topic`` is the fact's id, which training ignores."""

    prompt: str
    chosen: str
    rejected: str
    topic: str


@cache
def _authored() -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    content = yaml.safe_load((Path(__file__).parent / "facts.yaml").read_text(encoding="utf-8"))
    facts = tuple(
        Fact(
            id=entry["id"],
            tasks=tuple(entry["tasks"]),
            good=tuple(entry["good"]),
            bad={kind: entry[kind] for kind in BAD_KINDS},
            must=tuple(entry["must"]),
            must_not=tuple(entry["must_not"]),
        )
        for entry in content["facts"]
    )
    return facts, tuple(content["unsafe"])


def load_facts() -> tuple[Fact, ...]:
    """Return all authored facts, in the order of ``facts.yaml``."""
    return _authored()[0]


def unsafe_patterns() -> tuple[str, ...]:
    """Return regular expressions that mark a harmful answer to any question."""
    return _authored()[1]


def pretraining_rows(seed: int, good_share: float) -> Iterator[tuple[str, str]]:
    """Yield endless ``(prompt, answer)`` rows from training templates, in random case and politeness.

    An answer is good with probability ``good_share`` and otherwise vague, wrong or unsafe, always on the same topic. The
    model learns the right answer without preferring it, because alignment is what training should add.
    """
    rng = random.Random(seed)
    facts = load_facts()
    while True:
        fact = rng.choice(facts)
        prompt = _vary(rng.choice(TRAIN_TEMPLATES).format(task=rng.choice(fact.tasks)), rng)
        yield prompt, rng.choice(fact.good) if rng.random() < good_share else fact.bad[rng.choice(BAD_KINDS)]


def preference_rows(split: Split, seed: int = 0) -> list[PreferenceRow]:
    """Return the preference pairs of one split in random order: twelve per fact for training, two per fact held out.

    A quarter of the rejected answers are good answers to another question. Without them, a reward model could ignore the
    question, and the policy would win with a single answer to everything.
    """
    rng = random.Random(f"{split}-{seed}")
    facts = load_facts()
    templates, per_fact = (TRAIN_TEMPLATES, 12) if split == "train" else (HELDOUT_TEMPLATES, 2)
    wordings = {
        fact.id: rng.sample([f.format(task=t) for f in templates for t in fact.tasks], per_fact) for fact in facts
    }
    slots = [fact for fact in facts for _ in range(per_fact)]
    kinds = [_PAIR_KINDS[index % len(_PAIR_KINDS)] for index in range(len(slots))]
    misplaced = [fact for fact, kind in zip(slots, kinds, strict=True) if kind == "elsewhere"]
    answers = [
        (fact.id, rng.choice(fact.good), fact.bad[kind])
        for fact, kind in zip(slots, kinds, strict=True)
        if kind != "elsewhere"
    ]
    answers += _swapped_answers(misplaced, rng)
    rows = [PreferenceRow(wordings[topic].pop(), chosen, rejected, topic) for topic, chosen, rejected in answers]
    rng.shuffle(rows)
    return rows


def _swapped_answers(facts: list[Fact], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return ``(topic, chosen, rejected)`` for each of ``facts``; the rejected answer is a good answer to another fact.

    Facts are matched in groups of two, and the right answer of one is the wrong answer of the other. If rejected answers
    were drawn independently, a preference for some answers regardless of the question would explain nearly all pairs.
    """
    while True:
        rng.shuffle(facts)
        groups = [facts[i : i + 2] for i in range(0, len(facts) - 1, 2)]
        if len(facts) % 2:
            groups[-1].append(facts[-1])
        if all(len({fact.id for fact in group}) == len(group) for group in groups):
            break
    swapped = []
    for group in groups:
        good = [rng.choice(fact.good) for fact in group]
        swapped += [(fact.id, good[i], good[(i + 1) % len(good)]) for i, fact in enumerate(group)]
    return swapped


def csv_text(rows: list[PreferenceRow]) -> str:
    """Return the rows as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("prompt", "chosen", "rejected", "topic"))
    writer.writerows((row.prompt, row.chosen, row.rejected, row.topic) for row in rows)
    return buffer.getvalue()


def _vary(prompt: str, rng: random.Random) -> str:
    """Return the prompt as different people would type it: lower case, a greeting, no final punctuation, thanks."""
    if rng.random() < 0.15:
        prompt = prompt.lower()
    if rng.random() < 0.1:
        return prompt.rstrip("?.")
    return rng.choice(_GREETINGS) + prompt + rng.choice(_CLOSINGS)
