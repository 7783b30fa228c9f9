"""Generation with the policy itself: batched, with a KV cache, and waiting completions take the places of finished ones.

Families whose cache or padding works otherwise are decoded in the fastest way that is exact; see ``decoding``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.models.mkldnn_linear import packed
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.decoding import PROBE_BATCH_SIZE, Decoding, probe_rows, select_decoding
from reinforcepp.rollout.engine import check_prompts, to_completion
from reinforcepp.rollout.running_batch import GPU_READ_INTERVAL, RunningBatch
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
        check_prompts(prompts, sampling, context_length(self.model.config))
        if not prompts:
            return []
        rows = [
            BatchRow.start(prompt, sample, sampling) for prompt in prompts for sample in range(sampling.num_samples)
        ]
        decoding = self.decoding
        with packed(self.model, min(len(rows), self.batch_size)):
            self._finish(rows, self.batch_size, sampling, decoding, self.eos_ids)
        return [self._completion(row) for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt`` after each token."""
        check_prompts([prompt], sampling, context_length(self.model.config))
        row = BatchRow.start(prompt, 0, sampling)
        for _ in self._batch([row], 1, sampling, self.decoding, self.eos_ids).decode():
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
        self._finish(rows, PROBE_BATCH_SIZE, sampling, decoding, frozenset())
        return [self._completion(row) for row in rows]

    def _finish(
        self, rows: list[BatchRow], size: int, sampling: Sampling, decoding: Decoding, end_ids: frozenset[int]
    ) -> None:
        """Generate all tokens of ``rows`` in evaluation mode, up to ``size`` rows at a time."""
        was_training = self.model.training
        self.model.eval()
        interval = 1 if self.model.device.type == "cpu" else GPU_READ_INTERVAL
        try:
            for queue in decoding.queues(rows):
                for _ in self._batch(queue, size, sampling, decoding, end_ids, interval).decode():
                    pass
        finally:
            self.model.train(was_training)

    def _batch(
        self,
        rows: list[BatchRow],
        size: int,
        sampling: Sampling,
        decoding: Decoding,
        end_ids: frozenset[int],
        read_interval: int = 1,
    ) -> RunningBatch:
        pad_id = int(self.tokenizer.pad_token_id)
        return RunningBatch(self.model, rows, size, sampling, decoding, end_ids, pad_id, read_interval)

    def _completion(self, row: BatchRow) -> Completion:
        return to_completion(self.tokenizer, self.eos_ids, row.prompt, row.ids, row.logprobs)
