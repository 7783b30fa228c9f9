"""What the models themselves have to say: answers, log-probabilities, perplexity, with one model in memory at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from reinforcepp.config import CompareConfig
from reinforcepp.data import PromptRow
from reinforcepp.errors import ModelError
from reinforcepp.models.loading import check_context, context_length, load_config, load_policy, load_tokenizer
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.tokenization import encode, encode_example, encode_prompts, format_prompt
from reinforcepp.monitoring import Progress, echo
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.training.evaluation import BATCH, Logprobs, answer_logprobs, kl_sums
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_A_TIME = 64
"""Answers between two steps of the progress line."""
SIDES = ("A", "B")
THIRD = "reference"

Chosen = tuple[str, str]
"""A prompt and the answer that people chose."""


@dataclass(frozen=True)
class Ready:
    """A model as far as its small files tell: nothing of its weights is loaded yet."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    context: int | None
    vocabulary: int

    @property
    def pad_id(self) -> int:
        """What fills up rows that are shorter than others."""
        return int(self.tokenizer.pad_token_id)


@dataclass
class Said:
    """What came of the models; keys are A and B, and a figure that makes no sense is not there."""

    answers: dict[str, list[Completion]] = field(default_factory=dict)
    kl_sums: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- before any weights are loaded ----------------------------------------------------------------------------------


def make_ready(config: CompareConfig, rows: Sequence[PromptRow]) -> dict[str, Ready]:
    """Models A and B and, where it is neither, the reference, checked from their small files alone.

    Raises:
        ReinforceError: for a model that can't be had, or limits that its context can't hold.
    """
    names = {"A": config.model_a, "B": config.model_b}
    if reference_of(config) == THIRD:
        names[THIRD] = str(config.reference)
    ready = {}
    for side, name in names.items():
        own = load_config(name)
        check_context(own, config.max_prompt_length, config.max_new_tokens)
        tokenizer = load_tokenizer(name)
        prompts, cut = encode_prompts(tokenizer, rows, max_prompt_length=config.max_prompt_length)
        if cut and side in SIDES:
            echo(
                f"{len(cut)} of {len(rows)} prompts are longer than {config.max_prompt_length} tokens of {side} and were cut "
                "from the left.",
                "yellow",
            )
        ready[side] = Ready(name, tokenizer, prompts, context_length(own), own.get_text_config().vocab_size)
    return ready


def reference_of(config: CompareConfig) -> str:
    """The side to which the KL is measured: A, B or, where another model was named, ``reference``."""
    if config.reference in (None, config.model_a):
        return "A"
    return "B" if config.reference == config.model_b else THIRD


def choose_for_both(config: CompareConfig) -> EngineChoice:
    """One engine for both models: with different ones the same random numbers wouldn't give the same answers.

    Raises:
        RolloutError: vLLM was asked for by name and can't run one of them.
    """
    choices = [
        choose_engine(config.engine, load_config(name), torch.float32) for name in (config.model_a, config.model_b)
    ]
    choice = next((each for each in choices if each.name == "transformers"), choices[0])
    if config.engine == "auto":
        echo(f"Completions come from {choice.name}: {choice.reason}.")
    return choice


# --- one model after another ----------------------------------------------------------------------------------------


def ask(config: CompareConfig, ready: Mapping[str, Ready], choice: EngineChoice, chosen: Sequence[Chosen]) -> Said:
    """Let each model answer and measure it, the reference last, as it has to read what the others answered."""
    said = Said()
    reference = reference_of(config)
    due = _kl_due(config, ready, reference, said)
    pairs = _fitting(ready, chosen, said)
    own: dict[str, list[Logprobs]] = {}
    for side in sorted(ready, key=lambda each: (each == reference, each)):
        if side == THIRD and not due:
            continue
        model = load_policy(ready[side].name)
        if side in SIDES:
            said.answers[side] = _answers(config, side, ready[side], model, choice)
            _to_gpu(model)
            if side in due:
                own[side] = _logprobs(config, ready[side], model, said.answers[side])
            if pairs:
                said.perplexity[side] = perplexity(model, ready[side].tokenizer, pairs)
        if side == reference:
            _to_gpu(model)
            for other in due:
                if _has_rows_for(said.answers[other], ready[side]):
                    read = _logprobs(config, ready[side], model, said.answers[other])
                    said.kl_sums[other] = kl_sums(own[other], read)
                else:
                    said.notes.append(
                        f"The KL of {other} is left out: it said tokens that {ready[side].name} doesn't have."
                    )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return said


def _logprobs(
    config: CompareConfig, ready: Ready, model: PreTrainedModel, answers: Sequence[Completion]
) -> list[Logprobs]:
    """Of answers that may be another model's; they are read in the frame that they were given in, as in training."""
    return answer_logprobs(model, answers, config.temperature, ready.pad_id)


def _to_gpu(model: PreTrainedModel) -> None:
    if torch.cuda.is_available():
        model.to("cuda")


def _answers(
    config: CompareConfig, side: str, ready: Ready, model: PreTrainedModel, choice: EngineChoice
) -> list[Completion]:
    """``num_samples`` answers to each prompt, in order."""
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        num_samples=config.num_samples,
        seed=config.seed,
    )
    if choice.name == "transformers":
        _to_gpu(model)  # vLLM places its own copy
    limit = config.max_prompt_length + config.max_new_tokens
    engine = start_engine(choice, model, ready.tokenizer, max_length=limit, batch_size=AT_A_TIME)
    size = max(1, AT_A_TIME // config.num_samples)
    parts = [ready.prompts[start : start + size] for start in range(0, len(ready.prompts), size)]
    answers: list[Completion] = []
    try:
        with Progress(f"answers of {side}", len(parts)) as progress:
            for part in parts:
                answers += engine.generate(part, sampling)
                progress.step(f"{len(answers)} of {len(ready.prompts) * config.num_samples}")
    finally:
        engine.close()
    return answers


# --- KL -------------------------------------------------------------------------------------------------------------


def _kl_due(config: CompareConfig, ready: Mapping[str, Ready], reference: str, said: Said) -> list[str]:
    """The sides whose KL to the reference can be measured; why another's can't goes into the notes."""
    if config.temperature == 0 or config.top_p < 1 or config.top_k > 0:
        said.notes.append(
            "The KL is left out: it needs answers drawn from the models' own distributions (temperature above 0, top_p 1, "
            "top_k 0)."
        )
        return []
    due = []
    for side in SIDES:
        if side == reference:
            continue
        if ready[side].tokenizer.get_vocab() == ready[reference].tokenizer.get_vocab():
            due.append(side)
        else:
            said.notes.append(
                f"The KL of {side} to {ready[reference].name} is left out: it isn't defined between models with different "
                "tokenizers."
            )
    return due


def _has_rows_for(answers: Sequence[Completion], ready: Ready) -> bool:
    """Whether the model knows each id that was sampled: vocabularies with the same tokens may be padded differently."""
    return max(max(answer.ids) for answer in answers) < ready.vocabulary


# --- perplexity -----------------------------------------------------------------------------------------------------


def _fitting(ready: Mapping[str, Ready], chosen: Sequence[Chosen], said: Said) -> list[Chosen]:
    """The pairs that both models can read as a whole."""
    try:
        kept = [pair for pair in chosen if all(_fits(ready[side], pair) for side in SIDES)]
    except ModelError as error:  # a chat template that can't frame an answer that is given
        said.notes.append(f"The perplexity on the chosen answers is left out. {error}")
        return []
    if len(kept) < len(chosen):
        said.notes.append(
            f"The perplexity is that of {len(kept)} of {len(chosen)} chosen answers: the others are longer than a model's "
            "context."
        )
    if kept and ready["A"].tokenizer.get_vocab() != ready["B"].tokenizer.get_vocab():
        said.notes.append(
            "The perplexities can't be compared with each other: they are per token, and the tokenizers differ."
        )
    return kept


def _fits(ready: Ready, pair: Chosen) -> bool:
    length = len(encode_example(ready.tokenizer, *pair))
    return ready.context is None or length <= ready.context


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Chosen]) -> float:
    """Of the chosen answers: exp of the mean negative log-likelihood per token, in nats, framed, with EOS."""
    framed = []
    for prompt, answer in pairs:
        ids, whole = encode(tokenizer, format_prompt(tokenizer, prompt)), encode_example(tokenizer, prompt, answer)
        framed.append((ids, whole[len(ids) :]))
    framed.sort(key=lambda row: len(row[0]) + len(row[1]))  # rows of like length need little padding
    total = tokens = 0.0
    for start in range(0, len(framed), BATCH):
        prompts, answers = zip(*framed[start : start + BATCH], strict=True)
        logprobs_BT, _, mask_BT = response_logprobs(model, prompts, answers, pad_id=int(tokenizer.pad_token_id))
        total += float(logprobs_BT.double().sum())
        tokens += float(mask_BT.sum())
    return math.exp(-total / tokens)
