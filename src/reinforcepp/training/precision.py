"""Choose the precision of a training once, at its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.shared import ComputeConfig
from reinforcepp.distributed.ranks import from_rank_zero
from reinforcepp.models.loading import parameter_count
from reinforcepp.models.precision import automatic_precision, slow_precision
from reinforcepp.run_dir import unfinished_settings
from reinforcepp.runtime.terminal import echo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AnyConfig = TypeVar("AnyConfig", bound=RewardModelConfig | SftConfig | ReinforceConfig)


def with_precision(
    config: AnyConfig, model_config: PreTrainedConfig, started: Mapping[str, Any] | None = None
) -> tuple[AnyConfig, dict[str, str]]:
    """Return ``config`` with a resolved ``mixed_precision``, and the reason, which is printed, as a fact for ``run.json``.

    Rank 0 decides for all ranks. Also warns if the precision is slow on this CPU.

    Args:
        config: settings of the training.
        model_config: of the model that is trained.
        started: settings at the start of a resumed run, which keeps its precision on any device; default: those of an
            unfinished run in ``output_dir``, which a trainer can resume later.
    """
    facts: dict[str, str] = {}
    if config.mixed_precision == "auto":
        reason = _reason(config, model_config, started)
        chosen, text = json.loads(reason)
        config = replace(config, mixed_precision=chosen)
        facts["precision"] = f"Mixed precision {chosen}: {text}"
        echo(f"{facts['precision']}.")
    warn_about_precision(config)
    return config, facts


def _reason(config: AnyConfig, model_config: PreTrainedConfig, started: Mapping[str, Any] | None) -> str:
    """Return the precision and the reason for it as JSON."""
    if started is None and not config.overwrite:
        started = unfinished_settings(config.output_dir)
    if started is not None and (before := started.get("mixed_precision", "no")) != "auto":
        return json.dumps([before, "as at the start of the run"])
    count = parameter_count(model_config)
    key = f"reinforcepp/precision/{count}/{config.float32_setting}"
    return from_rank_zero(key, lambda: json.dumps(automatic_precision(config, count)))


def warn_about_precision(config: ComputeConfig) -> None:
    """Print a warning if the device of the training emulates ``mixed_precision``."""
    on_gpu = torch.cuda.is_available()
    if (on_gpu or not torch.accelerator.is_available()) and (warning := slow_precision(config, on_gpu=on_gpu)):
        echo(warning, "yellow")
