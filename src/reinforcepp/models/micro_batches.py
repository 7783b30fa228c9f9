"""Divide sequences into batches of one forward pass, by tokens or rows, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import setting

DEFAULT_TOKENS = {"cpu": 2048}
DEFAULT_GPU_TOKENS = 8192
"""Tokens per forward and backward pass by device. More aren't faster: matrix products are at their full speed by then."""
SCORING_FACTOR = 4
"""Size of a pass without gradients relative to one with gradients. It keeps the activations of one layer only."""

Lengths = tuple[int, int]
"""Tokens of a prompt and of its response."""


@dataclass(frozen=True)
class MicroBatchLimit:
    """Largest batch of one forward pass on a device. None doesn't limit; a single row can exceed ``tokens``."""

    tokens: int | None
    """Tokens, including padding."""
    rows: int | None = None
    packed: bool = False
    """Whether rows are packed, so that there is no padding."""

    @staticmethod
    def of(config: ReinforceConfig, device_type: str, *, packed: bool = False) -> MicroBatchLimit:
        """Return the limit of passes with gradients: the given settings, or tokens by device if neither is given."""
        tokens, rows = config.max_tokens_per_micro_batch, config.micro_batch_size
        if tokens is None and rows is None:
            tokens = MicroBatchLimit.default(device_type).tokens
        return MicroBatchLimit(tokens, rows, packed)

    @staticmethod
    def default(device_type: str, *, packed: bool = False) -> MicroBatchLimit:
        """Return the limit of passes with gradients without settings."""
        return MicroBatchLimit(DEFAULT_TOKENS.get(device_type, DEFAULT_GPU_TOKENS), packed=packed)

    @property
    def for_scoring(self) -> MicroBatchLimit:
        """The limit of passes without gradients."""
        tokens, rows = (None if size is None else size * SCORING_FACTOR for size in (self.tokens, self.rows))
        return MicroBatchLimit(tokens, rows, self.packed)

    def tokens_of(self, lengths: Sequence[Lengths]) -> int:
        """Return the tokens of a batch, with its padding: prompts are padded on the left, responses on the right."""
        if self.packed:
            return sum(map(sum, lengths))
        return len(lengths) * sum(map(max, zip(*lengths, strict=True)))

    def halved(self, lengths: Sequence[Lengths]) -> MicroBatchLimit:
        """Return the limit that divides a batch of ``lengths``, which ran out of memory."""
        tokens = None if self.tokens is None else max(1, min(self.tokens, self.tokens_of(lengths)) // 2)
        rows = None if self.rows is None else max(1, min(self.rows, len(lengths)) // 2)
        return MicroBatchLimit(tokens, rows, self.packed)

    def rows_of(self, length: int) -> int:
        """Return the most rows of ``length`` tokens."""
        by_tokens = self.rows if self.tokens is None else max(1, self.tokens // length)
        assert by_tokens is not None
        return by_tokens if self.rows is None else min(self.rows, by_tokens)

    def __str__(self) -> str:
        """Return the settings that set this limit."""
        settings = {"max_tokens_per_micro_batch": self.tokens, "micro_batch_size": self.rows}
        return " and ".join(f"{setting(name)} {size}" for name, size in settings.items() if size is not None)


def micro_batches(lengths: Sequence[Lengths], rows: Sequence[int], limit: MicroBatchLimit) -> Iterator[list[int]]:
    """Yield ``rows`` in batches within ``limit``; rows of similar length go together to save padding."""
    batch: list[int] = []
    prompt = response = used = 0
    for row in sorted(rows, key=lambda i: (sum(lengths[i]), i)):
        prompt, response = max(prompt, lengths[row][0]), max(response, lengths[row][1])
        count = len(batch) + 1
        used += sum(lengths[row])
        too_many = limit.rows is not None and count > limit.rows
        tokens = used if limit.packed else count * (prompt + response)
        if batch and (too_many or (limit.tokens is not None and tokens > limit.tokens)):
            yield batch
            batch, (prompt, response), used = [], lengths[row], sum(lengths[row])
        batch.append(row)
    if batch:
        yield batch
