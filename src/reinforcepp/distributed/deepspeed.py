"""DeepSpeed ZeRO stages 2 and 3 as a training backend, set up through Accelerate; only this module imports deepspeed.

Written for DeepSpeed 0.19. Its optimizer updates one flat float32 tensor per rank, and clips, steps, and clears the gradients
in a single call. This backend therefore computes the gradient norm before the step. To skip an update, it sets the gradients
to NaN, and DeepSpeed then handles the step as an overflow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from reinforcepp.distributed.backends import TrainingBackend
from reinforcepp.errors import ConfigError

if TYPE_CHECKING:
    from reinforcepp.models.master_weights import MasterWeights

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGES = (2, 3)
OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_requested() -> bool:
    """Return whether the launcher is configured to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def prepare_deepspeed(*, cpu: bool) -> None:
    """Configure logging and kernels before DeepSpeed is first used.

    Raises:
        ConfigError: DeepSpeed isn't installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "The launcher is configured for DeepSpeed, which isn't installed. "
            "Run pip install 'deepspeed>=0.19,<0.20', or use FSDP2."
        )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a deprecated function of torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if cpu:  # The shared-memory kernel for all-reduce on one node would first compile for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launcher_plugin() -> DeepSpeedPlugin:
    """Return the launcher's DeepSpeed plugin without its precision settings, which the training config decides.

    Raises:
        ConfigError: the configuration file that the launcher names can't be used.
    """
    try:
        plugin = DeepSpeedPlugin()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The launcher's DeepSpeed configuration can't be used: {error}") from error
    for name in ("fp16", "bf16"):
        plugin.deepspeed_config.pop(name, None)
    return plugin


def complete_config(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Add the settings that the training config decides to DeepSpeed's configuration, in place.

    Raises:
        ConfigError: ``config`` asks for something unsupported.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in STAGES:
        raise ConfigError(
            f"The launcher is configured for DeepSpeed with ZeRO stage {zero.get('stage', 0)}. "
            "Use stage 2 or 3, or train without DeepSpeed."
        )
    if dtype == torch.float16:
        raise ConfigError("mixed_precision: fp16 can't be combined with DeepSpeed. Use bf16.")
    for name in OFFLOADS:
        if zero.get(name, {}).get("device", "none") != "none":
            raise ConfigError(f"The launcher's DeepSpeed configuration sets {name}, which isn't supported. Remove it.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigError(
                f"The launcher's DeepSpeed configuration sets {name}, which the training settings decide. Remove it."
            )
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number here, but doesn't use it.
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        "gradient_accumulation_steps": 1,  # The denominators of the losses are global.
        "gradient_clipping": 0.0,  # The backend sets the limit before each step.
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }


class DeepSpeedBackend(TrainingBackend):
    """A :class:`~reinforcepp.distributed.backends.TrainingBackend` for DeepSpeed ZeRO.

    Args:
        engine: DeepSpeed's engine.
        masters: the model's parameters and AdamW, which DeepSpeed wraps.
        weights: the model's weights at full precision; DeepSpeed itself starts from those in the compute dtype.
        rank: index of this rank.
        world_size: number of ranks.
    """

    def __init__(
        self, engine: Any, masters: MasterWeights, weights: Iterable[Tensor], rank: int, world_size: int
    ) -> None:
        self.model, self._adam = engine, masters.optimizer
        self._parameters, self._group_sizes = masters.model_parameters, masters.group_sizes
        self._rank, self._world_size = rank, world_size
        self._zero = zero = engine.optimizer
        self._stage3 = hasattr(zero, "fp32_partitioned_groups_flat")  # In stage 3 no rank holds a whole weight.
        self._flats = zero.fp32_partitioned_groups_flat if self._stage3 else zero.single_partition_of_fp32_groups
        for flat in self._flats:  # AdamW creates the same state in its first step.
            zeros = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            self._adam.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if not self._stage3:
            zero._lazy_init_hp_params_optimizer_state()
        self._load_weights(weights)

    @override
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.model.set_gradient_accumulation_boundary(True)

    @override
    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self._world_size)

    @override
    def clip(self, limit: float) -> float:
        """Return the gradient norm; DeepSpeed clips in :meth:`step`."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._zero.clip_grad = limit
        norm = (
            combine_grad_norm_groups(self._zero._get_norm_groups()) if self._stage3 else self._zero.scaled_global_norm()
        )
        return float(norm)

    @override
    def step(self) -> None:
        self.model.step()

    @override
    def discard_gradients(self) -> None:
        """Clear the gradients; only valid after the last pass before a step."""
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients[:1]:
                gradient.fill_(torch.nan)
        self.model.step()

    @override
    def full_weight(self, parameter: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        weight: Tensor = safe_get_full_fp32_param(parameter)
        return weight.reshape(self._shape(parameter))

    @override
    def full_gradient(self, parameter: Tensor) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    @override
    def state_dict(self, *, masters: bool) -> dict[str, Any]:
        """Return the state of every ``world_size``-th parameter, starting at this rank's index."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._adam.state[self._flats[0]]["step"]
        states: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self._parameters):
            gathered = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if masters:
                gathered["master"] = self.full_weight(parameter)
            if index % self._world_size == self._rank:
                shape = self._shape(parameter)
                states[index] = {
                    "step": steps.clone(),
                    **{name: full.reshape(shape).cpu() for name, full in gathered.items()},
                }
        ends = list(accumulate(self._group_sizes))
        indices = [list(range(end - size, end)) for size, end in zip(self._group_sizes, ends, strict=True)]
        groups = zip(self._adam.param_groups, indices, strict=True)
        return {"state": states, "param_groups": [group | {"params": inside} for group, inside in groups]}

    @override
    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        for group, saved in zip(self._adam.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self._load_weights(weights)
        for index, parameter in enumerate(self._parameters):
            values = state["state"].get(index)
            if values is None:  # The saved run had made no optimizer step.
                continue
            for name in MOMENTS:
                self._set(parameter, values[name], name)
            if "master" in values:
                self._set(parameter, values["master"])
            for flat in self._flats:
                self._adam.state[flat]["step"].copy_(values["step"])

    def _load_weights(self, weights: Iterable[Tensor]) -> None:
        """Copy ``weights`` to the model's trainable parameters and their float32 masters."""
        import deepspeed

        trainable = {id(parameter) for parameter in self._parameters}
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            if id(parameter) not in trainable:
                continue
            if self._stage3:
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    if self._rank == 0:
                        parameter.data.copy_(weight)
            else:
                parameter.data.copy_(weight)
            self._set(parameter, weight)

    def _set(self, parameter: Any, full: Tensor, moment: str | None = None) -> None:
        """Set this rank's part of a float32 weight, or of one of its ``moment`` tensors."""
        from deepspeed import utils

        key, device = (moment,) if moment else (), self._flats[0].device
        if not self._stage3:
            setter = utils.safe_set_full_optimizer_state if moment else utils.safe_set_full_fp32_param
            setter(parameter, full.to(device), *key)
            return
        size = parameter.ds_tensor.numel()  # Partitions have equal sizes, so the last one can extend past the data.
        local = full.flatten()[self._rank * size :][:size].to(device, torch.float32)
        setter = utils.safe_set_local_optimizer_state if moment else utils.safe_set_local_fp32_param
        setter(parameter, functional.pad(local, (0, size - local.numel())), *key)

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self._stage3 else parameter.shape
