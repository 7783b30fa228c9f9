"""Which engine generates, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from reinforcepp.config.reinforce import RAY, server_addresses
from reinforcepp.errors import RolloutError
from reinforcepp.models import context_length
from reinforcepp.rollout.canary import NEW_TOKENS, PROBE_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.rollout.engine import RolloutEngine

EngineName = Literal["transformers", "vllm", "ray", "servers"]


@dataclass(frozen=True)
class EngineChoice:
    """The engine and the reason for it, to be told to the user."""

    name: EngineName
    reason: str
    address: str = ""
    """Of the cluster, for Ray; of the servers, as it was given, for vLLM's."""

    @property
    def elsewhere(self) -> bool:
        """Whether it works in processes of others: one engine then serves all processes that train together."""
        return self.name in ("ray", "servers")


def choose_engine(wanted: str, config: PreTrainedConfig, dtype: torch.dtype) -> EngineChoice:
    """``auto`` is vLLM where it can run the model, else transformers; anything else is what was asked for.

    Args:
        wanted: ``auto``, ``transformers``, ``vllm``, or ``ray://`` or ``vllm://`` with an address.
        config: the model's.
        dtype: what the engine's copy of the weights would have.

    Raises:
        RolloutError: vLLM was asked for by name and can't run the model; nothing has been loaded by then.
    """
    if wanted.startswith(RAY):
        return EngineChoice("ray", "asked for", wanted.removeprefix(RAY))
    if server_addresses(wanted):
        return EngineChoice("servers", "asked for", wanted)
    if wanted == "transformers":
        return EngineChoice("transformers", "asked for")
    from reinforcepp.rollout.vllm_support import vllm_status

    usable, reason = vllm_status(config, dtype)
    if usable:
        return EngineChoice("vllm", "asked for" if wanted == "vllm" else reason)
    if wanted == "vllm":
        raise RolloutError(f"vLLM can't be used: {reason}; --rollout auto falls back to transformers.")
    return EngineChoice("transformers", reason)


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
        from reinforcepp.rollout.ray_pool import RayEngine

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
        from reinforcepp.rollout.vllm_remote import VllmServerEngine

        assert folder is not None, "servers get weights through a folder"
        addresses = server_addresses(choice.address)
        return VllmServerEngine(
            addresses, model, tokenizer, max_length=max_length, batch_size=batch_size, folder=folder
        )
    if choice.name == "vllm":
        from reinforcepp.rollout.vllm_integration import VllmEngine

        wide = max(max_length, PROBE_TOKENS + NEW_TOKENS)  # the canary's prompts must fit as well
        limit = min(wide, context_length(model.config) or wide)
        return VllmEngine(
            model,
            tokenizer,
            max_length=limit,
            max_num_seqs=batch_size,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size,
            alone=alone,
            weight_transfer=weight_transfer,
        )
    from reinforcepp.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(model, tokenizer, batch_size)
