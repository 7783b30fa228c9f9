"""Settings of the sampling of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reinforcepp.config.base import (
    Config,
    FilledStr,
    JsonText,
    MinP,
    NonNegativeInt,
    PositiveFloat,
    Probability,
    json_object,
)
from reinforcepp.errors import ConfigError, nearest, shown

EXAMPLE = '{"typical_p": 0.9}'
TRANSFORMERS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "suppress_tokens")
VLLM = ("presence_penalty", "frequency_penalty", "min_tokens", "allowed_token_ids", "bad_words", "logit_bias")
SAME_NAME = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of generation_kwargs that are settings; they replace the setting, as in TRL."""
OTHER_NAMES = {
    "temperature": "temperature, which training applies, too",
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "num_generations",
    "n": "num_generations",
    "seed": "seed",
}
"""Keys of generation_kwargs that must be given as a setting."""
NO_EFFECT = {"do_sample": True, "num_beams": 1, "use_cache": None, "length_penalty": None, "early_stopping": None}
"""Keys without an effect on sampling, and the only value if another one would have an effect."""


@dataclass(frozen=True)
class RolloutSamplingConfig(Config):
    """How completions are sampled in training."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature of rollouts, also applied to log-probs in training"""
    top_p: Probability = 1.0
    """Top-p sampling of rollouts; values other than 1 bias the policy ratio"""
    top_k: NonNegativeInt = 0
    """Top-k sampling of rollouts; 0 disables, other values bias the policy ratio"""
    min_p: MinP | None = None
    """Sample tokens above this fraction of the top probability; biases the ratio"""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes repeated tokens unlikelier in rollouts; biases the ratio"""
    generation_kwargs: JsonText | None = None
    """Further arguments of generation in the engine, JSON; they bias the ratio"""
    cache_implementation: FilledStr | None = None
    """No effect, accepted for TRL: the engine chooses its KV cache"""

    def __post_init__(self) -> None:
        """Move the generation arguments that are settings to these settings."""
        given: Any = self.generation_kwargs
        if isinstance(given, (str, dict)):  # the check refuses any other type
            values = given if isinstance(given, dict) else json_object("generation_kwargs", given, EXAMPLE)
            for name in SAME_NAME:
                if values.get(name) is not None:
                    object.__setattr__(self, name, values[name])
            rest = {name: value for name, value in values.items() if name not in SAME_NAME}
            object.__setattr__(self, "generation_kwargs", rest or None)
        super().__post_init__()

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Arguments that only some engines have."""
        given = json_object("generation_kwargs", self.generation_kwargs, EXAMPLE)
        return {name: value for name, value in given.items() if name not in NO_EFFECT}

    @property
    def sampling_filters(self) -> dict[str, Any]:
        """Settings by which the sampled distribution differs from the model's."""
        off = {"top_p": (1,), "top_k": (0,), "min_p": (None, 0), "repetition_penalty": (1,)}
        given = {name: getattr(self, name) for name, values in off.items() if getattr(self, name) not in values}
        return given | self.engine_arguments

    def check_engine(self, engine: str) -> None:
        """Check that ``engine`` has the engine arguments: transformers, vllm, servers (of vLLM), or ray (either).

        Raises:
            ConfigError: it doesn't have one of them.
        """
        for name in self.engine_arguments:
            owner = "transformers" if name in TRANSFORMERS else "vllm"
            if owner != {"servers": "vllm"}.get(engine, engine):
                raise ConfigError(
                    f"generation_kwargs: {name} is an argument of {owner}, but the rollouts come from {engine}. Remove it, or "
                    f"set rollout to {owner}."
                )

    def _check_rules(self) -> None:
        known = (*SAME_NAME, *TRANSFORMERS, *VLLM, *NO_EFFECT)
        for name, value in json_object("generation_kwargs", self.generation_kwargs, EXAMPLE).items():
            if name in OTHER_NAMES:
                raise ConfigError(f"generation_kwargs: {name} isn't accepted here. Set {OTHER_NAMES[name]}.")
            if name not in known:
                raise ConfigError(
                    f"generation_kwargs: {name!r} isn't supported, only {', '.join(known)}.{nearest(name, known)}"
                )
            if NO_EFFECT.get(name) is not None and value != NO_EFFECT[name]:
                raise ConfigError(
                    f"generation_kwargs: {name} {shown(value)} isn't supported, because rollouts are sampled. Remove it."
                )
