"""Select the engine that generates, and start one in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from reinforcepp.config.reinforce import RAY, server_addresses
from reinforcepp.errors import RolloutError, option, setting
from reinforcepp.models.loading import context_length
from reinforcepp.models.remote_code import uses_remote_code
from reinforcepp.rollout.engine import call
from reinforcepp.rollout.weight_sync_check import NEW_TOKENS, PROBE_TOKENS
from reinforcepp.runtime.terminal import warn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.rollout.engine import RolloutEngine

EngineName = Literal["transformers", "vllm", "ray", "servers"]


@dataclass(frozen=True)
class EngineChoice:
    """The selected engine, and the reason to show the user."""

    name: EngineName
    reason: str
    address: str = ""
    """Address of the Ray cluster, or the vLLM servers' addresses as the user wrote them."""
    can_fall_back: bool = False
    """Whether transformers replaces the engine if it can't start or its samples are wrong, because the user chose none."""

    @property
    def is_remote(self) -> bool:
        """Whether the engine runs in other processes, so that one engine serves all data-parallel ranks."""
        return self.name in ("ray", "servers")


def choose_engine(rollout: str, config: PreTrainedConfig, dtype: torch.dtype) -> EngineChoice:
    """Return the engine for the setting ``rollout``: ``auto`` is vLLM if it can run the model, otherwise transformers.

    Args:
        rollout: ``auto``, ``transformers``, ``vllm``, or ``ray://`` or ``vllm://`` with an address.
        config: The model's configuration.
        dtype: Data type of the engine's weights.

    Raises:
        RolloutError: ``rollout`` is ``vllm``, and vLLM can't run the model. Nothing is loaded before.
    """
    if uses_remote_code(config):
        if rollout not in ("auto", "transformers"):
            raise RolloutError(
                f"trust_remote_code: {setting('rollout')} {rollout} can't run the model's own code. Use transformers or auto."
            )
        return EngineChoice("transformers", "the model has its own code")
    if rollout.startswith(RAY):
        return EngineChoice("ray", "as requested", rollout.removeprefix(RAY))
    if server_addresses(rollout):
        return EngineChoice("servers", "as requested", rollout)
    if rollout == "transformers":
        return EngineChoice("transformers", "as requested")
    from reinforcepp.rollout.vllm.compat import vllm_status

    usable, reason = vllm_status(config, dtype)
    if usable:
        is_auto = rollout == "auto"
        return EngineChoice("vllm", reason if is_auto else "as requested", can_fall_back=is_auto)
    if rollout == "vllm":
        raise RolloutError(
            f"{setting('rollout')} vllm: {reason}. Use {option('rollout', 'auto')}, which falls back to transformers."
        )
    return EngineChoice("transformers", reason)


def agree_on_engine(choice: EngineChoice, ranks: Ranks) -> EngineChoice:
    """Return the choice of all ranks, which call this: transformers if vLLM can't run the model on one of their nodes."""
    for rank, other in enumerate(ranks.gather(choice)):
        if other.name == "transformers" != choice.name:
            return replace(other, reason=f"vLLM can't be used on rank {rank} of {ranks.count} ({other.reason})")
    return choice


def start_chosen_engine(
    choice: EngineChoice,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_all_ranks: Callable[[Callable[[], Any]], Any] = call,
    **settings: Any,
) -> RolloutEngine:
    """Return the chosen engine of this process; transformers replaces vLLM if it can't start and the user chose neither.

    Args:
        choice: The selected engine.
        model: The model whose weights it gets.
        tokenizer: Its tokenizer.
        on_all_ranks: Runs a function on every rank and, if it fails on one, raises that error on all. Then they replace vLLM
            together.
        settings: Arguments of :func:`start_in_process_engine`.
    """
    started: list[RolloutEngine] = []

    def start() -> None:
        started.append(start_in_process_engine(choice.name, model, tokenizer, on_all_ranks=on_all_ranks, **settings))

    try:
        on_all_ranks(start)
        return started[0]
    except RolloutError as error:
        for engine in started:  # it failed on another rank
            engine.close()
        if not choice.can_fall_back:
            raise
        reason = (
            str(error)
            .removeprefix(f"{setting('rollout')} vllm: ")
            .removesuffix(f" Use {option('rollout', 'transformers')}.")
        )
        warn(f"Completions come from transformers: {reason}", stacklevel=2)
        return start_in_process_engine("transformers", model, tokenizer, **settings)


def start_in_process_engine(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int = 64,
    vllm_batch_size: int | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    exclusive_gpu: bool = False,
    weight_transfer: str = "",
    reserved_bytes: int = 0,
    on_all_ranks: Callable[[Callable[[], Any]], Any] = call,
) -> RolloutEngine:
    """Return a ``vllm`` or ``transformers`` engine with ``model``'s weights, for sequences of up to ``max_length`` tokens."""
    if name == "vllm":
        from reinforcepp.rollout.vllm_integration import VllmEngine

        longest = max(max_length, PROBE_TOKENS + NEW_TOKENS)  # the prompts of the weight-sync check must fit too
        limit = min(longest, context_length(model.config) or longest)
        return VllmEngine(
            model,
            tokenizer,
            max_length=limit,
            max_num_seqs=vllm_batch_size or batch_size,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size,
            exclusive_gpu=exclusive_gpu,
            weight_transfer=weight_transfer,
            reserved_bytes=reserved_bytes,
            on_all_ranks=on_all_ranks,
        )
    from reinforcepp.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(model, tokenizer, batch_size)
