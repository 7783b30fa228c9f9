"""Rotary position embeddings whose frequencies depend on the longest sequence of a batch.

Transformers computes the frequencies of the types ``dynamic`` and ``longrope`` anew if a batch has a sequence beyond the
original context. A row's log-probabilities then depend on the rows in its batch and, for ``dynamic``, in earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

FIXED = "default"
"""Type of transformers whose frequencies never change."""


def fix_frequencies(model: nn.Module, longest: int) -> str | None:
    """Compute rotary frequencies once, as for a sequence of ``longest`` tokens; return their type if they would change.

    A model whose sequences stay within the original context isn't changed. vLLM also chooses the frequencies once, by the
    longest sequence. On the meta device, the caller supplies the frequencies, which are buffers.
    """
    found = None
    for embedding, layer_type, kind, limit in list(_changing(model)):
        if longest <= limit:
            continue
        found, device = kind, next(embedding.buffers()).device
        if device.type != "meta":
            last = torch.tensor([[longest - 1]], device=device)
            embedding(last.float(), last, *([] if layer_type is None else [layer_type]))
        embedding.rope_type = FIXED if layer_type is None else embedding.rope_type | {layer_type: FIXED}
    return found


def frequencies_change(model: nn.Module, longest: int) -> bool:
    """Return whether a batch with a sequence of ``longest`` tokens has other frequencies than one of short sequences."""
    return any(longest > limit for *_, limit in _changing(model))


def _changing(model: nn.Module) -> Iterator[tuple[Any, str | None, str, int]]:
    """Yield each embedding with frequencies that change, the layers' type, the embedding's type and its original context."""
    for part in model.modules():
        kinds = getattr(part, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            config: Any = part.config
            limit = config.max_position_embeddings
            if kind == "longrope":
                settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
                limit = settings["original_max_position_embeddings"]
            yield part, layer_type, kind, int(limit)
