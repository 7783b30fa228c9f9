"""Faster linear layers for generation on a CPU.

oneDNN wants weights in a blocked layout, and torch converts them anew for every matrix product. Training does few large
products, so the conversion costs little there. Generation does thousands of small ones, where it takes half of the time or
more. So each weight gets a blocked copy for the duration of a generation.
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
    """Let the linear layers of ``model`` compute with blocked copies of their weights inside the context.

    Args:
        model: A model on a CPU. On other devices, or if torch was built without oneDNN, nothing changes.
        rows: Rows of a typical product, for which the layout is optimized.
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
    """Return how many weights :func:`packed` copies, including an output layer that shares the embeddings' memory."""
    return sum(weight.numel() for module in model.modules() if (weight := _output_by_input(module)) is not None)


def _available(model: nn.Module) -> bool:
    parameter: Tensor = next(model.parameters())
    built_in = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_bf16 = parameter.dtype == torch.bfloat16
    supported = not is_bf16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return parameter.device.type == "cpu" and built_in and parameter.dtype in DTYPES and supported


def _output_by_input(module: nn.Module) -> Tensor | None:
    """Return the weight of a plain linear layer as (output, input); GPT-2's Conv1D stores it transposed."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    if type(module) is nn.Linear:
        return cast(Tensor, weight.detach())
    if type(module) is Conv1D:
        return cast(Tensor, weight.detach().t())
    return None


def _forward(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    fixed_bias = None if bias is None else bias.detach()

    def forward(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, fixed_bias, "none", [], "")
        return product

    return forward
