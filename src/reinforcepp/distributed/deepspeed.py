"""DeepSpeed's ZeRO as the training engine: stages 2 and 3, set up by Accelerate; deepspeed is only imported here.

Written against DeepSpeed 0.19. Its optimiser learns one flat tensor of float32 weights on each rank, and would clip, step and
forget at once. So the norm is asked for before the step; an update that is left out goes the way of an overflow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from torch.nn import functional

from reinforcepp.errors import ConfigError

if TYPE_CHECKING:
    from reinforcepp.models.precision import MasterAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGES = (2, 3)
OFFLOADS = ("offload_optimizer", "offload_param")


def asked_for() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def prepare_deepspeed(*, cpu: bool) -> None:
    """What has to be done before DeepSpeed is first used.

    Raises:
        ConfigError: it isn't installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "The launcher is set to DeepSpeed, which isn't installed: pip install 'deepspeed>=0.19,<0.20', or use FSDP2."
        )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")  # of its calls
    if cpu:  # a kernel for sums between processes of one machine, which would first be compiled for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launched_plugin() -> DeepSpeedPlugin:
    """What the launcher was told of DeepSpeed; precision is a setting of the training.

    Raises:
        ConfigError: a file that it names can't be used.
    """
    try:
        plugin = DeepSpeedPlugin()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The launcher's DeepSpeed configuration can't be used: {error}") from error
    for name in ("fp16", "bf16"):
        plugin.deepspeed_config.pop(name, None)
    return plugin


def complete(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Add to DeepSpeed's configuration what the training has settings of its own for.

    Raises:
        ConfigError: it says what can't be done.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in STAGES:
        raise ConfigError(
            f"The launcher is set to DeepSpeed with ZeRO stage {zero.get('stage', 0)}: use stage 2 or 3, or leave DeepSpeed out."
        )
    if dtype == torch.float16:
        raise ConfigError("mixed_precision fp16 can't be had with DeepSpeed: use bf16.")
    for name in OFFLOADS:
        if zero.get(name, {}).get("device", "none") != "none":
            raise ConfigError(
                f"The launcher's DeepSpeed configuration sets {name}, which isn't supported: leave it out."
            )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigError(
                f"The launcher's DeepSpeed configuration has its own {name}: leave it out, the training's settings decide it."
            )
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number, and uses it for nothing
        "train_batch_size": int(os.environ.get("WORLD_SIZE", "1")),
        "gradient_accumulation_steps": 1,  # the losses' denominators are global
        "gradient_clipping": 0.0,  # given before each step
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }


class ZeroEngine:
    """A model and its optimiser as DeepSpeed runs them; see :class:`~reinforcepp.distributed.backends.Engine`.

    Args:
        engine: DeepSpeed's.
        adam: the optimiser that it was given.
        weights: of the model, with all digits; DeepSpeed itself would begin with those it computes with.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, engine: Any, adam: MasterAdamW, weights: Iterable[Tensor], rank: int, ranks: int) -> None:
        self.model, self._adam, self._rank, self._ranks = engine, adam, rank, ranks
        self._zero = zero = engine.optimizer
        self._split = hasattr(zero, "fp32_partitioned_groups_flat")  # stage 3: no rank holds a whole weight
        self._flats = zero.fp32_partitioned_groups_flat if self._split else zero.single_partition_of_fp32_groups
        for flat in self._flats:  # as AdamW would make it in its first step
            zeros = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            adam.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if not self._split:
            zero._lazy_init_hp_params_optimizer_state()
        self._take(weights)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        self.model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.model.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        self.model.backward(loss * self._ranks)

    def clip(self, limit: float) -> float:
        """See :class:`~reinforcepp.distributed.backends.Engine`; it is done in the step."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._zero.clip_grad = limit
        norm = (
            combine_grad_norm_groups(self._zero._get_norm_groups()) if self._split else self._zero.scaled_global_norm()
        )
        return float(norm)

    def step(self) -> None:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        self.model.step()

    def drop(self) -> None:
        """See :class:`~reinforcepp.distributed.backends.Engine`; only after the last pass before a step."""
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients[:1]:
                gradient.fill_(torch.nan)
        self.model.step()

    def weight(self, parameter: Tensor) -> Tensor:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param

        weight: Tensor = safe_get_full_fp32_param(parameter)
        return weight.reshape(self._shape(parameter))

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def state(self, *, masters: bool) -> dict[str, Any]:
        """See :class:`~reinforcepp.distributed.backends.Engine`; of every so many parameters, this rank keeps those of one."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._adam.state[self._flats[0]]["step"]
        states: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self._adam.live):
            found = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if masters:
                found["master"] = self.weight(parameter)
            if index % self._ranks == self._rank:
                shape = self._shape(parameter)
                states[index] = {
                    "step": steps.clone(),
                    **{name: full.reshape(shape).cpu() for name, full in found.items()},
                }
        (group,) = self._adam.param_groups
        return {"state": states, "param_groups": [group | {"params": list(range(len(self._adam.live)))}]}

    def load_state(self, state: dict[str, Any], weights: Iterable[Tensor]) -> None:
        """See :class:`~reinforcepp.distributed.backends.Engine`."""
        (group,) = state["param_groups"]
        self._adam.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        self._take(weights)
        for index, parameter in enumerate(self._adam.live):
            held = state["state"].get(index)
            if held is None:  # of a run that hadn't made a step
                continue
            for name in MOMENTS:
                self._set(parameter, held[name], name)
            if "master" in held:
                self._set(parameter, held["master"])
            for flat in self._flats:
                self._adam.state[flat]["step"].copy_(held["step"])

    # --- inside ---

    def _take(self, weights: Iterable[Tensor]) -> None:
        """Have the model compute with ``weights``, and learn from them."""
        import deepspeed

        learnt = {id(parameter) for parameter in self._adam.live}
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            if id(parameter) not in learnt:
                continue
            if self._split:
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    if self._rank == 0:
                        parameter.data.copy_(weight)
            else:
                parameter.data.copy_(weight)
            self._set(parameter, weight)

    def _set(self, parameter: Any, full: Tensor, moment: str | None = None) -> None:
        """Give this rank its part of a float32 weight, or of one of its moments."""
        from deepspeed import utils

        place, device = (moment,) if moment else (), self._flats[0].device
        if not self._split:
            setter = utils.safe_set_full_optimizer_state if moment else utils.safe_set_full_fp32_param
            setter(parameter, full.to(device), *place)
            return
        size = parameter.ds_tensor.numel()  # the last part may be longer than what is left for it
        own = full.flatten()[self._rank * size :][:size].to(device, torch.float32)
        setter = utils.safe_set_local_optimizer_state if moment else utils.safe_set_local_fp32_param
        setter(parameter, functional.pad(own, (0, size - own.numel())), *place)

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self._split else parameter.shape
