"""Weights for a vLLM whose workers are processes of their own, through vLLM's IPC weight transfer.

Written against vLLM 0.32 (``vllm/distributed/weight_transfer/ipc_engine.py``). A worker maps the memory of its card that
the trainer names, so on the trainer's own card nothing is copied on the way; on another card the trainer first puts a
copy there, from card to card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30
"""Weights that have a copy on another card at a time."""


def send_weights(
    rpc: Callable[..., Any], weights: Iterable[tuple[str, Tensor]], devices: Sequence[torch.device]
) -> None:
    """Give ``weights`` to the workers on ``devices``.

    Args:
        rpc: calls a method of every worker: ``LLM.collective_rpc``.
        weights: names and tensors, as :func:`~reinforcepp.rollout.weights.full_weights` yields them.
        devices: the workers' cards.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    cards = {device: str(torch.cuda.get_device_properties(device).uuid) for device in devices}
    rpc("start_weight_update")
    for chunk in in_chunks(weights, CHUNK_BYTES):
        copies = [{device: weight.detach().to(device).contiguous() for device in cards} for _, weight in chunk]
        handles = [
            {cards[device]: reduce_tensor(copy)[1] for device, copy in of.items()}  # type: ignore[no-untyped-call]
            for of in copies
        ]
        torch.cuda.synchronize()
        rpc("update_weights", args=(update(chunk, handles),))
        del copies  # not before: the workers read from them
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    rpc("finish_weight_update")


def update(chunk: Sequence[tuple[str, Tensor]], handles: list[dict[str, Any]]) -> dict[str, Any]:
    """One message: what each weight is, and where its memory is on each card."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in chunk],
        "shapes": [list(weight.shape) for _, weight in chunk],
        "ipc_handles": handles,
    }


def in_chunks(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """``weights`` in lists of at most ``limit`` bytes each, or of one weight where that alone is larger."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, weight in weights:
        if chunk and size + weight.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, weight))
        size += weight.nbytes
    if chunk:
        yield chunk
