"""Completions that are decoded together: finished rows leave the batch, and waiting rows take their places.

Every row has its own positions, random numbers and padding, so a completion doesn't depend on the rows that it shares a
batch with, nor on the step at which it enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reinforcepp.models.tokenization import pad, position_ids
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.decoding import BatchDecoder, Decoding, takes_attention_mask
from reinforcepp.rollout.sampling import draw, filter_logits
from reinforcepp.types import Sampling

GPU_READ_INTERVAL = 8
"""Tokens per row between two reads of sampled tokens on a GPU. A read waits for the GPU; a finished row runs on until then."""


@dataclass
class PrefilledRows:
    """Rows that haven't sampled a token, after the forward pass of their prompts; ``P`` counts distinct prompts."""

    rows: list[BatchRow]
    prompt_of: list[int]
    """Index of each row's prompt."""
    decoder: BatchDecoder
    logits_PV: Tensor
    """Logits of the first token."""

    def split(self, count: int) -> tuple[PrefilledRows, PrefilledRows | None]:
        """Return the first ``count`` rows, and the others, which must all be samples of one prompt."""
        if count >= len(self.rows):
            return self, None
        rows, last = self.rows[count:], self.prompt_of[-1]
        others = PrefilledRows(
            rows, [0] * len(rows), self.decoder.copy_row(last), self.logits_PV[last : last + 1].clone()
        )
        return PrefilledRows(self.rows[:count], self.prompt_of[:count], self.decoder, self.logits_PV), others


class RunningBatch:
    """Decodes rows in a batch of limited size.

    A finished row stays in the batch until finished rows have cost as much as one step of the whole batch. Then they are
    removed and waiting rows are added, which copies the cache. So both wasted rows and copies stay a fraction of the work.

    Args:
        model: A causal language model in evaluation mode.
        rows: The rows to decode. Without padding, their prompts must have equal lengths.
        size: Largest number of rows in the batch.
        sampling: The sampling parameters.
        decoding: How the model is decoded.
        end_ids: Tokens that finish a completion.
        pad_id: Token id of padding.
        read_interval: Tokens per row between two reads of sampled tokens; results don't depend on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[BatchRow],
        size: int,
        sampling: Sampling,
        decoding: Decoding,
        end_ids: frozenset[int],
        pad_id: int,
        read_interval: int = 1,
    ) -> None:
        self.rows: list[BatchRow] = []
        self._waiting = list(rows)
        self._prefilled: PrefilledRows | None = None
        self._model, self._size, self._sampling, self._decoding = model, size, sampling, decoding
        self._end_ids, self._pad_id, self._read_interval = end_ids, pad_id, read_interval
        self._prepares_mask = takes_attention_mask(model)
        self._decoder = BatchDecoder(model, decoding)
        self._columns = 0  # of the cache
        self._wasted = 0  # passes of finished rows since rows were last replaced
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._until_read = 1
        self._logits_BV: Tensor
        self._seen_BV: Tensor | None = None  # tokens that occur in each row, for the repetition penalty
        self._mask: Tensor | None
        self._uniforms_BT: Tensor
        self._prompt_lengths_B1: Tensor
        self._t_B1: Tensor  # index of the next token in the completion

    @torch.no_grad()
    def decode(self) -> Iterator[None]:
        """Sample one token per row and step until all rows are finished; yield after each step."""
        while self._replace_finished():
            self._sample()
            yield
            if not all(row.finished for row in self.rows):
                self._forward()

    # --- one step -----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Sample the next token of each row, and append tokens to the rows if it is time to read them."""
        logits_BV = filter_logits(self._logits_BV, self._seen_BV, self._sampling)
        random = self._sampling.temperature > 0
        self._next_B, logprobs_B = draw(logits_BV, self._uniforms_BT.gather(1, self._t_B1)[:, 0] if random else None)
        self._unread.append((self._next_B, logprobs_B))
        if len(self._unread) < self._until_read:
            return
        ids_BN, logprobs_BN = (torch.stack(columns, dim=1).tolist() for columns in zip(*self._unread, strict=True))
        self._unread.clear()
        for row, ids, logprobs in zip(self.rows, ids_BN, logprobs_BN, strict=True):
            for token, logprob in zip(ids, logprobs, strict=True):
                row.append(token, logprob, self._end_ids)
            self._wasted += row.finished * len(ids)
        self._plan_read()

    def _forward(self) -> None:
        """Run the model on the sampled tokens. Finished rows stay at their last position."""
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._next_B[:, None], True)
        self._columns += 1
        mask = None if self._mask is None else self._mask[..., : self._columns]
        self._logits_BV = self._decoder.forward(self._next_B[:, None], mask, self._prompt_lengths_B1 + self._t_B1)
        self._t_B1 = (self._t_B1 + 1).clamp_max(self._sampling.max_new_tokens - 1)

    def _plan_read(self) -> None:
        """Set the steps until the next read: no row that runs to its limit gets a wasted step."""
        remaining = [row.limit - len(row.ids) for row in self.rows if not row.finished]
        self._until_read = min([self._read_interval, *remaining])

    # --- from one set of rows to the next -----------------------------------------------------------------------------

    def _replace_finished(self) -> bool:
        """Replace finished rows by waiting ones if it is time; return whether any row is left."""
        kept = [i for i, row in enumerate(self.rows) if not row.finished]
        if kept and (self._wasted < len(self.rows) or not self._decoding.selects_rows):
            return True
        self._drop_finished(kept)  # before the prompts of waiting rows need memory
        if self._decoding.refills or not self.rows:
            self._add_waiting()
        if self.rows:
            self._set_inputs()
        return bool(self.rows)

    def _drop_finished(self, kept: list[int]) -> None:
        self.rows = [self.rows[i] for i in kept]
        if kept:
            self._decoder.select(kept)
            self._logits_BV = self._logits_BV[kept]
        else:
            self._decoder = BatchDecoder(self._model, self._decoding)

    def _add_waiting(self) -> None:
        started = self._start(self._size - len(self.rows))
        logits = [self._logits_BV] if self.rows else []
        logits += [group.logits_PV[group.prompt_of] for group in started]
        running = list(range(len(self.rows)))
        self.rows += [row for group in started for row in group.rows]
        if not self.rows:
            return
        self._logits_BV = torch.cat(logits)
        self._columns = max(row.length() for row in self.rows)
        if self._decoding.refills:
            self._decoder.join(running, [(group.decoder, group.prompt_of) for group in started], self._columns)
        else:
            (group,) = started
            self._decoder = group.decoder
            if len(group.logits_PV) < len(group.rows):
                self._decoder.select(group.prompt_of)

    def _set_inputs(self) -> None:
        """Set the inputs of the next steps that don't depend on the tokens to be sampled."""
        device, sampling = self._logits_BV.device, self._sampling
        lengths_B1 = torch.tensor([[row.length()] for row in self.rows], device=device)
        self._t_B1 = torch.tensor([[len(row.ids)] for row in self.rows], device=device)
        self._prompt_lengths_B1 = lengths_B1 - self._t_B1
        self._uniforms_BT = torch.stack([row.uniforms for row in self.rows]).to(device)
        columns_C = torch.arange(self._columns + sampling.max_new_tokens, device=device)
        self._mask = columns_C >= self._columns - lengths_B1
        if not self._prepares_mask:
            self._mask = self._mask.long()
        elif all(row.length() == self._columns for row in self.rows):
            self._mask = None
        else:
            self._mask = self._mask[:, None, None]
        if sampling.repetition_penalty != 1:
            ids_BL, mask_BL = pad([(*row.prompt.ids, *row.ids) for row in self.rows], self._pad_id, left=True)
            ids_BL = torch.where(mask_BL == 1, ids_BL, ids_BL[:, -1:])  # the last column is never padding
            self._seen_BV = torch.zeros_like(self._logits_BV, dtype=torch.bool).scatter_(1, ids_BL.to(device), True)
        self._wasted = 0
        self._plan_read()

    def _start(self, count: int) -> list[PrefilledRows]:
        """Return up to ``count`` waiting rows after the forward pass of their prompts."""
        started = []
        while count and (self._prefilled or self._waiting):
            group, self._prefilled = (self._prefilled or self._prefill(count)).split(count)
            started.append(group)
            count -= len(group.rows)
        return started

    def _prefill(self, count: int) -> PrefilledRows:
        """Run the prompts of the next ``count`` waiting rows, and of all further samples of the last prompt."""
        if self._decoding.refills and count < len(self._waiting):
            last = self._waiting[count - 1].prompt.ids
            count += sum(1 for _ in takewhile(lambda row: row.prompt.ids == last, self._waiting[count:]))
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        keys = [(row.prompt.ids, 0 if self._decoding.selects_rows else number) for number, row in enumerate(rows)]
        index_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        ids_PL, mask_PL = (x.to(self._model.device) for x in pad([ids for ids, _ in index_of], self._pad_id, left=True))
        decoder = BatchDecoder(self._model, self._decoding)
        logits_PV = decoder.forward(ids_PL, mask_PL, position_ids(mask_PL))
        return PrefilledRows(rows, [index_of[key] for key in keys], decoder, logits_PV)
