"""Only the adapter travels to vLLM, where vLLM can add it to a model's weights itself."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.models.lora import base_model, has_adapter
from reinforcepp.rollout.vllm.compat import model_class

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MEMORY_FOLDER = Path("/dev/shm")


def takes_adapter(model: PreTrainedModel | str) -> bool:
    """Whether ``model`` has an adapter that vLLM runs beside the weights of such a model; else it has to be merged."""
    if isinstance(model, str) or not has_adapter(model) or len(model.peft_config) != 1:
        return False
    from vllm.model_executor.models.interfaces import supports_lora

    family = model_class(type(base_model(model)).__name__)
    lora = _settings(model)
    plain = not (
        lora.use_dora or lora.modules_to_save or lora.bias != "none" or lora.rank_pattern or lora.alpha_pattern
    )
    return family is not None and supports_lora(family) and plain and lora.r <= RANKS[-1]


def _settings(model: PreTrainedModel) -> LoraConfig:
    (settings,) = model.peft_config.values()
    return settings


class AdapterCopy:
    """vLLM's copy of an adapter, each time under another number, so that none that is older can be meant.

    vLLM reads adapters from folders; this one is in memory where there is such a place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        place = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="reinforcepp-adapter-", dir=place)
        self._number = 0
        self.base = base_model(model)
        rank = next(rank for rank in RANKS if rank >= _settings(model).r)
        self.settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        """Of vLLM's start."""
        self.request: Any = None
        """To be given with each prompt."""
        self.beside_its_model = False
        """Whether vLLM has the weights that the adapter belongs to."""

    def belongs_to(self, model: PreTrainedModel) -> bool:
        """Whether the weights that vLLM has are those beside which ``model`` has its adapter."""
        return has_adapter(model) and base_model(model) is self.base

    def update(self, llm: Any, model: PreTrainedModel) -> None:
        """Hand over the adapter of ``model`` and drop the one before."""
        from vllm.lora.request import LoRARequest

        model.save_pretrained(self._folder.name, save_embedding_layers=False)
        self.forget(llm)
        self._number += 1
        self.request = LoRARequest(f"policy-{self._number}", self._number, self._folder.name)
        llm.llm_engine.add_lora(self.request)
        self.beside_its_model = True

    def forget(self, llm: Any) -> None:
        """Have vLLM answer without an adapter, with whatever weights it has."""
        if self.request is not None:
            llm.llm_engine.remove_lora(self.request.lora_int_id)
        self.request, self.beside_its_model = None, False

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()
