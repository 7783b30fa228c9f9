"""Faster linear layers on a CPU, with oneDNN.

oneDNN wants weights in a blocked layout, and torch converts them anew for every matrix product. Training does few large
products, so the conversion costs little there. Generation does thousands of small ones, where it takes half of the time or
more. So each weight gets a blocked copy for the duration of a generation, see :func:`packed`.

torch computes float32 products with MKL, which takes 1.7 times as long as oneDNN for the logits of a training pass, see
:func:`linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)
MIN_MULTIPLICATIONS = 1 << 26
"""Size of a float32 product from which on oneDNN saves more time than it takes to call it."""


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


def linear(layer: nn.Module, x_NI: Tensor) -> Tensor:
    """Return ``layer(x_NI)``; oneDNN computes it if ``layer`` is a plain linear layer, large, and in float32 on a CPU."""
    if type(layer) is not nn.Linear or not _is_faster(layer, x_NI):
        output: Tensor = layer(x_NI)
        return output
    output = _Linear.apply(x_NI, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return output


def _is_faster(layer: nn.Linear, x_NI: Tensor) -> bool:
    """Return whether oneDNN computes ``layer(x_NI)`` in less time, and nothing else happens in the layer."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    plain = type(layer.weight) is nn.Parameter and "forward" not in vars(layer) and not any(hooks)
    large = len(x_NI) * layer.weight.numel() >= MIN_MULTIPLICATIONS
    is_float32 = x_NI.dtype == layer.weight.dtype == torch.float32
    return plain and large and is_float32 and _available(layer) and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """A linear layer whose output is computed by oneDNN; MKL computes the gradients equally fast."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            slope_NO @ weight_OI if for_x else None,
            slope_NO.t() @ x_NI if for_weight else None,
            slope_NO.sum(0) if for_bias else None,
        )


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
