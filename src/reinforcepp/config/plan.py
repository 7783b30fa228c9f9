"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config.accelerators import DeviceName
from reinforcepp.config.base import FilledStr, NonNegativeInt, PositiveFloat, PositiveInt
from reinforcepp.config.reinforce import RAY
from reinforcepp.config.training import TrainConfig
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Estimate, before a model is loaded, whether a training fits into memory and how long a step takes."""

    gpus: NonNegativeInt | None = None
    """GPUs per node; 0 is the CPU. Default: those of this node, 1 with a named device"""
    nodes: PositiveInt | None = None
    """Nodes; also estimates fewer. With ray:// the nodes of the pool. Default: 1"""
    trainers: PositiveInt = 1
    """Training devices if a pool generates, one process each"""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the GPUs (FSDP2)"""
    network_gbps: PositiveFloat = 400.0
    """Bandwidth between two nodes over all adapters, in Gbit/s"""
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

    def _check_rules(self) -> None:
        if self.device == "cpu" and self.gpus:
            raise ConfigError(
                f"gpus: device cpu has no GPUs, but gpus is {self.gpus}. Name the GPU, as in --device h100."
            )
        if self.device not in ("auto", "cpu") and self.gpus == 0:
            raise ConfigError(f"gpus: device {self.device} is a GPU, but gpus is 0. Omit gpus, or set it to 1 or more.")
        self._check_sharing()
        self._check_lengths()

    @property
    def pooled(self) -> bool:
        """Whether a pool of other devices than the training devices generates."""
        return self.rollout.startswith(RAY)

    def _check_sharing(self) -> None:
        if self.trainers > 1 and not self.pooled:
            raise ConfigError(
                f"trainers: {self.trainers} is only for a pool. Add --rollout ray://..., or omit trainers to train on all GPUs."
            )
        devices = self.trainers if self.pooled else (self.nodes or 1) * max(1, self.gpus or 1)
        if devices > self.batch_size:
            spread = (self.nodes or 1) > 1 and not self.pooled
            of = f"{self.nodes} nodes x {self.gpus or 1}" if spread else f"{devices}"
            raise ConfigError(
                f"batch_size: {self.batch_size} can't be shared by {of} GPUs, because each needs at least one prompt. Raise "
                "batch_size or use fewer GPUs."
            )
        if self.fsdp and self.pooled and self.trainers == 1:
            raise ConfigError("fsdp needs several training devices. Set trainers to 2 or more, or omit fsdp.")
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
