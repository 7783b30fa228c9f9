"""Generation with the trainer's own model: batched, key-value cache, rows leave the batch when they end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.models.tokenization import pad, position_ids
from reinforcepp.rollout.engine import check_prompts, completed, request_seed
from reinforcepp.rollout.kv_cache import roomy_cache
from reinforcepp.rollout.mkldnn_linear import packed
from reinforcepp.rollout.sampling import draw, uniforms
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class _Row:
    """One completion in the making."""

    prompt: Prompt
    uniforms: Tensor
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Rollouts by the model that is being trained; ``load_weights`` of that very model is free.

    Args:
        model: a causal language model; used in evaluation mode, never copied.
        tokenizer: its tokenizer, with EOS and pad token.
        batch_size: completions generated at a time; memory grows with it, results don't change.
    """

    name = "transformers"
    shares_trainer_forward = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_ids = eos_token_ids(model, tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts(prompts, sampling.max_new_tokens, context_length(self.model.config))
        if not prompts:
            return []
        rows = [
            _Row(prompt, _uniforms(sampling, prompt, sample))
            for prompt in prompts
            for sample in range(sampling.num_samples)
        ]
        by_length = sorted(rows, key=lambda row: len(row.prompt.ids))
        was_training = self.model.training
        self.model.eval()
        try:
            with packed(self.model, min(len(rows), self.batch_size)):
                for start in range(0, len(by_length), self.batch_size):
                    for _ in self._decode(by_length[start : start + self.batch_size], sampling):
                        pass
        finally:
            self.model.train(was_training)
        return [completed(self.tokenizer, self.eos_ids, row.prompt, row.ids, row.logprobs) for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts([prompt], sampling.max_new_tokens, context_length(self.model.config))
        row = _Row(prompt, _uniforms(sampling, prompt, 0))
        for _ in self._decode([row], sampling):
            yield completed(self.tokenizer, self.eos_ids, prompt, row.ids, row.logprobs)

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; copies only from another model object."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Nothing to give back: the model belongs to the caller."""

    @torch.no_grad()
    def _decode(self, rows: list[_Row], sampling: Sampling) -> Iterator[None]:
        """Fill in ``rows`` together, a token of each at a time, dropping each from the batch once it has ended."""
        cache = roomy_cache(self.model.config)
        logits_BV, mask_BL, seen_BV = self._prefill(rows, cache)
        positions_B1 = position_ids(mask_BL)[:, -1:]
        uniforms_BT = torch.stack([row.uniforms for row in rows]).to(logits_BV.device)
        for t in range(sampling.max_new_tokens):
            logits_BV = _filtered(logits_BV, seen_BV, sampling)
            next_B, logprobs_B = draw(logits_BV, uniforms_BT[:, t] if sampling.temperature > 0 else None)
            chosen, scores = next_B.tolist(), logprobs_B.tolist()
            for row, token, score in zip(rows, chosen, scores, strict=True):
                row.ids.append(token)
                row.logprobs.append(score)
            yield
            going = [i for i, token in enumerate(chosen) if token not in self.eos_ids]
            if not going or t + 1 == sampling.max_new_tokens:
                return
            if len(going) < len(rows):
                keep = torch.tensor(going, device=next_B.device)
                cache.batch_select_indices(keep)
                next_B, positions_B1, mask_BL, uniforms_BT, seen_BV = (
                    x[keep] for x in (next_B, positions_B1, mask_BL, uniforms_BT, seen_BV)
                )
                rows = [rows[i] for i in going]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            positions_B1 = positions_B1 + 1
            seen_BV.scatter_(1, next_B[:, None], True)
            logits_BV = self._forward(next_B[:, None], mask_BL, positions_B1, cache)

    def _prefill(self, rows: list[_Row], cache: DynamicCache) -> tuple[Tensor, Tensor, Tensor]:
        """Run each different prompt once and give every row its prompt's share of the cache; ``P`` counts the different prompts.

        Returns:
            ``(logits_BV, mask_BL, seen_BV)``: logits of the first token, what of the prompt is attended to, and which
            tokens occur in it.
        """
        places = {ids: i for i, ids in enumerate(dict.fromkeys(row.prompt.ids for row in rows))}
        ids_PL, mask_PL = (x.to(self.model.device) for x in pad(list(places), self._pad_id, left=True))
        logits_PV = self._forward(ids_PL, mask_PL, position_ids(mask_PL), cache)
        seen_PV = torch.zeros(logits_PV.shape, dtype=torch.bool, device=logits_PV.device)
        seen_PV.scatter_(1, torch.where(mask_PL == 1, ids_PL, ids_PL[:, -1:]), True)  # the last column is never padding
        origin_B = torch.tensor([places[row.prompt.ids] for row in rows], device=logits_PV.device)
        if len(places) < len(rows):
            cache.batch_select_indices(origin_B)
        return logits_PV[origin_B], mask_PL[origin_B], seen_PV[origin_B]

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor, cache: DynamicCache) -> Tensor:
        """Extend the cache by ``ids_BL``; logits after its last column, in float32. -> (B, V)"""
        output = self.model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def _uniforms(sampling: Sampling, prompt: Prompt, sample: int) -> Tensor:
    return uniforms(request_seed(sampling.seed, prompt.key, sample), sampling.max_new_tokens)


def _filtered(logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling) -> Tensor:
    """Repetition penalty on the tokens seen so far, then temperature, top-k and top-p, as ``generate`` does them.

    The penalty is the one filter that looks back; the library's own would take the padding for seen tokens, and with
    pad = EOS the end of an answer would be penalised in some rows and not in others.
    """
    if sampling.repetition_penalty != 1:
        penalised_BV = torch.where(
            logits_BV < 0, logits_BV * sampling.repetition_penalty, logits_BV / sampling.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    no_ids: Any = None  # these two filters don't read the ids
    if sampling.top_k > 0:
        logits_BV = TopKLogitsWarper(sampling.top_k)(no_ids, logits_BV)
    if sampling.top_p < 1:
        logits_BV = TopPLogitsWarper(sampling.top_p)(no_ids, logits_BV)
    return logits_BV
