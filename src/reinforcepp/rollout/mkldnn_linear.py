"""Faster matrix products for generation on a CPU.

The processor's matrix library wants weights in blocks, and torch puts them so anew for every product. Training does few
large products, where that is little; generation does thousands of small ones, where it is half of the time and more.
So for the length of a generation each weight has a copy in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """While it lasts the linear layers of ``model`` compute with packed copies of their weights; nothing else changes.

    Args:
        model: on a CPU; anywhere else, and where torch was built without that library, nothing is done.
        rows: of a typical product, for which the packing is optimised.
    """
    layers: list[nn.Module] = []
    try:
        for module in model.modules() if _available(model) else ():
            weight = _output_by_input(module)
            if weight is not None and "forward" not in vars(module):
                module.forward = _forward(weight, cast("Tensor | None", module.bias), rows)
                layers.append(module)
        yield
    finally:
        for module in layers:
            del module.forward


def packed_weights(model: nn.Module) -> int:
    """How many weights :func:`packed` makes copies of; an output layer that shares the embeddings' counts."""
    return sum(weight.numel() for module in model.modules() if (weight := _output_by_input(module)) is not None)


def _available(model: nn.Module) -> bool:
    parameter: Tensor = next(model.parameters())
    built_in = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    narrow = parameter.dtype == torch.bfloat16
    supported = not narrow or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return parameter.device.type == "cpu" and built_in and parameter.dtype in DTYPES and supported


def _output_by_input(module: nn.Module) -> Tensor | None:
    """The weight of a plain linear layer, as (output, input); GPT-2 has its own kind of layer, with it transposed."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    if type(module) is nn.Linear:
        return cast(Tensor, weight.detach())
    if type(module) is Conv1D:
        return cast(Tensor, weight.detach().t())
    return None


def _forward(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    own = None if bias is None else bias.detach()

    def forward(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocks, own, "none", [], "")
        return product

    return forward
