"""Starting an engine inside the process: vLLM's or the trainer's own, by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reinforcepp.models.loading import context_length
from reinforcepp.rollout.weight_sync_check import NEW_TOKENS, PROBE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.rollout.engine import RolloutEngine


def start_in_process_engine(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int = 64,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    alone: bool = False,
    weight_transfer: str = "",
) -> RolloutEngine:
    """Return an engine with the weights of ``model``, for sequences of up to ``max_length`` tokens.

    ``name`` is ``vllm`` or ``transformers``. ``alone`` means that no trainer shares the engine's GPU.
    """
    if name == "vllm":
        from reinforcepp.rollout.vllm_integration import VllmEngine

        longest = max(max_length, PROBE_TOKENS + NEW_TOKENS)  # the prompts of the weight-sync check must fit as well
        limit = min(longest, context_length(model.config) or longest)
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
