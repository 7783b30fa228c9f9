"""The one module that names the training engine (Accelerate): devices, backward passes, sums over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from reinforcepp.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
TRACKERS = "trackers"
PROJECT = "reinforcepp"


def check_trackers(names: Sequence[str]) -> None:
    """Check that what is to be reported to is installed.

    Raises:
        ConfigError: naming what isn't, and how to install it.
    """
    there = {str(tracker.value) for tracker in get_available_trackers()} if names else set()
    for name in names:
        if name not in there:
            package = {"comet_ml": "comet-ml"}.get(name, name)
            raise ConfigError(f"report_to names {name}, which is not installed: pip install {package}")


class Ranks:
    """This process among those that train together; alone, everything here is the identity."""

    def __init__(self, report_to: Sequence[str] = (), folder: Path | None = None) -> None:
        places = ProjectConfiguration(logging_dir=str(folder / TRACKERS)) if report_to and folder else None
        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            AcceleratorState._reset_state()  # a trainer of TRL in this process left its own there
        # Precision is this package's own affair, whatever a launcher's settings or the environment say.
        self._accelerator = Accelerator(mixed_precision="no", log_with=list(report_to) or None, project_config=places)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return bool(self._accelerator.is_main_process)

    @property
    def index(self) -> int:
        """Which of the processes this is."""
        return int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        """How many processes train together."""
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    def start_trackers(self, settings: Mapping[str, Any], step: int) -> None:
        """Tell the trackers of a run that begins, or goes on, after ``step``."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        # what a stopped run reported of the steps that are done again is not to be shown
        again = {"tensorboard": {"purge_step": step + 1}} if step else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about their own parts
            self._accelerator.init_trackers(PROJECT, config=plain, init_kwargs=again)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Report a step's figures."""
        self._accelerator.log(dict(values), step=step)

    def end_trackers(self) -> None:
        """Have everything written. Accelerate's own end would also end the process group that vLLM goes on to use."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def prepare(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimiser as the engine runs them; the optimiser's tensors stay where they are."""
        return self._accelerator.prepare(model, optimizer, device_placement=[None, False])

    def unwrap(self, model: Any) -> PreTrainedModel:
        """The plain model inside a prepared one."""
        return self._accelerator.unwrap_model(model)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks hold in common."""
        return list(items[self._accelerator.process_index :: self._accelerator.num_processes])

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        return self._accelerator.reduce(values, reduction="sum")

    def max(self, values: Tensor) -> Tensor:
        """Largest value over ranks, of single numbers."""
        gathered: Tensor = self._accelerator.gather(values)
        return gathered.max()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss whose denominator is global: ranks add up instead of averaging."""
        self._accelerator.backward(loss * self._accelerator.num_processes)

    def clip_gradients(self, parameters: Sequence[Tensor], limit: float) -> float:
        """Scale gradients down to norm ``limit``; returns the norm before."""
        return float(self._accelerator.clip_grad_norm_(parameters, limit))
