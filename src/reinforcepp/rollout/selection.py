"""Which engine generates, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from reinforcepp.config.reinforce import RAY, server_addresses
from reinforcepp.errors import RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    from reinforcepp.rollout.vllm.compat import vllm_status

    usable, reason = vllm_status(config, dtype)
    if usable:
        return EngineChoice("vllm", "asked for" if wanted == "vllm" else reason)
    if wanted == "vllm":
        raise RolloutError(f"vLLM can't be used: {reason}; --rollout auto falls back to transformers.")
    return EngineChoice("transformers", reason)
