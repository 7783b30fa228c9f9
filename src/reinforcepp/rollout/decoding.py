"""How a model family is decoded: with or without padding, and with which cache.

Attention over keys and values can be padded, and finished rows can leave the cache. Other families (Mamba, RWKV,
RecurrentGemma, xLSTM) keep a recurrent state, take their cache under another name, ignore the attention mask, or have no
cache. For such a family the engine tries each :class:`Decoding` of :data:`LADDER` on a few tokens and uses the first one
whose log-probabilities equal those of an unpadded forward pass without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from reinforcepp.errors import RolloutError, first_line
from reinforcepp.models.logprobs import counts_from_padding_id, takes_left_padding
from reinforcepp.models.lora import base_model
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.kv_cache import PreallocatedLayer, preallocated_cache, select_rows
from reinforcepp.rollout.self_check import compare_samples
from reinforcepp.terminal import warn
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")
"""Names under which the families of transformers take and return their cache."""

PROBE_LENGTHS = (13, 13, 3, 8)
"""Tokens of the probe's prompts: two samples of one prompt, shorter ones that need padding, one shorter than a convolution."""
PROBE_NEW_TOKENS = (2, 6, 6, 6)
"""Tokens that the probe generates; the first row leaves the batch early."""

FAILURES = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
"""Exceptions by which a family shows that it doesn't support a decoding."""


@dataclass(frozen=True)
class Decoding:
    """A way to decode a batch."""

    padded: bool
    """Prompts of different lengths share a batch, padded on the left."""
    selects_rows: bool
    """A prompt is run once for all its samples, and finished rows leave the batch."""
    cache: Literal["preallocated", "model", "none"]
    """Our cache, the cache that the model returns, or no cache: each token then costs a pass over the whole sequence."""

    def batches(self, rows: Sequence[BatchRow], size: int) -> Iterator[list[BatchRow]]:
        """Yield batches of up to ``size`` rows whose prompts have similar or, without padding, equal lengths."""
        by_length = sorted(rows, key=BatchRow.prompt_length)
        groups = (
            [by_length] if self.padded else [list(group) for _, group in groupby(by_length, BatchRow.prompt_length)]
        )
        for group in groups:
            yield from (group[start : start + size] for start in range(0, len(group), size))


LADDER = (
    Decoding(padded=True, selects_rows=True, cache="preallocated"),
    Decoding(padded=False, selects_rows=True, cache="preallocated"),
    Decoding(padded=False, selects_rows=False, cache="preallocated"),
    Decoding(padded=False, selects_rows=False, cache="model"),
    Decoding(padded=False, selects_rows=True, cache="none"),
)
"""All ways to decode, the fastest one first."""


def is_plain(model: PreTrainedModel) -> bool:
    """Return whether a text model has attention layers only and takes a KV cache, a mask, and positions that begin at 0."""
    base = base_model(model)
    takes_cache = "past_key_values" in inspect.signature(type(base).forward).parameters
    if not (takes_cache and takes_left_padding(base)):
        return False
    if base.config.get_text_config() is not base.config:  # a model of text and images can mask text in its own way
        return False
    try:
        layers = preallocated_cache(base.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # the library has no cache for this configuration
        return False
    return all(type(layer) in (PreallocatedLayer, DynamicSlidingWindowLayer) for layer in layers)


def select_decoding(model: PreTrainedModel, probe: Callable[[Decoding], list[Completion]]) -> Decoding:
    """Return the first decoding of :data:`LADDER` whose samples have the log-probabilities of an unpadded forward pass.

    A model whose layers are all attention takes the first one without a probe.

    Args:
        model: The model that generates.
        probe: Returns a few completions sampled by a decoding.

    Raises:
        RolloutError: no decoding is exact; the message names the family.
    """
    if is_plain(model):
        return LADDER[0]
    family = base_model(model).config.model_type
    problem = ""
    for decoding in LADDER:
        try:
            report = compare_samples(model, probe(decoding))
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            problem = f"its forward pass fails ({first_line(error)})"
            continue
        if report.exact:
            if decoding.cache == "none":
                warn(
                    f"The model family {family} generates without a cache here, so each token costs a pass over the whole "
                    "sequence. Keep max_prompt_length and max_new_tokens short.",
                    stacklevel=2,
                )
            return decoding
        problem = (
            "log-probabilities of sampled tokens differ from those of a forward pass over the whole sequence by up to "
            f"{report.gap_max:.3g} nats"
        )
    raise RolloutError(
        f"The transformers engine can't generate with the model family {family}: {problem}. Use a causal language model of "
        "another family."
    )


def probe_rows(model: PreTrainedModel) -> tuple[list[BatchRow], Sampling]:
    """Return the rows that a probe generates, and their sampling parameters."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sampling = Sampling(max(PROBE_NEW_TOKENS))
    rows = []
    for sample, (length, limit) in enumerate(zip(PROBE_LENGTHS, PROBE_NEW_TOKENS, strict=True)):
        prompt = Prompt("", tuple((7 + 11 * i) % vocabulary for i in range(length)), length)
        rows.append(BatchRow.start(prompt, sample, sampling, limit))
    return rows, sampling


class BatchDecoder:
    """The forward passes of one batch.

    Args:
        model: A causal language model.
        decoding: How the batch is decoded.
    """

    def __init__(self, model: PreTrainedModel, decoding: Decoding) -> None:
        base = base_model(model)
        parameters = inspect.signature(type(base).forward).parameters
        passes_on = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        self._model, self._decoding = model, decoding
        self._inputs = parameters.keys() | ({"use_cache", "logits_to_keep"} if passes_on else set())
        self._counts_positions = counts_from_padding_id(base)
        self._cache: Any = preallocated_cache(base.config) if decoding.cache == "preallocated" else None
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
        self._ids_BL: Tensor | None = None

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """Extend the sequences by ``ids_BL``; return the logits after the last column, in float32. -> (B, V)"""
        uses_cache = self._decoding.cache != "none"
        if not uses_cache:
            self._ids_BL = ids_BL if self._ids_BL is None else torch.cat([self._ids_BL, ids_BL], dim=1)
            ids_BL = self._ids_BL
        inputs: dict[str, Any] = {"use_cache": uses_cache, "logits_to_keep": 1}
        if ids_BL.shape == mask_BL.shape or self._cache_name == "past_key_values":
            inputs["attention_mask"] = mask_BL  # a recurrent state needs a mask of the new columns only
        if uses_cache and not self._counts_positions:
            inputs["position_ids"] = positions_BL
        if self._cache is not None:
            inputs[self._cache_name] = self._cache
        output = self._model(input_ids=ids_BL, **{name: x for name, x in inputs.items() if name in self._inputs})
        if self._decoding.cache == "model":
            self._cache_name = next((name for name in CACHE_NAMES if getattr(output, name, None) is not None), "")
            if not self._cache_name:
                raise NotImplementedError("the model returns no cache")
            self._cache = getattr(output, self._cache_name)
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def select(self, indices: Tensor) -> None:
        """Keep the rows ``indices``; a row can occur several times."""
        if self._ids_BL is not None:
            self._ids_BL = self._ids_BL[indices]
        elif self._cache is not None:
            select_rows(self._cache, indices)
