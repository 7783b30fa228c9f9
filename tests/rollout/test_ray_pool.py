"""The Ray pool on a real cluster of several local nodes: the engines' contract, killed workers, joining nodes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from rollout import without_nccl
from rollout.contract import EngineContract, prepared_model, prepared_tokenizer, prompts_of

from reinforcepp.commands import cli
from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, EngineLost, RolloutError
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import COMPLETIONS, read_completions
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rollout.ray import actor_pool, reward_pool
from reinforcepp.rollout.ray import engine as ray_engine
from reinforcepp.rollout.ray import worker as ray_worker
from reinforcepp.rollout.ray.actor_pool import RayPool, connect
from reinforcepp.rollout.ray.engine import RayEngine
from reinforcepp.rollout.ray.reward_pool import PooledReward, pool_rewards
from reinforcepp.rollout.ray.worker import Worker, WorkerSpec, as_array, as_tensor, check_ray_version, pack
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.rollout.vllm import nccl as vllm_nccl
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.nccl import NcclPoolTransfer
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.rollout.weight_transfer import WeightsNeeded, config_with_architecture
from reinforcepp.types import Sampling

ray = pytest.importorskip("ray")
load = RayPool._start_loading
needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


@pytest.fixture(scope="module")
def cluster():
    """Start a head without room for workers, and a node with room for two."""
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_worker_niceness="0")  # otherwise parallel tests starve the workers
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
    except (RuntimeError, ConnectionError, TimeoutError, OSError) as error:
        pytest.skip(f"Ray can't start a cluster on this machine: {error}")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pool(cluster):
    engine = RayEngine(
        cluster.address,
        prepared_model(),
        prepared_tokenizer(),
        engine="transformers",
        workers=2,
        max_length=200,
        batch_size=8,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def room(cluster):
    """Add a node for the tests that start other workers, one test after the other."""
    cluster.add_node(num_cpus=4)


def pids() -> list[int]:
    """Return the workers' process ids, by Ray's process names."""
    started_here = psutil.Process().children(recursive=True)
    return [p.pid for p in started_here if p.cmdline() and p.cmdline()[0].startswith("ray::Worker")]


class TestRayEngine(EngineContract):
    @pytest.fixture
    def engine(self, pool, model):
        pool.load_weights(model)
        return pool


def test_a_pool_generates_the_completions_of_one_engine(pool):
    model, tokenizer = prepared_model(seed=5), prepared_tokenizer()
    pool.load_weights(model)
    prompts, sampling = prompts_of(tokenizer), Sampling(12, num_samples=3, seed=2)
    alone = TransformersEngine(model, tokenizer).generate(prompts, sampling)
    assert [c.ids for c in pool.generate(prompts, sampling)] == [c.ids for c in alone]


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_buffers_arrive_unchanged(family, dtype):
    model = prepared_model(family).to(dtype)
    packed = pack(model)
    state = model.state_dict()
    assert packed.weights.keys() == state.keys()
    assert all(torch.equal(as_tensor(values), state[name]) for name, values in packed.weights.items())
    assert {name for name, _ in model.named_buffers()} == packed.buffers.keys()
    if model.config.tie_word_embeddings:
        addresses = [
            values[1].ctypes.data
            for name, values in packed.weights.items()
            if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight"))
        ]
        assert len(addresses) == 2 and len(set(addresses)) == 1
    narrow = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    assert torch.equal(as_tensor(as_array(narrow)), narrow)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_worker_rebuilds_the_model(family):
    """Rotary frequencies, which aren't saved, arrive too, and tied weights stay tied."""
    tokenizer, sampling = prepared_tokenizer(), Sampling(12, num_samples=2, seed=4)
    prompts, worker = prompts_of(tokenizer), None
    for seed in (0, 7):
        model = prepared_model(family, seed=seed)
        if worker is None:
            config = config_with_architecture(model)
            worker = Worker(WorkerSpec(config, model.generation_config, model.dtype, tokenizer, "transformers", 200, 8))
        assert worker.load(pack(model)) == "transformers"
        expected = TransformersEngine(model, tokenizer).generate(prompts, sampling)
        assert [c.ids for of_prompt in worker.process(prompts, sampling) for c in of_prompt] == [
            c.ids for c in expected
        ]


@needs_vllm
def test_a_worker_with_vllm(monkeypatch):
    tokenizer, sampling = prepared_tokenizer(), Sampling(12, temperature=0)
    model = prepared_model()
    config = config_with_architecture(model)
    worker = Worker(WorkerSpec(config, model.generation_config, model.dtype, tokenizer, "vllm", 200, 8))
    try:
        for seed in (0, 7):
            model = prepared_model(seed=seed)
            assert worker.load(pack(model)) == "vllm"
            expected = TransformersEngine(model, tokenizer).generate(prompts_of(tokenizer), sampling)
            answers = worker.process(prompts_of(tokenizer), sampling)
            assert [c.ids for of_prompt in answers for c in of_prompt] == [c.ids for c in expected]
        assert worker.in_transfer_group() is None  # without a GPU
        monkeypatch.setattr(worker.engine, "transfer", lambda *step: None)  # without a group
        worker.finish_transfer()
        worker.engine._in_transfer_group = True
        with pytest.raises(WeightsNeeded):
            worker.engine._restart(RuntimeError("failed in the middle of a batch"))
        with pytest.raises(WeightsNeeded):
            worker.process(prompts_of(tokenizer), sampling)
        later = prepared_model(seed=8)
        assert worker.load(pack(later)) == "vllm"
        check_sync(worker.engine, later, tokenizer)
        assert not worker.engine._in_transfer_group
    finally:
        worker.engine.close()


@pytest.fixture
def broadcasting(cluster, room, monkeypatch):
    """Return a function that starts real workers with vLLM; the broadcast goes through a TCP store, without vLLM's packing.

    The engine comes with a list that gets "packed" when weights are packed for Ray's object store, and the number of each
    worker that loads them.
    """
    ray.cloudpickle.register_pickle_by_value(without_nccl)
    without_nccl.stand_in(monkeypatch.setattr)
    monkeypatch.setattr(ray_engine, "Worker", without_nccl.Taker)
    engines, by_store = [], []

    def start(workers):
        sizes = {"workers": workers, "max_length": 200, "batch_size": 8}
        engine = RayEngine(cluster.address, prepared_model(), prepared_tokenizer(), engine="vllm", **sizes)
        engines.append(engine)
        while len(engine.pool.ready()) < workers:
            engine.pool.wait()
        engine._nccl = NcclPoolTransfer(engine.ray)
        counted = lambda pool, number: by_store.append(number) or load(pool, number)  # noqa: E731
        monkeypatch.setattr(RayPool, "_start_loading", counted)
        monkeypatch.setattr(actor_pool, "pack", lambda model: by_store.append("packed") or pack(model))
        return engine, by_store

    yield start
    for engine in engines:
        engine.close()


def updated_by_broadcast(engine):
    for seed in (1, 2):
        model = prepared_model(seed=seed)
        engine.load_weights(model)
        check_sync(engine, model, prepared_tokenizer())


@pytest.mark.full
@needs_vllm
def test_weights_are_broadcast_to_workers_by_vllms_transfer(broadcasting):
    engine, by_store = broadcasting(1)
    updated_by_broadcast(engine)
    assert by_store == [] and len(engine._nccl._workers) == 1


@pytest.mark.full
@needs_vllm
def test_a_replaced_worker_joins_the_broadcast(broadcasting):
    engine, by_store = broadcasting(2)
    updated_by_broadcast(engine)
    assert by_store == [] and len(engine._nccl._workers) == 2
    dead, left = engine.pool.ready()
    ray.kill(engine.pool.actors[dead])
    for seed in (3, 4):  # its replacement gets the current weights from the store, and later ones by broadcast
        model = prepared_model(seed=seed)
        engine.load_weights(model)
        while len(engine.pool.ready()) < 2:
            engine.pool.wait()
        check_sync(engine, model, prepared_tokenizer())
        assert len(by_store) == 2 and "packed" in by_store and len(engine._nccl._workers) == seed - 2
    assert left in engine._nccl._workers


@pytest.mark.full
@needs_vllm
def test_an_engine_that_fails_after_a_broadcast_starts_again_with_the_same_weights(broadcasting):
    engine, by_store = broadcasting(1)
    updated_by_broadcast(engine)
    (number,) = engine.pool.call_all("fail_once")
    check_sync(engine, prepared_model(seed=2), prepared_tokenizer())
    assert sorted(map(str, by_store)) == [str(number), "packed"] and engine.pool.ready() == [number]
    updated_by_broadcast(engine)
    assert len(by_store) == 2


@pytest.mark.gpu
@needs_vllm
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the trainer and one for a worker")
def test_weights_are_broadcast_between_gpus(cluster, monkeypatch):
    """Unless ``CUDA_VISIBLE_DEVICES`` is set, the trainer has the first GPU and Ray the second."""
    tokenizer, model = prepared_tokenizer(), prepared_model().to("cuda:0")
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        cluster.add_node(num_cpus=1, num_gpus=1)
    engine = RayEngine(cluster.address, model, tokenizer, engine="vllm", workers=1, max_length=200, batch_size=8)
    try:
        for seed in (1, 2):
            model = prepared_model(seed=seed).to("cuda:0")
            engine.load_weights(model)
            check_sync(engine, model, tokenizer)
        assert len(engine._nccl._workers) == 1
    finally:
        engine.close()


@pytest.mark.parametrize("failure", ["refused", "hangs"])
def test_after_a_failed_broadcast_weights_go_through_the_store(failure, monkeypatch):
    """Workers that can still be waiting for the broadcast are replaced; two failures in a row disable it."""
    replaced, sent = [], []
    engine = object.__new__(RayEngine)
    engine.pool = SimpleNamespace(
        actors={2: "two", 5: "five", 7: "of another kind"},
        call_all=lambda method: {2: True, 5: False, 7: None},
        replace=lambda numbers: replaced.extend(numbers),
    )
    engine._nccl, engine._broadcast_failures = NcclPoolTransfer(ray), 0

    def send(workers, rebuild):
        model = engine._nccl.model
        assert workers == {2: "two", 5: "five"} and rebuild
        sent.append(workers)
        if model == "works":
            return
        if failure == "hangs":
            threading.Event().wait(30)
        raise ray.exceptions.RaySystemError("Duplicate GPU detected")

    monkeypatch.setattr(engine._nccl, "_send", send)
    monkeypatch.setattr(vllm_nccl, "POOL_TIMEOUT_SECONDS", 0.1 if failure == "hangs" else 20)
    why = {
        "refused": r"can't load the weights over NCCL \(.*Duplicate GPU",
        "hangs": r"didn't load the weights within 0\.1 s",
    }[failure]
    for what in ("fails", "works", "fails", "fails again"):
        if what == "works":
            assert engine._broadcast(what) == {2, 5}
            continue
        which = "All further weights" if what == "fails again" else "These weights"
        with pytest.warns(UserWarning, match=f"The Ray pool {why}.* {which} go through Ray's object store"):
            assert engine._broadcast(what) == set()
    assert replaced == [2, 5] * 3
    assert engine._broadcast("works") == set() and len(sent) == 4


def test_each_worker_is_checked_for_the_current_weights(pool):
    tokenizer, model = prepared_tokenizer(), prepared_model()
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        pool.load_weights(model)
        report = check_sync(pool, model, tokenizer)
        assert report.tokens > 4 * 16  # of both workers
    number = pool.pool.ready()[1]
    old = pool.ray.put(pack(prepared_model(seed=9)))
    pool.ray.get(pool.pool.actors[number].load.remote(old))  # one of them missed the update
    with pytest.raises(RolloutError, match="out of sync"):
        check_sync(pool, model, tokenizer)


def test_killed_workers_are_replaced_and_every_prompt_is_completed_once(pool):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    pool.load_weights(model)
    prompts = [p for key in range(20) for p in [prompts_of(tokenizer)[key % 7]]]
    prompts = [type(p)(p.text, p.ids, key) for key, p in enumerate(prompts)]
    sampling = Sampling(100, num_samples=4, seed=3)
    undisturbed = pool.generate(prompts, sampling)
    before = len(pool.dispatches)
    stop = threading.Event()

    def kill():
        for _ in range(2):
            time.sleep(0.4)
            there = pids()
            if there and not stop.is_set():
                os.kill(there[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while killer.is_alive():
            assert [c.ids for c in pool.generate(prompts, sampling)] == [c.ids for c in undisturbed]
    finally:
        stop.set()
        killer.join()
    assert sum(stats.lost for stats in pool.dispatches[before:]) >= 1
    check_sync(pool, model, tokenizer)


@pytest.mark.full
def test_a_node_can_join_and_leave(cluster, pool, monkeypatch):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts, sampling = prompts_of(tokenizer), Sampling(8, seed=1)
    expected = [c.ids for c in TransformersEngine(model, tokenizer).generate(prompts, sampling)]
    pool.load_weights(model)
    before = len(pool.pool.ready())
    monkeypatch.setattr(pool.pool, "_max_workers", before + 1)
    node = cluster.add_node(num_cpus=1)
    begin = time.monotonic()
    while len(pool.pool.ready()) == before and time.monotonic() - begin < 150:
        pool.pool._poll()
    assert len(pool.pool.ready()) == before + 1
    cluster.remove_node(node, allow_graceful=False)
    assert [c.ids for c in pool.generate(prompts, sampling)] == expected
    pool.load_weights(model)
    assert [c.ids for c in pool.generate(prompts, sampling)] == expected


def test_a_late_worker_loads_the_current_weights(pool, monkeypatch):
    """A worker that is still loading at the next update loads the newer weights before it gets a chunk."""
    tokenizer, model = prepared_tokenizer(), prepared_model()
    pool.load_weights(model)
    workers, number = pool.pool, pool.pool.ready()[0]
    workers._start_loading(number)
    monkeypatch.setattr(actor_pool, "LOAD_TIMEOUT_SECONDS", 0)
    late = prepared_model(seed=3)
    pool.load_weights(late)
    while number not in workers.ready():
        workers.wait()
    check_sync(pool, late, tokenizer)


def test_an_error_in_a_worker_is_raised(pool):
    prompt = prompts_of(prepared_tokenizer())[0]
    with pytest.raises(RolloutError, match="exceed the model's context"):
        pool.generate([prompt], Sampling(10_000))
    with pytest.raises(RolloutError, match=r"A rollout worker failed: .*top_p"):
        pool.generate([prompt], Sampling(2, top_p=-1.0))


def test_a_cluster_without_room(cluster, monkeypatch):
    monkeypatch.setattr(actor_pool, "WORKER_READY_TIMEOUT_SECONDS", 2)
    monkeypatch.setattr(RayPool, "_grow", lambda self: None)
    with pytest.raises(RolloutError, match=r"no rollout worker was ready within 2 seconds. The cluster has .* CPUs"):
        RayEngine(cluster.address, prepared_model(), prepared_tokenizer(), max_length=100)


def test_a_local_cluster_that_fails_is_reported_without_a_command_that_does_not_reach_it(monkeypatch):
    def init(**options):
        raise RuntimeError("no space left")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RolloutError, match=r"can't start a Ray cluster on this node \(no space left\)") as caught:
        connect("local")
    assert "ray status" not in str(caught.value)


def test_a_missing_cluster_is_reported_at_once(monkeypatch, tmp_path):
    begin = time.monotonic()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(RolloutError, match="belongs to no Ray cluster"):
        connect("auto")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    for address in ("auto", "127.0.0.1:9"):
        with pytest.raises(RolloutError, match=r"no Ray cluster responds at 127.0.0.1:9 \(Connection refused\)"):
            connect(address)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("rollout", ["ray://", "ray://nonsense", "ray://a:b", "ray:auto", "Ray://auto", "vlm"])
def test_invalid_rollout_settings(rollout):
    with pytest.raises(ConfigError, match="rollout must be one of auto, transformers, vllm, or ray://auto"):
        ReinforceConfig(rollout=rollout)


def test_pool_settings():
    assert ReinforceConfig(rollout="ray://10.0.0.1:6379", rollout_workers=3).rollout_workers == 3
    with pytest.raises(ConfigError, match="rollout_workers is a setting of ray:// pools"):
        ReinforceConfig(rollout_workers=3)
    with pytest.raises(ConfigError, match="reward_workers is a setting of ray:// pools"):
        ReinforceConfig(reward_workers=1)
    with pytest.raises(ConfigError, match=r"vllm_tensor_parallel_size is a setting of ray:// pools.*vllm serve"):
        ReinforceConfig(vllm_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"load_in_4bit.*Ray pool"):
        ReinforceConfig(rollout="ray://auto", use_peft=True, load_in_4bit=True)


@pytest.mark.full
def test_an_asynchronous_training_with_a_pool(cluster, room, model_folder, pairs_csv, tmp_path):
    """At the first step its workers sample the same completions as the trainer; later rounding error sets them apart."""
    drawn = []
    pool = f"ray://{cluster.address}"
    for rollout, staleness in ((pool, 1), ("transformers", 0)):
        folder = tmp_path / f"{rollout.partition(':')[0]}{staleness}"
        arguments = ["train", "--model", model_folder, "--data", pairs_csv, "--rewards", "rule:length?max=20"]
        arguments += ["--rollout", rollout, "--output_dir", folder, "--max_new_tokens", 12, "--max_steps", 2]
        arguments += ["--rollout_workers", 1, "--sync_check_every", 1] if rollout == pool else []
        arguments += ["--staleness", staleness] if staleness else []
        assert cli.main(list(map(str, arguments))) == 0
        drawn.append([row["completion"] for row in read_completions(folder / COMPLETIONS) if row["step"] == 1])
        log = read_metrics(folder)
        assert len(log) == 2 and log[1].get("staleness", 0) == staleness
    assert drawn[0] == drawn[1] and len(drawn[0]) > 4


def test_a_node_with_another_version_is_rejected():
    model = prepared_model()
    worker = Worker(
        WorkerSpec(config_with_architecture(model), None, model.dtype, prepared_tokenizer(), "transformers", 200, 8)
    )
    with pytest.raises(RolloutError, match=r"The trainer has reinforcepp 0\.0\.9, but .*, a node of the pool, has"):
        worker.load(replace(pack(model), version="0.0.9"))


@pytest.mark.full
def test_a_reward_model_in_the_pool(cluster, room, reward_folder, monkeypatch):
    """The pool scores like the local model, each text once even if a worker dies; the local weights are released."""
    rewards = load_rewards(str(reward_folder))
    (alone,) = rewards.trained
    asked = [f"How do I check host {i}?" for i in range(60)]
    answers = [f"Run ping -c {i} host{i} and read the last line. " * (1 + i % 5) for i in range(60)]
    expected, word = alone(asked, answers), rewards.fingerprint()
    engine, first = SimpleNamespace(ray=connect(cluster.address)[0]), RankZero(Ranks(), 0)
    monkeypatch.setattr(reward_pool, "CHUNK_SIZE", 4)
    with pytest.raises(ConfigError, match=r"reward_workers .*engine doesn't run on Ray"):
        pool_rewards(rewards, engine, 2, first)
    reward = PooledReward(alone, lambda: engine.ray, 2, first)
    try:
        assert reward.card is not None and reward.name == "reward_model" and word
        assert {p.device.type for p in reward.model.parameters()} == {"meta"}
        assert reward(asked, answers) == pytest.approx(expected, abs=1e-5)
        assert reward.dispatches[-1].chunks >= 4
        victim = reward.pool.ready()[0]
        engine.ray.kill(reward.pool.actors[victim])
        assert reward(asked, answers) == pytest.approx(expected, abs=1e-5)
        assert reward.dispatches[-1].lost == 1 and reward([], []) == []
    finally:
        reward.pool.close()


@pytest.mark.full
def test_a_training_with_both_in_the_pool(cluster, room, model_folder, pairs_csv, reward_folder, tmp_path):
    rewards, drawn = [], []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        arguments = ["train", "--model", model_folder, "--data", pairs_csv, "--reward_model", reward_folder]
        arguments += ["--output_dir", folder, "--max_new_tokens", 12, "--max_steps", 2, "--eval_prompts", 2]
        pool = ["--rollout", f"ray://{cluster.address}", "--rollout_workers", 1, "--reward_workers", 1]
        pool += ["--sync_check_every", 1]
        arguments += pool if workers else ["--rollout", "transformers"]
        assert cli.main(list(map(str, arguments))) == 0
        first_step = [row for row in read_completions(folder / COMPLETIONS) if row["step"] == 1]
        rewards.append([row["reward"] for row in first_step])
        drawn.append([row["completion"] for row in first_step])
        assert len(read_metrics(folder)) == 2
    assert drawn[0] == drawn[1] and rewards[1] == pytest.approx(rewards[0], abs=1e-5)


def test_a_pool_without_reward_models(model_folder, pairs_csv, tmp_path, capsys):
    """The error comes before anything starts."""
    arguments = ["train", "--model", model_folder, "--data", pairs_csv, "--rewards", "rule:length?max=20"]
    arguments += ["--output_dir", tmp_path / "run", "--rollout", "ray://192.0.2.1:6379", "--reward_workers", 1]
    assert cli.main(list(map(str, arguments))) == 2
    assert "none of the rewards is a trained reward model" in capsys.readouterr().err


def pool_of(head="127.0.0.1:9"):
    """Return a pool without workers; of its cluster only the head's address exists."""
    context = SimpleNamespace(gcs_address=head)
    return RayPool(
        SimpleNamespace(
            put=lambda value: value,
            get_runtime_context=lambda: context,
            cluster_resources=dict,
            wait=lambda refs, **_: ([ref for ref in refs if ref == "runs"], []),
        ),
        Worker,
        None,
        1,
    )


def test_the_last_loss_is_named_when_no_worker_is_left():
    pool = pool_of()
    pool._check_time(time.monotonic())  # there is time left
    pool._last_loss = "The node was parted from the others."
    with pytest.raises(EngineLost, match=r"no rollout worker was ready .* was lost: The node was parted"):
        pool._check_time(time.monotonic() - 1e6)
    pool._ready[3] = None
    pool._check_time(time.monotonic() - 1e6)


def test_a_worker_that_loads_its_model_is_waited_for_and_its_progress_printed(capsys):
    """A process that runs isn't a missing one: a cold start of a large model takes longer than 180 seconds."""
    pool, now = pool_of(), time.monotonic()
    pool._processes = {0: "pending", 1: "pending"}
    pool._check_time(now - 100)
    pool._check_time(now - 100)  # too early for another message
    assert capsys.readouterr().err == "Waiting for rollout workers for 100 s: the cluster has no room for them yet.\n"
    with pytest.raises(EngineLost, match="no rollout worker was ready within 180 seconds"):
        pool._check_time(now - 200)
    pool._processes[1], pool._next_message = "runs", 0.0
    pool._check_time(now - 1700)
    assert "1700 s: 1 of them load and compile the model." in capsys.readouterr().err
    with pytest.raises(EngineLost, match="1 rollout workers have loaded the model for 1800 seconds"):
        pool._check_time(now - 1900)
    pool.actors[1] = object()
    pool._forget(1)  # its process died
    with pytest.raises(EngineLost, match="no rollout worker was ready within 180 seconds"):
        pool._check_time(now - 200)


@pytest.mark.parametrize(
    ("there", "needs", "started"), [({"GPU": 7.0, "CPU": 9.0}, {"num_gpus": 3}, 2), ({"CPU": 9.0}, {"num_gpus": 3}, 3)]
)
def test_each_worker_takes_tensor_parallel_size_gpus(there, needs, started, monkeypatch):
    pool = pool_of()
    pool._gpus, pool._max_workers = 3, 0
    asked = []
    actor = SimpleNamespace(load=SimpleNamespace(remote=lambda weights: object()))
    actor.__ray_ready__ = SimpleNamespace(remote=lambda: "pending")
    made = SimpleNamespace(remote=lambda spec: actor)
    pool._ray.remote = lambda worker: SimpleNamespace(options=lambda **given: asked.append(given) or made)
    pool._ray.cluster_resources = lambda: there
    monkeypatch.setattr(pool, "_head_responds", lambda: True)
    pool._grow()
    assert asked == [needs] * started
    pool._ready.clear()
    with pytest.raises(EngineLost, match="each worker needs 3"):
        pool._check_time(time.monotonic() - 1e6)


def test_tensor_parallelism_needs_vllm():
    model = prepared_model()
    spec = WorkerSpec(
        config_with_architecture(model), model.generation_config, model.dtype, None, "transformers", 200, 8, 2
    )
    with pytest.raises(RolloutError, match=r"vllm_tensor_parallel_size 2: vLLM can't be used on"):
        Worker(spec).load(pack(model))


def test_an_unreachable_head_stops_the_run(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = pool_of(":".join(map(str, server.getsockname())))
        assert pool._head_responds() and pool._head_lost_at is None
    assert not pool._head_responds()  # and no request goes to Ray
    pool._ray.cluster_resources = None
    pool._grow()
    since = pool._head_lost_at
    assert since is not None and not pool._head_responds() and pool._head_lost_at == since
    monkeypatch.setattr(actor_pool, "HEAD_TIMEOUT_SECONDS", -1)
    with pytest.raises(EngineLost, match=r"the head of the Ray cluster, 127\.0\.0\.1:\d+, hasn't been reachable"):
        pool._head_responds()


@pytest.mark.parametrize(("installed", "accepted"), [("2.51.1", False), ("2.52.0", True), ("3.0.0.dev0", True)])
def test_a_ray_without_authentication_is_rejected(installed, accepted, monkeypatch):
    """On the trainer's node before it connects, and on each node of the pool before it loads weights."""
    monkeypatch.setattr(ray_worker, "versions_of", lambda names: {"ray": installed})
    if accepted:
        check_ray_version()
        return
    model = prepared_model()
    worker = Worker(WorkerSpec(config_with_architecture(model), None, model.dtype, None, "transformers", 200, 8))
    for use in (lambda: connect("local"), lambda: worker.load(pack(model))):
        with pytest.raises(
            RolloutError, match=rf"Ray 2\.51\.1 on {socket.gethostname()} ignores authentication tokens"
        ):
            use()


AUTHENTICATION = "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"


@pytest.mark.parametrize(
    ("stranger", "own", "outcome"),
    [
        ("", "", "accepts anyone"),
        (AUTHENTICATION, "", "connects with a token"),
        (AUTHENTICATION, AUTHENTICATION, "requires another token"),
        ("timeout", "", "Ray decides"),
    ],
)
def test_a_cluster_without_authentication_is_reported(stranger, own, outcome, monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(
        actor_pool, "_authentication_problem", lambda address, mode: {"disabled": stranger, "token": own}[mode]
    )
    read = []
    monkeypatch.setattr(actor_pool, "_reread_authentication", lambda: read.append(os.environ["RAY_AUTH_MODE"]))
    if outcome == "requires another token":
        with pytest.raises(
            RolloutError, match=r"cluster at head:1 requires a token, and this process has none or another"
        ):
            actor_pool._check_authentication("head:1")
    else:
        for _ in range(2):
            actor_pool._check_authentication("head:1")
    warnings = [record.getMessage() for record in caplog.records if "requires no token" in record.getMessage()]
    assert len(warnings) == (outcome == "accepts anyone")
    assert ("token" in read) == (outcome == "connects with a token") == (os.environ["RAY_AUTH_MODE"] == "token")


def test_the_token_of_a_local_cluster_exists_only_while_ray_starts(monkeypatch):
    """Programs that the trainer starts later don't inherit it, and the user's own settings return."""
    from ray._private import ray_constants

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    before, loopback = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    tokens = []
    for failure in (None, ConnectionError):
        with suppress(ConnectionError), actor_pool._private_cluster():
            assert ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            assert ray._raylet.AuthenticationTokenLoader.instance().get_raw_token() == tokens[-1]
            if failure:
                raise failure
        assert dict(os.environ) == before and loopback == ray_constants.ENABLE_RAY_CLUSTER
        actor_pool._reread_authentication()
        assert ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.DISABLED
    assert len(set(tokens)) == 2 and min(map(len, tokens)) == 64


def test_without_ray_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RolloutError, match="pip install 'ray"):
        connect("auto")
