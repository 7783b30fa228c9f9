"""What vLLM keeps once per process instead of once per engine: parallel groups, GPU memory pools, CPU threads.

Each engine is started and stopped so that other engines and the trainer keep theirs. Written against vLLM 0.32
(``v1/worker/gpu_worker.py``, ``v1/executor/uniproc_executor.py``, ``device_allocator/cumem.py``).
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import RolloutError, option, setting

if TYPE_CHECKING:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

THREAD_VARIABLES = ("OMP_NUM_THREADS", "VLLM_OMP_NUM_THREADS_SET_BY_VLLM")
"""Environment variables that vLLM sets for its worker processes."""

_set_num_threads = torch.set_num_threads  # On a CPU vLLM replaces it by a function that does nothing.
_engines_alive = 0
_trainer_owns_group = False
_allocator_failed = False


def prepare_start(*, sleeps: bool) -> None:
    """Call before an engine starts.

    Args:
        sleeps: Whether the engine will sleep in this process, where vLLM has one allocator for it.

    Raises:
        RolloutError: Another engine of this process sleeps.
    """
    global _trainer_owns_group, _allocator_failed
    if _engines_alive == 0:
        _trainer_owns_group = torch.distributed.is_initialized()
    if sleeps and _pool_bytes() > 0:
        gc.collect()  # The other engine can belong to a trainer that nothing refers to.
        torch.cuda.empty_cache()
        if _pool_bytes() > 0:
            raise RolloutError(
                f"{setting('rollout')} vllm: another vLLM engine of this process shares the GPU with its trainer, and vLLM "
                "supports one per process. Close the other trainer's engine (trainer.engine.close()), or use "
                f"{option('rollout', 'transformers')}."
            )
    if _allocator_failed:
        _clear_allocator_error()
        _allocator_failed = False


def finish_start(owner: object, llm: Any) -> weakref.finalize[..., object]:
    """Call after an engine has started; return the function that stops it. It also runs when ``owner`` is collected."""
    global _engines_alive
    engine, client = llm.llm_engine, llm.llm_engine.engine_core
    client._finalizer.detach()  # When collected, it would destroy the groups of the trainer and of other engines.
    gc.unfreeze()  # vLLM exempts all objects of the process from collection, also a trainer that is dropped later.
    _engines_alive += 1
    return weakref.finalize(owner, _shut_down, client.engine_core, getattr(engine, "_finalizer", None))


def clean_up_failed_start(error: BaseException, *, sleeps: bool) -> None:
    """Free what an engine that didn't start holds, so that another engine can start."""
    release_frames(error)
    gc.collect()
    if sleeps and (allocator := _allocator()) is not None:
        allocator.release_pools()
        torch.cuda.empty_cache()
    if _engines_alive == 0:
        _destroy_parallel_groups()
        if not _trainer_owns_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def release_frames(error: BaseException | None) -> None:
    """Clear the local variables of the frames that an exception passed, because they keep vLLM's model in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def preserve_threads(number: int | None = None) -> Iterator[None]:
    """Restore the number of CPU threads afterwards; vLLM on a GPU sets it to 1 for the whole process.

    Args:
        number: Threads in this block; None leaves the number to vLLM.
    """
    before, variables = torch.get_num_threads(), {name: os.environ.get(name) for name in THREAD_VARIABLES}
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads = _set_num_threads
        torch.set_num_threads(before)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def rank_executor(rank: int, gpu: int) -> type[UniProcExecutor]:
    """Return vLLM's ``distributed_executor_backend`` for an engine in the process of a rank.

    vLLM's own executor for one process always takes GPU 0. Its ``external_launcher`` takes LOCAL_RANK, but reduces the free
    memory over all ranks when it starts, so that one rank alone can't restart its engine.

    vLLM's world size stays 1 per engine. The rank names the worker's folder in the compile cache, so ranks don't overwrite
    each other's files. No seed depends on it, because every request has its own.

    Args:
        rank: Rank of this process among all ranks.
        gpu: Index of the GPU on this node; a CPU ignores it.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class RankExecutor(UniProcExecutor):
        def _distributed_args(self) -> tuple[str, int, int]:
            init_method, _, _ = super()._distributed_args()
            return init_method, rank, gpu

    return RankExecutor


def this_rank() -> tuple[int, int]:
    """Return the rank of this process and the index of its current GPU."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return rank, torch.cuda.current_device() if torch.cuda.is_available() else 0


# --- inside ---------------------------------------------------------------------------------------------------------


def _shut_down(core: Any, remove_hooks: weakref.finalize[..., object] | None) -> None:
    """Stop an engine, but keep the groups of the trainer and of other engines.

    Args:
        core: vLLM's engine core.
        remove_hooks: vLLM's function that removes the compiler's hooks, which keep the model in memory.
    """
    global _engines_alive, _allocator_failed
    _engines_alive -= 1
    if core.model_executor.is_sleeping:
        # Freeing memory that sleeps leaves an error behind, with which the next allocation fails as if memory had run out.
        try:
            core.model_executor.wake_up()
        except RuntimeError:  # too little memory
            _allocator_failed = True
    if remove_hooks is not None:
        remove_hooks()
    with _pools_of_others(sleeps=core.vllm_config.model_config.enable_sleep_mode):
        if _engines_alive == 0 and not _trainer_owns_group:
            core.shutdown()
        else:
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            if _engines_alive == 0:
                _destroy_parallel_groups()


@contextmanager
def _pools_of_others(*, sleeps: bool) -> Iterator[None]:
    """Keep the memory pools of an engine that sleeps while one that doesn't is shut down, which releases all pools."""
    allocator = _allocator()
    if sleeps or allocator is None:
        yield
        return
    pools, allocator.allocator_and_pools = allocator.allocator_and_pools, {}
    try:
        yield
    finally:
        allocator.allocator_and_pools = pools


def _allocator() -> Any:
    """Return vLLM's allocator for engines that sleep, or None before the first such engine."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    return module.CuMemAllocator.instance if module is not None else None


def _pool_bytes() -> int:
    allocator = _allocator()
    return 0 if allocator is None else int(allocator.get_current_usage())


def _clear_allocator_error() -> None:
    """Clear an error that vLLM's allocator keeps: a call from Python that fails raises it and forgets it."""
    from vllm.device_allocator import cumem

    with suppress(RuntimeError):
        cumem.unmap_and_release((0, 0, 0, 0))


def _destroy_parallel_groups() -> None:
    """Destroy vLLM's groups but not the trainer's, on which they are built.

    With several ranks they stay until the process exits, and the next engine uses them: creating groups is a collective, but
    one rank alone can restart its engine.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
