"""A model with its optimizer and learning rate schedule: the policy, and the critic."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, TrainingDiverged
from reinforcepp.models.lora import base_model, has_adapter, is_4bit, load_trainable_weights, trainable_weights
from reinforcepp.models.master_weights import LossScale, MasterWeights, sums_fit
from reinforcepp.models.precision import cast_parameters, compute_dtype
from reinforcepp.runtime.process import protect_compiled_code
from reinforcepp.training.optimizer import Optimizers, make_optimizer, with_given_optimizer
from reinforcepp.training.schedule import make_scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
MOMENT_BYTES = 8
"""AdamW's two float32 moments of a weight."""
PROBED_WEIGHTS, PROBED_GRADIENTS = 8, 32
"""Weights whose change an optimizer step must show, and gradients that are searched at a time for nonzero ones."""
MIN_PROBED_RATE = 1e-6
"""Below this learning rate a step can be smaller than the distance between float32 numbers near 1."""


class Learner:
    """Accumulates gradients and makes optimizer steps; weights are updated in float32, whatever the model computes in.

    Args:
        model: trained in place, always in evaluation mode: dropout would make the policy ratio differ from 1.
        ranks: the data-parallel ranks.
        config: settings of optimizer, schedule and precision.
        learning_rate: the peak learning rate.
        steps: optimizer steps of the whole run.
        optimizers: an optimizer of the model's parameters and its schedule, instead of those of ``config``; see
            :func:`~reinforcepp.training.optimizer.check_optimizers`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Ranks,
        config: ReinforceConfig,
        *,
        learning_rate: float,
        steps: int,
        optimizers: Optimizers = (None, None),
    ) -> None:
        if ranks.sharded and config.offload_optimizer:
            raise ConfigError("offload_optimizer: can't be combined with sharded weights (FSDP2, DeepSpeed). Omit it.")
        model.eval()
        if not is_4bit(model):  # a 4-bit model is on its device already and can't be moved
            model.to(ranks.device)
        if not has_adapter(model):  # with an adapter, only the adapter is trained
            model.requires_grad_(True)
        dtype = compute_dtype(config)
        self.plain = model
        """The unwrapped model with all weights, for generation, scoring and saving; see :meth:`refresh`."""
        if ranks.sharded:
            model = copy.deepcopy(model)
        self._training_submodules = training_submodules(model, checkpointing=config.gradient_checkpointing)
        self._scale = LossScale(dtype)
        self._dtype = dtype
        given, scheduler = optimizers
        optimizer = with_given_optimizer(model, given) if given else make_optimizer(model, config, learning_rate)
        self._masters = MasterWeights(
            optimizer,
            torch.float32 if ranks.sharded else dtype,
            **_offloading(optimizer, ranks.device, config),
        )
        self._sizes = [parameter.numel() for parameter in self._masters.masters]
        self._ranks = ranks
        self._max_grad_norm = config.max_grad_norm
        if not ranks.sharded:  # sharded weights are cast later, from full precision
            cast_parameters(model, dtype)
        self.backend = ranks.prepare(model, self._masters, dtype, self.plain.parameters())
        cast_parameters(self.plain, dtype)
        self.model = self.backend.model
        if config.torch_compile:  # not the plain model: generation uses inputs that the compiler doesn't handle
            protect_compiled_code()
            self.model = torch.compile(self.model)
        self.scheduler = scheduler or make_scheduler(optimizer, config, steps)

    @property
    def scoring(self) -> Any:
        """The model for passes without gradients, whose number can differ between ranks."""
        return self.model if self._ranks.count == 1 and not self._ranks.sharded else self.plain

    @property
    def pending_moment_bytes(self) -> int:
        """Bytes that AdamW's moments will take on this rank's device from the first optimizer step on; 0 if they exist.

        Gradients aren't counted: an optimizer step frees them. DeepSpeed creates the moments when it starts.
        """
        if self._ranks.uses_deepspeed:
            return 0
        state, device = self._masters.optimizer.state, self._ranks.device.type
        missing = [master for master in self._masters.masters if master not in state and master.device.type == device]
        own = [master.to_local() if isinstance(master, DTensor) else master for master in missing]
        return sum(MOMENT_BYTES * master.numel() for master in own)

    @contextmanager
    def learning(self, *, last: bool = True) -> Iterator[None]:
        """Surround a forward pass and its backward pass, which can recompute the forward pass.

        DDP and DeepSpeed reduce gradients over ranks in the ``last`` pass before an optimizer step. Separate master weights
        sum the gradients of all passes in float32, and :meth:`clip` reduces the sums. FSDP2 reduces in every pass, because a
        rank has no memory for gradients of whole weights.
        """
        for part in self._training_submodules:
            part.training = True
        try:
            with nullcontext() if last else self.backend.no_sync():
                yield
        finally:
            for part in self._training_submodules:
                part.training = False

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's share of the loss."""
        self.backend.backward(self._scale.scale(loss))

    def clip(self) -> float:
        """Clip the gradients accumulated on all ranks to ``max_grad_norm``; return their norm before clipping."""
        self._masters.collect(self._ranks.sum_in_place if self._ranks.count > 1 else None)
        self._scale.unscale(self._masters.masters)
        norm = self.backend.clip(self._max_grad_norm)
        self._scale.update(norm)
        return norm

    def step(self, norm: float) -> dict[str, float]:
        """Update the weights with gradients of a finite ``norm``; return the norm and the learning rate.

        Raises:
            TrainingDiverged: no weight changed.
        """
        rate = float(self.scheduler.get_last_lr()[0])
        probes = self._probes() if rate >= MIN_PROBED_RATE and norm > 0 else []
        self.backend.step()
        changed = [(self.backend.full_weight(weight) != before).any() for weight, before in probes]
        if changed and not torch.stack(changed).any():
            raise TrainingDiverged(
                f"The optimizer step changed no weight at learning rate {rate:g} and gradient norm {norm:.3g}. Check that the "
                "optimizer holds the model's parameters and that gradients reach them."
            )
        self.scheduler.step()
        return {"grad_norm": norm, "learning_rate": rate}

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate, for this step and the rest of the schedule."""
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        self.scheduler._last_lr = [rate * factor for rate in self.scheduler.get_last_lr()]
        for group in self._masters.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._masters.discard()
        self.backend.discard_gradients()

    def _probes(self) -> list[tuple[Tensor, Tensor]]:
        """Return a few of the smallest weights with a nonzero gradient, each with a copy."""
        small = [
            master for _, master in sorted(zip(self._sizes, self._masters.masters, strict=True), key=itemgetter(0))
        ]
        moved: list[Tensor] = []
        for start in range(0, len(small), PROBED_GRADIENTS):
            gradients = [(p, self.backend.full_gradient(p)) for p in small[start : start + PROBED_GRADIENTS]]
            flags = {p: gradient.any() for p, gradient in gradients if gradient is not None}
            if not flags:
                continue
            # One transfer for all of them, because each makes the CPU wait for the GPU.
            moved += [p for p, nonzero in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True) if nonzero]
            if len(moved) >= PROBED_WEIGHTS:
                break
        return [(p, self.backend.full_weight(p).detach().clone()) for p in moved[:PROBED_WEIGHTS]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy sharded weights to ``plain`` after optimizer steps, one weight at a time on every rank."""
        if self._ranks.sharded:
            for shard, copied in zip(self.backend.model.parameters(), self.plain.parameters(), strict=True):
                if copied.requires_grad:
                    copied.copy_(self.backend.full_weight(shard))

    @torch.no_grad()
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Return state dicts of trainable weights, optimizer and schedule; if sharded, each rank's holds its own shards."""
        schedule = {name: value for name, value in self.scheduler.state_dict().items() if _is_json(value)}
        schedule["loss_scale"] = self._scale.state_dict()
        return trainable_weights(self.plain), self.backend.state_dict(masters=self._dtype != torch.float32), schedule

    def shard_like(self, index: int, shape: torch.Size) -> Tensor | None:
        """Return the sharded tensor whose layout an optimizer tensor of parameter ``index`` has; None if it is whole."""
        master = self._masters.masters[index]
        return master if isinstance(master, DTensor) and master.shape == shape else None

    @torch.no_grad()
    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, possibly on another number of ranks.

        Raises:
            ConfigError: the saved optimizer was another one.
        """
        sizes = [len(group["params"]) for group in optimizer["param_groups"]]
        names = [set(group) for group in optimizer["param_groups"]]
        own = self._masters.optimizer
        if sizes != self._masters.group_sizes or names != [set(group) for group in own.param_groups]:
            raise ConfigError(
                f"resume: the checkpoint's optimizer isn't {type(own).__name__} with {self._masters.group_sizes} parameters "
                "per group. Resume with the optimizer of the run's start."
            )
        load_trainable_weights(self.plain, model)
        self.backend.load_state(optimizer, self.plain.parameters())
        self._scale.load_state_dict(scheduler["loss_scale"])
        schedule = {name: value for name, value in scheduler.items() if name != "loss_scale"}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **schedule})


def _offloading(optimizer: torch.optim.Optimizer, device: torch.device, config: ReinforceConfig) -> dict[str, Any]:
    """Return where ``offload_optimizer`` keeps the masters and sums the gradients, as arguments of ``MasterWeights``."""
    if not config.offload_optimizer or device == CPU:
        return {}
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    memory = torch.cuda.get_device_properties(device).total_memory
    fit = sums_fit(trained * (1 + config.estimator_spec.uses_critic), memory)
    return {"device": CPU, "sum_device": None if fit else CPU}


def _is_json(value: Any) -> bool:
    """Return whether JSON keeps ``value``. A schedule's other values are arguments of its constructor, such as milestones."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except TypeError:
        return False


def training_submodules(model: PreTrainedModel, *, checkpointing: bool) -> list[nn.Module]:
    """Return the submodules that must be in training mode during a training pass.

    The model as a whole stays in evaluation mode, because its dropout would make the policy ratio differ from 1. Layers with
    gradient checkpointing read their own ``training`` flag, and so does an adapter's dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    parts: list[nn.Module] = []
    if checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        parts += [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        if not parts:
            raise ConfigError(f"gradient_checkpointing: not supported by {model.config.model_type} models. Omit it.")
    for part in model.modules():
        dropouts = [p for p in getattr(part, "lora_dropout", {}).values() if isinstance(p, nn.Dropout)]
        parts += [part, *dropouts] if dropouts else []
    return parts
