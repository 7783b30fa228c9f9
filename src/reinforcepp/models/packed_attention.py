"""Pack sequences of different length into one row without padding; each attends to itself only.

Positions restart in each sequence. Attention computes each sequence by itself: on a GPU with torch's kernel for variable
lengths or with FlashAttention, otherwise with one call of SDPA per group of equally long sequences. A model is packed only if
that gives the outputs that it has for each sequence alone, see :func:`can_pack`.

The same attention function computes decoding steps on a CPU, see :func:`one_query_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reinforcepp.models.rotary import frequencies_change

FLASH = ("flash_attention_2", "flash_attention_3")
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings of model configurations that limit the tokens that a token attends to."""
PROBE_LENGTHS = (3, 5, 5, 2)
TOLERANCE = {torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 3e-2
"""Largest difference of outputs, relative to the largest output."""


@dataclass(frozen=True)
class Segments:
    """The sequences of a packed row."""

    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    bounds: Tensor
    """Index of each sequence's first token, then the number of all tokens; int32, on the model's device."""


def packed_inputs(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return arguments of ``model`` that pack ``rows`` of token ids into one row."""
    lengths = tuple(map(len, rows))
    device = model.device
    bounds = on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    shared = {
        "input_ids": on_device(torch.tensor([list(chain.from_iterable(rows))]), device),
        "position_ids": on_device(torch.cat([torch.arange(length) for length in lengths])[None], device),
        "use_cache": False,
    }
    if text_config(model)._attn_implementation in FLASH:
        longest = max(lengths)
        return shared | {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    extend_sdpa()
    # Models pass on a mask with four dimensions. An attention that reads it instead of the segments returns nan.
    mask = torch.full((1, 1, 1, 1), torch.nan, dtype=model.dtype, device=device)
    return shared | {"attention_mask": mask, "segments": Segments(lengths, bounds)}


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on ``device``; the CPU doesn't wait for the copy."""
    return tensor.to(device, non_blocking=True)


def text_config(model: Any) -> Any:
    """Return the configuration of the layers that read text."""
    return model.config.get_text_config()


# --- attention ------------------------------------------------------------------------------------------------------


@cache
def extend_sdpa() -> None:
    """Let the attention ``sdpa`` of transformers take ``segments``, and compute single queries on a CPU without copied keys.

    Single queries are computed in the type of the keys.

    Otherwise, it is unchanged.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        segments = settings.pop("segments", None)
        if segments is not None:
            if attention_mask is None or attention_mask.numel() > 1:
                raise ValueError("segments: the model has its own mask, as sparse attention does")
            return segment_attention(query, key, value, segments, settings.get("scaling")), None
        if query.device.type == "cpu" and query.shape[2] == 1 and _attends_alone(query, key, attention_mask, settings):
            return one_query_attention(query, key, value, attention_mask, settings.get("scaling")), None
        return plain(module, query, key, value, attention_mask, **settings)

    AttentionInterface.register("sdpa", attention)


def _attends_alone(query: Tensor, key: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> bool:
    """Return whether heads share keys, or keys have another type, and nothing but a mask that heads share changes attention."""
    plain = settings.get("position_bias") is None and settings.get("cache") is None and not settings.get("dropout")
    differs = query.shape[1] > key.shape[1] or query.dtype != key.dtype
    return plain and differs and (mask is None or mask.shape[1:3] == (1, 1))


def one_query_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention of one query per row and head, (B, H, 1, D) -> (B, 1, H, D), computed in the type of the keys.

    Heads that share keys are computed as queries of one head. With a mask, transformers copies the keys for each of them.

    Args:
        query: (B, H, 1, D).
        key: (B, K, L, D), where K divides H.
        value: (B, K, L, D).
        mask: (B, 1, 1, L), or None for none.
        scale: Factor of the products, or None for the default.
    """
    queries = query.to(key.dtype).reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    attended = nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    return attended.flatten(1, 2)[:, None].to(query.dtype)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Return causal attention inside each segment, (1, H, L, D) -> (1, L, H, D); keys can have fewer heads than queries."""
    grouped = query.shape[1] != key.shape[1]
    if _has_varlen_kernel(query, value):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(segments.lengths)
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
        attended: Tensor = varlen_attn(
            *(queries, keys, values, segments.bounds, segments.bounds, longest, longest),
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=grouped,
        )  # type: ignore[assignment]
        return attended[None]
    groups = [(length, sum(1 for _ in equal)) for length, equal in groupby(segments.lengths)]
    sizes = [length * count for length, count in groups]
    parts = []
    for (length, count), *rows in zip(
        groups, *(torch.split(x[0], sizes, dim=1) for x in (query, key, value)), strict=True
    ):
        queries, keys, values = (x.unflatten(1, (count, length)).transpose(0, 1) for x in rows)
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _has_varlen_kernel(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's kernel for variable lengths takes these tensors: FlashAttention 2 on an NVIDIA GPU."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


# --- models that can be packed --------------------------------------------------------------------------------------

_packable: WeakKeyDictionary[nn.Module, dict[tuple[torch.device, torch.dtype], bool]] = WeakKeyDictionary()


def can_pack(model: Any, longest: int) -> bool:
    """Return whether ``model`` has the same outputs for packed sequences of up to ``longest`` tokens as for each alone.

    The first call on a device and in a dtype computes a few tokens both ways. Sliding windows must be longer than the
    sequences, and rotary frequencies must be the same for all. Outputs are logits, or hidden states if the model has no
    output layer.
    """
    config = text_config(model)
    windows = [getattr(config, name, None) for name in WINDOWS]
    if any(window is not None and longest > window for window in windows) or frequencies_change(model, longest):
        return False
    known, key = _packable.setdefault(model, {}), (model.device, model.dtype)
    if key not in known:
        known[key] = config._attn_implementation in ("sdpa", *FLASH) and _packs_exactly(model)
    return known[key]


@torch.no_grad()
def _packs_exactly(model: Any) -> bool:
    """Return whether a few packed sequences have the outputs that each has alone."""
    count = min(model.get_input_embeddings().weight.shape[0], 1 << 10)
    ids = iter(torch.randint(count, (sum(PROBE_LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist())
    rows = [[next(ids) for _ in range(length)] for length in PROBE_LENGTHS]
    asked = torch.arange(1, sum(PROBE_LENGTHS), device=model.device)
    has_head = model.get_output_embeddings() is not None

    def outputs(**inputs: Any) -> Tensor:
        found = model(**inputs)
        all_outputs: Tensor = (found.logits if has_head else found.last_hidden_state)[0]
        return all_outputs

    try:
        if has_head:
            packed = outputs(**packed_inputs(model, rows), logits_to_keep=asked)
        else:
            packed = outputs(**packed_inputs(model, rows))[asked]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False  # The model doesn't pass the arguments on, or has no kernel for them.
    alone = [outputs(input_ids=torch.tensor([row], device=model.device), use_cache=False) for row in rows]
    expected = torch.cat(alone)[1:]
    if packed.shape != expected.shape:
        return False
    allowed = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE) * expected.abs().max()
    return bool((packed - expected).abs().max() <= allowed)  # False for nan
