"""Starting the engine that was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinforcepp.config.reinforce import server_addresses
from reinforcepp.rollout.in_process import start_in_process_engine
from reinforcepp.rollout.selection import EngineChoice

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.rollout.engine import RolloutEngine


def start_engine(
    choice: EngineChoice,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int = 64,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    alone: bool = False,
    weight_transfer: str = "",
    workers: int = 0,
    reserved: int = 0,
    folder: Path | None = None,
) -> RolloutEngine:
    """The chosen engine with ``model``'s weights, for sequences of up to ``max_length`` tokens.

    ``folder`` is where servers find the weights; ``alone`` has its GPU who shares it with no trainer.
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
    return start_in_process_engine(
        choice.name,
        model,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        alone=alone,
        weight_transfer=weight_transfer,
    )
