"""Sizes, FLOPs, and peak memory of a model's passes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reinforcepp.config import ComputeConfig
from reinforcepp.errors import ModelError, first_line
from reinforcepp.models.loading import meta_model
from reinforcepp.models.logprobs import bypass_head
from reinforcepp.models.lora import is_linear, with_adapter
from reinforcepp.models.master_weights import added_gradient
from reinforcepp.models.mkldnn_linear import packed_weights
from reinforcepp.models.precision import cast_parameters
from reinforcepp.planner.trace import (
    FLOPS,
    ROWS,
    Line,
    MemoryTracker,
    Peak,
    Snapshot,
    fused_attention,
    line_through,
    peak_of,
)
from reinforcepp.rollout.decoding import cache_dtype
from reinforcepp.rollout.vllm.memory import ActivationSize, activation_size, cache_bytes_per_token
from reinforcepp.training.learner import training_submodules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NF4_BYTES = (4 + (8 + 32 / 256) / 64) / 8
"""Bytes of a 4-bit weight, with an 8-bit scale per 64 weights and a 32-bit scale per 256 of those scales."""
META_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError)
"""Errors that a model's code can raise if it reads values of meta tensors."""


@dataclass(frozen=True)
class Pass:
    """Bytes that one pass over a micro-batch needs, except for the weights and for separately computed logits."""

    peak: Peak
    at_head: Line
    """Bytes alive between the last hidden states and the output layer."""


@dataclass(frozen=True)
class FrozenModel:
    """A model that only computes forward passes, such as a reward model."""

    parameters: int
    score: Pass
    """A forward pass of prompts with completions."""
    row_flops: int
    """FLOPs of the forward pass of one such row, without a separately computed output layer."""


def combined(models: Sequence[FrozenModel]) -> FrozenModel:
    """Return the costs of several models that run one after another; without any model, all costs are 0."""
    lines = tuple(line for model in models for line in model.score.peak.lines) or (Line(0, 0.0, 0.0),)
    return FrozenModel(
        parameters=sum(model.parameters for model in models),
        score=Pass(Peak(lines), lines[0]),
        row_flops=sum(model.row_flops for model in models),
    )


NO_ACTIVATIONS = ActivationSize(0, 0)


@dataclass(frozen=True)
class TrainedModel(FrozenModel):
    """A model that is trained and, as the policy, generates."""

    trained: int
    """Trainable parameters: all of the model's, or those of the adapter."""
    stored: int
    """Bytes of the parameters in the dtype the model computes in."""
    layers: int
    vocabulary: int
    head: int
    """Weights of the output layer."""
    tied: bool
    """Whether the output layer shares its weights with the embeddings."""
    separate_logits: bool
    """Whether logits are computed in chunks for response tokens only; False for models that scale or cap their logits."""
    packed: int
    """Weights that generation on a CPU packs into copies."""
    cache_per_token: int
    """Bytes of the KV cache per token."""
    token_flops: int
    """FLOPs of one more token of a completion including the output layer, without attention to earlier tokens."""
    token_calls: int
    """Library calls for one more token."""
    prompt_flops: int
    """FLOPs of the forward pass of one prompt."""
    prefill: Pass
    """A forward pass of prompts."""
    first: Pass
    """A forward and backward pass that starts without gradients."""
    later: Pass
    """A forward and backward pass that starts with all gradients."""
    vllm_activations: ActivationSize = NO_ACTIVATIONS
    """Activations of vLLM on a GPU."""
    widened_cache: int = 0
    """Bytes by which ``cache_per_token`` is larger in the transformers engine on a CPU, which can keep it in float32."""

    @property
    def adapted(self) -> bool:
        """Whether only an adapter is trained."""
        return self.trained < self.parameters


@dataclass(frozen=True)
class RowSize:
    """Tokens per row."""

    prompt: int
    new: int

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return self.prompt + self.new


def trained_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    size: RowSize,
    settings: ComputeConfig | None = None,
    *,
    cpu_sums: bool = False,
    shards: int = 1,
    values: bool = False,
) -> TrainedModel:
    """Return the costs of a policy, or of a critic.

    Args:
        config: the model's configuration.
        dtype: the compute dtype.
        size: tokens per row.
        settings: decide about adapters and gradient checkpointing.
        cpu_sums: gradients move to CPU memory one by one.
        shards: number of devices that share the gradients.
        values: the output layer has one output instead of the vocabulary, as in a critic.

    Raises:
        ModelError: the model isn't a causal language model, or its code doesn't run on the meta device.
    """
    with meta_errors(config), fused_attention():
        model = meta_model(config, dtype)
        if values:
            width = model.get_output_embeddings().weight.shape[1]
            model.set_output_embeddings(nn.Linear(width, 1, bias=False, device="meta", dtype=dtype))
            model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        separate = not values and _returns_logits(model, head)
        cache = cache_bytes_per_token(config, dtype)
        tied = head.weight is model.get_input_embeddings().weight
        settings = settings or ComputeConfig()
        stored = dtype.itemsize * sum(p.numel() for p in model.parameters())
        if settings.use_peft:
            base = stored if not settings.load_in_4bit else _bytes_in_4bit(model, head)
            model = with_adapter(model, settings, seed=0, heads=[head] if values else [])
            cast_parameters(model, dtype)
            stored = base + dtype.itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
            head = model.get_output_embeddings()
        skip = partial(bypass_head, head) if separate else nullcontext
        flow = GradientFlow(cpu_sums, shards)
        passes = [_two_passes(model, head if separate else None, skip, rows, size, settings, flow) for rows in ROWS]
        first, later = (
            Pass(peak_of([snapshots for snapshots, _ in both]), line_through([at_head for _, at_head in both]))
            for both in zip(*passes, strict=True)
        )
        weights = head.weight.numel()
        with skip():
            calls, flops = _forward_cost(lambda: _outputs(model, 1, RowSize(1, 0)))
            return TrainedModel(
                parameters=sum(p.numel() for p in model.parameters()),
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
                stored=stored,
                score=_forward_pass(lambda rows: _outputs(model, rows, size)),
                row_flops=_forward_cost(lambda: _outputs(model, 1, size))[1],
                layers=config.get_text_config().num_hidden_layers,
                vocabulary=head.weight.shape[0],
                head=weights,
                tied=tied,
                separate_logits=separate,
                packed=0 if settings.load_in_4bit else packed_weights(model),
                cache_per_token=cache,
                token_flops=flops + (2 * weights if separate else 0),
                token_calls=calls,
                prompt_flops=_forward_cost(lambda: _outputs(model, 1, RowSize(size.prompt, 0)))[1],
                prefill=_forward_pass(lambda rows: _outputs(model, rows, RowSize(size.prompt, 0))),
                first=first,
                later=later,
                vllm_activations=activation_size(config, dtype),
                widened_cache=cache_bytes_per_token(config, cache_dtype(model, "cpu") or dtype) - cache,
            )


def _bytes_in_4bit(model: PreTrainedModel, head: nn.Module) -> int:
    """Return the bytes of a model with 4-bit weights, as in QLoRA: all linear layers but the output layer."""
    layers = {part.weight for part in model.modules() if is_linear(part) and part is not head}
    unquantized = sum(p.nbytes for p in model.parameters() if p not in layers)
    return unquantized + round(NF4_BYTES * sum(weight.numel() for weight in layers))


def frozen_model(config: PreTrainedConfig, dtype: torch.dtype, size: RowSize) -> FrozenModel:
    """Return the costs of a reward model; arguments and errors are those of :func:`trained_model`."""
    with meta_errors(config), fused_attention():
        model = meta_model(config, dtype, "AutoModel")
        score_weights = config.get_text_config().hidden_size
        return FrozenModel(
            parameters=sum(p.numel() for p in model.parameters()) + score_weights,
            score=_forward_pass(lambda rows: model(**padded_inputs(rows, size)).last_hidden_state),
            row_flops=_forward_cost(lambda: model(**padded_inputs(1, size)).last_hidden_state)[1],
        )


@contextmanager
def meta_errors(config: PreTrainedConfig) -> Iterator[None]:
    """Raise a ModelError if the model's code doesn't run on the meta device."""
    try:
        yield
    except META_ERRORS as error:
        raise ModelError(
            f"A model of type {config.model_type} can't be planned: its code doesn't run on the meta device "
            f"({first_line(error)}). Train a few steps with small batches, and read the peak memory instead."
        ) from error


# --- passes ---------------------------------------------------------------------------------------------------------


class GradientFlow(NamedTuple):
    """How gradients reach their float32 sums."""

    cpu_sums: bool = False
    """One by one to CPU memory, instead of to sums on the device."""
    shards: int = 1
    """Number of devices that share the sums."""


def padded_inputs(rows: int, size: RowSize) -> dict[str, Any]:
    """Return padded rows, as rows of different lengths are."""
    ids = torch.zeros(rows, size.length, dtype=torch.long, device="meta")
    mask = torch.zeros(rows, 1, size.length, size.length, dtype=torch.bool, device="meta")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": ids, "use_cache": False}


def _outputs(model: Any, rows: int, size: RowSize) -> Tensor:
    """Return the model's outputs before each new token, or after the last token if there is no new one. (rows, new, X)"""
    output_BTX: Tensor = model(**padded_inputs(rows, size), logits_to_keep=size.new + 1).logits
    return output_BTX[:, :-1] if size.new else output_BTX


def _returns_logits(model: Any, head: nn.Module) -> bool:
    """Return whether the model returns its output layer's outputs unchanged; some models scale or cap them."""
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits_BTV = model(**padded_inputs(1, RowSize(4, 0))).logits
    hook.remove()
    return len(seen) == 1 and seen[0].untyped_storage()._cdata == logits_BTV.untyped_storage()._cdata


def _two_passes(
    model: PreTrainedModel,
    head: nn.Module | None,
    skip: Callable[[], AbstractContextManager[None]],
    rows: int,
    size: RowSize,
    settings: ComputeConfig,
    flow: GradientFlow,
) -> list[tuple[list[Snapshot], Snapshot]]:
    """Run forward and backward twice; for each, return a snapshot per operation, and the one before the output layer.

    For separately computed logits, ``head`` is the output layer and ``skip`` bypasses it in the model.
    """
    passes = []
    tracker = MemoryTracker(flow.shards)
    for part in (parts := training_submodules(model, checkpointing=settings.gradient_checkpointing)):
        part.training = True
    with gradient_hooks(model, tracker, flow), tracker:
        for _ in range(2):
            begin = len(tracker.snapshots)
            with skip():
                output_BTX = _outputs(model, rows, size)
            output_NX = output_BTX.reshape(-1, output_BTX.shape[-1])
            tracker.record()
            at_head = tracker.snapshots[-1]
            # One token is enough to create the output layer's gradient. The planner adds the logits itself.
            result = _Saved.apply(output_NX) if head is None else head(output_NX[:1])  # type: ignore[no-untyped-call]
            del output_BTX, output_NX
            result.sum().backward()
            del result
            passes.append((tracker.snapshots[begin:], at_head))
    for part in parts:
        part.training = False
    return passes


class _Saved(torch.autograd.Function):
    """Saves its input for the backward pass, as log-probabilities save their logits."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return given.new_empty(len(given))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def gradient_hooks(model: PreTrainedModel, tracker: MemoryTracker, flow: GradientFlow) -> Iterator[None]:
    """Add up gradients as ``MasterWeights`` does, and clear them at the end."""
    has_masters = model.dtype != torch.float32
    sums: dict[Tensor, Tensor] = {}

    def accumulated(parameter: Tensor) -> None:
        is_first = parameter not in sums
        if flow.cpu_sums:
            parameter.grad = None
        elif has_masters:
            sums[parameter] = added_gradient(sums.get(parameter), parameter)
        elif parameter.grad is not None:
            sums[parameter] = parameter.grad
        if is_first and parameter in sums:
            tracker.gradients += sums[parameter].nbytes
        tracker.record()

    hooks = [p.register_post_accumulate_grad_hook(accumulated) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()


@torch.no_grad()
def _forward_pass(forward: Callable[[int], Tensor]) -> Pass:
    """Return the memory of a forward pass without gradients; ``forward`` runs it for a number of rows."""
    runs, at_head = [], []
    for rows in ROWS:
        with MemoryTracker() as tracker:
            output = forward(rows)
            runs.append(tracker.snapshots)
            at_head.append(tracker.snapshots[-1])
            del output
    return Pass(peak_of(runs), line_through(at_head))


@torch.no_grad()
def _forward_cost(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the library calls and the FLOPs of a forward pass."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, MemoryTracker() as tracker:
        forward()
    return tracker.operations, counter.get_total_flops()
