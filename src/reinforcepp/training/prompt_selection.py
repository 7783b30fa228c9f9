"""Choose how the prompts of a training are chosen, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import ConfigError
from reinforcepp.training.curriculum import CurriculumBatches
from reinforcepp.training.prompt_batches import InterleavedBatches, PromptBatches
from reinforcepp.types import Prompt


def prompt_batches(prompts: Sequence[Prompt], config: ReinforceConfig, *, stream: bool) -> PromptBatches:
    """Return the batches of a training as ``config`` chooses them; the prompts of a ``stream`` are read in order.

    Raises:
        ConfigError: the prompts can't be chosen that way.
    """
    drawing = "dynamic_sampling" if config.dynamic_sampling else "curriculum" if config.curriculum else None
    if stream and drawing:
        raise ConfigError(
            f"{drawing}: draws prompts at random, but train_dataset is a stream, which is read in order. Give a Dataset, or "
            f"remove {drawing}."
        )
    refills = config.max_num_gen_batches - 1 if config.dynamic_sampling else 0
    options: Any = {"shuffle": config.shuffle_dataset and not stream, "refills": refills}
    options["success_threshold"] = config.success_threshold
    if config.curriculum:
        return CurriculumBatches(prompts, config.batch_size, config.seed, **options)
    if not config.interleave_probs:
        return PromptBatches(prompts, config.batch_size, config.seed, **options)
    names = [] if stream else [name for name, _ in groupby(prompt.source for prompt in prompts)]
    if names == [""] or len(names) != len(config.interleave_probs):
        raise ConfigError(
            f"interleave_probs: {len(config.interleave_probs)} shares, but train_dataset isn't a dictionary of as many "
            "datasets. Give one share per dataset."
        )
    return InterleavedBatches(prompts, config.batch_size, config.seed, config.interleave_probs, **options)
