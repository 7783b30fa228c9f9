"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import filled, not_negative, positive
from reinforcepp.config.accelerators import DeviceName
from reinforcepp.config.reinforce import RAY
from reinforcepp.config.training import TrainConfig
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Tell, before anything is loaded, whether a training fits into memory and how long a step takes."""

    gpus: int | None = None
    """GPUs of each machine; all train together. 0 is the CPU. Default: those of this machine, 1 with a named device."""
    nodes: int | None = None
    """Machines, each with so many GPUs: then the step is also told for fewer machines, with what they tell each other. With
    rollout ray://... they are the pool's, with a worker on each GPU, and others train. Default: 1."""
    trainers: int = 1
    """Devices that train where a pool generates, each in a process of its own, as under a launcher."""
    fsdp: bool = False
    """Weights, gradients and moments are in shards, one on each GPU, as under a launcher with FSDP2: docs/parallel.md."""
    network_gbps: float = 400.0
    """Gbit/s between two machines, over all adapters that one has."""
    mean_new_tokens: float | None = None
    """Mean length of a completion in tokens, where any token may be the last one with the same chance. Default:
    max_new_tokens, the most that it can be. Memory is always counted for max_new_tokens."""
    lengths_from: str | None = None
    """Folder of a training run whose completions tell instead how long they are."""
    device: DeviceName = "auto"
    """What to plan for: auto is this machine, cpu its processor, anything else a GPU by the vendor's data sheet."""
    gpu_memory: float | None = None
    """GiB of each GPU or, on a CPU, of main memory. Default: what the machine or the data sheet says."""
    format: Literal["text", "json"] = "text"
    """Form of the plan."""

    def __post_init__(self) -> None:
        """Check what planning adds to the settings of a training."""
        super().__post_init__()
        not_negative(self, "gpus")
        positive(self, "nodes", "trainers", "gpu_memory", "network_gbps")
        if self.device == "cpu" and self.gpus:
            raise ConfigError(f"device cpu has no GPUs, but gpus is {self.gpus}: name the GPU, as in --device h100.")
        if self.device not in ("auto", "cpu") and self.gpus == 0:
            raise ConfigError(f"device {self.device} is a GPU, but gpus is 0: leave gpus out, or set it to 1 or more.")
        self._check_sharing()
        self._check_lengths()

    @property
    def pooled(self) -> bool:
        """Whether completions come from other devices than those that train."""
        return self.rollout.startswith(RAY)

    def _check_sharing(self) -> None:
        if self.trainers > 1:
            self._check_trainers()
        devices = self.trainers if self.pooled else (self.nodes or 1) * max(1, self.gpus or 1)
        if devices > self.batch_size:
            spread = (self.nodes or 1) > 1 and not self.pooled
            of = f"{self.nodes} nodes x {self.gpus or 1}" if spread else f"{devices}"
            raise ConfigError(
                f"batch_size {self.batch_size} can't be shared by {of} GPUs: each needs at least one prompt, so raise it or "
                "take fewer."
            )
        if self.fsdp and self.pooled and self.trainers == 1:
            raise ConfigError("One device that trains has no shards: set trainers to more than 1, or leave fsdp out.")
        if self.fsdp and self.offload_optimizer:
            raise ConfigError("offload_optimizer is for whole weights, and fsdp cuts them up: leave one of them out.")

    def _check_trainers(self) -> None:
        if not self.pooled:
            raise ConfigError(
                "trainers are those beside a pool: add rollout ray://..., or leave trainers out, and all GPUs train."
            )

    def _check_lengths(self) -> None:
        mean, most = self.mean_new_tokens, self.max_new_tokens
        if mean is not None and not 1 <= mean <= most:
            raise ConfigError(f"mean_new_tokens must be from 1 to max_new_tokens, which is {most}, not {mean:g}.")
        if self.lengths_from is not None:
            filled(self, "lengths_from")
            if mean is not None:
                raise ConfigError("mean_new_tokens and lengths_from both say how long completions are: give one.")
