"""vLLM in the process of each data-parallel rank: its GPU, its process groups, and starts and restarts on one rank alone."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

import scripts
from reinforcepp.errors import RolloutError
from reinforcepp.rollout import engine as engines
from reinforcepp.rollout import selection
from reinforcepp.rollout.selection import EngineChoice, start_chosen_engine
from reinforcepp.rollout.vllm import lifecycle
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm_integration import VllmEngine

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


@pytest.fixture
def gpus(monkeypatch):
    """Eight stubbed GPUs: ``current`` is this thread's, ``states`` are those of their random generators."""
    gpus = {"current": 3, "states": list("abcdefgh")}

    def exchange(index):
        if index < 0:  # leaves the device alone, as in torch
            return -1
        before, gpus["current"] = gpus["current"], index
        return before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus["current"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: exchange(device.index))
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: gpus["states"][index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: gpus["states"].__setitem__(index, state))
    return gpus


@pytest.fixture
def seventh_rank(monkeypatch, gpus):
    """This process is rank 7 of 8 on GPU 3 of its node."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 7)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)


# --- the GPU of a rank ----------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.parametrize("on_gpu", [True, False])
def test_vllm_gets_the_rank_and_the_gpu_of_the_trainer(seventh_rank, on_gpu):
    engine = object.__new__(VllmEngine)
    engine._separate_process, engine._on_gpu, engine._weight_transfer, engine._sleeps = False, on_gpu, "", True
    executor = engine._platform_settings()["distributed_executor_backend"]
    started = object.__new__(executor)
    started.vllm_config = SimpleNamespace(device_config=SimpleNamespace(device="cuda"))
    assert started._distributed_args()[1:] == (7, 3)
    assert executor.supports_async_scheduling()  # vLLM would otherwise schedule synchronously


def test_a_process_without_ranks_is_rank_zero():
    assert lifecycle.this_rank() == (0, 0)


def test_a_cpu_has_no_current_gpu_to_restore():
    with engines.preserve_current_device():
        pass


def test_the_current_gpu_is_restored(gpus):
    with engines.preserve_current_device():
        torch.cuda.set_device(torch.device("cuda", 0))
    assert gpus["current"] == 3
    with pytest.raises(RuntimeError), engines.preserve_current_device():
        torch.cuda.set_device(torch.device("cuda", 0))
        raise RuntimeError
    assert gpus["current"] == 3


def test_a_thread_selects_the_gpu_of_its_rank(gpus):
    engines.select_device(torch.device("cpu"))
    assert gpus["current"] == 3
    engines.select_device(torch.device("cuda", 5))
    assert gpus["current"] == 5


def test_random_state_is_preserved_on_the_cpu_and_the_current_gpu_only(gpus, recwarn):
    before = torch.get_rng_state()
    with engines.preserve_random_state():
        torch.manual_seed(7)
        gpus["states"][2:4] = "xy"
    assert torch.equal(torch.get_rng_state(), before)
    assert "".join(gpus["states"]) == "abxdefgh"  # torch would have initialized all eight
    assert not recwarn.list


# --- groups and failures --------------------------------------------------------------------------------------------


@needs_vllm
def test_groups_of_several_ranks_stay_for_the_next_engine(seventh_rank, monkeypatch):
    from vllm.distributed import parallel_state

    destroyed = []
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: destroyed.append(1))
    lifecycle._destroy_parallel_groups()
    assert not destroyed
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    lifecycle._destroy_parallel_groups()
    assert destroyed


@pytest.mark.parametrize("can_fall_back", [True, False])
def test_a_failed_start_on_another_rank_closes_this_ranks_engine(monkeypatch, can_fall_back):
    class Engine:
        closed = False

        def close(self):
            self.closed = True

    def other_rank_fails(function):
        function()
        raise RolloutError("rollout vllm: too little memory on rank 1.")

    engine, fallback = Engine(), Engine()
    monkeypatch.setattr(
        selection, "start_in_process_engine", lambda name, *_, **__: {"vllm": engine}.get(name, fallback)
    )
    choice = EngineChoice("vllm", "", can_fall_back=can_fall_back)
    with ExitStack() as expected:
        if can_fall_back:
            expected.enter_context(
                pytest.warns(UserWarning, match="come from transformers: too little memory on rank 1")
            )
        else:
            expected.enter_context(pytest.raises(RolloutError, match="rank 1"))
        assert start_chosen_engine(choice, None, None, on_all_ranks=other_rank_fails, max_length=8) is fallback
    assert engine.closed and not fallback.closed


SCRIPT = """
import json, os, sys
import torch
from reinforcepp import ReinforceConfig, ReinforceTrainer
from vllm.distributed import parallel_state

def reward(prompts, completions, completion_ids, **_):
    return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]

args = ReinforceConfig(
    output_dir=sys.argv[2], rollout="vllm", max_new_tokens=8, max_prompt_length=40, batch_size=8, max_steps=2,
    learning_rate=1e-2, eval_prompts=0, watchdog_seconds=60,
)
trainer = ReinforceTrainer(sys.argv[1], reward, args, [{"prompt": f"How do I check host {i}?"} for i in range(8)])
rank, engine, first = int(os.environ["RANK"]), trainer.engine, trainer.engine._llm

def run_out(*_, **__):
    raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

if rank == 1:  # on this rank alone
    first.generate = run_out
trainer.train()
worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
result = {
    "ranks": [worker.rank, worker.local_rank],
    "groups": [parallel_state._WORLD.world_size, parallel_state._TP.ranks],
    "max_num_seqs": engine.max_num_seqs,
    "restarted": engine._llm is not first,
}
open(f"{sys.argv[3]}/{rank}", "w").write(json.dumps(result))
engine.close()
"""


@needs_vllm
@pytest.mark.full
def test_two_ranks_generate_in_their_processes_and_one_restarts_alone(tmp_path, model_folder):
    """Both ranks stay in sync with the policy, which each step checks; vLLM's groups of two ranks outlive the restart."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = scripts.launched(2, tmp_path / "script.py", model_folder, tmp_path / "run", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first["ranks"] == [0, 0] and second["ranks"] == [1, 0]
    assert first["groups"] == [2, [0]] and second["groups"] == [2, [1]]
    assert not first["restarted"] and second["restarted"]
    assert second["max_num_seqs"] == first["max_num_seqs"] // 2
