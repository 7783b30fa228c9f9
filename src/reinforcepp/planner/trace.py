"""Measure the memory of a model's own code by running it on the meta device.

Meta tensors have a shape and a type but no contents, so forward and backward passes of any model size take little time and no
memory. A tracker records when each tensor is allocated and freed. The bytes alive after an operation grow linearly with the
number of rows, so two runs determine a line for every operation. The upper envelope of these lines is the peak for any
number of rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROWS = (2, 4)
"""Rows of the two runs. With a single row some operations take a different code path."""


class Snapshot(NamedTuple):
    """Bytes alive after an operation: gradients of weights, and everything else allocated in the run."""

    gradients: int
    other: int


class Line(NamedTuple):
    """Bytes alive after an operation as a function of the number of rows."""

    gradients: int
    constant: float
    per_row: float

    def at(self, rows: int) -> float:
        """Return the bytes without the gradients."""
        return self.constant + self.per_row * rows


@dataclass(frozen=True)
class Peak:
    """The maximum of several lines as a function of the number of rows."""

    lines: tuple[Line, ...]

    def at(self, rows: int) -> Snapshot:
        """Return the snapshot with the most bytes."""
        line = max(self.lines, key=lambda line: line.gradients + line.at(rows))
        return Snapshot(line.gradients, round(line.at(rows)))


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of all tensors created in its context while they are alive.

    Args:
        shards: number of devices that share the gradients; only one shard of them is counted.
    """

    def __init__(self, shards: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards = shards
        self.snapshots: list[Snapshot] = []
        self.gradients = 0
        self.operations = 0
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and record the storages it allocates."""
        before = {_storage_id(tensor) for tensor in _tensors((arguments, named))}
        result = operation(*arguments, **(named or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if (key := _storage_id(tensor)) not in before and key not in self._alive:
                self._alive[key] = storage.nbytes()
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.operations += 1
        self.record()
        return result

    def record(self) -> None:
        """Append a snapshot."""
        self.snapshots.append(Snapshot(self.gradients // self._shards, self._bytes - self.gradients))

    def _freed(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def peak_of(runs: Sequence[Sequence[Snapshot]]) -> Peak:
    """Return the peak for any number of rows from two runs of the same operations with ``ROWS`` rows."""
    few, many = runs
    if len(few) != len(many):  # The code path depends on the number of rows, so only the two peaks are known.
        few, many = ([max(run, key=sum)] for run in runs)
    return Peak(tuple(_upper_hull(line_through(pair) for pair in zip(few, many, strict=True))))


def line_through(snapshots: Sequence[Snapshot]) -> Line:
    """Return the line through the same operation of two runs with ``ROWS`` rows."""
    few, many = snapshots
    per_row = (many.other - few.other) / (ROWS[1] - ROWS[0])
    return Line(few.gradients, few.other - per_row * ROWS[0], per_row)


def _upper_hull(lines: Iterable[Line]) -> list[Line]:
    """Return the lines that are the maximum of all lines somewhere."""
    hull: list[Line] = []
    for line in sorted(set(lines), key=lambda line: (line.per_row, line.gradients + line.constant)):
        while hull and (hull[-1].per_row == line.per_row or (len(hull) > 1 and _hidden(hull[-2], hull[-1], line))):
            hull.pop()
        hull.append(line)
    return hull


def _hidden(a: Line, b: Line, c: Line) -> bool:
    """Return whether ``b`` is nowhere above both ``a`` and ``c``; its slope is between theirs."""

    def height(line: Line) -> float:
        return line.gradients + line.constant

    return (height(c) - height(a)) * (b.per_row - a.per_row) >= (height(b) - height(a)) * (c.per_row - a.per_row)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _grouped_flops(tokens: Any, experts: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * tokens[0] * experts[-2] * experts[-1]


FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
"""FLOPs of operations that torch's counter doesn't know."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Make attention keep what fused kernels keep: never the scores of all pairs of tokens.

    The meta device has no fused kernels, so torch would choose the plain implementation.
    """
    before: Callable[..., Tensor] = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # Each layer converts it to an additive mask.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), 0.0)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
