"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config.accelerators import DeviceName
from reinforcepp.config.base import FilledStr, NonNegativeInt, PositiveFloat
from reinforcepp.config.training import TrainConfig
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Estimate, without loading a model, whether a training run fits into one node's memory and how long a step takes."""

    gpus: NonNegativeInt | None = None
    """GPUs that train; 0 is the CPU. Default: all of this node, 1 of a named device"""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the GPUs (FSDP2)"""
    mean_new_tokens: float | None = None
    """Mean completion length for time, in tokens; default: max_new_tokens"""
    lengths_from: FilledStr | None = None
    """Folder of a run whose completion lengths are used instead"""
    device: DeviceName = "auto"
    """Device to plan for; auto is this node, cpu its CPU, others are GPUs"""
    gpu_memory: PositiveFloat | None = None
    """Memory of each GPU, or of the CPU, in GiB. Default: measured, or the data sheet"""
    format: Literal["text", "json"] = "text"
    """Format of the plan"""

    @property
    def uses_this_node(self) -> bool:
        """Whether the plan is for the devices of this node."""
        return self.device == "auto"

    def _check_rules(self) -> None:
        if self.device == "cpu" and self.gpus:
            raise ConfigError(
                f"gpus: device cpu has no GPUs, but gpus is {self.gpus}. Name the GPU, as in --device h100."
            )
        if self.device not in ("auto", "cpu") and self.gpus == 0:
            raise ConfigError(f"gpus: device {self.device} is a GPU, but gpus is 0. Omit gpus, or set it to 1 or more.")
        self._check_ranks()
        self._check_lengths()

    def _check_ranks(self) -> None:
        self._check_shares(max(1, self.gpus or 1), "GPUs")

    def _check_shares(self, ranks: int, title: str) -> None:
        if ranks > self.batch_size:
            raise ConfigError(
                f"batch_size: {self.batch_size} can't be shared by {ranks} {title}, because each needs at least one prompt. "
                "Raise batch_size or use fewer GPUs."
            )
        if self.fsdp and self.offload_optimizer:
            raise ConfigError("offload_optimizer doesn't work with fsdp, which shards the weights. Remove one.")

    def _check_lengths(self) -> None:
        mean, most = self.mean_new_tokens, self.max_new_tokens
        if mean is not None and not 1 <= mean <= most:
            raise ConfigError(f"mean_new_tokens must be from 1 to max_new_tokens, which is {most}, not {mean:g}.")
        if self.lengths_from is not None and mean is not None:
            raise ConfigError(
                "mean_new_tokens and lengths_from both give the length of completions. Give one of the two."
            )
