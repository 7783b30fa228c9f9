"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import not_negative, positive
from reinforcepp.config.verbs import TrainConfig
from reinforcepp.devices import DeviceName
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Tell, before anything is loaded, whether a training fits into memory and how long a step takes."""

    gpus: int | None = None
    """GPUs that train together, each with a copy of everything; 0 is the CPU. Default: those of this machine."""
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
        positive(self, "gpu_memory")
        if self.device == "cpu" and self.gpus:
            raise ConfigError(f"device cpu has no GPUs, but gpus is {self.gpus}: name the GPU, as in --device h100.")
        if self.device not in ("auto", "cpu") and self.gpus == 0:
            raise ConfigError(f"device {self.device} is a GPU, but gpus is 0: leave gpus out, or set it to 1 or more.")
        if self.gpus is not None and self.gpus > self.batch_size:
            raise ConfigError(
                f"batch_size {self.batch_size} can't be shared by {self.gpus} GPUs: each needs at least one prompt, so "
                "raise it or take fewer GPUs."
            )
