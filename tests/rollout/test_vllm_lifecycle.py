"""Starting and stopping engines of one process: sleep, memory pools, parallel groups, CPU threads."""

import gc
import os
import weakref
from types import SimpleNamespace

import pytest
import torch

from reinforcepp.errors import RolloutError
from reinforcepp.rollout.vllm import lifecycle
from reinforcepp.rollout.vllm.compat import node_problem

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


class Owner:
    """An engine of this package, as far as its end matters."""


class Part:
    """A part of vLLM's engine, which records the calls in order."""

    def __init__(self, name, calls, **attributes):
        self._name, self._calls = name, calls
        vars(self).update(attributes)

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda: self._calls.append(f"{self._name}.{method}")


def started(calls, *, sleeps=False, asleep=False, owner=None, **executor):
    """Return the function that stops a started engine; its executor's shutdown releases all pools, as vLLM's worker does."""

    def shut_down():
        calls.append("executor.shutdown")
        if (allocator := lifecycle._allocator()) is not None:
            allocator.release_pools()

    config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=sleeps))
    executor = Part("executor", calls, is_sleeping=asleep, shutdown=shut_down, **executor)
    core = Part("core", calls, vllm_config=config, model_executor=executor, scheduler=Part("scheduler", calls))
    client = SimpleNamespace(engine_core=core)
    client._finalizer = weakref.finalize(core, calls.append, "vLLM's own teardown")
    engine = SimpleNamespace(engine_core=client, _finalizer=lambda: calls.append("remove hooks"))
    lifecycle.prepare_start(sleeps=False)
    return lifecycle.finish_start(owner or core, SimpleNamespace(llm_engine=engine))


@pytest.fixture
def calls(monkeypatch):
    """Calls in order; at the beginning no engine is alive, and the trainer has no process group."""
    calls = []
    monkeypatch.setattr(lifecycle, "_engines_alive", 0)
    monkeypatch.setattr(lifecycle, "_trainer_owns_group", False)
    monkeypatch.setattr(lifecycle, "_allocator_failed", False)
    monkeypatch.setattr(lifecycle, "_destroy_parallel_groups", lambda: calls.append("destroy vLLM's groups"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    return calls


class Allocator:
    """vLLM's allocator for engines that sleep."""

    def __init__(self, used=0):
        self.used, self.allocator_and_pools = used, {"weights": ["pool"]}

    def get_current_usage(self):
        return self.used

    def release_pools(self):
        self.allocator_and_pools.clear()


@pytest.fixture
def allocator(monkeypatch):
    allocator = Allocator()
    monkeypatch.setattr(lifecycle, "_allocator", lambda: allocator)
    return allocator


def test_a_sleeping_engine_wakes_before_it_frees_memory(calls):
    started(calls, sleeps=True, asleep=True)()
    assert calls == ["executor.wake_up", "remove hooks", "core.shutdown"]


def test_an_awake_engine_is_not_woken(calls):
    started(calls, sleeps=True)()
    assert calls == ["remove hooks", "core.shutdown"]


def test_a_failed_wake_up_neither_stops_the_close_nor_fails_the_next_engine(calls, monkeypatch):
    def fail():
        raise RuntimeError("CUDA Error: out of memory")

    monkeypatch.setattr(lifecycle, "_clear_allocator_error", lambda: calls.append("clear"))
    started(calls, sleeps=True, asleep=True, wake_up=fail)()
    assert calls == ["remove hooks", "core.shutdown"]
    lifecycle.prepare_start(sleeps=True)
    lifecycle.prepare_start(sleeps=True)
    assert calls[2:] == ["clear"]


@needs_vllm
def test_the_allocator_error_is_cleared_by_a_call_that_fails(monkeypatch):
    from vllm.device_allocator import cumem

    def fail(*handle):
        assert handle == (0, 0, 0, 0)
        raise RuntimeError("CUDA Error: invalid argument")

    monkeypatch.setattr(cumem, "python_unmap_and_release", fail)
    lifecycle._clear_allocator_error()


def test_only_the_last_engine_destroys_the_groups_but_not_those_of_the_trainer(calls, monkeypatch):
    first, second = started(calls), started(calls)
    first()
    assert calls == ["remove hooks", "executor.shutdown", "scheduler.shutdown"]
    second()
    assert calls[3:] == ["remove hooks", "core.shutdown"]
    calls.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    stop = started(calls)
    stop()
    stop()
    assert calls == ["remove hooks", "executor.shutdown", "scheduler.shutdown", "destroy vLLM's groups"]


def test_an_engine_that_is_collected_late_leaves_the_next_one_alone(calls):
    owner = Owner()
    started(calls, owner=owner)
    started(calls)
    del owner
    gc.collect()
    assert calls == ["remove hooks", "executor.shutdown", "scheduler.shutdown"]


def test_closing_another_engine_keeps_the_pools_of_the_one_that_sleeps(calls, allocator):
    sleeper, other = started(calls, sleeps=True), started(calls)
    other()
    assert allocator.allocator_and_pools == {"weights": ["pool"]}
    started(calls)
    sleeper()
    assert not allocator.allocator_and_pools


def test_a_second_engine_that_sleeps_is_refused(calls, allocator):
    lifecycle.prepare_start(sleeps=True)
    allocator.used = 1 << 20
    lifecycle.prepare_start(sleeps=False)
    with pytest.raises(RolloutError, match=r"another vLLM engine.*trainer\.engine\.close\(\)"):
        lifecycle.prepare_start(sleeps=True)


def test_an_unreachable_engine_that_sleeps_is_stopped_first(calls, allocator):
    owner = Owner()
    owner.itself = owner  # only the garbage collector ends it
    allocator.used = 1 << 20
    weakref.finalize(owner, lambda: setattr(allocator, "used", 0))
    del owner
    lifecycle.prepare_start(sleeps=True)


def test_a_failed_start_releases_pools_and_the_frames_of_its_error(calls, allocator):
    class Model:
        pass

    models = weakref.WeakSet()

    def load():
        model = Model()
        models.add(model)
        raise ValueError("no such layer")

    def start():
        try:
            load()
        except ValueError as error:
            raise RuntimeError("can't start") from error

    try:
        start()
    except RuntimeError as error:
        assert len(models) == 1
        lifecycle.clean_up_failed_start(error, sleeps=True)
        assert not models
    assert not allocator.allocator_and_pools
    assert calls == ["destroy vLLM's groups"]


def test_objects_that_vllm_froze_are_collected_again(calls, monkeypatch):
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
    started(calls)
    assert calls == ["unfreeze"]


def test_threads_are_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError), lifecycle.preserve_threads():
            torch.set_num_threads(1)  # on a GPU
            torch.set_num_threads = lambda number: None  # on a CPU
            os.environ["OMP_NUM_THREADS"] = os.environ["VLLM_OMP_NUM_THREADS_SET_BY_VLLM"] = "1"
            raise ValueError
        assert torch.set_num_threads is set_num_threads
        assert torch.get_num_threads() == 2
        with lifecycle.preserve_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert "VLLM_OMP_NUM_THREADS_SET_BY_VLLM" not in os.environ
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(before)
