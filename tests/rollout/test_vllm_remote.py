"""The engine with vLLM servers: the engines' contract over HTTP, weight transfer, and lost servers."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import httpx2
import psutil
import pytest
import tiny
import torch
from network import network
from rollout.contract import EngineContract, drawn, generate_plainly, prepared_model, prepared_tokenizer, prompts_of
from rollout.servers import KEY, Served
from rollout.without_nccl import stand_in

import scripts
from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli
from reinforcepp.errors import RolloutError
from reinforcepp.files import PARTIAL
from reinforcepp.monitoring.completion_log import COMPLETIONS, read_completions
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.rollout.vllm import server_pool
from reinforcepp.rollout.vllm.client import Timeouts
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.nccl import NcclServerTransfer
from reinforcepp.rollout.vllm.server_engine import VllmServerEngine
from reinforcepp.rollout.vllm.server_pool import ServerPool
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.types import Sampling

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(node_problem()), reason=node_problem())]
GREEDY = Sampling(24, temperature=0)
EXTENSION = "rollout.nccl_extension.Worker"
"""Our extension, in a server that also takes broadcasts without a GPU."""
NCCL = '--weight-transfer-config={"backend": "nccl"}'
GUARD = "--middleware=reinforcepp.commands.access.RequireKey"
SHORT = Timeouts(connect=2, health_interval=0.5, health=2, progress=60, rejoin=5)


@pytest.fixture(scope="module", autouse=True)
def key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        patch.setattr(server_pool, "EXTENSION", EXTENSION)
        yield


@pytest.fixture(scope="module")
def cable():
    made = network()
    yield made
    if made is not None:
        made.remove()


@pytest.fixture(scope="module")
def served(tmp_path_factory, cable):
    """Start a plain server with tied weights, and behind the cable one with all our additions and NCCL's stand-in, untied."""
    folder = tmp_path_factory.mktemp("served")
    tied, untied = tiny.save(folder / "tied", seed=3), tiny.save(folder / "untied", seed=3, tied=False)
    both = [
        Served(folder / "plain.log", tied),
        Served(folder / "extended.log", untied, f"--worker-extension-cls={EXTENSION}", NCCL, GUARD, network=cable),
    ]
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.end()


@pytest.fixture(scope="module")
def engine_of(served, tmp_path_factory):
    """Return a function that returns a cached engine for the servers with given numbers."""
    made = {}

    def engine(*numbers: int) -> VllmServerEngine:
        if numbers not in made:
            model = prepared_model(tied=numbers != (1,))
            made[numbers] = VllmServerEngine(
                [served[number].url for number in numbers],
                model,
                prepared_tokenizer(),
                max_length=200,
                batch_size=16,
                folder=tmp_path_factory.mktemp("run"),
                timeouts=SHORT,
            )
        return made[numbers]

    yield engine
    for each in made.values():
        each.close()


@pytest.fixture
def both(engine_of, monkeypatch):
    monkeypatch.setattr(server_pool, "FIRST_RETRY_SECONDS", 0.5)
    monkeypatch.setattr(server_pool, "MAX_RETRY_SECONDS", 1.0)
    engine = engine_of(0, 1)
    engine.load_weights(prepared_model())
    wait_until(engine, 2)
    return engine


def wait_until(engine: VllmServerEngine, number: int) -> None:
    """Poll until this many servers are ready; polling retries lost servers."""
    end = time.monotonic() + 60
    while len(engine.pool.ready()) < number:
        assert time.monotonic() < end, engine.pool._lost
        engine.pool._poll()


def expected(model, prompts, sampling=GREEDY):
    return {p.key: [generate_plainly(model, p, sampling.max_new_tokens)] for p in prompts}


class TestVllmServerEngine(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, engine_of, model):
        engine = engine_of(0)
        engine.load_weights(model)
        return engine


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1], ids=["tied, in files", "untied, in messages"])
def test_updates_arrive_and_a_missing_one_is_detected(engine_of, monkeypatch, number):
    engine, tokenizer = engine_of(number), prepared_tokenizer()
    for seed in (6, 7):
        model = prepared_model(seed=seed, tied=number == 0)
        engine.load_weights(model)
        assert check_sync(engine, model, tokenizer).tokens > 4
    transfer = engine.pool._transfer_for(engine.pool.clients[0])
    assert type(transfer).__name__ == ("FileTransfer", "MessageTransfer")[number]
    monkeypatch.setattr(transfer, "push", lambda server: None)
    other = prepared_model(seed=8, tied=number == 0)
    engine.load_weights(other)
    with pytest.raises(RolloutError, match="out of sync"):
        check_sync(engine, other, tokenizer)


def test_the_output_layer_is_part_of_an_update(engine_of):
    """An untied model has a separate output layer; a plain server on a CPU keeps one for a tied model too."""
    for number in (0, 1):
        engine, tokenizer = engine_of(number), prepared_tokenizer()
        model = prepared_model(tied=number == 0)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        engine.load_weights(model)
        check_sync(engine, model, tokenizer)


def test_large_models_are_sent_in_several_parts(engine_of, monkeypatch):
    monkeypatch.setattr("reinforcepp.rollout.vllm.server_transfer.FILE_BYTES", 50_000)
    monkeypatch.setattr("reinforcepp.rollout.vllm.server_transfer.MESSAGE_BYTES", 50_000)
    for number in (0, 1):
        engine, model = engine_of(number), prepared_model(seed=9, tied=number == 0)
        engine.load_weights(model)
        check_sync(engine, model, prepared_tokenizer())
    assert len(list(engine_of(0).pool._files.path.glob("weights-*/*.safetensors"))) > 3


def test_files_exist_as_long_as_they_are_needed(served, tmp_path):
    tokenizer, model = prepared_tokenizer(), prepared_model()
    left = tmp_path / f"rollout_weights{PARTIAL}" / "weights-old"  # left behind by a killed run
    left.mkdir(parents=True)
    engine = VllmServerEngine([served[0].url], model, tokenizer, max_length=200, folder=tmp_path)
    assert not left.exists()
    shutil.rmtree(left.parent)  # as the start of a training does
    engine.pool._start_loading(engine.pool.clients[0])
    wait_until(engine, 1)
    check_sync(engine, model, tokenizer)
    for _ in range(2):
        engine.load_weights(model)
        (present,) = left.parent.glob("weights-*")
    assert (present / "model-00000.safetensors").stat().st_mode & 0o044, "a server can run as another user"
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_server_cannot_read_breaks_nothing(engine_of, monkeypatch):
    engine, tokenizer = engine_of(0), prepared_tokenizer()
    model = prepared_model()
    engine.load_weights(model)
    files = engine.pool._files
    monkeypatch.setattr(files, "path", files.path / "elsewhere")
    with pytest.raises(RolloutError, match=r"can't read the weight folder .*elsewhere"):
        files.push(engine.pool.clients[0])
    monkeypatch.undo()
    check_sync(engine, model, tokenizer)


def test_weights_of_another_training_are_detected(engine_of, both, caplog):
    """Both trainings use the plain server; each restores its weights when it notices."""
    other, model = engine_of(0), prepared_model()
    other.load_weights(prepared_model(seed=5))
    prompts = prompts_of(prepared_tokenizer())
    assert drawn(both.generate(prompts, GREEDY)) == expected(model, prompts)
    assert both.dispatches[-1].lost == 1 and "holds other weights" in both.dispatches[-1].reasons[0]
    assert "another training uses it" in caplog.text


# --- generation and lost servers ------------------------------------------------------------------------------------


def test_with_the_extension_a_server_samples_like_every_engine(engine_of):
    engine, model, tokenizer = engine_of(1), prepared_model(seed=5, tied=False), prepared_tokenizer()
    engine.load_weights(model)
    prompts, sampling = prompts_of(tokenizer), Sampling(12, num_samples=3, seed=2)
    alone = TransformersEngine(model, tokenizer).generate(prompts, sampling)
    assert [c.ids for c in engine.generate(prompts, sampling)] == [c.ids for c in alone]


def test_prompts_are_dispatched_and_every_server_is_checked(both):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts = prompts_of(tokenizer, [f"Look at host {i}." for i in range(40)])
    assert drawn(both.generate(prompts, GREEDY)) == expected(model, prompts)
    assert both.dispatches[-1].chunks >= 3 and both.dispatches[-1].lost == 0
    one = check_sync(TransformersEngine(model, tokenizer), model, tokenizer).tokens
    assert check_sync(both, model, tokenizer).tokens == 2 * one


def while_it_generates(engine: VllmServerEngine, number: int, strike, monkeypatch) -> None:
    """Call ``strike`` when the server with that number starts to generate."""
    client, begun = engine.pool.clients[number], threading.Event()
    inner = client._sample

    async def sample(*arguments):
        if not begun.is_set():
            begun.set()
            strike()
        return await inner(*arguments)

    monkeypatch.setattr(client, "_sample", sample)


def test_a_stopped_server_is_lost_and_comes_back_with_the_current_weights(served, both, monkeypatch, caplog):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts = prompts_of(tokenizer, [f"Look at host {i}." for i in range(24)])
    while_it_generates(both, 0, lambda: served[0].signal(signal.SIGSTOP), monkeypatch)
    try:
        assert drawn(both.generate(prompts, GREEDY)) == expected(model, prompts)
        stats = both.dispatches[-1]
        assert (stats.lost, stats.requeued > 0) == (1, True) and "no longer responds" in stats.reasons[0]
        newer = prepared_model(seed=4)
        both.load_weights(newer)
        assert len(both.pool.ready()) == 1
    finally:
        served[0].signal(signal.SIGCONT)
    wait_until(both, 2)
    assert "is back and has the current weights" in caplog.text
    one = check_sync(TransformersEngine(newer, tokenizer), newer, tokenizer).tokens
    assert check_sync(both, newer, tokenizer).tokens == 2 * one


def test_a_disconnected_server_is_lost_and_comes_back(cable, both, monkeypatch):
    if cable is None:
        pytest.skip("network namespaces need rights that this user doesn't have")
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts = prompts_of(tokenizer, [f"Look at host {i}." for i in range(24)])
    while_it_generates(both, 1, cable.cut, monkeypatch)
    try:
        assert drawn(both.generate(prompts, GREEDY)) == expected(model, prompts)
        assert both.dispatches[-1].lost == 1
        both.load_weights(model)
    finally:
        cable.mend()
    wait_until(both, 2)
    check_sync(both, model, tokenizer)


def test_a_healthy_server_without_progress_is_lost(served, engine_of, monkeypatch):
    """Its engine hangs while its front end reports to be healthy."""
    engine = engine_of(0)
    engine.load_weights(prepared_model())
    client = engine.pool.clients[0]
    monkeypatch.setattr(client, "timeouts", replace(SHORT, progress=4))
    children = psutil.Process(served[0].process.pid).children(recursive=True)
    workers = [child for child in children if "Worker" in " ".join(child.cmdline())] or children
    for worker in workers:
        worker.suspend()
    try:
        engine.pool.begin(GREEDY)
        engine.pool.submit(client, prompts_of(prepared_tokenizer())[:1])
        assert "made no progress for 4 s" in engine.pool.wait().reason
    finally:
        for worker in workers:
            worker.resume()
    monkeypatch.undo()
    wait_until(engine, 1)


def takes_weights_by_nccl(server, folder, device, **shape) -> None:
    model, tokenizer = prepared_model(**shape).to(device), prepared_tokenizer()
    engine = VllmServerEngine([server.url], model, tokenizer, max_length=200, folder=folder)
    try:
        assert type(engine.pool._transfer_for(engine.pool.clients[0])) is NcclServerTransfer
        check_sync(engine, model, tokenizer)
        for seed in (1, 2):
            model = prepared_model(seed=seed, **shape).to(device)
            engine.load_weights(model)
            check_sync(engine, model, tokenizer)
    finally:
        engine.close()


def test_weights_are_broadcast_to_a_server_by_vllms_transfer(served, tmp_path, monkeypatch):
    """The broadcast goes through a TCP store instead of NCCL, without packing."""
    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(ServerPool, "_transfer_for", lambda self, client: self._nccl)
    takes_weights_by_nccl(served[1], tmp_path, "cpu", tied=False)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the trainer and one for the server")
def test_weights_are_broadcast_between_gpus(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        server = Served(tmp_path / "log", tiny.save(tmp_path / "base"), NCCL)
    try:
        server.wait()
        takes_weights_by_nccl(server, tmp_path, "cuda:0")
    finally:
        server.end()


# --- trainings ------------------------------------------------------------------------------------------------------


def likes_early_tokens(prompts, completions, completion_ids, **_):
    return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]


def training(base, folder, rollout, **changes) -> ReinforceTrainer:
    settings = {"max_new_tokens": 8, "max_prompt_length": 40, "batch_size": 8, "max_steps": 3, "learning_rate": 1e-2}
    settings |= {"eval_prompts": 0, "sync_check_every": 1, "rollout": rollout, "output_dir": str(folder)} | changes
    prompts = [{"prompt": f"How do I check host {i}?"} for i in range(8)]
    return ReinforceTrainer(str(base), likes_early_tokens, ReinforceConfig(**settings), prompts)


def test_a_training_with_a_server_equals_one_with_vllm_in_process(served, tmp_path):
    """With the extension the server samples like the in-process engine."""
    base, results = tiny.save(tmp_path / "base", tied=False), []
    for name, rollout in (("server", f"vllm://{served[1].address}"), ("process", "vllm")):
        trainer = training(base, tmp_path / name, rollout)
        trainer.train()
        trainer.engine.close()
        completions = [row["completion"] for row in read_completions(tmp_path / name / COMPLETIONS)]
        results.append((completions, trainer.policy.state_dict()))
    assert results[0][0] == results[1][0] and len(results[0][0]) == 24
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], rtol=0, atol=1e-6)
    assert not torch.equal(results[0][1]["lm_head.weight"], tiny.model(tied=False).lm_head.weight)


def test_a_server_serves_several_processes(served, tmp_path, pairs_csv):
    """Two ranks get from the server the completions that one process samples by itself."""
    base, completions = tiny.save(tmp_path / "base", tied=False), []
    for processes, rollout in ((1, "transformers"), (2, f"vllm://{served[1].address}")):
        run = tmp_path / f"by-{processes}"
        words = ["train", "--model", base, "--data", pairs_csv, "--rewards", "rule:length?max=20", "--output_dir", run]
        words += ["--rollout", rollout, "--max_steps", 2, "--batch_size", 3, "--max_new_tokens", 8, "--eval_prompts", 0]
        # AdamW turns the rounding errors of small gradients into whole steps, so the steps are small.
        words += ["--learning_rate", 1e-6, *(["--sync_check_every", 1] if processes > 1 else [])]
        done = scripts.launched(processes, "-m", "reinforcepp", *words, "--max_prompt_length", 40)
        assert done.returncode == 0, done.stderr
        completions.append(
            {(row["step"], row["prompt"]): row["completion"] for row in read_completions(run / COMPLETIONS)}
        )
    # Each check of the sync compares log-probabilities. Rounding depends on the CPU, and can turn a token sampled by another
    # engine; without the shared sampling seeds, no two of the completions would be equal.
    assert completions[0].keys() == completions[1].keys() and len(completions[0]) == 6
    assert sum(completions[0][key] == completions[1][key] for key in completions[0]) >= 4


def test_the_middleware_guards_the_endpoints_for_weights(served):
    """The other tests with this server show that the trainer gives the key to every endpoint."""
    with httpx2.Client(base_url=served[1].url, trust_env=False) as client:
        body = {"method": "reload_weights"}
        assert client.post("/collective_rpc", json=body).status_code == 401
        assert client.get("/server_info", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_wrong_key_is_reported_and_never_shown(served, model_folder, pairs_csv, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_API_KEY", "sk-another")
    arguments = ["train", "--model", model_folder, "--data", pairs_csv, "--rewards", "rule:length?max=20"]
    arguments += ["--rollout", f"vllm://{served[0].address}", "--output_dir", tmp_path / "run", "--max_new_tokens", 12]
    assert cli.main(list(map(str, arguments))) == 2
    err = capfd.readouterr().err
    assert "expects another key. Set VLLM_API_KEY" in err and "Traceback" not in err
    assert "sk-another" not in err + caplog.text


def test_another_model_is_refused_before_anything_breaks(served, engine_of, tmp_path):
    with pytest.raises(RolloutError, match=r"serves another model \('served'\).* lacks token 399"):
        VllmServerEngine(
            [served[0].url], prepared_model(vocab_size=400), prepared_tokenizer(), max_length=64, folder=tmp_path
        )
    with pytest.raises(
        RolloutError, match=r"takes sequences of 256 tokens, but this training needs 300.*\n.*vllm serve"
    ):
        VllmServerEngine(
            [served[0].url], prepared_model(n_positions=512), prepared_tokenizer(), max_length=300, folder=tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_saved_when_all_servers_are_killed(served, tmp_path, monkeypatch):
    """The first is killed in the middle of step 2 and the other before step 3. The last test: it leaves no server."""
    monkeypatch.setattr(server_pool, "FIRST_RETRY_SECONDS", 0.5)
    base = tiny.save(tmp_path / "base")
    addresses = ",".join(server.address for server in served)
    trainer = training(base, tmp_path / "run", f"vllm://{addresses}", max_steps=4, save_every=100)
    for client in trainer.engine.pool.clients:
        client.timeouts = SHORT
    trainer.engine.pool._timeouts = SHORT
    inner, steps = trainer.engine.generate, iter(range(100))

    def generate(prompts, sampling):
        step = next(steps)
        if step == 1:
            while_it_generates(trainer.engine, 1, lambda: served[1].signal(signal.SIGKILL), monkeypatch)
        if step == 2:
            served[0].signal(signal.SIGKILL)
        return inner(prompts, sampling)

    monkeypatch.setattr(trainer.engine, "generate", generate)
    with pytest.raises(RolloutError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "no vLLM server is available: " in message
    assert all(server.url in message for server in served) and "can't be reached" in message
    assert "Saved the run after step 2 of 4" in message
    answered = Counter((row["step"], row["prompt"]) for row in read_completions(tmp_path / "run" / COMPLETIONS))
    assert len(answered) == 16 and set(answered.values()) == {1}
    assert [stats.lost for stats in trainer.engine.dispatches] == [0, 1]
    trainer.engine.close()
