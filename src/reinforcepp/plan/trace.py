"""How much memory a model's own code takes, found by running it on shapes alone.

Tensors on torch's meta device have a shape and a type and no contents, so a forward and a backward pass of any model and
any size take a moment and no memory. While the code runs, each tensor's birth and death is noted. What is alive after an
operation grows in a straight line with the number of rows, so two runs give that line for every operation, and the
largest of the lines is the peak for any number of rows.
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
"""Rows of the two runs; with a single row some operations take a way of their own."""


class Moment(NamedTuple):
    """Bytes alive after an operation: gradients of weights, and everything else that was born in the run."""

    gradients: int
    other: int


class Line(NamedTuple):
    """Bytes alive at one moment, for any number of rows."""

    gradients: int
    constant: float
    per_row: float

    def at(self, rows: int) -> float:
        """Bytes apart from the gradients."""
        return self.constant + self.per_row * rows


@dataclass(frozen=True)
class Peak:
    """The largest of several lines, for any number of rows."""

    lines: tuple[Line, ...]

    def at(self, rows: int) -> Moment:
        """What is alive when the most is."""
        line = max(self.lines, key=lambda line: line.gradients + line.at(rows))
        return Moment(line.gradients, round(line.at(rows)))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts every tensor that is made is counted for as long as it lives; of gradients one of so many ``shards``."""

    def __init__(self, shards: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards = shards
        self.moments: list[Moment] = []
        self.gradients = 0
        self.operations = 0
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it has made."""
        before = {_place(tensor) for tensor in _tensors((arguments, named))}
        result = operation(*arguments, **(named or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if (place := _place(tensor)) not in before and place not in self._alive:
                self._alive[place] = storage.nbytes()
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, place)
        self.operations += 1
        self.note()
        return result

    def note(self) -> None:
        """Write down what is alive now."""
        self.moments.append(Moment(self.gradients // self._shards, self._bytes - self.gradients))

    def _gone(self, place: int) -> None:
        self._bytes -= self._alive.pop(place)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def peak_of(runs: Sequence[Sequence[Moment]]) -> Peak:
    """From what was alive in two runs of the same operations, with ``ROWS`` rows, the peak for any number of rows."""
    few, many = runs
    if len(few) != len(many):  # the code takes another way with other numbers of rows: only the two peaks are known
        few, many = ([max(run, key=sum)] for run in runs)
    return Peak(tuple(_largest(line_of(pair) for pair in zip(few, many, strict=True))))


def line_of(moments: Sequence[Moment]) -> Line:
    """Through the same moment of two runs with ``ROWS`` rows."""
    few, many = moments
    per_row = (many.other - few.other) / (ROWS[1] - ROWS[0])
    return Line(few.gradients, few.other - per_row * ROWS[0], per_row)


def _largest(lines: Iterable[Line]) -> list[Line]:
    """Those lines that are above all others somewhere: the upper hull of them."""
    hull: list[Line] = []
    for line in sorted(set(lines), key=lambda line: (line.per_row, line.gradients + line.constant)):
        while hull and (hull[-1].per_row == line.per_row or (len(hull) > 1 and _hidden(hull[-2], hull[-1], line))):
            hull.pop()
        hull.append(line)
    return hull


def _hidden(a: Line, b: Line, c: Line) -> bool:
    """Whether ``b`` is nowhere above both ``a`` and ``c``, whose slopes are on either side of its own."""

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
"""Operations of what torch's own counter doesn't know."""


@contextmanager
def attention_on_shapes() -> Iterator[None]:
    """While it lasts attention keeps what the fused kernels keep: never the scores of all pairs of tokens.

    The meta device has no kernel to choose by, and would take the plain one.
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
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # each layer turns it into numbers to be added
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), 0.0)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
