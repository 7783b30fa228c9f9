"""Start the selected engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from reinforcepp.config.reinforce import server_addresses
from reinforcepp.rollout.engine import call
from reinforcepp.rollout.selection import EngineChoice, start_chosen_engine

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.config import ReinforceConfig
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.rollout.engine import RolloutEngine


def start_training_engine(
    choice: EngineChoice,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ReinforceConfig,
    ranks: Ranks,
    reserved: int,
    folder: Path,
    max_length: int,
    reserved_bytes: int = 0,
) -> RolloutEngine:
    """Return the engine of a training; all ranks call this. One remote engine serves all ranks.

    Args:
        choice: The selected engine.
        model: The policy, with the same weights on all ranks.
        tokenizer: Its tokenizer.
        config: The training's settings.
        ranks: The data-parallel ranks.
        reserved: GPUs or CPUs of a Ray cluster that the engine doesn't use.
        folder: Folder through which vLLM servers get the weights.
        max_length: Most tokens of a prompt and its completion.
        reserved_bytes: GPU memory that the trainer will allocate later and keep while the engine generates.
    """
    start = partial(
        start_engine,
        choice,
        model,
        tokenizer,
        max_length=max_length,
        batch_size=config.effective_rollout_batch_size,
        vllm_batch_size=config.vllm_batch_size(ranks.count, on_gpu=ranks.device.type == "cuda"),
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        workers=config.rollout_workers,
        reserved=reserved,
        folder=folder,
        exclusive_gpu=False,
        reserved_bytes=reserved_bytes,
        on_all_ranks=ranks.run_or_raise_all,
    )
    if choice.is_remote and ranks.count > 1:
        # This loads Accelerate, which the commands that only call start_engine don't need.
        from reinforcepp.distributed.rank_zero import RankZero
        from reinforcepp.rollout.shared_engine import SharedEngine

        return SharedEngine(RankZero(ranks, config.watchdog_seconds), start, model, tokenizer)
    return start()


def start_engine(
    choice: EngineChoice,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int = 64,
    vllm_batch_size: int | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    workers: int = 0,
    reserved: int = 0,
    folder: Path | None = None,
    exclusive_gpu: bool = True,
    reserved_bytes: int = 0,
    on_all_ranks: Callable[[Callable[[], Any]], Any] = call,
) -> RolloutEngine:
    """Return the selected engine with ``model``'s weights, for sequences of up to ``max_length`` tokens.

    vLLM servers get the weights through ``folder``. With ``exclusive_gpu``, vLLM keeps its GPU memory between two calls.
    It doesn't use ``reserved_bytes`` of the GPU's memory, and generates ``vllm_batch_size`` completions at a time if it is in
    this process, by default ``batch_size``.
    Several ranks start an engine in their processes by ``on_all_ranks``; see
    :func:`~reinforcepp.rollout.selection.start_chosen_engine`.
    """
    if choice.name == "ray":
        from reinforcepp.rollout.ray.engine import RayEngine

        return RayEngine(
            choice.address,
            model,
            tokenizer,
            workers=workers,
            tensor_parallel_size=tensor_parallel_size,
            max_length=max_length,
            batch_size=batch_size,
            reserved=reserved,
        )
    if choice.name == "servers":
        from reinforcepp.rollout.vllm.server_engine import VllmServerEngine

        assert folder is not None, "servers get weights through a folder"
        addresses = server_addresses(choice.address)
        return VllmServerEngine(
            addresses, model, tokenizer, max_length=max_length, batch_size=batch_size, folder=folder
        )
    return start_chosen_engine(
        choice,
        model,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        vllm_batch_size=vllm_batch_size,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        exclusive_gpu=exclusive_gpu,
        reserved_bytes=reserved_bytes,
        on_all_ranks=on_all_ranks,
    )
