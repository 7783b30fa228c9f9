"""The vLLM engine, in this process. vllm is imported only when an engine starts.

Requirements of vLLM 0.32 that this module meets:

- On a CPU vLLM packs its weights, so an update reloads the whole state dict, except a tied ``lm_head``.
- Keys and values of prompts outlive an update, so each update empties the prefix cache.
- Starting and generating disturb the global random state, which is restored.

``weight_sync_check.check_sync`` verifies the result.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from reinforcepp.errors import RolloutError, first_line, option, setting
from reinforcepp.models import loading as models
from reinforcepp.rollout.engine import (
    call,
    check_prompts,
    preserve_current_device,
    preserve_random_state,
    to_completion,
)
from reinforcepp.rollout.vllm import lifecycle
from reinforcepp.rollout.vllm.compat import (
    import_vllm,
    inspect_models_safely,
    load_format,
    sampling_settings,
    vllm_status,
)
from reinforcepp.rollout.vllm.cpu_patches import patch_vllm
from reinforcepp.rollout.vllm.local_transfer import (
    AdapterTransfer,
    IpcTransfer,
    ReloadTransfer,
    supports_adapter,
    unsaved_tensors,
)
from reinforcepp.rollout.vllm.memory import CPU_BLOCK, memory_settings
from reinforcepp.rollout.vllm.model_folder import model_folder
from reinforcepp.rollout.weight_transfer import WeightsNeeded, WeightTransfer, config_with_architecture
from reinforcepp.runtime.memory import release_free_memory
from reinforcepp.runtime.terminal import warn
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_RESTARTS = 3
START_FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions of vLLM's code for model families that it lists but can't start on this node."""


class VllmEngine:
    """Generation by vLLM, which holds its own copy of the weights.

    Args:
        model: A live model, whose weights are transferred in memory, or the name of a saved one.
        tokenizer: Its tokenizer, with EOS. Prompts and completions are exchanged as token ids.
        dtype: Data type of the copy; by default that of the live model or of the saved one's configuration.
        max_length: Tokens of prompt and completion together, by default the model's context. It bounds the cache.
        max_num_seqs: Completions generated at a time; results don't depend on it.
        cache_bytes: Size of the KV cache; by default enough for the batch, within bounds.
        gpu_memory_utilization: Share of the GPU's memory; by default it is measured when the engine starts.
        tensor_parallel_size: GPUs that share the model.
        reserved_bytes: GPU memory that the trainer will allocate after this engine has started, and keep while it generates.
        separate_process: Run the model in a separate process even on one GPU; with several GPUs it always does.
        exclusive_gpu: Keep weights and cache on the GPU between two calls, because no trainer needs its memory.
        weight_transfer: Backend of vLLM's weight transfer, for weights that don't come through ``load_weights``.
        threads: CPU threads of vLLM; by default those of the process.
        on_all_ranks: Runs a function on every rank and, if it fails on one, raises that error on all. All ranks must start
            vLLM or none, because they create its process groups together.

    Raises:
        RolloutError: vLLM isn't installed, can't run the model, or lacks memory; the message names a fix.
    """

    name = "vllm"
    shares_trainer_forward = False

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        max_num_seqs: int = 128,
        cache_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        reserved_bytes: int = 0,
        separate_process: bool = False,
        exclusive_gpu: bool = False,
        weight_transfer: str = "",
        threads: int | None = None,
        on_all_ranks: Callable[[Callable[[], Any]], Any] = call,
    ) -> None:
        if isinstance(model, str):
            self.config = models.load_config(model)
            self.eos_ids = _saved_eos_ids(model, tokenizer)
        else:
            self.config = config_with_architecture(model)
            self.eos_ids = models.eos_token_ids(model, tokenizer)
        model_dtype = self.config.dtype if isinstance(model, str) else model.dtype
        self.dtype: torch.dtype = dtype or model_dtype or torch.float32
        usable, reason = vllm_status(self.config, self.dtype)
        if not usable:
            raise RolloutError(
                f"{setting('rollout')} vllm: {reason}. Use {option('rollout', 'transformers')}, which needs no vLLM."
            )
        self.tokenizer = tokenizer
        self.context = models.context_length(self.config)
        self.max_length = max_length or self.context
        if self.context is not None and self.max_length is not None and self.max_length > self.context:
            raise RolloutError(
                f"{setting('rollout')} vllm: sequences of {self.max_length} tokens exceed the model's context of "
                f"{self.context}. Lower max_prompt_length or max_new_tokens."
            )
        self.max_num_seqs = max_num_seqs
        self.restarts = 0
        self._source: Callable[[], PreTrainedModel | str] = lambda: model
        """Returns the model whose weights a restarted engine gets."""
        self._tensor_parallel_size = tensor_parallel_size
        self._on_gpu = not import_vllm().platforms.current_platform.is_cpu()
        self._separate_process = self._on_gpu and (separate_process or tensor_parallel_size > 1)
        self._weight_transfer = weight_transfer
        self._in_transfer_group = False
        self._sleeps = self._on_gpu and not (exclusive_gpu or isinstance(model, str))
        self._asleep = self._weights_dropped = self._drops_weights = False
        settings = partial(
            memory_settings,
            model,
            self.config,
            self.dtype,
            on_gpu=self._on_gpu,
            max_length=self.max_length or 2048,
            max_num_seqs=max_num_seqs,
            cache_bytes=cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size,
            reserved_bytes=reserved_bytes,
        )
        self._memory: dict[str, Any] = on_all_ranks(settings)
        self._llm: Any = None
        self._threads = threads
        """CPU threads with which vLLM started; it compiles code for this number."""
        self._adapter: AdapterTransfer | None = None
        self._transfer: WeightTransfer[Any] = ReloadTransfer()
        self._start()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Return ``sampling.num_samples`` completions per prompt; a failure of vLLM restarts it and repeats the batch."""
        check_prompts(prompts, sampling, self.context)
        check_prompts(prompts, sampling, self.max_length)
        if not prompts:
            return []
        if self._llm is None:
            self._no_copy()
        rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]
        while True:
            try:
                with self._inside_vllm():
                    self.wake_up()
                    outputs = self._llm.generate(
                        [{"prompt_token_ids": list(prompt.ids)} for prompt, _ in rows],
                        [self._parameters(sampling, prompt, sample) for prompt, sample in rows],
                        use_tqdm=False,
                        lora_request=self._adapter and self._adapter.request,
                    )
                    self.sleep()
                break
            except _engine_failures() as error:
                failure = error
            self._restart(failure)
        if not self._on_gpu:
            release_free_memory()
        sampled = [output.outputs[0] for output in outputs]
        return [
            to_completion(self.tokenizer, self.eos_ids, prompt, out.token_ids, out.logprobs.logprobs)
            for (prompt, _), out in zip(rows, sampled, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """Yield the growing completion of ``prompt`` after each token."""
        check_prompts([prompt], sampling, self.context)
        engine = self._llm.llm_engine
        with self._inside_vllm():
            self.wake_up()
            tokens = {"prompt_token_ids": list(prompt.ids)}
            lora = self._adapter and self._adapter.request
            engine.add_request("stream", tokens, self._parameters(sampling, prompt, 0), lora_request=lora)
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        out = output.outputs[0]
                        yield to_completion(self.tokenizer, self.eos_ids, prompt, out.token_ids, out.logprobs.logprobs)
            finally:
                engine.abort_request(["stream"])  # the caller can close the stream early
                self.sleep()

    def load_weights(self, model: PreTrainedModel) -> None:
        """Generate with ``model``'s weights; only a LoRA adapter is sent if vLLM can apply it, otherwise it is merged."""
        self._source = lambda: model
        if self._llm is None:  # it stopped and raised WeightsNeeded
            self._start()
            return
        with self._inside_vllm():
            self._push(model)
            self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Drop the cached keys and values of earlier prompts."""
        emptied = self._llm.reset_prefix_cache()
        assert emptied, "a request is still running"

    def close(self) -> None:
        """Stop vLLM and release its memory."""
        if self._llm is None:
            return
        self._shut_down()
        self._llm, self._asleep, self._weights_dropped = None, False, False
        self._transfer.close()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()

    # --- one GPU for trainer and engine ---

    def sleep(self) -> None:
        """Drop the cache, and drop the weights or move them to CPU memory, if the trainer needs the GPU's memory."""
        if self._sleeps:
            self._llm.sleep(level=2 if self._drops_weights else 1)
            self._asleep, self._weights_dropped = True, self._drops_weights

    def wake_up(self) -> None:
        """Undo :meth:`sleep`; ``generate`` and ``stream`` call it.

        Weights that were dropped are loaded from the model that they came from, so with its current weights.
        """
        if self._weights_dropped:
            self._push(self._source())
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM's allocator can't use memory that torch keeps for later
            self._llm.wake_up()
            self._asleep = False

    # --- vLLM's own weight transfer ---

    @property
    def in_transfer_group(self) -> bool | None:
        """Whether the engine has joined a group for weight transfer; None if it never can."""
        return self._in_transfer_group if self._on_gpu and self._weight_transfer else None

    def join_transfer(self, message: dict[str, Any]) -> None:
        """Join the trainer's group with vLLM's ``message``, after leaving an earlier group."""
        self.transfer("shutdown_weight_transfer_engine")
        self.transfer("init_weight_transfer_engine", message)
        self._in_transfer_group = True

    def transfer(self, method: str, *arguments: Any) -> None:
        """Call a method of the transfer on vLLM's workers; :meth:`finish_transfer` must be the last call."""
        with self._inside_vllm():
            self._llm.collective_rpc(method, args=arguments)

    def finish_transfer(self) -> None:
        """Generate with the transferred weights. If the engine must restart, ``generate`` raises ``WeightsNeeded``."""
        self.transfer("finish_weight_update")
        self._source = self._no_copy
        self.reset_prefix_cache()

    # --- inside ---

    @contextmanager
    def _inside_vllm(self) -> Iterator[None]:
        """Restore the trainer's random state, current GPU and number of CPU threads afterwards."""
        with preserve_current_device(), preserve_random_state(), lifecycle.preserve_threads(self._threads):
            yield

    def _start(self) -> None:
        """Start vLLM with the weights of the current model."""
        vllm = import_vllm()
        inspect_models_safely()
        lifecycle.prepare_start(sleeps=self._sleeps and not self._separate_process)
        model = self._source()
        self._select_transfer(model)
        quiet = warnings.catch_warnings(action="ignore", category=FutureWarning)
        with quiet, self._inside_vllm(), self._model_folder(model) as (folder, load_format):
            try:
                self._llm = vllm.LLM(
                    model=folder,
                    runner="generate",
                    load_format=load_format,
                    dtype=str(self.dtype).removeprefix("torch."),
                    max_model_len=self.max_length,
                    max_num_seqs=self.max_num_seqs,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    use_tqdm_on_load=False,
                    tensor_parallel_size=self._tensor_parallel_size,
                    **self._memory,
                    **self._platform_settings(),
                    **(self._adapter.settings if self._adapter else {}),
                )
            except START_FAILURES as error:
                lifecycle.clean_up_failed_start(error, sleeps=self._sleeps)
                raise RolloutError(
                    f"{setting('rollout')} vllm: vLLM can't start with this model ({first_line(error)}). Use "
                    f"{option('rollout', 'transformers')}."
                ) from error
            self._shut_down = lifecycle.finish_start(self, self._llm)
            self._threads = torch.get_num_threads()
            if not isinstance(model, str):
                if self._separate_process:
                    self._llm.collective_rpc("init_weight_transfer_engine", args=({"packed": False},))
                self._drops_weights = self._can_drop_weights()
                if self._drops_weights:
                    self.sleep()  # The first batch, which is checked, wakes it up and loads the weights.
                else:
                    self._push(model)

    def _can_drop_weights(self) -> bool:
        """Return whether a sleeping vLLM needs no copy of its weights, because the trainer's model has all of them."""
        if not self._sleeps or self._adapter is not None or self._separate_process:
            return False
        (lost,) = self._llm.apply_model(unsaved_tensors)
        return not lost

    def _select_transfer(self, model: PreTrainedModel | str) -> None:
        gpus = [torch.device("cuda", index) for index in range(self._tensor_parallel_size)]
        full: WeightTransfer[Any] = IpcTransfer(gpus) if self._separate_process else ReloadTransfer()
        self._adapter = None
        if not isinstance(model, str) and supports_adapter(model):
            self._adapter = AdapterTransfer(model, full)
        self._transfer = self._adapter or full

    def _platform_settings(self) -> dict[str, Any]:
        if self._separate_process:
            workers = {"distributed_executor_backend": "mp", "weight_transfer_config": {"backend": "ipc"}}
            return workers | {"enable_sleep_mode": self._sleeps}
        settings: dict[str, Any] = {"distributed_executor_backend": lifecycle.rank_executor(*lifecycle.this_rank())}
        if self._weight_transfer:
            settings["weight_transfer_config"] = {"backend": self._weight_transfer}
        if self._on_gpu:
            return settings | {"enable_sleep_mode": self._sleeps}
        patch_vllm()
        return settings | {"enforce_eager": True, "block_size": CPU_BLOCK}

    @contextmanager
    def _model_folder(self, model: PreTrainedModel | str) -> Iterator[tuple[str, str]]:
        """Yield the folder from which vLLM starts and its load format; a live model's folder holds no weights."""
        if isinstance(model, str):
            with models.safe_folder(model) as folder:
                yield folder, load_format(folder)
            return
        with model_folder(self.config, self.tokenizer) as folder:
            yield folder, "dummy"

    def _push(self, model: PreTrainedModel | str) -> None:
        """Load all weights, or those of the adapter; the cache can stay asleep."""
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM's allocator can't use memory that torch keeps for later
            self._llm.wake_up(tags=["weights"])
        assert not isinstance(model, str), "vLLM loads a saved model itself"
        self._transfer.prepare(model)
        self._transfer.push(self._llm)
        self._weights_dropped = False

    def _no_copy(self) -> NoReturn:
        """Stand in for the source of weights that came over NCCL."""
        raise WeightsNeeded("its engine failed and starts again with weights from the trainer")

    def _parameters(self, sampling: Sampling, prompt: Prompt, sample: int) -> Any:
        from vllm import SamplingParams

        settings = sampling_settings(sampling, prompt, sample, self.eos_ids)
        return SamplingParams(**settings, flat_logprobs=True, detokenize=False)

    def _restart(self, error: Exception) -> None:
        """Restart with the current weights after a failure in a batch, which the caller then repeats.

        If memory ran out, halve the number of completions at a time; results don't depend on it.
        """
        lifecycle.release_frames(error)  # otherwise the old engine's memory isn't free for the new one
        if isinstance(error, torch.OutOfMemoryError):
            if self.max_num_seqs == 1:
                raise RolloutError(
                    f"{setting('rollout')} vllm: memory doesn't suffice for one completion ({first_line(error)}). "
                    "Lower max_prompt_length or max_new_tokens, or use a smaller dtype."
                ) from error
            self.max_num_seqs //= 2
            warn(
                f"Out of memory with {2 * self.max_num_seqs} completions at a time. Continuing with {self.max_num_seqs}. Set "
                f"rollout_batch_size to {self.max_num_seqs} to start with it.",
                stacklevel=3,
            )
        else:
            self.restarts += 1
            if self.restarts > MAX_RESTARTS:
                raise RolloutError(
                    f"{setting('rollout')} vllm: vLLM failed {self.restarts} times in this run ({first_line(error)}). Use "
                    f"{option('rollout', 'transformers')}."
                ) from error
        self.close()
        self._in_transfer_group = False
        self._start()


def _saved_eos_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return all ids that end a completion of a saved model; see :func:`~reinforcepp.models.loading.eos_token_ids`."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(models.resolve(name)).eos_token_id
    except OSError:  # the file is optional
        configured = models.load_config(name).get_text_config().eos_token_id
    return models.end_ids(configured, tokenizer)


def _engine_failures() -> tuple[type[Exception], ...]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return RuntimeError, EngineDeadError, EngineGenerateError
