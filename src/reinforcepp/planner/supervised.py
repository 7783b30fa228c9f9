"""Estimate the memory of SFT and of a reward training before the weights are loaded, and compare it with the free memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.config import ComputeConfig, RewardModelConfig, SftConfig
from reinforcepp.errors import ModelError, setting
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import CLASSIFIER, load_config, meta_model, parameter_count
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.precision import cast_parameters, compute_dtype
from reinforcepp.models.reward_models import head_modules, register_classifier
from reinforcepp.planner.device import CGROUP_LIMIT, cpu_memory
from reinforcepp.planner.memory import ALLOCATOR, FLOAT, MOMENTS
from reinforcepp.planner.model_costs import (
    NF4_BYTES,
    GradientFlow,
    RowSize,
    gradient_hooks,
    meta_errors,
    padded_inputs,
)
from reinforcepp.planner.trace import ROWS, MemoryTracker, Peak, fused_attention, peak_of
from reinforcepp.run_dir import format_size
from reinforcepp.runtime.process import is_main, started
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.learner import training_submodules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SMALL_PARAMETERS, SMALL_TOKENS = 10_000_000, 16_384
"""A model with fewer parameters, in passes of fewer tokens, needs too little memory to estimate it."""
MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class SupervisedMemory:
    """Bytes of a supervised training on one device.

    Attributes:
        weights: of the model.
        moments: of AdamW.
        peak: gradients and activations of a pass, by the number of texts.
        texts: texts per row, which is 2 for pairs.
        overhead: fraction of the activations that the allocator adds.
    """

    weights: float
    moments: float
    peak: Peak
    texts: int
    overhead: float

    def gradients(self, rows: int) -> float:
        """Return the bytes of gradients at the peak of a pass over ``rows``."""
        return float(self.peak.at(rows * self.texts).gradients)

    def activations(self, rows: int) -> float:
        """Return the bytes of everything else that a pass allocates."""
        return self.peak.at(rows * self.texts).other * (1 + self.overhead)

    def total(self, rows: int) -> float:
        """Return the bytes at the peak, in a pass or while a checkpoint copies the moments."""
        return self.weights + self.moments + max(self.gradients(rows) + self.activations(rows), self.moments)


def supervised_memory(
    config: RewardModelConfig | SftConfig, model_config: PreTrainedConfig, length: int, device: str = "cpu"
) -> SupervisedMemory:
    """Return the memory of a training, from the model's configuration alone.

    Args:
        config: the training.
        model_config: of the model.
        length: tokens of the longest row.
        device: key of the allocator's overhead, cpu or gpu.

    Raises:
        ModelError: the model's code doesn't run on the meta device.
    """
    outputs = max(1, len(config.parsed_criteria)) if isinstance(config, RewardModelConfig) else None
    is_pair = outputs is not None
    stored = getattr(torch, config.dtype) if isinstance(config, RewardModelConfig) else torch.float32
    dtype = compute_dtype(config) if stored == torch.float32 else stored
    with meta_errors(model_config), fused_attention():
        model_config = copy.deepcopy(model_config)
        if outputs is not None:
            register_classifier(model_config)
            model_config.num_labels = outputs
        plain = model = meta_model(model_config, dtype, CLASSIFIER if is_pair else "AutoModelForCausalLM")
        parameters = sum(p.numel() for p in model.parameters())
        weights: float = stored.itemsize * parameters
        if config.use_peft:
            weights = (NF4_BYTES if config.load_in_4bit else stored.itemsize) * parameters
            model = with_adapter(model, config, seed=0, heads=head_modules(model) if is_pair else ())
            cast_parameters(model, dtype)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        moments = MOMENTS * trained * (1.0 if config.use_peft else stored.itemsize / FLOAT)
        if config.use_peft:
            weights += FLOAT * trained
        elif dtype != stored:
            weights += dtype.itemsize * parameters  # autocast keeps a copy of each weight until the backward pass
        forward = partial(_scores if is_pair else _token_loss, plain, length)
        peak = training_peak(model, forward, config)
    return SupervisedMemory(weights, moments, peak, 2 if is_pair else 1, ALLOCATOR[device])


def training_peak(model: PreTrainedModel, forward: Callable[[int], Tensor], settings: ComputeConfig) -> Peak:
    """Return the peak of a forward and backward pass that starts with all gradients, without weights.

    ``forward`` returns a loss for a number of texts.
    """
    for part in training_submodules(model, checkpointing=settings.gradient_checkpointing):
        part.training = True
    runs = []
    for texts in ROWS:
        tracker = MemoryTracker()
        with gradient_hooks(model, tracker, GradientFlow()), tracker:
            for _ in range(2):
                begin = len(tracker.snapshots)
                forward(texts).backward()  # type: ignore[no-untyped-call]
            runs.append(tracker.snapshots[begin:])
    return peak_of(runs)


def _scores(model: Any, length: int, texts: int) -> Tensor:
    if is_encoder(model.config):
        ids = torch.zeros(texts, length, dtype=torch.long, device="meta")
        scores: Tensor = model(input_ids=ids).logits
        return scores.sum()
    hidden_BLD = model.base_model(**padded_inputs(texts, RowSize(length, 0))).last_hidden_state
    return hidden_BLD[:, -1].sum()


def _token_loss(model: Any, length: int, texts: int) -> Tensor:
    inputs = padded_inputs(texts, RowSize(length, 0))
    outputs = model(**inputs, labels=inputs["input_ids"])
    _ = outputs.logits[:, :-1].detach().contiguous()  # TRL's token accuracy
    loss: Tensor = outputs.loss
    return loss


# --- comparison with the free memory ------------------------------------------------------------------------------------


def report_memory(config: RewardModelConfig | SftConfig, length: int) -> None:
    """Print the memory that a training needs; warn if less is free, because the system then stops the process.

    Args:
        config: the training.
        length: tokens of its longest row.
    """
    model_config = load_config(config.model)
    ranks = max(1, started())
    per_rank = max(1, config.batch_size // ranks)
    rows = math.gcd(config.effective_micro_batch_size, per_rank)
    texts = rows * (2 if isinstance(config, RewardModelConfig) else 1)
    if not is_main() or (parameter_count(model_config) < SMALL_PARAMETERS and texts * length < SMALL_TOKENS):
        return
    on_gpu = torch.accelerator.is_available()
    try:
        memory = supervised_memory(config, model_config, length, "gpu" if on_gpu else "cpu")
    except ModelError:
        return  # only this estimate needs the meta device
    copies = 1 if on_gpu else ranks
    free, needed = free_memory(on_gpu=on_gpu), copies * memory.total(rows)
    noun = "pairs" if isinstance(config, RewardModelConfig) else "rows"
    parts = (
        f"weights {format_size(copies * memory.weights)}, AdamW {format_size(copies * memory.moments)}, gradients "
        f"{format_size(copies * memory.gradients(rows))}, activations of {rows} {noun} of up to {length:,} tokens "
        f"{format_size(copies * memory.activations(rows))}"
    )
    text = f"Memory: about {format_size(needed)} at the peak ({parts}); {format_size(free)} free"
    if needed <= free:
        echo(text)
        return
    echo(f"{text}. Training will probably run out of memory. {_fix(config, memory, rows, free / copies)}", "yellow")


def _fix(config: RewardModelConfig | SftConfig, memory: SupervisedMemory, rows: int, free: float) -> str:
    fitting = [count for count in range(rows - 1, 0, -1) if rows % count == 0 and memory.total(count) <= free]
    options = [f"{setting('micro_batch_size')} {fitting[0]}"] if fitting else []
    if not config.gradient_checkpointing:
        options.append(setting("gradient_checkpointing"))
    options.append(f"a lower {setting('max_length')}")
    if not config.use_peft:
        options.append(setting("use_peft"))
    if not fitting and rows > 1:
        options.insert(0, f"{setting('micro_batch_size')} 1")
    return f"Set {', '.join(options[:-1])} or {options[-1]}."


def free_memory(*, on_gpu: bool) -> float:
    """Return the bytes that this process can still allocate."""
    if on_gpu and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    available = cpu_memory()
    with suppress(OSError, ValueError, IndexError):
        lines = MEMORY_FILE.read_text(encoding="utf-8").splitlines()
        available = min(available, next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail")))
    with suppress(OSError, ValueError):
        used = float(CGROUP_LIMIT.with_name("memory.current").read_text(encoding="utf-8"))
        available = min(available, float(CGROUP_LIMIT.read_text(encoding="utf-8")) - used)
    return available
