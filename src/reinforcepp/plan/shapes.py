"""What the planner knows of a model: sizes, operations and the peaks of its passes, from its configuration alone."""

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
from reinforcepp.errors import ModelError
from reinforcepp.models.loading import meta_model
from reinforcepp.models.logprobs import bypass_head
from reinforcepp.models.lora import is_linear, with_adapter
from reinforcepp.models.precision import cast_parameters, move_gradient
from reinforcepp.plan.trace import FLOPS, ROWS, Line, Live, Moment, Peak, attention_on_shapes, line_of, peak_of
from reinforcepp.rollout.mkldnn_linear import packed_weights
from reinforcepp.rollout.vllm.memory import cache_bytes_per_token
from reinforcepp.training.learner import training_submodules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a model's code may raise when it is given no numbers to compute with.
NF4_BYTES = (4 + (8 + 32 / 256) / 64) / 8
"""Of one weight in 4 bits, with a scale of 8 bits for 64 of them and one of 32 bits for 256 of those."""
NEEDS_NUMBERS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError)


@dataclass(frozen=True)
class Pass:
    """Memory of one pass over a micro-batch in bytes, apart from the weights and from logits that are computed apart."""

    peak: Peak
    """The most that is alive at a time."""
    at_head: Line
    """What is alive when the last hidden states are there and the output layer's turn comes."""


@dataclass(frozen=True)
class Body:
    """A model that is only asked, as a reward model is."""

    parameters: int
    score: Pass
    """Of prompts with completions."""
    row_flops: int
    """Operations of the forward pass of one such row, without an output layer that is computed apart."""


def together(bodies: Sequence[Body]) -> Body:
    """What several models, asked one after another, are as one; none are a model of no size."""
    lines = tuple(line for body in bodies for line in body.score.peak.lines) or (Line(0, 0.0, 0.0),)
    return Body(
        parameters=sum(body.parameters for body in bodies),
        score=Pass(Peak(lines), lines[0]),
        row_flops=sum(body.row_flops for body in bodies),
    )


@dataclass(frozen=True)
class Shape(Body):
    """A model that generates and is trained."""

    trained: int
    """Parameters that learn: all, or those of the adapter."""
    stored: int
    """Bytes of the parameters, as the model computes with them."""
    layers: int
    vocabulary: int
    head: int
    """Weights of the output layer."""
    tied: bool
    """Whether they are those of the embeddings."""
    logits_apart: bool
    """Whether logits are computed for response tokens alone, and in chunks: not where a model scales or caps them."""
    packed: int
    """Weights of which generation on a CPU makes packed copies."""
    cache_per_token: int
    """Bytes of keys and values."""
    token_flops: int
    """Operations for one more token of a completion, output layer included, looking back at others not."""
    token_calls: int
    """Calls of the library for it."""
    prompt_flops: int
    """Operations of the forward pass of one prompt."""
    prefill: Pass
    """Of prompts alone."""
    first: Pass
    """Forward and backward where no gradient was there before."""
    later: Pass
    """The same where all gradients are."""

    @property
    def adapted(self) -> bool:
        """Whether an adapter is what learns."""
        return self.trained < self.parameters


@dataclass(frozen=True)
class Size:
    """Tokens of a row."""

    prompt: int
    new: int

    @property
    def length(self) -> int:
        """Prompt and completion."""
        return self.prompt + self.new


def trained_shape(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    size: Size,
    settings: ComputeConfig | None = None,
    *,
    early: bool = True,
    offload: bool = False,
    shards: int = 1,
    values: bool = False,
) -> Shape:
    """What there is to know of a policy, or of a critic with one value for an output.

    Args:
        config: the model's.
        dtype: what it computes in.
        size: of the rows.
        settings: whether an adapter is trained, and activations are computed again.
        early: gradients move to float32 one by one, as they do in a training of one process.
        offload: they move to another device's memory.
        shards: a device keeps one of so many parts of each.
        values: the output layer has one output instead of the vocabulary.

    Raises:
        ModelError: it is no causal language model, or its code can't be run on shapes.
    """
    with _told(config), attention_on_shapes():
        model = meta_model(config, dtype)
        if values:
            width = model.get_output_embeddings().weight.shape[1]
            model.set_output_embeddings(nn.Linear(width, 1, bias=False, device="meta", dtype=dtype))
        head = model.get_output_embeddings()
        apart = not values and _gives_logits(model, head)
        tied = head.weight is model.get_input_embeddings().weight
        settings = settings or ComputeConfig()
        stored = dtype.itemsize * sum(p.numel() for p in model.parameters())
        if settings.use_peft:
            own = stored if not settings.load_in_4bit else _in_4bit(model, head)
            model = with_adapter(model, settings, seed=0, head=head if values else None)
            cast_parameters(model, dtype)
            stored = own + dtype.itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
            head = model.get_output_embeddings()
        skip = partial(bypass_head, head) if apart else nullcontext
        moves = Moves(early, offload, shards)
        passes = [_two_passes(model, head if apart else None, skip, rows, size, settings, moves) for rows in ROWS]
        first, later = (
            Pass(peak_of([moments for moments, _ in both]), line_of([at_head for _, at_head in both]))
            for both in zip(*passes, strict=True)
        )
        weights = head.weight.numel()
        with skip():
            calls, flops = _cost(lambda: _answers(model, 1, Size(1, 0)))
            return Shape(
                parameters=sum(p.numel() for p in model.parameters()),
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
                stored=stored,
                score=_asking(lambda rows: _answers(model, rows, size)),
                row_flops=_cost(lambda: _answers(model, 1, size))[1],
                layers=config.get_text_config().num_hidden_layers,
                vocabulary=head.weight.shape[0],
                head=weights,
                tied=tied,
                logits_apart=apart,
                packed=0 if settings.load_in_4bit else packed_weights(model),
                cache_per_token=cache_bytes_per_token(config, dtype),
                token_flops=flops + (2 * weights if apart else 0),
                token_calls=calls,
                prompt_flops=_cost(lambda: _answers(model, 1, Size(size.prompt, 0)))[1],
                prefill=_asking(lambda rows: _answers(model, rows, Size(size.prompt, 0))),
                first=first,
                later=later,
            )


def _in_4bit(model: PreTrainedModel, head: nn.Module) -> int:
    """Bytes of a model whose layers' weights, but not those of embeddings and output, are rounded as QLoRA does."""
    layers = {part.weight for part in model.modules() if is_linear(part) and part is not head}
    whole = sum(p.nbytes for p in model.parameters() if p not in layers)
    return whole + round(NF4_BYTES * sum(weight.numel() for weight in layers))


def asked_shape(config: PreTrainedConfig, dtype: torch.dtype, size: Size) -> Body:
    """What there is to know of a reward model; arguments and errors are those of :func:`trained_shape`."""
    with _told(config), attention_on_shapes():
        model = meta_model(config, dtype, "AutoModel")
        score_weights = config.get_text_config().hidden_size
        return Body(
            parameters=sum(p.numel() for p in model.parameters()) + score_weights,
            score=_asking(lambda rows: model(**_inputs(rows, size)).last_hidden_state),
            row_flops=_cost(lambda: model(**_inputs(1, size)).last_hidden_state)[1],
        )


@contextmanager
def _told(config: PreTrainedConfig) -> Iterator[None]:
    try:
        yield
    except NEEDS_NUMBERS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"What a model of the type {config.model_type} takes can't be told without loading it: its code doesn't run on "
            f"shapes alone ({reason})."
        ) from error


# --- the passes -----------------------------------------------------------------------------------------------------


class Moves(NamedTuple):
    """How gradients go to the float32 masters: each at once or all after a pass, whether to another memory, in how many parts."""

    early: bool
    away: bool
    shards: int = 1


def _inputs(rows: int, size: Size) -> dict[str, Any]:
    """Rows that are padded, as rows of different length are."""
    ids = torch.zeros(rows, size.length, dtype=torch.long, device="meta")
    mask = torch.zeros(rows, 1, size.length, size.length, dtype=torch.bool, device="meta")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": ids, "use_cache": False}


def _answers(model: Any, rows: int, size: Size) -> Tensor:
    """What ``model`` puts out before each new token, or where there are none after the last. -> (rows, new, X)"""
    output_BTX: Tensor = model(**_inputs(rows, size), logits_to_keep=size.new + 1).logits
    return output_BTX[:, :-1] if size.new else output_BTX


def _gives_logits(model: Any, head: nn.Module) -> bool:
    """Whether the model's logits are what its output layer puts out: some models scale or cap them afterwards."""
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits_BTV = model(**_inputs(1, Size(4, 0))).logits
    hook.remove()
    return len(seen) == 1 and seen[0].untyped_storage()._cdata == logits_BTV.untyped_storage()._cdata


def _two_passes(
    model: PreTrainedModel,
    head: nn.Module | None,
    skip: Callable[[], AbstractContextManager[None]],
    rows: int,
    size: Size,
    settings: ComputeConfig,
    moves: Moves,
) -> list[tuple[list[Moment], Moment]]:
    """Forward and backward, twice: what was alive after every operation, and when the output layer's turn came.

    Where the logits are computed apart, ``head`` is the output layer and ``skip`` leaves it out of the model.
    """
    passes = []
    live = Live(moves.shards)
    for part in (parts := training_submodules(model, checkpointing=settings.gradient_checkpointing)):
        part.training = True
    with _gradients(model, live, moves) as collect, live:
        for _ in range(2):
            begin = len(live.moments)
            with skip():
                output_BTX = _answers(model, rows, size)
            output_NX = output_BTX.reshape(-1, output_BTX.shape[-1])
            live.note()
            at_head = live.moments[-1]
            # One token is enough to have the output layer's gradient; what logits take is added by the planner.
            result = _Kept.apply(output_NX) if head is None else head(output_NX[:1])  # type: ignore[no-untyped-call]
            del output_BTX, output_NX
            result.sum().backward()
            del result
            collect()
            passes.append((live.moments[begin:], at_head))
    for part in parts:
        part.training = False
    return passes


class _Kept(torch.autograd.Function):
    """Keeps its input for the backward pass, as log-probabilities keep their logits."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return given.new_empty(len(given))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def _gradients(model: PreTrainedModel, live: Live, moves: Moves) -> Iterator[Callable[[], None]]:
    """Gradients go where ``MasterAdamW`` has them go; gives what is due after each pass, and drops them at the end."""
    apart = model.dtype != torch.float32 or moves.away
    learning = [p for p in model.parameters() if p.requires_grad]
    masters = {p: torch.empty_like(p, dtype=torch.float32) if apart else p for p in learning}
    sizes = dict.fromkeys(masters, 0)

    def arrived(parameter: Tensor, *, move: bool) -> None:
        if move and moves.away:
            parameter.grad = None
        elif move:
            move_gradient(parameter, masters[parameter])
        size = sum(t.grad.nbytes for t in {parameter, masters[parameter]} if t.grad is not None)
        live.gradients += size - sizes[parameter]
        sizes[parameter] = size
        live.note()

    def collect() -> None:
        for parameter in masters:
            arrived(parameter, move=apart)

    hooks = [p.register_post_accumulate_grad_hook(partial(arrived, move=apart and moves.early)) for p in masters]
    try:
        yield collect
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()


@torch.no_grad()
def _asking(ask: Callable[[int], Tensor]) -> Pass:
    """A forward pass without gradients; ``ask`` makes it with so many rows."""
    runs, at_head = [], []
    for rows in ROWS:
        with Live() as live:
            output = ask(rows)
            runs.append(live.moments)
            at_head.append(live.moments[-1])
            del output
    return Pass(peak_of(runs), line_of(at_head))


@torch.no_grad()
def _cost(ask: Callable[[], Tensor]) -> tuple[int, int]:
    """Calls of the library and floating-point operations of a forward pass."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, Live() as live:
        ask()
    return live.operations, counter.get_total_flops()
