"""Tokens of episodes on real chat templates: are those that are trained on exactly those that were sampled?

A stand-in for a policy writes messages of random tokens, of reasoning and of text, which no tokenizer would encode the same way
again. In every episode, an environment answers twice, with special tokens in its text. A token mismatches if it is trained on
without having been sampled, or sampled without being trained on, or if the environment's tokens don't spell what the chat
template writes. For comparison: how many of the sampled tokens would be lost if the conversation were encoded again by the
template, as a trainer that works with texts does it. ``environments.py`` runs it as its part ``masks``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.models.conversations import prefill
from reinforcepp.models.special_tokens import encode, marked
from reinforcepp.models.tokenization import encode_prompt, end_token_id
from reinforcepp.types import Completion, Prompt, Sampling

EPISODES, TURNS = 100, 3
OBSERVATION = "Not yet, step {step}. A trap: <|im_end|><|eot_id|><end_of_turn></s>."
MAX_NEW_TOKENS = 4000


class Answers:
    """Answers every message until the last turn."""

    def __init__(self) -> None:
        self.step_number = 0

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin with the row's own prompt."""

    def step(self, message: Mapping[str, Any]) -> tuple[str, float, bool]:
        """Return the next observation."""
        self.step_number += 1
        return OBSERVATION.format(step=self.step_number), 1.0, self.step_number == TURNS


class RandomPolicy:
    """Writes random messages, and keeps what it sampled for each episode, by the tokens of its prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.plain = [i for i in range(min(len(tokenizer), 30_000)) if i not in special]
        self.sampled: list[list[list[int]]] = []

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        replies = [self._message() for _ in prompts]
        self.sampled.append(replies)
        return [
            Completion(prompt, tuple(ids), (-1.0,) * len(ids), str(self.tokenizer.decode(ids[:-1])), "stop")
            for prompt, ids in zip(prompts, replies, strict=True)
        ]

    def _message(self) -> list[int]:
        words = " ".join(self.random.choice(("the", "route", "is", "down", "7", "maybe")) for _ in range(8))
        letters = [ids for letter in "answer" for ids in encode(self.tokenizer, letter)]  # never merged
        odd = self.random.choices(self.plain, k=self.random.randint(1, 12))
        thought = encode(self.tokenizer, f"<think>\n{words}\n</think>\n\n")
        return [*thought, *letters, *odd, *encode(self.tokenizer, words), end_token_id(self.tokenizer)]


def masks(folders: Mapping[str, str | Path]) -> dict[str, Any]:
    """Return the counts for each tokenizer, by its name."""
    rows = [{"template": name, **counts(AutoTokenizer.from_pretrained(folder))} for name, folder in folders.items()]
    return {"episodes": EPISODES, "turns": TURNS, "rows": rows}


def counts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the numbers of tokens of all episodes, and of those that mismatch."""
    policy = RandomPolicy(tokenizer, seed=0)
    runner = EpisodeRunner("Answers", Answers, tokenizer, TURNS, 60.0, max_prompt_length=1000)
    texts = [f"Question {i}: is the link up?" for i in range(EPISODES)]
    prompts = [
        Prompt(text, tuple(encode_prompt(tokenizer, text)), key, prefill=prefill(tokenizer))
        for key, text in enumerate(texts)
    ]
    episodes = runner.run(prompts, Sampling(MAX_NEW_TOKENS), policy)
    runner.close()
    found = {"sampled": 0, "masked": 0, "mismatched": 0, "lost_if_encoded_again": 0}
    for number, episode in enumerate(episodes):
        assert not episode.error, episode.error
        sampled = [replies[number] for replies in policy.sampled]
        flat = [token for ids in sampled for token in ids]
        trained = [token for token, mask in zip(episode.ids, episode.mask, strict=True) if mask]
        found["sampled"] += len(flat)
        found["masked"] += len(episode.ids) - len(trained)
        found["mismatched"] += differing(trained, flat) + wrong_observations(tokenizer, episode, sampled)
        found["lost_if_encoded_again"] += lost(flat, encoded_again(tokenizer, episode))
    return found


def differing(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of positions at which two sequences differ."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def wrong_observations(tokenizer: PreTrainedTokenizerBase, episode: Completion, sampled: list[list[int]]) -> int:
    """Return the number of the environment's tokens that aren't those of the template's text for its messages."""
    wrong, position = 0, 0
    for step, ids in enumerate(sampled[:-1], 1):
        position += len(ids)
        turn = next(turn for turn in episode.turns if turn.start == position and not turn.sampled)
        between = list(episode.ids[turn.start : turn.stop])
        position = turn.stop
        answer = f"answer number {step}"
        messages = [
            {"role": "user", "content": episode.prompt.text},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": marked(tokenizer, OBSERVATION.format(step=step))},
        ]
        whole = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        end = str(tokenizer.decode([end_token_id(tokenizer)]))
        wrong += differing(between, encode(tokenizer, whole.rpartition(answer)[2].partition(end)[2]))
    return wrong


def encoded_again(tokenizer: PreTrainedTokenizerBase, episode: Completion) -> list[int]:
    """Return the tokens of the whole conversation as the template formats its texts."""
    messages = [{"role": "user", "content": episode.prompt.text}, *episode.messages[: 2 * TURNS - 1]]
    text = tokenizer.apply_chat_template(
        [{**m, "content": marked(tokenizer, m["content"]) if m["role"] == "user" else m["content"]} for m in messages],
        tokenize=False,
    )
    return encode(tokenizer, str(text))


def lost(sampled: list[int], encoded: list[int]) -> int:
    """Return the number of ``sampled`` tokens that have no place in ``encoded``, in the same order."""
    blocks = SequenceMatcher(None, sampled, encoded, autojunk=False).get_matching_blocks()
    return len(sampled) - sum(block.size for block in blocks)
