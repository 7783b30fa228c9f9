"""The units to label, of models or of a file. Loads torch only if a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from reinforcepp.commands.label.files import add_from_file, add_gold, put_uncertain_first
from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import Store
from reinforcepp.errors import ConfigError
from reinforcepp.labeling.generation import BackgroundGeneration
from reinforcepp.labeling.units import Score


@contextmanager
def prepared(config: LabelConfig, store: Store) -> Iterator[BackgroundGeneration | None]:
    """Add the gold units, and the responses of a file or of models; yield the running generation of the latter.

    Raises:
        ReinforceError: The data or a model can't be used, or there is nothing to label.
    """
    add_gold(config, store)
    if not (config.models or config.data is not None or store.has_units()):
        raise ConfigError(
            "models: there is nothing to label. Name models that respond, as in reinforcepp label runs/train --data "
            "prompts.csv, or a file with responses, as in reinforcepp label --data pairs.csv."
        )
    scores: Sequence[Score] = ()
    if config.models or config.reward_model:
        from reinforcepp.commands.label.models import generation, load_scores  # They load torch.

        scores = load_scores(config)
    if config.data is not None and not config.models:
        add_from_file(config, store)
    if scores:
        put_uncertain_first(config, store, scores)
    if not config.models:
        yield None
        return
    with generation(config, store, scores) as background:
        background.start()
        yield background
