"""Generation with vLLM, in this process; vllm is only imported when an engine is started.

What this module owes to vLLM 0.32 on a CPU:

- Weights are prepacked there, so an update goes through ``reload_weights`` with the whole state dict, but for a tied
  lm_head, which is the embeddings.
- Keys and values of prompts outlive an update, so the prefix cache is emptied with each one.
- Starting and generating disturb the global random state, which is put back.
- ``canary.check_sync`` is what says whether all this worked.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.errors import RolloutError
from reinforcepp.models import loading as models
from reinforcepp.models.lora import AdapterDisabled, full_weights
from reinforcepp.rollout.engine import check_prompts, completed, random_state_kept
from reinforcepp.rollout.transfer import send_weights
from reinforcepp.rollout.vllm.compat import import_vllm, sampling_settings, vllm_status, without_tied
from reinforcepp.rollout.vllm.cpu_patches import give_back_freed, spare_work
from reinforcepp.rollout.vllm.lora import AdapterCopy, takes_adapter
from reinforcepp.rollout.vllm.memory import CPU_BLOCK, memory_settings
from reinforcepp.rollout.weights import named_config, saved_eos_ids
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_RESTARTS = 3

# vLLM keeps its parallel groups in globals of the process, so only the last engine may tear them down, and not even
# that one if the process group was the trainer's before.
_alive = 0
_group_is_the_trainers = False
_set_num_threads = torch.set_num_threads  # vLLM puts a function in its place that does nothing


# --- the engine -----------------------------------------------------------------------------------------------------


class VllmEngine:
    """Rollouts by vLLM, which holds its own copy of the weights.

    Args:
        model: a live model, whose weights are handed over in memory, or the name of a saved one.
        tokenizer: its tokenizer, with EOS; prompts and completions cross the border as token ids.
        dtype: of the copy; by default that of the live model or of the saved one's configuration.
        max_length: prompt and completion together, in tokens; the model's context by default. It bounds the cache.
        max_num_seqs: completions generated at a time; results don't depend on it.
        cache_bytes: size of the key-value cache; by default what the batch needs, within bounds.
        gpu_memory_utilization: share of the GPU's memory, instead of one measured when the engine starts.
        tensor_parallel_size: GPUs that share the model.
        apart: run the model in a process of its own even on one GPU; with several each always has one.
        alone: no trainer needs the GPU between two calls, so weights and cache stay there.
        weight_transfer: backend of vLLM's own weight transfer, for weights that don't come through ``load_weights``.
        threads: CPU threads; vLLM fixes their number for the process.

    Raises:
        RolloutError: vLLM isn't installed, can't run the model, or lacks memory; the message names the cure.
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
        apart: bool = False,
        alone: bool = False,
        weight_transfer: str = "",
        threads: int | None = None,
    ) -> None:
        if isinstance(model, str):
            self.config = models.load_config(model)
            self.eos_ids = saved_eos_ids(model, tokenizer)
        else:
            self.config = named_config(model)
            self.eos_ids = models.eos_token_ids(model, tokenizer)
        own_dtype = self.config.dtype if isinstance(model, str) else model.dtype
        self.dtype: torch.dtype = dtype or own_dtype or torch.float32
        usable, reason = vllm_status(self.config, self.dtype)
        if not usable:
            raise RolloutError(f"vLLM can't be used: {reason}; --rollout transformers needs no vLLM.")
        self.tokenizer = tokenizer
        self.context = models.context_length(self.config)
        self.max_length = max_length or self.context
        if self.context is not None and self.max_length is not None and self.max_length > self.context:
            raise RolloutError(
                f"The engine was asked for sequences of {self.max_length} tokens, but the model's context is "
                f"{self.context}: lower max_prompt_length or max_new_tokens."
            )
        self.max_num_seqs = max_num_seqs
        self.restarts = 0
        self._source: PreTrainedModel | str = model
        self._tensor_parallel_size = tensor_parallel_size
        self._on_gpu = not import_vllm().platforms.current_platform.is_cpu()
        self._apart = self._on_gpu and (apart or tensor_parallel_size > 1)
        self._weight_transfer = weight_transfer
        self._in_group = False
        self._latest: Callable[[], PreTrainedModel] | None = None
        self._sleeps = self._on_gpu and not (alone or isinstance(model, str))
        self._asleep = False
        self._memory = memory_settings(
            model,
            self.config,
            self.dtype,
            on_gpu=self._on_gpu,
            max_length=self.max_length or 2048,
            max_num_seqs=max_num_seqs,
            cache_bytes=cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size,
        )
        self._llm: Any = None
        self._adapter: AdapterCopy | None = None
        if threads is not None:
            torch.set_num_threads(threads)
        self._start()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts(prompts, sampling.max_new_tokens, self.context)
        check_prompts(prompts, sampling.max_new_tokens, self.max_length)
        if not prompts:
            return []
        rows = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]
        while True:
            try:
                with random_state_kept():
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
                self._restart(error)
        if not self._on_gpu:
            give_back_freed()
        sampled = [output.outputs[0] for output in outputs]
        return [
            completed(self.tokenizer, self.eos_ids, prompt, out.token_ids, out.logprobs.logprobs)
            for (prompt, _), out in zip(rows, sampled, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts([prompt], sampling.max_new_tokens, self.context)
        engine = self._llm.llm_engine
        with random_state_kept():
            self.wake_up()
            given = {"prompt_token_ids": list(prompt.ids)}
            lora = self._adapter and self._adapter.request
            engine.add_request("stream", given, self._parameters(sampling, prompt, 0), lora_request=lora)
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        out = output.outputs[0]
                        yield completed(self.tokenizer, self.eos_ids, prompt, out.token_ids, out.logprobs.logprobs)
            finally:
                engine.abort_request(["stream"])  # if it is given up
            self.sleep()

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; adapters travel alone or, where
        vLLM can't add them itself, are merged into the copy.
        """
        self._source, self._latest = model, None
        with random_state_kept():
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._reload(model)
            self.forget_prompts()

    @property
    def in_group(self) -> bool | None:
        """Whether it can take part in the next transfer: it has joined; False is before that, None never."""
        return self._in_group if self._on_gpu and self._weight_transfer else None

    def join(self, message: dict[str, Any]) -> None:
        """Meet the trainer, and who else gets its weights, as vLLM's own weight transfer says."""
        self.transfer("shutdown_weight_transfer_engine")  # of an earlier group
        self.transfer("init_weight_transfer_engine", message)
        self._in_group = True

    def transfer(self, step: str, *message: Any) -> None:
        """A step of the transfer, a method of vLLM's workers; :meth:`took_over` is the last one."""
        with random_state_kept():
            self._llm.collective_rpc(step, args=message)

    def took_over(self, latest: Callable[[], PreTrainedModel]) -> None:
        """Generate with the weights that came; ``latest`` gives them, should the engine have to start again."""
        self.transfer("finish_weight_update")
        self._latest = latest
        self.forget_prompts()

    def forget_prompts(self) -> None:
        """Empty the prefix cache: the next prompts are computed anew."""
        emptied = self._llm.reset_prefix_cache()
        assert emptied, "a request is still running"

    def close(self) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        global _alive
        if self._llm is None:
            return
        client = self._llm.llm_engine.engine_core
        _alive -= 1
        if _alive == 0 and not _group_is_the_trainers:
            client.shutdown()
        else:
            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
            client.engine_core.scheduler.shutdown()
            if _alive == 0:
                _drop_parallel_groups()
        self._llm = None
        if self._adapter is not None:
            self._adapter.close()
        gc.collect()
        if _alive == 0:
            torch.set_num_threads = _set_num_threads
        if self._on_gpu:
            torch.cuda.empty_cache()

    # --- one GPU for trainer and engine ---

    def sleep(self) -> None:
        """On a GPU that the trainer needs too: move the weights to main memory and drop the cache. Else nothing."""
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake_up(self) -> None:
        """Undo :meth:`sleep`; done by ``generate`` itself."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    # --- inside ---

    def _start(self) -> None:
        """Start vLLM and see that it has the weights of the model it stands for."""
        global _alive, _group_is_the_trainers
        vllm = import_vllm()
        if _alive == 0:
            _group_is_the_trainers = torch.distributed.is_initialized()
        self._adapter = AdapterCopy(self._source) if takes_adapter(self._source) else None
        quiet = warnings.catch_warnings(action="ignore", category=FutureWarning)
        with quiet, random_state_kept(), self._folder() as (folder, load_format):
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
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise RolloutError(
                    f"vLLM can't start with this model: {_first_line(error)} (--rollout transformers needs no vLLM.)"
                ) from error
            _alive += 1
            if load_format == "dummy":
                assert not isinstance(self._source, str)
                if self._apart:
                    self._llm.collective_rpc("init_weight_transfer_engine", args=({"packed": False},))
                self._reload(self._source)

    def _platform_settings(self) -> dict[str, Any]:
        if self._apart:
            own = {"distributed_executor_backend": "mp", "weight_transfer_config": {"backend": "ipc"}}
            return own | {"enable_sleep_mode": self._sleeps}
        transfer = {"weight_transfer_config": {"backend": self._weight_transfer}} if self._weight_transfer else {}
        if self._on_gpu:
            return transfer | {"enable_sleep_mode": self._sleeps}
        spare_work()
        return transfer | {"enforce_eager": True, "block_size": CPU_BLOCK}

    @contextmanager
    def _folder(self) -> Iterator[tuple[str, str]]:
        """A folder for vLLM to start from, and how it gets its weights."""
        if isinstance(self._source, str):
            yield models.resolve(self._source), "auto"
            return
        with tempfile.TemporaryDirectory(prefix="reinforcepp-vllm-") as folder:
            self.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            yield folder, "dummy"

    def _reload(self, model: PreTrainedModel) -> None:
        adapter = self._adapter
        if adapter is None or not adapter.belongs_to(model):
            self._reload_weights(full_weights(model))
            if adapter is not None:
                adapter.forget(self._llm)
            return
        if not adapter.beside_its_model:
            self._reload_weights(AdapterDisabled(model).state_dict().items())
        adapter.update(self._llm, model)

    def _reload_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        weights = without_tied(self.config, weights)
        if self._apart:
            devices = [torch.device("cuda", i) for i in range(self._tensor_parallel_size)]
            send_weights(self._llm.collective_rpc, weights, devices)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def _parameters(self, sampling: Sampling, prompt: Prompt, sample: int) -> Any:
        from vllm import SamplingParams

        settings = sampling_settings(sampling, prompt, sample, self.eos_ids)
        return SamplingParams(**settings, flat_logprobs=True, detokenize=False)

    def _restart(self, error: Exception) -> None:
        """Start again with the current weights after a failure in the middle of a batch; the batch is then done again.

        Where memory ran out, with half as many completions at a time: results don't depend on their number.
        """
        if isinstance(error, torch.OutOfMemoryError):
            if self.max_num_seqs == 1:
                raise RolloutError(
                    "There is too little memory to generate even one completion at a time: lower max_prompt_length or "
                    f"max_new_tokens, or use a smaller dtype. ({_first_line(error)})"
                ) from error
            self.max_num_seqs //= 2
            warnings.warn(
                f"Memory ran out with {2 * self.max_num_seqs} completions at a time; going on with {self.max_num_seqs}. "
                f"Set rollout_batch_size {self.max_num_seqs} to start like that.",
                stacklevel=3,
            )
        else:
            self.restarts += 1
            if self.restarts > MAX_RESTARTS:
                raise RolloutError(
                    f"vLLM failed while generating, {self.restarts} times in this run: {_first_line(error)} "
                    "--rollout transformers needs no vLLM."
                ) from error
        self.close()
        self._asleep = False
        self._in_group = False
        if self._latest is not None:
            self._source, self._latest = self._latest(), None
        self._start()


# --- small things ---------------------------------------------------------------------------------------------------


def _drop_parallel_groups() -> None:
    """Take down vLLM's own groups but not the trainer's, on which they were built."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def _engine_failures() -> tuple[type[Exception], ...]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return RuntimeError, EngineDeadError, EngineGenerateError


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else f"{type(error).__name__}."
