"""Log-probabilities of sampled tokens, without holding all logits in float32.

Dimensions: B sequences, T response tokens, L prompt and response tokens, N response tokens of the batch, D hidden size,
V vocabulary. Three optimizations reduce the work of size V without changing results:

- Logits are computed for response tokens only, neither for prompts nor for padding.
- Softmax and its gradient are computed in blocks that fit the CPU cache.
- Large logits are computed in chunks, and recomputed in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reinforcepp.models.tokenization import pad, position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 128 << 20
"""Size up to which logits, in the model's dtype, are kept for the backward pass; larger ones are recomputed."""
BLOCK_BYTES = {"cpu": 2 << 20}
"""Size of a block of float32 logits by device: on a CPU it fits the cache; other devices use a chunk."""


def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    temperature: float = 1.0,
    width: int | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities of ``responses`` after ``prompts`` in one forward pass.

    Prompts are padded on the left and responses on the right, so that the responses are aligned. ``width`` pads the
    result to a common T.

    Returns:
        ``(logprobs_BT, entropy_BT, mask_BT)`` on the model's device, 0 after the end of a response. The entropy is in
        nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    plain = unwrap_model(model)
    head = plain.get_output_embeddings() if _head_gives_logits(plain) else nn.Identity()
    with bypass_head(head):
        hidden_BTD, ids_BT, mask_BT = response_states(model, prompts, responses, pad_id=pad_id)
    logprobs_N, entropy_N = head_logprobs(
        head, hidden_BTD[mask_BT], ids_BT[mask_BT], temperature, entropy_gradient=entropy_gradient
    )
    zeros_BT = hidden_BTD.new_zeros(mask_BT.shape, dtype=torch.float32)
    padding = (0, 0 if width is None else width - mask_BT.shape[1])
    logprobs_BT, entropy_BT, mask_BT = (
        nn.functional.pad(x, padding)
        for x in (
            zeros_BT.masked_scatter(mask_BT, logprobs_N),
            zeros_BT.masked_scatter(mask_BT, entropy_N),
            mask_BT.float(),
        )
    )
    return logprobs_BT, entropy_BT, mask_BT


def response_states(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of ``model`` at the position before each response token, the tokens, and their mask.

    Returns:
        ``(output_BTX, ids_BT, mask_BT)``; X is V for logits, D for hidden states, or 1 for a value.
    """
    device = next(model.parameters()).device
    response_ids, response_mask = (x.to(device) for x in pad(responses, pad_id))
    if not takes_left_padding(unwrap_model(model)):
        return _right_padded_states(model, prompts, responses, pad_id), response_ids, response_mask.bool()
    prompt_ids, prompt_mask = (x.to(device) for x in pad(prompts, pad_id, left=True))
    ids_BL = torch.cat([prompt_ids, response_ids], dim=1)
    mask_BL = torch.cat([prompt_mask, response_mask], dim=1)
    length = response_ids.shape[1]
    output_BTX = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=position_ids(mask_BL),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]
    return output_BTX, response_ids, response_mask.bool()


def _right_padded_states(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """Return the output at the position before each response token, from rows that are padded on the right only. -> (B, T, X)

    Nothing follows from padding on the right in a causal model, so neither mask nor positions are needed.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ids_BL = pad(rows, pad_id)[0].to(next(model.parameters()).device)
    first = min(map(len, prompts)) - 1  # the position before the earliest response token
    count = ids_BL.shape[1] - first
    output_BLX = model(input_ids=ids_BL, use_cache=False, logits_to_keep=count).logits[:, -count:]
    width = max(map(len, responses))
    starts_B1 = torch.tensor([[len(prompt) - 1 - first] for prompt in prompts], device=output_BLX.device)
    columns_BT = (starts_B1 + torch.arange(width, device=output_BLX.device)).clamp_max(count - 1)
    return output_BLX[torch.arange(len(rows), device=output_BLX.device)[:, None], columns_BT]


def takes_left_padding(model: Any) -> bool:
    """Return whether rows can be padded on the left: the model takes a mask and positions, and has no recurrent state.

    RoBERTa's positions begin after the padding id, so it must count them itself.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", False):
        return False
    if not {"attention_mask", "position_ids"} <= inspect.signature(type(base).forward).parameters.keys():
        return False
    return not counts_from_padding_id(base)


def counts_from_padding_id(base: Any) -> bool:
    """Return whether positions begin after the padding id, as in RoBERTa."""
    tokens = base.get_input_embeddings()
    embeddings = (part for part in base.modules() if isinstance(part, nn.Embedding) and part is not tokens)
    return any(part.padding_idx is not None for part in embeddings)


def unwrap_model(model: Any) -> Any:
    """Return the model inside the wrappers of torch.compile and data-parallel training."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "module", model)


# --- from hidden states to log-probabilities ------------------------------------------------------------------------


def head_logprobs(
    head: nn.Module, hidden_ND: Tensor, ids_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(head(hidden) / temperature), in float32.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    weight = getattr(head, "weight", None)
    columns = hidden_ND.shape[-1] if weight is None else weight.shape[0]
    rows = max(1, CHUNK_BYTES // (columns * hidden_ND.element_size()))

    def chunk(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(head(part_ND), part_N, temperature, entropy_gradient=entropy_gradient)

    if len(ids_N) <= rows or weight is None:
        return chunk(hidden_ND, ids_N)
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(chunk, part_ND, part_N, use_reentrant=False) if recompute else chunk(part_ND, part_N)
        for part_ND, part_N in zip(torch.split(hidden_ND, rows), torch.split(ids_N, rows), strict=True)
    ]
    logprobs_N, entropy_N = (torch.cat(side) for side in zip(*parts, strict=True))
    return logprobs_N, entropy_N


def token_logprobs(
    logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(logits / temperature), in float32.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    logprobs_N, entropy_N = _TokenLogprobs.apply(logits_NV, ids_N, temperature, entropy_gradient)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    """Saves only the logits, in their dtype, for backward, with p = softmax(logits / temperature):

    d logp / d logits = (onehot - p) / temperature, and d H / d logits = -p · (log p + H) / temperature for the entropy H.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropy_N = (torch.empty(len(ids_N), device=logits_NV.device) for _ in range(2))
        for rows in _blocks(logits_NV):
            block_NV, probs_NV = _softmax(logits_NV[rows], temperature)
            best_N1, index_N1 = probs_NV.max(-1, keepdim=True)  # at least 1/V, so its logarithm is accurate
            log_z_N1 = block_NV.gather(-1, index_N1) - best_N1.log()
            logprobs_N[rows] = (block_NV.gather(-1, ids_N[rows, None]) - log_z_N1).squeeze(-1)
            entropy_N[rows] = log_z_N1.squeeze(-1) - torch.linalg.vecdot(probs_NV, block_NV)
        ctx.save_for_backward(logits_NV, ids_N)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, ids_N = ctx.saved_tensors
        slope_N1 = (gradients[0] / ctx.temperature).unsqueeze(-1)
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _blocks(logits_NV):
            block_NV, probs_NV = _softmax(logits_NV[rows], ctx.temperature)
            if ctx.entropy_gradient:  # before probs_NV is overwritten
                bonus_NV = _entropy_gradient(block_NV, probs_NV) * (gradients[1][rows, None] / ctx.temperature)
            probs_NV.mul_(-slope_N1[rows]).scatter_add_(-1, ids_N[rows, None], slope_N1[rows])
            gradient_NV[rows] = probs_NV + bonus_NV if ctx.entropy_gradient else probs_NV
        return gradient_NV, None, None, None


def _entropy_gradient(scaled_NV: Tensor, probs_NV: Tensor) -> Tensor:
    """Return -p · (log p + H), the gradient of the entropy H with respect to the scaled logits."""
    logprobs_NV = scaled_NV - torch.logsumexp(scaled_NV, -1, keepdim=True)
    entropy_N1 = -torch.linalg.vecdot(probs_NV, logprobs_NV).unsqueeze(-1)
    return -probs_NV * (logprobs_NV + entropy_N1)


def _softmax(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``(logits / temperature, softmax(logits / temperature))`` in float32."""
    scaled_NV = logits_NV.float()
    if temperature != 1:
        scaled_NV = scaled_NV / temperature
    return scaled_NV, scaled_NV.softmax(-1)


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    limit = BLOCK_BYTES.get(logits_NV.device.type, CHUNK_BYTES)
    rows = max(1, limit // (4 * logits_NV.shape[-1]))
    for start in range(0, len(logits_NV), rows):
        yield slice(start, start + rows)


# --- hidden states before the head ----------------------------------------------------------------------------------

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _head_gives_logits(model: Any) -> bool:
    """Return whether the logits are the unchanged output of the head: some models scale or cap them afterwards."""
    head = model.get_output_embeddings()
    if hasattr(head.weight, "ds_id"):  # DeepSpeed partitions it and gathers it only inside the model's forward
        return False
    if model not in _plain_heads:
        ids = torch.arange(4, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
        whole = model(input_ids=ids, use_cache=False).logits
        with bypass_head(head):
            hidden = model(input_ids=ids, use_cache=False).logits
        same_shape = hidden.shape[-1] == head.weight.shape[-1]
        _plain_heads[model] = same_shape and torch.allclose(head(hidden), whole, atol=1e-4, rtol=1e-3)
    return _plain_heads[model]


@contextmanager
def bypass_head(head: nn.Module) -> Iterator[None]:
    """Make the model return the input of ``head``; wrappers and hooks still run."""
    head.forward = _identity
    try:
        yield
    finally:
        del head.forward


def _identity(hidden: Tensor) -> Tensor:
    return hidden
