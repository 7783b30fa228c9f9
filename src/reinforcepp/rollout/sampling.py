"""Sampling tokens by inverse transform. All engines on a CPU use it, so equal weights and seeds give equal completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from reinforcepp.errors import ConfigError, first_line
from reinforcepp.types import Sampling

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed together."""
ALMOST_ONE = 1 - 2**-53


def uniforms(seed: int, count: int) -> Tensor:
    """Return the random numbers of one completion, one per token. -> (count,) float64"""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits_BV: Tensor, uniforms_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the token at each row's uniform number in the cumulative distribution, or the likeliest token without numbers.

    A number belongs to a completion and not to a batch, so a token doesn't depend on the other rows. Probabilities are summed
    in blocks: the search finds the block of a number, then the token inside, without a cumulative sum over the whole vocabulary.
    The position inside the block is kept as a fraction of the block, so rounding can't select a token of probability 0.

    Returns:
        ``(ids_B, logprobs_B)``, the latter in float32.
    """
    probs_BV = logits_BV.softmax(-1, dtype=torch.float32)
    ids_B = logits_BV.argmax(-1) if uniforms_B is None else _invert(probs_BV, uniforms_B)
    return ids_B, probs_BV.gather(-1, ids_B[:, None]).squeeze(-1).log()


def _invert(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    size = probs_BV.shape[-1]
    whole = size - size % BLOCK
    sums_BK = torch.unflatten(probs_BV[:, :whole], -1, (-1, BLOCK)).sum(-1)
    ends_BK = torch.cat([sums_BK, probs_BV[:, whole:].sum(-1, keepdim=True)], -1).double().cumsum(-1)
    point_B1 = uniforms_B[:, None] * ends_BK[:, -1:]
    block_B1 = torch.searchsorted(ends_BK, point_B1, right=True).clamp_max(ends_BK.shape[-1] - 1)
    begin_B1 = torch.where(block_B1 > 0, ends_BK.gather(1, (block_B1 - 1).clamp_min(0)), 0.0)
    fraction_B1 = ((point_B1 - begin_B1) / (ends_BK.gather(1, block_B1) - begin_B1)).clamp(0, ALMOST_ONE)
    ids_BJ = block_B1 * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    block_BJ = torch.where(ids_BJ < size, probs_BV.gather(1, ids_BJ.clamp_max(size - 1)), 0.0)
    inside_BJ = block_BJ.double().cumsum(-1)
    offset_B1 = torch.searchsorted(inside_BJ, fraction_B1 * inside_BJ[:, -1:], right=True)
    return (block_B1 * BLOCK + offset_B1).squeeze(-1)


def filter_logits(logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling) -> Tensor:
    """Apply the repetition penalty for seen tokens, then temperature, top-k, top-p and further filters, as ``generate`` does.

    The library's repetition penalty isn't used because it would count padding as seen. With pad = EOS it would then penalize the
    end token in padded rows only.
    """
    if sampling.repetition_penalty != 1 and seen_BV is not None:
        penalized_BV = torch.where(
            logits_BV < 0, logits_BV * sampling.repetition_penalty, logits_BV / sampling.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    no_ids: Any = None  # these filters don't read the ids
    if "suppress_tokens" in sampling.extra:
        suppressed = processors.SuppressTokensLogitsProcessor(
            sampling.extra["suppress_tokens"], device=logits_BV.device
        )
        logits_BV = suppressed(no_ids, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    for keep in _filters(sampling, logits_BV.device):
        logits_BV = keep(no_ids, logits_BV)
    return logits_BV


def _filters(sampling: Sampling, device: torch.device | str) -> Iterator[Any]:
    """Yield the filters of transformers that ``sampling`` enables, in the order of ``generate``.

    Raises:
        ValueError: An argument isn't in its range.
    """
    if sampling.top_k > 0:
        yield processors.TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1:
        yield processors.TopPLogitsWarper(sampling.top_p)
    if sampling.min_p > 0:
        yield processors.MinPLogitsWarper(sampling.min_p)
    extra = sampling.extra
    if "typical_p" in extra:
        yield processors.TypicalLogitsWarper(extra["typical_p"])
    if "epsilon_cutoff" in extra:
        yield processors.EpsilonLogitsWarper(extra["epsilon_cutoff"])
    if "eta_cutoff" in extra:
        yield processors.EtaLogitsWarper(extra["eta_cutoff"], device=str(device))


def check_extra(extra: Mapping[str, Any]) -> None:
    """Check the values of arguments of the transformers engine.

    Raises:
        ConfigError: A value isn't valid.
    """
    vocabulary = torch.zeros(1, max([2, *map(int, extra.get("suppress_tokens", ()))]) + 1)
    try:
        filter_logits(vocabulary, None, Sampling(1, extra=extra))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs: {dict(extra)} isn't valid ({first_line(error)}). Change it.") from None
