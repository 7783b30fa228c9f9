"""Settings of LoRA, under the names that TRL and peft give them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from reinforcepp.config._checks import fraction, positive
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class Adapters:
    """Whether all weights are trained, or small matrices beside them."""

    use_peft: bool = False
    """Train LoRA adapters and leave the model's own weights as they are: far less memory, and the reference is free."""
    lora_r: int = 16
    """Rank of the adapters: more can learn more and takes more memory."""
    lora_alpha: float = 32.0
    """Adapters count lora_alpha / lora_r, with use_rslora lora_alpha / sqrt(lora_r)."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is left out at random while learning."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Layers that get adapters, by the end of their names, as in q_proj v_proj; all-linear is every one but the output."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: a larger rank doesn't make adapters count less."""
    use_dora: bool = False
    """DoRA: direction and length of a weight's columns are learnt apart; slower, and often as good as a larger rank."""
    load_in_4bit: bool = False
    """QLoRA: the model's own weights in 4 bits (nf4, by bitsandbytes); needs use_peft."""


def check_adapters(config: Any) -> None:
    """Check these settings of a configuration."""
    positive(config, "lora_r", "lora_alpha")
    fraction(config, "lora_dropout")
    targets = tuple(config.lora_target_modules)  # a list, where the settings come from a file
    if not targets or not all(name.strip() for name in targets):
        raise ConfigError("lora_target_modules is empty: name layers, as in q_proj v_proj, or leave it at all-linear.")
    if "all-linear" in targets and len(targets) > 1:
        raise ConfigError(
            "lora_target_modules names all-linear and others, but all-linear is all there are: give one of them."
        )
    if not config.use_peft:
        default = Adapters()
        own = {field.name: getattr(config, field.name) for field in fields(Adapters)} | {"lora_target_modules": targets}
        chosen = [name for name, value in own.items() if value != getattr(default, name)]
        if chosen:
            raise ConfigError(f"{chosen[0]} is a setting of LoRA, which is off: add --use_peft, or leave it out.")
    if config.load_in_4bit and getattr(config, "rollout", None) == "vllm":
        raise ConfigError("vLLM can't share weights of 4 bits with a training: use --rollout transformers, or auto.")
    if config.load_in_4bit and config.use_dora:
        raise ConfigError("use_dora needs the weights that load_in_4bit rounds away: give one of the two.")
