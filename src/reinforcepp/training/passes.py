"""The forward passes of a step on one device: which rows go together, and what happens if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models.logprobs import is_packable
from reinforcepp.models.micro_batches import Lengths, MicroBatchLimit, micro_batches
from reinforcepp.models.packed_attention import on_device
from reinforcepp.runtime.terminal import echo
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.training.learner import Learner


class Passes:
    """Owns the limits of micro-batches, which shrink if memory runs out. Gradients are sums, so limits change no result.

    Sharded and compiled models take no packed rows. Rows are packed if every rank can, so that all make as many passes.
    """

    def __init__(self, config: ReinforceConfig, ranks: Ranks, learners: Sequence[Learner]) -> None:
        simple = config.padding_free == "auto" and not ranks.sharded and not config.torch_compile
        self.packed = simple and not ranks.any(not all(is_packable(learner.plain) for learner in learners))
        """Whether rows are packed instead of padded."""
        self.limit = MicroBatchLimit.of(config, ranks.device.type, packed=self.packed)
        """Limit of passes with gradients."""
        self.scoring_limit = self.limit.for_scoring
        self._ranks = ranks

    @torch.no_grad()
    def score(self, completions: Sequence[Completion], score: Callable[[list[int]], None]) -> None:
        """Call ``score`` with all row numbers of ``completions``, in batches of a pass without gradients.

        If memory runs out, ``score`` is called again for the same rows in smaller batches.
        """
        lengths, remaining = lengths_of(completions), list(range(len(completions)))
        while remaining:
            for rows in micro_batches(lengths, remaining, self.scoring_limit):
                try:
                    score(rows)
                except torch.OutOfMemoryError as error:
                    batch = [lengths[i] for i in rows]
                    self.scoring_limit = smaller_limit(self.scoring_limit, batch, error, can_repeat=True)
                    break
                done = set(rows)
                remaining = [row for row in remaining if row not in done]

    def of_update(self, completions: Sequence[Completion], rows: Sequence[int]) -> list[tuple[list[int], float]]:
        """Return this rank's micro-batches of an optimizer step, each with its weight; see :func:`rank_passes`."""
        return rank_passes(lengths_of(completions), rows, self.limit, self._ranks)

    def halve(self, completions: Sequence[Completion], error: torch.OutOfMemoryError) -> None:
        """Lower the limit of passes with gradients after memory ran out in a pass over ``completions``.

        Raises:
            ConfigError: it was a single completion, or other ranks wait in a sum of gradients that can't be interrupted.
        """
        alone = self._ranks.count == 1 and not self._ranks.uses_deepspeed
        self.limit = smaller_limit(self.limit, lengths_of(completions), error, can_repeat=alone)


def row_index(rows: Sequence[int], indexed: Tensor) -> Tensor:
    """Return ``rows`` as an index of ``indexed``. A list would be copied to the GPU each time, and the CPU would wait for it."""
    return on_device(torch.tensor(rows, dtype=torch.long), indexed.device)


def lengths_of(completions: Sequence[Completion]) -> list[Lengths]:
    """Return the tokens of each prompt and completion."""
    return [(len(completion.prompt.ids), len(completion.ids)) for completion in completions]


def rank_passes(
    lengths: Sequence[Lengths], rows: Sequence[int], limit: MicroBatchLimit, ranks: Ranks
) -> list[tuple[list[int], float]]:
    """Return this rank's micro-batches of an optimizer step, each with its weight.

    Ranks wait for each other in every pass, so all make as many passes as the rank with the most. A rank without rows left
    repeats one with weight 0.
    """
    passes = [list(micro_batches(lengths, ranks.slice_of(rows, index), limit)) for index in range(ranks.count)]
    local, most = passes[ranks.index], max(map(len, passes))
    return [(micro, 1.0) for micro in local] + [([rows[0]], 0.0)] * (most - len(local))


def smaller_limit(
    limit: MicroBatchLimit, lengths: Sequence[Lengths], error: torch.OutOfMemoryError, *, can_repeat: bool
) -> MicroBatchLimit:
    """Return the limit after memory ran out in a pass over rows of ``lengths``, and print a warning.

    Raises:
        ConfigError: the pass had a single row, or it can't be repeated.
    """
    smaller = limit.halved(lengths)
    if len(lengths) == 1 or not can_repeat:
        fix = "Lower max_new_tokens or max_prompt_length" if len(lengths) == 1 else f"Set {smaller}"
        raise ConfigError(
            f"Memory ran out in a pass of {limit.tokens_of(lengths)} tokens (completions: "
            f"{len(lengths)}). {fix}, or use mixed_precision bf16."
        ) from error
    echo(
        f"Memory ran out with {limit}; training continues with {smaller} and the same result. Set {smaller} to start this way.",
        "yellow",
    )
    return smaller
