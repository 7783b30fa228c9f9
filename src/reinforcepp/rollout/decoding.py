"""How a model family is decoded: with or without padding, and with which cache.

Attention over keys and values can be padded, and finished rows can leave the cache. Other families (Mamba, RWKV,
RecurrentGemma, xLSTM) keep a recurrent state, take their cache under another name, ignore the attention mask, or have no
cache. For such a family the engine tries each :class:`Decoding` of :data:`LADDER` on a few tokens and uses the first one
whose log-probabilities equal those of an unpadded forward pass without a cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from reinforcepp.errors import RolloutError, first_line
from reinforcepp.models.logprobs import counts_from_padding_id, takes_left_padding
from reinforcepp.models.lora import base_model
from reinforcepp.models.packed_attention import extend_sdpa
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.kv_cache import PreallocatedLayer, join_rows, preallocated_cache, select_rows
from reinforcepp.rollout.self_check import compare_samples
from reinforcepp.runtime.terminal import warn
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")
"""Names under which the families of transformers take and return their cache."""

PROBE_LENGTHS = (13, 13, 3, 8, 21)
"""Tokens of the probe's prompts: two samples of one prompt, others that need padding, one shorter than a convolution."""
PROBE_NEW_TOKENS = (2, 6, 6, 3, 6)
"""Tokens that the probe generates; rows with few tokens leave the batch early."""
PROBE_BATCH_SIZE = 3
"""Largest number of rows in the probe's batch; the others wait."""

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
    refills: bool
    """Waiting rows take the places of finished ones; requires the two above and our cache."""
    cache: Literal["preallocated", "model", "none"]
    """Our cache, the cache that the model returns, or no cache: each token then costs a pass over the whole sequence."""

    def queues(self, rows: Sequence[BatchRow]) -> list[list[BatchRow]]:
        """Return ``rows`` in the order in which they are decoded; without padding, one queue per length of prompt."""
        by_length = sorted(rows, key=BatchRow.prompt_length)
        return [by_length] if self.padded else [list(group) for _, group in groupby(by_length, BatchRow.prompt_length)]


LADDER = (
    Decoding(padded=True, selects_rows=True, refills=True, cache="preallocated"),
    Decoding(padded=True, selects_rows=True, refills=False, cache="preallocated"),
    Decoding(padded=False, selects_rows=True, refills=False, cache="preallocated"),
    Decoding(padded=False, selects_rows=False, refills=False, cache="preallocated"),
    Decoding(padded=False, selects_rows=False, refills=False, cache="model"),
    Decoding(padded=False, selects_rows=True, refills=False, cache="none"),
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


def takes_attention_mask(model: PreTrainedModel) -> bool:
    """Return whether a plain model attends by SDPA and takes the mask of shape (B, 1, 1, L) that SDPA needs, or no mask.

    The library otherwise makes that mask anew for each token, and reads a sum from the device to see whether it needs one.
    Each sliding window needs another mask. Falcon's ALiBi is computed from the mask of shape (B, L).
    """
    base = base_model(model)
    if not (is_plain(model) and type(base).__module__.startswith("transformers.")):
        return False
    has_windows = any(type(layer) is not PreallocatedLayer for layer in preallocated_cache(base.config).layers)
    return base.config._attn_implementation == "sdpa" and not has_windows and not getattr(base.config, "alibi", False)


def cache_dtype(model: PreTrainedModel, device: str) -> torch.dtype | None:
    """Return float32 if decoding ``model`` on ``device`` is faster with a float32 cache, otherwise None for the model's dtype.

    A CPU computes the attention of single queries in float32 in 1.2 to 2.6 times less time than in bfloat16. Heads that share
    keys are computed as one product, which is faster in bfloat16.
    """
    base = base_model(model)
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    shares_keys = getattr(text, "num_key_value_heads", heads) != heads or getattr(text, "multi_query", False)
    narrow = base.dtype in (torch.bfloat16, torch.float16)
    if device != "cpu" or shares_keys or not narrow or not base._supports_attention_backend:
        return None
    return torch.float32 if takes_attention_mask(model) else None


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
        extend_sdpa()
        self._cache: Any = None
        if decoding.cache == "preallocated":
            self._cache = preallocated_cache(base.config, cache_dtype(model, model.device.type))
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
        self._ids_BL: Tensor | None = None

    def forward(self, ids_BL: Tensor, mask: Tensor | None, positions_BL: Tensor) -> Tensor:
        """Extend the sequences by ``ids_BL``; return the logits after the last column, in float32. -> (B, V)

        Args:
            ids_BL: New tokens.
            mask: (B, columns so far), or (B, 1, 1, columns so far) or None if :func:`takes_attention_mask`.
            positions_BL: Positions of the new tokens.
        """
        uses_cache = self._decoding.cache != "none"
        if not uses_cache:
            self._ids_BL = ids_BL if self._ids_BL is None else torch.cat([self._ids_BL, ids_BL], dim=1)
            ids_BL = self._ids_BL
        inputs: dict[str, Any] = {"use_cache": uses_cache, "logits_to_keep": 1}
        if mask is not None and (ids_BL.shape == mask.shape or self._cache_name == "past_key_values"):
            inputs["attention_mask"] = mask  # a recurrent state needs a mask of the new columns only
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

    def select(self, indices: list[int]) -> None:
        """Keep the rows ``indices``; a row can occur several times."""
        kept = torch.tensor(indices, device=self._model.device)
        if self._ids_BL is not None:
            self._ids_BL = self._ids_BL[kept]
        elif self._cache is not None:
            select_rows(self._cache, kept)

    def join(self, kept: list[int], others: Sequence[tuple[BatchDecoder, list[int]]], tokens: int) -> None:
        """Keep the rows ``kept`` and append rows of ``others``, aligned at the end; this uses ``others`` up.

        Args:
            kept: Indices of this decoder's rows.
            others: Decoders, and indices of their rows.
            tokens: Length of the cache afterwards: at least the length of every row.
        """
        join_rows(self._cache, kept, [(other._cache, indices) for other, indices in others], tokens)

    def copy_row(self, index: int) -> BatchDecoder:
        """Return a decoder of a copy of one row, with our cache."""
        other = copy.copy(self)
        other._cache = copy.copy(self._cache)
        other._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        other.select([index])
        return other
