"""Weight transfer to a vLLM engine that the trainer started itself. The receiver is ``vllm.LLM``.

Written against vLLM 0.32 (IPC: ``vllm/distributed/weight_transfer/ipc_engine.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.models.lora import base_model, has_adapter
from reinforcepp.rollout.vllm.compat import load_model_class
from reinforcepp.rollout.weight_transfer import WeightTransfer, in_chunks, weights_without_tied_head

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

IPC_CHUNK_BYTES = 1 << 30
"""Weights that are copied to another GPU at a time."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM can be configured for."""
KEPT_TENSORS = ("_parameters", "_buffers", "_modules", "kv_cache", "_k_scale_cpu", "_v_scale_cpu")
"""Attributes of vLLM's layers whose tensors are reloaded, saved, allocated again or on the CPU."""
MEMORY_FOLDER = Path("/dev/shm")  # nosec B108  # only for a folder that mkdtemp makes in it


class ReloadTransfer(WeightTransfer[Any]):
    """Weights for a vLLM in this process, read from the trainer's tensors one at a time."""

    def push(self, receiver: Any) -> None:
        """Reload all weights of vLLM's model, which on a CPU also repacks them."""
        weights = weights_without_tied_head(self.model)
        receiver.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


def unsaved_tensors(model: torch.nn.Module) -> list[str]:
    """Return the names of tensors in vLLM's ``model`` that a reload after sleep level 2 leaves undefined, such as ALiBi's slopes.

    A reload fills parameters, and vLLM saves buffers. Other tensors are attributes of layers or of their attention.
    """
    owners = {f"{name}.": layer for name, layer in model.named_modules()}
    owners |= {f"{name}impl.": layer.impl for name, layer in owners.items() if hasattr(layer, "impl")}
    return [
        f"{name}{key}"
        for name, owner in owners.items()
        for key, value in getattr(owner, "__dict__", {}).items()
        if key not in KEPT_TENSORS and _holds_tensor(value)
    ]


def _holds_tensor(value: Any) -> bool:
    """Return whether ``value`` is a tensor or a collection with one; parameters belong to the layer that has them."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


class IpcTransfer(WeightTransfer[Any]):
    """Weights for a vLLM whose workers are separate processes, through CUDA IPC.

    A worker maps the GPU memory that the trainer names. On the trainer's own GPU nothing is copied; for each other GPU the
    trainer first makes a copy there.

    Args:
        devices: The workers' GPUs.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices

    def push(self, receiver: Any) -> None:
        """Send handles of all weights to the workers, one chunk at a time."""
        from torch.multiprocessing.reductions import reduce_tensor

        uuids = {device: str(torch.cuda.get_device_properties(device).uuid) for device in self._devices}
        receiver.collective_rpc("start_weight_update")
        for chunk in in_chunks(weights_without_tied_head(self.model), IPC_CHUNK_BYTES):
            copies = [
                {uuid: weight.detach().to(device).contiguous() for device, uuid in uuids.items()} for _, weight in chunk
            ]
            handles = [
                {uuid: reduce_tensor(copy)[1] for uuid, copy in per_gpu.items()}  # type: ignore[no-untyped-call]
                for per_gpu in copies
            ]
            torch.cuda.synchronize()
            receiver.collective_rpc("update_weights", args=(ipc_message(chunk, handles),))
            del copies  # only now, because the workers read from this memory
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        receiver.collective_rpc("finish_weight_update")


def ipc_message(chunk: Sequence[tuple[str, Tensor]], handles: list[dict[str, Any]]) -> dict[str, Any]:
    """Return vLLM's update message: name, dtype and shape of each weight, and its memory handle per GPU UUID."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in chunk],
        "shapes": [list(weight.shape) for _, weight in chunk],
        "ipc_handles": handles,
    }


class AdapterTransfer(WeightTransfer[Any]):
    """A LoRA adapter for a vLLM that applies adapters to base weights; the base is sent only if vLLM doesn't have it.

    vLLM reads adapters from folders; this one is in memory if the system has such a place. Each update gets a new adapter
    ID, so a request can't refer to an older one.

    Args:
        model: The policy with its adapter; :func:`supports_adapter` must hold.
        full: Transfer of full weights, for the base model and for models with other base weights.
    """

    def __init__(self, model: PreTrainedModel, full: WeightTransfer[Any]) -> None:
        parent = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="reinforcepp-adapter-", dir=parent)
        self._full = full
        self._base = base_model(model)
        self._base_loaded = False
        self._id = 0
        rank = next(rank for rank in LORA_RANKS if rank >= _lora_config(model).r)
        self.settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        """Arguments with which vLLM must be started."""
        self.request: Any = None
        """vLLM's ``LoRARequest`` for each prompt; None if the engine generates without an adapter."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Save the adapter of ``model``, if it belongs to the base model."""
        self.model = model
        self._fits_base = has_adapter(model) and base_model(model) is self._base
        if self._fits_base:
            model.save_pretrained(self._folder.name, save_embedding_layers=False)

    def push(self, receiver: Any) -> None:
        """Replace the adapter in vLLM, or load full weights if the model isn't the base with its adapter."""
        from vllm.lora.request import LoRARequest

        if not self._fits_base or not self._base_loaded:
            self._full.prepare(self.model)
            with self.model.disable_adapter() if self._fits_base else nullcontext():
                self._full.push(receiver)
        if self.request is not None:
            receiver.llm_engine.remove_lora(self.request.lora_int_id)
        self.request, self._base_loaded = None, self._fits_base
        if self._fits_base:
            self._id += 1
            self.request = LoRARequest(f"policy-{self._id}", self._id, self._folder.name)
            receiver.llm_engine.add_lora(self.request)

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


def supports_adapter(model: PreTrainedModel | str) -> bool:
    """Return whether ``model`` has an adapter that vLLM can apply to the base weights; otherwise it must be merged."""
    if isinstance(model, str) or not has_adapter(model) or len(model.peft_config) != 1:
        return False
    from vllm.model_executor.models.interfaces import supports_lora

    family = load_model_class(type(base_model(model)).__name__)
    lora = _lora_config(model)
    plain = not (
        lora.use_dora or lora.modules_to_save or lora.bias != "none" or lora.rank_pattern or lora.alpha_pattern
    )
    return supports_lora(family) and plain and lora.r <= LORA_RANKS[-1]


def _lora_config(model: PreTrainedModel) -> LoraConfig:
    (config,) = model.peft_config.values()
    return config
