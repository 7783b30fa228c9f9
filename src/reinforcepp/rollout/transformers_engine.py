"""Generation with the policy itself: batched, with a KV cache, and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.models.tokenization import pad, position_ids
from reinforcepp.rollout.engine import check_prompts, request_seed, to_completion
from reinforcepp.rollout.kv_cache import preallocated_cache
from reinforcepp.rollout.mkldnn_linear import packed
from reinforcepp.rollout.sampling import draw, filter_logits, uniforms
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """Generation by the model that is being trained; :meth:`load_weights` of that same model costs nothing.

    Args:
        model: A causal language model; used in evaluation mode, never copied.
        tokenizer: Its tokenizer, with EOS and pad token.
        batch_size: Completions generated at a time; memory grows with it, results don't change.
    """

    name = "transformers"
    shares_trainer_forward = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_ids = eos_token_ids(model, tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return ``sampling.num_samples`` completions per prompt; prompts of similar length share a batch."""
        check_prompts(prompts, sampling.max_new_tokens, context_length(self.model.config))
        if not prompts:
            return []
        rows = [_Row.start(prompt, sample, sampling) for prompt in prompts for sample in range(sampling.num_samples)]
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
        return [self._completion(row) for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt`` after each token."""
        check_prompts([prompt], sampling.max_new_tokens, context_length(self.model.config))
        row = _Row.start(prompt, 0, sampling)
        for _ in self._decode([row], sampling):
            yield self._completion(row)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with ``model``'s weights; they are copied only from another model object."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    @torch.no_grad()
    def _decode(self, rows: list[_Row], sampling: Sampling) -> Iterator[None]:
        """Extend all ``rows`` by one token at a time, until each has sampled an end token or ``max_new_tokens``."""
        cache = preallocated_cache(self.model.config)
        logits_BV, mask_BL, seen_BV = self._prefill(rows, cache)
        positions_B1 = position_ids(mask_BL)[:, -1:]
        uniforms_BT = torch.stack([row.uniforms for row in rows]).to(logits_BV.device)
        for t in range(sampling.max_new_tokens):
            logits_BV = filter_logits(logits_BV, seen_BV, sampling)
            next_B, logprobs_B = draw(logits_BV, uniforms_BT[:, t] if sampling.temperature > 0 else None)
            ids = next_B.tolist()
            for row, token, logprob in zip(rows, ids, logprobs_B.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
            yield
            unfinished = [i for i, token in enumerate(ids) if token not in self.eos_ids]
            if not unfinished or t + 1 == sampling.max_new_tokens:
                return
            if len(unfinished) < len(rows):
                keep = torch.tensor(unfinished, device=next_B.device)
                cache.batch_select_indices(keep)
                next_B, positions_B1, mask_BL, uniforms_BT, seen_BV = (
                    x[keep] for x in (next_B, positions_B1, mask_BL, uniforms_BT, seen_BV)
                )
                rows = [rows[i] for i in unfinished]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            positions_B1 = positions_B1 + 1
            seen_BV.scatter_(1, next_B[:, None], True)
            logits_BV = self._forward(next_B[:, None], mask_BL, positions_B1, cache)

    def _prefill(self, rows: list[_Row], cache: DynamicCache) -> tuple[Tensor, Tensor, Tensor]:
        """Run each distinct prompt once and copy its cache to its rows; ``P`` counts the distinct prompts.

        Returns:
            ``(logits_BV, mask_BL, seen_BV)``: logits of the first token, attention mask of the prompts, and which tokens occur in
            each prompt.
        """
        index_of = {ids: i for i, ids in enumerate(dict.fromkeys(row.prompt.ids for row in rows))}
        ids_PL, mask_PL = (
            x.to(self.model.device) for x in pad(list(index_of), int(self.tokenizer.pad_token_id), left=True)
        )
        logits_PV = self._forward(ids_PL, mask_PL, position_ids(mask_PL), cache)
        seen_PV = torch.zeros(logits_PV.shape, dtype=torch.bool, device=logits_PV.device)
        seen_PV.scatter_(1, torch.where(mask_PL == 1, ids_PL, ids_PL[:, -1:]), True)  # the last column is never padding
        prompt_B = torch.tensor([index_of[row.prompt.ids] for row in rows], device=logits_PV.device)
        if len(index_of) < len(rows):
            cache.batch_select_indices(prompt_B)
        return logits_PV[prompt_B], mask_PL[prompt_B], seen_PV[prompt_B]

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor, cache: DynamicCache) -> Tensor:
        """Extend the cache by ``ids_BL``; return the logits after its last column, in float32. -> (B, V)"""
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

    def _completion(self, row: _Row) -> Completion:
        return to_completion(self.tokenizer, self.eos_ids, row.prompt, row.ids, row.logprobs)


@dataclass
class _Row:
    """A completion in progress."""

    prompt: Prompt
    uniforms: Tensor
    """One random number per token, (T,)."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, prompt: Prompt, sample: int, sampling: Sampling) -> _Row:
        seed = request_seed(sampling.seed, prompt.key, sample)
        return cls(prompt, uniforms(seed, sampling.max_new_tokens))
