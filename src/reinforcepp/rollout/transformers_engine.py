"""Generation with the trainer's own model: batched, key-value cache, rows leave the batch when they end.

Tokens are drawn by inverting the cumulative distribution at uniform numbers that belong to the request, not to the
batch; that is why a completion doesn't depend on what is generated beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reinforcepp.models import context_length, eos_ids
from reinforcepp.rollout.engine import check_prompts, request_seed
from reinforcepp.tokens import pad, position_ids
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        self.eos_ids = eos_ids(model, tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts(prompts, sampling.max_new_tokens, context_length(self.model.config))
        rows = [
            _Row(prompt, _uniforms(sampling, prompt, sample))
            for prompt in prompts
            for sample in range(sampling.num_samples)
        ]
        by_length = sorted(rows, key=lambda row: len(row.prompt.ids))
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(by_length), self.batch_size):
                self._decode(by_length[start : start + self.batch_size], sampling)
        self.model.train(was_training)
        return [self._completion(row) for row in rows]

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; copies only from another model object."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Nothing to give back: the model belongs to the caller."""

    def _decode(self, rows: list[_Row], sampling: Sampling) -> None:
        """Fill in ``rows`` together, dropping each from the batch once it has ended."""
        device = self.model.device
        processors = _processors(sampling)
        ids_BL, mask_BL = (x.to(device) for x in pad([row.prompt.ids for row in rows], self._pad_id, left=True))
        uniforms_BT = torch.stack([row.uniforms for row in rows]).to(device)
        cache = DynamicCache(config=self.model.config)
        history_BL, step_ids = ids_BL, ids_BL
        positions = position_ids(mask_BL)
        for t in range(sampling.max_new_tokens):
            output = self.model(
                input_ids=step_ids,
                attention_mask=mask_BL,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits_BV = processors(history_BL, output.logits[:, -1].float())
            next_B, logprobs_B = _draw(logits_BV, uniforms_BT[:, t], greedy=sampling.temperature == 0)
            chosen, scores = next_B.tolist(), logprobs_B.tolist()
            for row, token, score in zip(rows, chosen, scores, strict=True):
                row.ids.append(token)
                row.logprobs.append(score)
            going = [i for i, token in enumerate(chosen) if token not in self.eos_ids]
            if not going:
                return
            step_ids, positions = next_B[:, None], positions[:, -1:] + 1
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            history_BL = torch.cat([history_BL, step_ids], dim=1)
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                step_ids, positions, mask_BL, history_BL, uniforms_BT = (
                    x[keep] for x in (step_ids, positions, mask_BL, history_BL, uniforms_BT)
                )
                rows = [rows[i] for i in going]

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]  # load_tokenizer sets one

    def _completion(self, row: _Row) -> Completion:
        ended = row.ids[-1] in self.eos_ids
        text = self.tokenizer.decode(row.ids[:-1] if ended else row.ids, skip_special_tokens=True)
        return Completion(
            row.prompt, tuple(row.ids), tuple(row.logprobs), str(text).strip(), "stop" if ended else "length"
        )


def _uniforms(sampling: Sampling, prompt: Prompt, sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(request_seed(sampling.seed, prompt.key, sample))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """The library's own filters, in the order in which ``generate`` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature != 0 and sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature != 0 and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def _draw(logits_BV: Tensor, uniforms_B: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """The token at each row's uniform number, and its log-probability. -> (B,), (B,)"""
    logprobs_BV = logits_BV.log_softmax(-1)
    if greedy:
        next_B = logits_BV.argmax(-1)
    else:
        cumulative_BV = logprobs_BV.exp().double().cumsum(-1)
        threshold_B1 = (uniforms_B * cumulative_BV[:, -1]).unsqueeze(-1)
        next_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
        next_B = next_B.clamp_max(logits_BV.shape[-1] - 1)
    return next_B, logprobs_BV.gather(-1, next_B.unsqueeze(-1)).squeeze(-1)
