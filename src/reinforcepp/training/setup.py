"""What is made ready, and told, before a training starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.config import ComputeConfig, ReinforceConfig
from reinforcepp.data import DiskRows
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.loading import load_policy
from reinforcepp.models.lora import has_adapter
from reinforcepp.models.precision import compute_dtype
from reinforcepp.models.tokenization import LazyPrompts, encode_prompts
from reinforcepp.monitoring import echo
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], part: str, config: ReinforceConfig
) -> Sequence[Prompt]:
    """The prompts of ``rows`` as the policy sees them; those that are too long are cut or left out, and counted.

    Rows on the disk are tokenised when their turn comes, so those that are cut then can't be counted now.

    Raises:
        DataError: if none is left.
    """
    limit, action = config.max_prompt_length, config.long_prompts
    did = "cut from the left" if action == "cut" else "left out"
    prompts: Sequence[Prompt]
    if isinstance(rows, DiskRows) and action == "cut":
        if part == "training":
            echo(f"Prompts are tokenised when their turn comes; what is longer than {limit} tokens is {did}.")
        return LazyPrompts(tokenizer, rows, limit, rows.digest)
    if isinstance(rows, DiskRows):
        long = [
            i
            for i, row in enumerate(rows)
            if not encode_prompts(tokenizer, [row], max_prompt_length=limit, long_prompts="drop")[0]
        ]
        fitting = rows.without(long)
        prompts = LazyPrompts(tokenizer, fitting, limit, fitting.digest)
    else:
        prompts, long = encode_prompts(tokenizer, rows, max_prompt_length=limit, long_prompts=action)
    if long:
        echo(f"{len(long)} of {len(rows)} {part} prompts are longer than {limit} tokens and were {did}.", "yellow")
    if rows and not prompts:
        raise DataError(f"Every {part} prompt is longer than max_prompt_length {limit}: raise it.")
    return prompts


def start_policy(model: str | PreTrainedModel, config: ReinforceConfig) -> PreTrainedModel:
    """The model that training starts from, loaded where it is given by name.

    Raises:
        ConfigError: it can't have an adapter, or not a second one.
    """
    if isinstance(model, str):
        # Weights that are trained are rounded later, when the optimiser has all their digits.
        dtype = compute_dtype(config) if config.use_peft else torch.float32
        return load_policy(model, dtype, **loading(config))
    if config.use_peft and has_adapter(model):
        raise ConfigError("use_peft adds an adapter, but the given model has one: leave use_peft out to train that.")
    if config.use_peft and not model.config.name_or_path:
        raise ConfigError(
            "use_peft saves the adapter alone, so the model has to be found again, but the given one was made in memory: "
            "save it and give its folder."
        )
    if config.estimator_spec.uses_critic and has_adapter(model):
        raise ConfigError("The estimator ppo can't copy a model with an adapter: give the model, and use_peft.")
    return model


def loading(config: ComputeConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is to be told of attention and of weights in 4 bits.

    Raises:
        ConfigError: what is asked for isn't installed.
    """
    return _attention(config) | _in_4bit(config)


def _attention(config: ComputeConfig) -> dict[str, Any]:
    wanted = config.attn_implementation
    if wanted == "auto":
        return {}
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(wanted)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"attn_implementation {wanted} needs the package {package}, which isn't installed: install it where there is a "
            "GPU that it supports, or use sdpa."
        )
    return {"attn_implementation": wanted}


def _in_4bit(config: ComputeConfig) -> dict[str, Any]:
    if not config.load_in_4bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs bitsandbytes, which isn't installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config),
        llm_int8_skip_modules=["lm_head", "score"],
    )
    place = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": place}}


def warn_of_bias(config: ReinforceConfig) -> None:
    """Tell where sampling and training see different distributions."""
    if config.top_p < 1 or config.top_k > 0:
        echo(
            f"top_p {config.top_p:g} and top_k {config.top_k} cut the sampled distribution but not the trained one, so "
            "the policy ratio is biased; train with top_p 1 and top_k 0 unless this is what you want to study.",
            "yellow",
        )
