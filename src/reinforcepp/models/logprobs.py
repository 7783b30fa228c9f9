"""Log-probabilities of responses: one forward pass of a model, then its head for response tokens only.

Dimensions: B sequences, T response tokens, L prompt and response tokens, N response tokens of the batch, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reinforcepp.models.token_logprobs import head_logprobs
from reinforcepp.models.tokenization import pad, position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
