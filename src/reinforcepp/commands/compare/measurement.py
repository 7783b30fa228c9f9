"""Measurements on the models: responses, log-probabilities, and perplexity, with one model in memory at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from reinforcepp.config import CompareConfig
from reinforcepp.data import PromptRow
from reinforcepp.errors import ModelError
from reinforcepp.models.loading import (
    context_length,
    load_config,
    load_policy,
    load_tokenizer,
    prompt_limit,
    tokenizer_for,
)
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.precision import inference_dtype
from reinforcepp.models.tokenization import encode_example, encode_prompts, split_example
from reinforcepp.monitoring import Progress
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.evaluation import SCORING_BATCH_SIZE, Logprobs, completion_logprobs, kl_sums
from reinforcepp.types import Completion, Conversation, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESPONSES_PER_CHUNK = 64
"""Responses between two updates of the progress line."""
SIDES = ("A", "B")
THIRD = "reference"


class Chosen(NamedTuple):
    """A prompt and its chosen response."""

    prompt: Conversation
    response: str
    variables: Mapping[str, Any] = {}


@dataclass(frozen=True)
class PreparedModel:
    """A model's tokenizer and limits, without its weights."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    context: int | None
    vocabulary: int
    dtype: torch.dtype
    """Data type of the weights, the same for all models, because rounding would count as a difference."""
    loaded: PreTrainedModel | None = None
    """The model, if a Python program passed it."""

    def load(self) -> PreTrainedModel:
        """Return the model with its weights, in evaluation mode."""
        return load_policy(self.name, self.dtype) if self.loaded is None else self.loaded.eval()

    def to_gpu(self, model: PreTrainedModel) -> None:
        """Move a model of :meth:`load` to the GPU, if there is one."""
        if self.loaded is None and torch.cuda.is_available():
            model.to("cuda")

    @property
    def pad_id(self) -> int:
        """Padding token."""
        return int(self.tokenizer.pad_token_id)


@dataclass
class Measurements:
    """Results by side, A and B. Metrics that aren't defined are missing."""

    responses: dict[str, list[Completion]] = field(default_factory=dict)
    kl_sums: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- before any weights are loaded ----------------------------------------------------------------------------------


def prepare(
    config: CompareConfig,
    rows: Sequence[PromptRow],
    loaded: Mapping[str, PreTrainedModel],
    processing_class: PreTrainedTokenizerBase | None = None,
) -> dict[str, PreparedModel]:
    """Check models A and B and a separate reference model by their small files and tokenize the prompts.

    Raises:
        ReinforceError: A model isn't available, or the limits exceed its context.
    """
    names = {"A": config.model_a, "B": config.model_b}
    if reference_of(config) == THIRD:
        names[THIRD] = str(config.reference)
    configs = {side: loaded[side].config if side in loaded else load_config(name) for side, name in names.items()}
    stored = [loaded[side].dtype if side in loaded else found.dtype for side, found in configs.items()]
    dtype = inference_dtype(config.dtype, *stored)
    models = {}
    for side, name in names.items():
        model, model_config = loaded.get(side), configs[side]
        limit = prompt_limit(model_config, config.max_prompt_length, config.max_new_tokens)
        tokenizer = load_tokenizer(name) if model is None else tokenizer_for(model_config, processing_class)
        prompts, truncated = encode_prompts(tokenizer, rows, max_prompt_length=limit)
        if truncated and side in SIDES:
            echo(
                f"{len(truncated)} of {len(rows)} prompts exceed {limit} tokens of {side}. They lost "
                "their oldest turns or the beginning of their text.",
                "yellow",
            )
        models[side] = PreparedModel(
            name,
            tokenizer,
            prompts,
            context_length(model_config),
            model_config.get_text_config().vocab_size,
            dtype if model is None else model.dtype,
            model,
        )
    return models


def reference_of(config: CompareConfig) -> str:
    """Return the reference side of the KL: A, B or, for another model, ``reference``."""
    if config.reference in (None, config.model_a):
        return "A"
    return "B" if config.reference == config.model_b else THIRD


def choose_for_both(config: CompareConfig, models: Mapping[str, PreparedModel]) -> EngineChoice:
    """Return one engine for both models, because shared seeds give equal samples only within one engine.

    Raises:
        RolloutError: vLLM was requested but can't run one of the models.
    """
    both = [models[side] for side in SIDES]
    wanted = "transformers" if config.engine == "auto" and any(model.loaded for model in both) else config.engine
    choices = [
        choose_engine(wanted, load_config(model.name) if model.loaded is None else model.loaded.config, model.dtype)
        for model in both
    ]
    choice = next((each for each in choices if each.name == "transformers"), choices[0])
    if config.engine == "auto":
        echo(f"Completions come from {choice.name}: {choice.reason}.")
    return choice


# --- one model after another ----------------------------------------------------------------------------------------


def measure(
    config: CompareConfig, models: Mapping[str, PreparedModel], choice: EngineChoice, chosen: Sequence[Chosen]
) -> Measurements:
    """Generate with each model and measure it. The reference comes last because it scores the others' responses."""
    measured = Measurements()
    reference = reference_of(config)
    due = _kl_due(config, models, reference, measured)
    pairs = _fitting(models, chosen, measured)
    logprobs: dict[str, list[Logprobs]] = {}
    for side in sorted(models, key=lambda each: (each == reference, each)):
        if side == THIRD and not due:
            continue
        model = models[side].load()
        if side in SIDES:
            measured.responses[side] = _responses(config, side, models[side], model, choice)
            models[side].to_gpu(model)
            if side in due:
                logprobs[side] = _logprobs(config, models[side], model, measured.responses[side])
            if pairs:
                measured.perplexity[side] = perplexity(model, models[side].tokenizer, pairs, side)
        if side == reference:
            models[side].to_gpu(model)
            for other in due:
                if _knows_ids_of(measured.responses[other], models[side]):
                    by_reference = _logprobs(config, models[side], model, measured.responses[other])
                    measured.kl_sums[other] = kl_sums(logprobs[other], by_reference)
                else:
                    measured.notes.append(
                        f"Skipped the KL of {other}: it generated tokens that {models[side].name} doesn't have."
                    )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return measured


def _logprobs(
    config: CompareConfig, prepared: PreparedModel, model: PreTrainedModel, responses: Sequence[Completion]
) -> list[Logprobs]:
    """Return log-probabilities of responses, with the prompt format that they were generated with, as in training."""
    with Progress(f"log-probabilities by {prepared.name}", len(responses)) as progress:
        return completion_logprobs(
            model, responses, config.temperature, prepared.pad_id, lambda rows: progress.step(units=rows)
        )


def _responses(
    config: CompareConfig, side: str, prepared: PreparedModel, model: PreTrainedModel, choice: EngineChoice
) -> list[Completion]:
    """Return ``num_samples`` responses to each prompt, in order."""
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        num_samples=config.num_samples,
        seed=config.seed,
    )
    if choice.name == "transformers":
        prepared.to_gpu(model)  # vLLM moves its own copy
    limit = max(len(prompt.ids) for prompt in prepared.prompts) + config.max_new_tokens
    echo(f"{choice.name} generates {len(prepared.prompts) * config.num_samples} responses of {side}")
    engine = start_engine(choice, model, prepared.tokenizer, max_length=limit, batch_size=RESPONSES_PER_CHUNK)
    size = max(1, RESPONSES_PER_CHUNK // config.num_samples)
    chunks = [prepared.prompts[start : start + size] for start in range(0, len(prepared.prompts), size)]
    responses: list[Completion] = []
    try:
        with Progress(f"responses of {side}", len(chunks)) as progress:
            for chunk in chunks:
                responses += engine.generate(chunk, sampling)
                progress.step(f"{len(responses)} of {len(prepared.prompts) * config.num_samples}")
    finally:
        engine.close()
    return responses


# --- KL -------------------------------------------------------------------------------------------------------------


def _kl_due(
    config: CompareConfig, models: Mapping[str, PreparedModel], reference: str, measured: Measurements
) -> list[str]:
    """Return the sides whose KL to the reference is defined, and note why another's isn't."""
    if config.temperature == 0 or config.top_p < 1 or config.top_k > 0:
        measured.notes.append(
            "Skipped the KL: it needs samples from the models' full distributions (temperature above 0, top_p 1, top_k 0)."
        )
        return []
    due = []
    for side in SIDES:
        if side == reference:
            continue
        if models[side].tokenizer.get_vocab() == models[reference].tokenizer.get_vocab():
            due.append(side)
        else:
            measured.notes.append(
                f"Skipped the KL of {side} to {models[reference].name}: it isn't defined for different tokenizers."
            )
    return due


def _knows_ids_of(responses: Sequence[Completion], prepared: PreparedModel) -> bool:
    """Return whether the model has all sampled ids; vocabularies with the same tokens can differ in padding."""
    return max(max(response.ids) for response in responses) < prepared.vocabulary


# --- perplexity -----------------------------------------------------------------------------------------------------


def _fitting(models: Mapping[str, PreparedModel], chosen: Sequence[Chosen], measured: Measurements) -> list[Chosen]:
    """Return the pairs that fit into the contexts of both models."""
    try:
        kept = [pair for pair in chosen if all(_fits(models[side], pair) for side in SIDES)]
    except ModelError as error:  # a chat template that can't format a given response
        measured.notes.append(f"Skipped the perplexity on chosen responses. {error}")
        return []
    if len(kept) < len(chosen):
        measured.notes.append(
            f"The perplexity covers {len(kept)} of {len(chosen)} chosen responses. The others exceed a model's context."
        )
    if kept and models["A"].tokenizer.get_vocab() != models["B"].tokenizer.get_vocab():
        measured.notes.append("The perplexities aren't comparable: they are per token, and the tokenizers differ.")
    return kept


def _fits(prepared: PreparedModel, pair: Chosen) -> bool:
    length = len(encode_example(prepared.tokenizer, pair.prompt, pair.response, variables=pair.variables))
    return prepared.context is None or length <= prepared.context


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Chosen], name: str) -> float:
    """Return the perplexity of chosen responses with prompt format and end token: exp(mean negative log-likelihood per token).

    The progress line calls the model ``name``.
    """
    formatted = [split_example(tokenizer, pair.prompt, pair.response, variables=pair.variables) for pair in pairs]
    formatted.sort(key=lambda row: len(row[0]) + len(row[1]))  # rows of similar length need little padding
    total = tokens = 0.0
    with Progress(f"perplexity of {name}", len(formatted)) as progress:
        for start in range(0, len(formatted), SCORING_BATCH_SIZE):
            prompts, answers = zip(*formatted[start : start + SCORING_BATCH_SIZE], strict=True)
            logprobs_BT, _, mask_BT = response_logprobs(model, prompts, answers, pad_id=int(tokenizer.pad_token_id))
            total += float(logprobs_BT.double().sum())
            tokens += float(mask_BT.sum())
            progress.step(units=len(prompts))
    return math.exp(-total / tokens)
