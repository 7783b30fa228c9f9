"""Settings of TRL and transformers without an equivalent: those that change no result here, and those that would.

A setting isn't in force here if the configuration has one with the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

JsonText = dict[str, Any] | str
"""A dictionary, also as JSON."""

PREFETCH = "prompts are tokenized before the training"
DISTRIBUTED = "accelerate's own settings apply"
MEMORY = "evaluations choose their batch size, which changes no result"
LOGS = "logs have the same content on every rank and step"
VESPO = "it is a setting of the loss_type vespo, which isn't available"
ADAPTIVE = "entropy_coef is constant"
SERVERS = "the servers' own settings apply"

NO_EFFECT: Mapping[str, tuple[Any, str]] = {
    "dataloader_num_workers": (int, PREFETCH),
    "dataloader_pin_memory": (bool, PREFETCH),
    "dataloader_persistent_workers": (bool, PREFETCH),
    "dataloader_prefetch_factor": (int, PREFETCH),
    "dataloader_multiprocessing_context": (str, PREFETCH),
    "dataloader_in_order": (bool, PREFETCH),
    "dataset_num_proc": (int, PREFETCH),
    "remove_unused_columns": (bool, "reward functions get every column"),
    "pad_to_multiple_of": (int | str, "padding changes no result"),
    "disable_tqdm": (bool, "progress is shown on terminals"),
    "gradient_checkpointing_kwargs": (JsonText, "both kinds of checkpointing give the same gradients"),
    "use_liger_kernel": (bool, "its kernels change only speed and memory"),
    "activation_offloading": (bool, "it changes only speed and memory"),
    "ds3_gather_for_generation": (bool, "weights are always gathered for generation"),
    "ddp_find_unused_parameters": (bool, DISTRIBUTED),
    "ddp_bucket_cap_mb": (int, DISTRIBUTED),
    "ddp_broadcast_buffers": (bool, DISTRIBUTED),
    "ddp_static_graph": (bool, DISTRIBUTED),
    "ddp_backend": (str, DISTRIBUTED),
    "ddp_timeout": (int, "watchdog_seconds limits waiting"),
    "per_device_eval_batch_size": (int, MEMORY),
    "eval_accumulation_steps": (int, MEMORY),
    "eval_do_concat_batches": (bool, MEMORY),
    "eval_use_gather_object": (bool, MEMORY),
    "batch_eval_metrics": (bool, MEMORY),
    "prediction_loss_only": (bool, MEMORY),
    "torch_empty_cache_steps": (int, "it changes only speed and memory"),
    "save_only_model": (bool, "checkpoints also hold the optimizer, so that a run can resume"),
    "do_train": (bool, "it is a flag for scripts"),
    "do_eval": (bool, "it is a flag for scripts"),
    "do_predict": (bool, "it is a flag for scripts"),
    "logging_dir": (str, "trackers write to the folder trackers in output_dir"),
    "logging_steps": (float, "every step is logged"),
    "logging_first_step": (bool, "every step is logged"),
    "log_level": (str, LOGS),
    "log_level_replica": (str, LOGS),
    "log_on_each_node": (bool, LOGS),
    "logging_nan_inf_filter": (bool, "values that aren't finite are skipped"),
    "skip_memory_metrics": (bool, "memory is always logged"),
    "include_num_input_tokens_seen": (str, "num_tokens is always logged"),
    "log_multimodal": (bool, "completions are text"),
    "num_completions_to_print": (int, "all completions are in Parquet files"),
    "log_unique_prompts": (bool, "all completions are in Parquet files"),
    "full_determinism": (bool, "runs with the same seed are reproducible"),
    "use_cache": (bool, "generation has a cache, and training has none"),
    "liger_kernel_config": (JsonText, "its kernels change only speed and memory"),
    "restore_callback_states_from_checkpoint": (bool, "a resumed run restores the states of callbacks"),
    "save_on_each_node": (bool, "rank 0 saves"),
    "local_rank": (int, "the launcher sets it"),
    "debug": (str, "it changes no result"),
    "length_column_name": (str, "lengths are measured"),
    "project": (str, "trackers use the project reinforcepp"),
    "vespo_k_pos": (float, VESPO),
    "vespo_lambda_pos": (float, VESPO),
    "vespo_k_neg": (float, VESPO),
    "vespo_lambda_neg": (float, VESPO),
    "trackio_bucket_id": (str, "trackio's own settings apply"),
    "trackio_static_space_id": (str, "trackio's own settings apply"),
    "entropy_coef_min": (float, ADAPTIVE),
    "entropy_coef_max": (float, ADAPTIVE),
    "entropy_coef_delta": (float, ADAPTIVE),
    "entropy_target": (float, ADAPTIVE),
    "vllm_max_model_length": (int, "it follows from the longest prompt and max_new_tokens"),
    "vllm_enable_sleep_mode": (bool, "vLLM's memory is measured before the training"),
    "vllm_model_impl": (str, "vLLM chooses the implementation"),
    "vllm_server_timeout": (float, SERVERS),
    "vllm_group_port": (int, SERVERS),
}
"""Type and reason by name; any value is accepted, with one printed line."""


class Neutral(NamedTuple):
    """A setting whose only accepted values are those that leave it off.

    Attributes:
        kind: Type of the value.
        values: Accepted values, in addition to None.
        fix: Replacement for other values.
        secret: Whether a value must not be shown.
    """

    kind: Any
    values: tuple[Any, ...]
    fix: str
    secret: bool = False


LAUNCHER = "Give it to the launcher: accelerate launch --config_file FILE (see docs/parallel.md)."
TEXT_ONLY = "Omit it: prompts and completions are text."
TOKEN = "Set HF_TOKEN, or give the token to trainer.push_to_hub(token=...): settings are written to files."
AT_END = "The model is uploaded when training ends, with push_to_hub, or call trainer.push_to_hub()."

NEUTRAL: Mapping[str, Neutral] = {
    "optim_target_modules": Neutral(tuple[str, ...], (), "Give the trainer an optimizer over these layers."),
    "label_names": Neutral(tuple[str, ...], (), "Omit it: the trainer knows the columns."),
    "include_for_metrics": Neutral(tuple[str, ...], ((),), "Omit it: metrics get scores alone."),
    "label_smoothing_factor": Neutral(float, (0.0,), "Omit it: it is a setting of classification."),
    "average_tokens_across_devices": Neutral(bool, (True,), "Omit it: means are over the tokens of all processes."),
    "bf16_full_eval": Neutral(bool, (False,), "Give mixed_precision, which evaluations use, too."),
    "fp16_full_eval": Neutral(bool, (False,), "Give mixed_precision, which evaluations use, too."),
    "tf32": Neutral(bool, (False,), "Omit it: products of float32 numbers keep their precision."),
    "torch_compile_backend": Neutral(str, ("inductor",), "Omit it: torch_compile uses inductor."),
    "torch_compile_mode": Neutral(str, ("default",), "Omit it: torch_compile uses the default mode."),
    "neftune_noise_alpha": Neutral(float, (0.0,), "Omit it: noise in embeddings isn't supported."),
    "auto_find_batch_size": Neutral(
        bool, (False,), "Omit it: if memory runs out, the micro-batch is halved with the same result."
    ),
    "logging_strategy": Neutral(str, ("steps",), "Give logging_steps, a number of steps."),
    "load_best_model_at_end": Neutral(bool, (False,), "Give keep_best, and use the checkpoint that it keeps."),
    "eval_delay": Neutral(float, (0.0,), "Omit it: evaluations begin before the training."),
    "data_seed": Neutral(int, (), "Give seed, which also sets the order of prompts."),
    "ignore_data_skip": Neutral(bool, (False,), "Omit it: a resumed run continues with the prompts that follow."),
    "dataloader_drop_last": Neutral(bool, (False,), "Omit it: the last batch of an epoch can be smaller."),
    "train_sampling_strategy": Neutral(str, ("random",), "Omit it: every epoch has a new random order."),
    "accelerator_config": Neutral(JsonText, ("{}",), LAUNCHER),
    "parallelism_config": Neutral(JsonText, ("{}",), LAUNCHER),
    "deepspeed": Neutral(JsonText, (), LAUNCHER),
    "fsdp": Neutral(str, ("", "False", "false"), LAUNCHER),
    "fsdp_config": Neutral(JsonText, ("{}",), LAUNCHER),
    "push_to_hub": Neutral(bool, (False,), "After SFT, run reinforcepp push."),
    "hub_model_id": Neutral(str, (), "After SFT, give it to reinforcepp push: --repo."),
    "hub_private_repo": Neutral(bool, (), "After SFT, give it to reinforcepp push: --private."),
    "hub_token": Neutral(str, (), TOKEN, secret=True),
    "hub_strategy": Neutral(str, ("every_save", "end"), AT_END),
    "log_completions_hub_repo": Neutral(str, (), "Upload the folder completions in output_dir instead."),
    "router_aux_loss_coef": Neutral(float, (0.0,), "Omit it: routers of experts get no loss of their own."),
    "cast_lm_head_to_fp32": Neutral(bool, (False,), "Omit it: log-probabilities are computed in float32."),
    "cache_implementation": Neutral(str, ("dynamic",), "Omit it: generation manages its cache."),
    "use_transformers_continuous_batching": Neutral(bool, (False,), "Give rollout vllm for continuous batching."),
    "use_transformers_paged": Neutral(bool, (False,), "Give rollout vllm for continuous batching."),
    "vllm_structured_outputs_regex": Neutral(str, (), "Check the format in a reward: rule:regex?pattern=..."),
    "num_generations_eval": Neutral(int, (1,), "Omit it: evaluations generate one completion per prompt."),
    "use_adaptive_entropy": Neutral(bool, (False,), "Omit it: entropy_coef is constant."),
    "transformers_continuous_batching_config": Neutral(JsonText, (), "Give rollout vllm for continuous batching."),
    "optim_args": Neutral(str, (), "Give the optimizer's settings by name, for example adam_beta2."),
    "enable_jit_checkpoint": Neutral(bool, (False,), "Omit it: signals already save a checkpoint."),
    "hub_always_push": Neutral(bool, (False,), AT_END),
    "hub_revision": Neutral(str, (), "Give it to trainer.push_to_hub(revision=...)."),
    "trackio_space_id": Neutral(str, (), "Omit it: trackio keeps the run on this node."),
}
"""Settings by name that are accepted only if they are off."""

SUPERVISED_NEUTRAL: Mapping[str, Neutral] = {
    "packing": Neutral(bool, (False,), "Omit it: rows aren't packed."),
    "eval_packing": Neutral(bool, (False,), "Omit it: rows aren't packed."),
    "packing_strategy": Neutral(str, ("bfd",), "Omit it: rows aren't packed."),
    "truncation_mode": Neutral(str, ("keep_start",), "Omit it: rows over max_length are skipped."),
    "eval_on_start": Neutral(bool, (False,), "Call trainer.evaluate() before the training."),
    "padding_free": Neutral(bool, (False,), "Omit it: rows of similar length are padded together."),
    "completion_only_loss": Neutral(bool, (True,), "Give the data a text column, whose tokens all have a loss."),
    "assistant_only_loss": Neutral(bool, (False,), "Omit it: the last response of a conversation has the loss."),
    "dataset_kwargs": Neutral(JsonText, ("{}",), "Omit it: data are prepared as docs/sft.md describes."),
    "eos_token": Neutral(str, (), "Set it in the tokenizer of the model."),
    "pad_token": Neutral(str, (), "Set it in the tokenizer of the model."),
}
"""Settings of SFT and reward models that are accepted only if they are off."""
