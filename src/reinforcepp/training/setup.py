"""Prepare a training: prompts, the initial policy, and arguments for loading models."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.config import ComputeConfig, ReinforceConfig, RewardModelConfig
from reinforcepp.data import DiskRows, StreamRows
from reinforcepp.errors import ConfigError, DataError, setting
from reinforcepp.models.loading import load_policy, with_fused_gelu
from reinforcepp.models.lora import add_adapter, has_adapter, with_adapter
from reinforcepp.models.precision import compute_dtype
from reinforcepp.models.reward_models import head_modules
from reinforcepp.models.tokenization import BATCH_ROWS, LazyPrompts, encode_prompt, encode_prompts, with_defaults
from reinforcepp.monitoring import PROGRESS_ROWS, reading_progress
from reinforcepp.rollout.sampling import check_extra
from reinforcepp.runtime.terminal import echo
from reinforcepp.types import Prompt

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


SHOWN_ROWS = 5
ADAPTER_FIELDS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Settings of LoRA by their names in ``peft.LoraConfig``."""
FROZEN_ADAPTER = (
    "model: the adapter of the given model is frozen, so nothing would be trained. Load it with "
    "PeftModel.from_pretrained(..., is_trainable=True)."
)
SET_BY_PEFT = ("task_type", "target_modules", "fan_in_fan_out", "runtime_config", "peft_version")


def with_peft_config(
    model: str | PreTrainedModel, config: ReinforceConfig, adapter: PeftConfig | None
) -> tuple[str | PreTrainedModel, ReinforceConfig]:
    """Return ``config`` with the settings of a ``peft.LoraConfig``; or, if it has others, the model with its adapter.

    Raises:
        ConfigError: it isn't a ``LoraConfig``, it doesn't fit the model, or ``config`` has LoRA settings, too.
    """
    if adapter is None:
        return model, config
    from peft import LoraConfig

    if not isinstance(adapter, LoraConfig):
        raise ConfigError(f"peft_config: {type(adapter).__name__} isn't supported. Give a LoraConfig.")
    if config.use_peft:
        raise ConfigError("peft_config and use_peft are both given. Remove one of the two.")
    plain = LoraConfig()
    targets = adapter.target_modules or "all-linear"
    others = [part.name for part in fields(adapter) if part.name not in (*ADAPTER_FIELDS, *SET_BY_PEFT)]
    pattern = isinstance(targets, str) and targets != "all-linear"
    if pattern or any(getattr(adapter, name) != getattr(plain, name) for name in others):
        base = load_policy(model, torch.float32, **loading(config)) if isinstance(model, str) else model
        return add_adapter(base, adapter, seed=config.seed, heads=()), config
    settings = {ours: getattr(adapter, theirs) for theirs, ours in ADAPTER_FIELDS.items()}
    names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    return model, replace(config, use_peft=True, lora_target_modules=names, **settings)


def with_quantization(
    config: ReinforceConfig, model: str | PreTrainedModel, quantization: Any
) -> tuple[ReinforceConfig, BitsAndBytesConfig | None]:
    """Return ``config`` and the argument ``quantization_config`` of the trainer, which counts as the setting load_in_4bit.

    Raises:
        ConfigError: it isn't a ``BitsAndBytesConfig`` of 4 bits, or no adapter is trained.
    """
    from transformers import BitsAndBytesConfig

    if quantization is None:
        return config, None
    if not isinstance(model, str):
        echo("quantization_config: not used, because the model is already loaded.", "yellow")
        return config, None
    if not isinstance(quantization, BitsAndBytesConfig) or not quantization.load_in_4bit:
        raise ConfigError("quantization_config: only BitsAndBytesConfig(load_in_4bit=True) is supported. Give one.")
    if not config.use_peft:
        raise ConfigError("quantization_config: weights of 4 bits can't be trained. Add peft_config or use_peft.")
    return replace(config, load_in_4bit=True), quantization


def first_rows(rows: Sequence[Any], indices: Sequence[int]) -> str:
    """Return the row numbers of the first ``SHOWN_ROWS`` of ``indices``: ``3, 8, 9, 12, 20, …``."""
    named = ", ".join(str(rows[index].row) for index in indices[:SHOWN_ROWS])
    return f"{named}, …" if len(indices) > SHOWN_ROWS else named


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    part: str,
    config: ReinforceConfig,
    limit: int,
    variables: Mapping[str, Any] | None = None,
) -> Sequence[Prompt]:
    """Return the prompts of ``rows``; those of more than ``limit`` tokens are truncated or skipped, and counted.

    Rows on disk are tokenized when they are used, so truncated ones can't be counted here. ``variables`` of the chat template are
    those of rows that don't have them.

    Raises:
        DataError: every prompt is too long.
    """
    action = config.long_prompts
    outcome = "truncated" if action == "cut" else "skipped"
    prompts: Sequence[Prompt]
    if isinstance(rows, StreamRows):
        if action == "drop":
            raise ConfigError("long_prompts drop: needs all rows, but the dataset is a stream. Use cut, or a Dataset.")
        return LazyPrompts(tokenizer, rows, limit, "stream", variables)
    if isinstance(rows, DiskRows) and action == "cut":
        if part == "training":
            echo(f"Prompts are tokenized when they are used; those longer than {limit} tokens are {outcome}.")
        return LazyPrompts(tokenizer, rows, limit, rows.digest, variables)
    with reading_progress(len(rows) >= PROGRESS_ROWS, f"tokenizing {part} prompts") as on_progress:
        if isinstance(rows, DiskRows):
            long = []
            for start in range(0, len(rows), BATCH_ROWS):
                batch = rows[start : start + BATCH_ROWS]
                _, over = encode_prompts(
                    tokenizer, batch, max_prompt_length=limit, long_prompts="drop", variables=variables
                )
                long += [start + index for index in over]
                on_progress((start + len(batch)) / len(rows))
            fitting = rows.without(long)
            prompts = LazyPrompts(tokenizer, fitting, limit, fitting.digest, variables)
        else:
            prompts, long = encode_prompts(
                tokenizer,
                rows,
                max_prompt_length=limit,
                long_prompts=action,
                on_progress=on_progress,
                variables=variables,
            )
    if long:
        longest = max(
            len(encode_prompt(tokenizer, row.conversation, **row.chat_template_kwargs))
            for row in with_defaults([rows[index] for index in long], variables)
        )
        keep = (
            f"raise {setting('max_prompt_length')} to {longest}"
            if config.max_prompt_length
            else f"lower {setting('max_new_tokens')}"
        )
        echo(
            f"{len(long)} of {len(rows)} {part} prompts are longer than {limit} tokens and were {outcome} "
            f"(rows {first_rows(rows, long)}). To keep all, {keep}.",
            "yellow",
        )
    if rows and not prompts:
        raise DataError(
            f"max_prompt_length: {limit} tokens are too few, because every {part} prompt is longer. Raise it."
        )
    return prompts


def longest_prompt(*parts: Sequence[Prompt]) -> int:
    """Return the most tokens of a prompt; of prompts that are tokenized when they are used, their limit."""
    return max(
        part.limit if isinstance(part, LazyPrompts) else max((len(prompt.ids) for prompt in part), default=0)
        for part in parts
    )


def start_policy(
    model: str | PreTrainedModel, config: ReinforceConfig, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Return the initial policy, loaded if ``model`` is a name, with weights of 4 bits as in ``quantization``, if given.

    Raises:
        ConfigError: use_peft or the estimator ppo can't be combined with the given model.
    """
    if isinstance(model, str):
        # Trainable weights are rounded later, after the optimizer has copied them in full precision.
        dtype = compute_dtype(config) if config.use_peft else torch.float32
        given = {"quantization_config": quantization} if quantization is not None else {}
        return load_policy(model, dtype, **loading(config) | given)
    if config.use_peft and has_adapter(model):
        raise ConfigError("use_peft: the given model has an adapter already. Omit use_peft to train that adapter.")
    if config.use_peft and not model.config.name_or_path:
        raise ConfigError(
            "use_peft: only the adapter is saved, but the given model exists in memory only. Save the model and give its folder."
        )
    if has_adapter(model) and not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(FROZEN_ADAPTER)
    if config.estimator_spec.uses_critic and has_adapter(model):
        raise ConfigError("estimator ppo: can't copy a model with an adapter. Give the base model and set use_peft.")
    return with_fused_gelu(model)


def loading_reward_model(config: RewardModelConfig) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a reward model; errors as in :func:`loading`."""
    return {"dtype": getattr(torch, config.dtype), **loading(config)}


def with_reward_adapter(
    model: PreTrainedModel, config: RewardModelConfig, peft_config: PeftConfig | None
) -> PreTrainedModel:
    """Return a classifier with the adapter of ``peft_config`` or of the settings; without either, it is unchanged.

    Raises:
        ConfigError: the given adapter can't be trained, or can't be added.
    """
    if not has_adapter(model):
        heads = head_modules(model)
        if peft_config is not None:
            return add_adapter(model, peft_config, seed=config.seed, heads=heads)
        return with_adapter(model, config, seed=config.seed, heads=heads) if config.use_peft else model
    if peft_config is not None:
        raise ConfigError("peft_config: the given model has an adapter already. Omit it to train that adapter.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(FROZEN_ADAPTER)
    return model


def loading(config: ComputeConfig) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for attention and 4-bit weights.

    Raises:
        ConfigError: a required package isn't installed.
    """
    return _attention(config) | _in_4bit(config)


def _attention(config: ComputeConfig) -> dict[str, Any]:
    implementation = config.attn_implementation
    if implementation == "auto":
        return {}
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(implementation)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"attn_implementation {implementation}: package {package} isn't installed. Install it if your GPU supports it, or "
            "use sdpa."
        )
    return {"attn_implementation": implementation}


def _in_4bit(config: ComputeConfig) -> dict[str, Any]:
    if not config.load_in_4bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit: package bitsandbytes isn't installed. Run pip install bitsandbytes.")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config),
        llm_int8_skip_modules=["lm_head", "score"],
    )
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def check_sampling(config: ReinforceConfig, engine: str) -> None:
    """Check that ``engine`` can generate with the sampling settings.

    Raises:
        ConfigError: it doesn't have one of the arguments, or a value isn't valid.
    """
    config.check_engine(engine)
    if engine == "transformers":
        check_extra(config.engine_arguments)


def warn_about_bias(config: ReinforceConfig) -> None:
    """Print a warning if sampling changes the distribution that training sees, and a line about settings without effect."""
    if filters := config.sampling_filters:
        given = ", ".join(f"{name} {value}" for name, value in filters.items())
        echo(
            f"{given}: changes the sampled distribution but not the trained one, so the policy ratio is biased. Train with "
            "top_p 1, top_k 0, and without the other filters unless you study this bias.",
            "yellow",
        )
    if config.cache_implementation is not None:
        echo("cache_implementation: no effect, because each engine chooses its KV cache.")
    if config.objective.spec.surrogate == "cispo" and config.clip_high <= 1:
        echo(
            f"clip_high {config.clip_high:g} is cispo's upper bound of the policy ratio itself, so every gradient shrinks. "
            "Set it above 1, such as 5.",
            "yellow",
        )
