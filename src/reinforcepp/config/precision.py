"""Settings of how a model computes; none of them changes what is computed by more than rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config.lora import Adapters


@dataclass(frozen=True)
class Computing(Adapters):
    """How a model is trained, be it a policy or a reward model."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """bf16 and fp16 compute in 16 bits; weights that learn, optimiser, log-probabilities and reductions stay float32."""
    gradient_checkpointing: bool = False
    """Keep only what goes in and out of each layer and compute the rest again: less memory, about a third more time."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention of the trained model; auto is what transformers takes, mostly sdpa. Flash needs its package and a GPU."""
    torch_compile: bool = False
    """Compile the model with torch.compile: the first steps take minutes, the others less time on a GPU."""
