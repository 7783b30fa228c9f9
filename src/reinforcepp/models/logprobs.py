"""Log-probabilities of responses: one forward pass of a model, then its head for response tokens only.

Dimensions: B sequences, T response tokens, L prompt and response tokens, N response tokens of the batch, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reinforcepp.models.packed_attention import can_pack, on_device, packed_inputs
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
    padding_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities of ``responses`` after ``prompts`` in one forward pass; see :func:`response_states`.

    ``width`` pads the result to a common T.

    Returns:
        ``(logprobs_BT, entropy_BT, mask_BT)`` on the model's device, 0 after the end of a response. The entropy is in
        nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    plain = unwrap_model(model)
    head = plain.get_output_embeddings() if _head_gives_logits(plain) else nn.Identity()
    with bypass_head(head):
        hidden_ND, tokens = response_states(model, prompts, responses, pad_id=pad_id, padding_free=padding_free)
    logprobs_N, entropy_N = head_logprobs(head, hidden_ND, tokens.ids_N, temperature, entropy_gradient=entropy_gradient)
    values = logprobs_N, entropy_N, torch.ones_like(logprobs_N)
    logprobs_BT, entropy_BT, mask_BT = (tokens.by_row(values_N, width) for values_N in values)
    return logprobs_BT, entropy_BT, mask_BT


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a batch in the order of its rows. Indices come from lengths on the CPU, so no GPU waits."""

    ids_N: Tensor
    rows_N: Tensor
    columns_N: Tensor
    shape: tuple[int, int]
    """``(B, T)``"""

    @staticmethod
    def of(responses: Sequence[Sequence[int]], device: torch.device) -> ResponseTokens:
        """Return the tokens of ``responses`` on ``device``."""
        lengths_B = torch.tensor([len(response) for response in responses])
        rows_N = torch.arange(len(responses)).repeat_interleave(lengths_B)
        columns_N = torch.arange(len(rows_N)) - (lengths_B.cumsum(0) - lengths_B)[rows_N]
        ids_N = torch.tensor(list(chain.from_iterable(responses)), dtype=torch.long)
        ids_N, rows_N, columns_N = (on_device(tensor, device) for tensor in (ids_N, rows_N, columns_N))
        return ResponseTokens(ids_N, rows_N, columns_N, (len(responses), int(lengths_B.max())))

    def by_row(self, values_N: Tensor, width: int | None = None) -> Tensor:
        """Return a value per token as one row per response, padded with 0 on the right to ``width``. -> (B, width)"""
        count, longest = self.shape
        width = longest if width is None else width
        return (
            values_N.new_zeros(count * width)
            .scatter(0, self.rows_N * width + self.columns_N, values_N)
            .view(count, width)
        )


def response_states(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    padding_free: bool = False,
) -> tuple[Tensor, ResponseTokens]:
    """Return the output of ``model`` at the position before each response token, and the tokens.

    With ``padding_free``, rows are packed if the model allows it. Otherwise prompts are padded on the left and responses on
    the right, so that the responses are aligned.

    Returns:
        ``(output_NX, tokens)``; X is V for logits, D for hidden states, or 1 for a value.
    """
    plain = unwrap_model(model)
    device = next(model.parameters()).device
    tokens = ResponseTokens.of(responses, device)
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    before_B = torch.tensor([len(prompt) - 1 for prompt in prompts])  # column of the token before the response
    if padding_free and is_packable(plain, max(map(len, rows))):
        starts_B = torch.tensor([0, *accumulate(map(len, rows[:-1]))]) + before_B
        asked_N = on_device(starts_B, device)[tokens.rows_N] + tokens.columns_N
        return model(**packed_inputs(plain, rows), logits_to_keep=asked_N).logits[0], tokens
    if not takes_left_padding(plain):
        # Nothing follows from padding on the right in a causal model, so neither mask nor positions are needed.
        first = int(before_B.min())
        ids_BL = on_device(pad(rows, pad_id)[0], device)
        count = ids_BL.shape[1] - first
        output_BLX = model(input_ids=ids_BL, use_cache=False, logits_to_keep=count).logits[:, -count:]
        starts_N = on_device(before_B - first, device)[tokens.rows_N]
        return output_BLX[tokens.rows_N, starts_N + tokens.columns_N], tokens
    parts = pad(prompts, pad_id, left=True), pad(responses, pad_id)
    ids_BL, mask_BL = (on_device(torch.cat(sides, dim=1), device) for sides in zip(*parts, strict=True))
    output_BTX = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=position_ids(mask_BL),
        use_cache=False,
        logits_to_keep=tokens.shape[1] + 1,
    ).logits
    return output_BTX[tokens.rows_N, tokens.columns_N], tokens


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


def is_packable(model: Any, longest: int = 0) -> bool:
    """Return whether sequences of up to ``longest`` tokens can be packed without changing the outputs of ``model``."""
    return takes_left_padding(model) and can_pack(model, longest)


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
