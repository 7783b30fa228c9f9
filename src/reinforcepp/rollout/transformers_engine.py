"""Generation with the policy itself: batched, with a KV cache, and finished rows leave the batch.

Families whose cache or padding works otherwise are decoded in the fastest way that is exact; see ``decoding``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.models.tokenization import pad, position_ids
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.decoding import BatchDecoder, Decoding, probe_rows, select_decoding
from reinforcepp.rollout.engine import check_prompts, to_completion
from reinforcepp.rollout.mkldnn_linear import packed
from reinforcepp.rollout.sampling import draw, filter_logits
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """Generation by the model that is being trained; :meth:`load_weights` of that same model costs nothing.

    Args:
        model: A causal language model; used in evaluation mode, never copied.
        tokenizer: Its tokenizer, with EOS and pad token.
        batch_size: Completions generated at a time; memory grows with it, results don't change.
    """

    name = "transformers"
    shares_trainer_forward = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        decoding: Decoding | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_ids = eos_token_ids(model, tokenizer)
        self._decoding = decoding

    @property
    def decoding(self) -> Decoding:
        """How this model is decoded; tried on a few tokens at the first access, unless all its layers are attention.

        Raises:
            RolloutError: the model isn't a causal language model that can generate token by token.
        """
        if self._decoding is None:
            self._decoding = select_decoding(self.model, self._probe)
        return self._decoding

    def with_model(self, model: PreTrainedModel) -> TransformersEngine:
        """Return an engine for ``model``, which is a copy of this engine's model."""
        return TransformersEngine(model, self.tokenizer, self.batch_size, self.decoding)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return ``sampling.num_samples`` completions per prompt; prompts of similar length share a batch."""
        check_prompts(prompts, sampling.max_new_tokens, context_length(self.model.config))
        if not prompts:
            return []
        rows = [
            BatchRow.start(prompt, sample, sampling) for prompt in prompts for sample in range(sampling.num_samples)
        ]
        decoding = self.decoding
        with packed(self.model, min(len(rows), self.batch_size)):
            self._finish(rows, sampling, decoding, self.eos_ids)
        return [self._completion(row) for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt`` after each token."""
        check_prompts([prompt], sampling.max_new_tokens, context_length(self.model.config))
        row = BatchRow.start(prompt, 0, sampling)
        for _ in self._decode([row], sampling, self.decoding, self.eos_ids):
            yield self._completion(row)

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with ``model``'s weights; they are copied only from another model object."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    def _probe(self, decoding: Decoding) -> list[Completion]:
        """Return a few completions sampled by ``decoding``."""
        rows, sampling = probe_rows(self.model)
        self._finish(rows, sampling, decoding, frozenset())
        return [self._completion(row) for row in rows]

    def _finish(self, rows: list[BatchRow], sampling: Sampling, decoding: Decoding, end_ids: frozenset[int]) -> None:
        """Generate all tokens of ``rows`` in evaluation mode, in batches of prompts of similar or equal length."""
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in decoding.batches(rows, self.batch_size):
                for _ in self._decode(batch, sampling, decoding, end_ids):
                    pass
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _decode(
        self, rows: list[BatchRow], sampling: Sampling, decoding: Decoding, end_ids: frozenset[int]
    ) -> Iterator[None]:
        """Extend all ``rows`` by one token at a time, until each has sampled an end token or reached its limit."""
        decoder = BatchDecoder(self.model, decoding)
        logits_BV, mask_BL, seen_BV = self._prefill(rows, decoder, shared=decoding.selects_rows)
        positions_B1 = position_ids(mask_BL)[:, -1:]
        uniforms_BT = torch.stack([row.uniforms for row in rows]).to(logits_BV.device)
        for t in range(sampling.max_new_tokens):
            logits_BV = filter_logits(logits_BV, seen_BV, sampling)
            next_B, logprobs_B = draw(logits_BV, uniforms_BT[:, t] if sampling.temperature > 0 else None)
            for row, token, logprob in zip(rows, next_B.tolist(), logprobs_B.tolist(), strict=True):
                row.append(token, logprob, end_ids)
            yield
            unfinished = [i for i, row in enumerate(rows) if not row.finished]
            if not unfinished:
                return
            if len(unfinished) < len(rows) and decoding.selects_rows:
                keep = torch.tensor(unfinished, device=next_B.device)
                decoder.select(keep)
                next_B, positions_B1, mask_BL, uniforms_BT, seen_BV = (
                    x[keep] for x in (next_B, positions_B1, mask_BL, uniforms_BT, seen_BV)
                )
                rows = [rows[i] for i in unfinished]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            positions_B1 = positions_B1 + 1
            seen_BV.scatter_(1, next_B[:, None], True)
            logits_BV = decoder.forward(next_B[:, None], mask_BL, positions_B1)

    def _prefill(self, rows: list[BatchRow], decoder: BatchDecoder, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run the prompts; if ``shared``, run each distinct prompt once and copy its cache to its rows.

        ``P`` counts the prompts that are run.

        Returns:
            ``(logits_BV, mask_BL, seen_BV)``: logits of the first token, attention mask of the prompts, and which tokens occur in
            each prompt.
        """
        keys = [(row.prompt.ids, 0 if shared else number) for number, row in enumerate(rows)]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        ids_PL, mask_PL = (
            x.to(self.model.device)
            for x in pad([ids for ids, _ in index_of], int(self.tokenizer.pad_token_id), left=True)
        )
        logits_PV = decoder.forward(ids_PL, mask_PL, position_ids(mask_PL))
        seen_PV = torch.zeros(logits_PV.shape, dtype=torch.bool, device=logits_PV.device)
        seen_PV.scatter_(1, torch.where(mask_PL == 1, ids_PL, ids_PL[:, -1:]), True)  # the last column is never padding
        prompt_B = torch.tensor([index_of[key] for key in keys], device=logits_PV.device)
        if len(index_of) < len(rows):
            decoder.select(prompt_B)
        return logits_PV[prompt_B], mask_PL[prompt_B], seen_PV[prompt_B]

    def _completion(self, row: BatchRow) -> Completion:
        return to_completion(self.tokenizer, self.eos_ids, row.prompt, row.ids, row.logprobs)
