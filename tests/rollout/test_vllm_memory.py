"""vLLM's share of a GPU: its activations, and room for what the trainer allocates later. Made numbers for cards of four sizes."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from rollout.contract import prepared_model, prepared_tokenizer
from transformers import MixtralConfig, Qwen2Config

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import RolloutError
from reinforcepp.planner.memory import Rows
from reinforcepp.planner.model_costs import RowSize
from reinforcepp.rollout import vllm_integration
from reinforcepp.rollout.factory import start_training_engine
from reinforcepp.rollout.selection import EngineChoice
from reinforcepp.rollout.vllm import memory
from reinforcepp.rollout.vllm.memory import activation_size, cache_bytes_per_token, gpu_utilization
from reinforcepp.rollout.vllm_integration import VllmEngine
from reinforcepp.training.learner import Learner

GIB = 1 << 30
MIB = 1 << 20
SMALL = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936,
)  # fmt: skip
LARGE = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064,
)  # fmt: skip


def test_activations_are_those_of_the_widest_layer_or_of_the_logits():
    size = activation_size(SMALL, torch.bfloat16)
    assert size.token == 2 * (4 * 896 + 3 * 4864)
    assert size.sequence == 151936 * (2 + 4 * 4)
    assert size.peak(1) == 768 * MIB + 8192 * size.token
    assert size.peak(512) == 768 * MIB + 512 * size.sequence > GIB  # logits of 512 sequences
    assert activation_size(LARGE, torch.float32).token == 4 * (4 * 3584 + 3 * 18944)
    experts = MixtralConfig(
        hidden_size=64, intermediate_size=100, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2
    )
    assert activation_size(experts, torch.bfloat16).token == 2 * (4 * 64 + 3 * 200)


@pytest.mark.parametrize("gib", [16, 24, 80, 141])
@pytest.mark.parametrize(("config", "parameters"), [(SMALL, 494_000_000), (LARGE, 7_600_000_000)], ids=["0.5B", "7B"])
def test_vllm_and_the_moments_fit_next_to_the_trainer(gib, config, parameters):
    total, weights = gib * GIB, 2 * parameters
    sequences = cache_bytes_per_token(config, torch.bfloat16), 2048, 128
    activations = activation_size(config, torch.bfloat16).peak(128)
    trainer = (2 + 2 + 4) * parameters  # policy and reference in bfloat16, float32 masters
    moments = 8 * parameters
    free = total - trainer - GIB
    arguments = total, moments, weights, activations, sequences
    one = sequences[0] * (2048 + memory.CPU_BLOCK)
    if 0.95 * free < moments + weights + activations + one:
        with pytest.raises(RolloutError, match="one sequence needs"):
            gpu_utilization(free, *arguments, None)
        assert gib == 16 or config is LARGE
        return
    share = gpu_utilization(free, *arguments, None)
    assert share * total + moments <= free
    assert one <= share * total - weights - activations <= 129 * one
    capped = gpu_utilization(free, *arguments, one)
    assert capped * total == pytest.approx(weights + activations + one)


def test_a_reserve_shrinks_the_cache_and_nothing_else():
    sequences = 12288, 4096, 4096
    shares = [gpu_utilization(20 * GIB, 24 * GIB, reserved, GIB, GIB, sequences, None) for reserved in (0, 4 * GIB)]
    assert (shares[0] - shares[1]) * 24 == pytest.approx(4)


def test_settings_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 24 * GIB))
    arguments = {"on_gpu": True, "max_length": 4096, "max_num_seqs": 4096}
    model = SimpleNamespace(parameters=lambda: [torch.empty(10**9, device="meta")])
    monkeypatch.setattr(memory, "base_model", lambda source: source)
    shares = [
        memory.memory_settings(model, SMALL, torch.bfloat16, reserved_bytes=reserved, **arguments)
        for reserved in (0, 2 * GIB)
    ]
    assert shares[0]["max_num_batched_tokens"] == 8192
    assert (shares[0]["gpu_memory_utilization"] - shares[1]["gpu_memory_utilization"]) * 24 == pytest.approx(2)
    asked = memory.memory_settings(model, SMALL, torch.bfloat16, gpu_memory_utilization=0.4, **arguments)
    assert asked == {"gpu_memory_utilization": 0.4, "max_num_batched_tokens": 8192}
    many = memory.memory_settings(
        model, SMALL, torch.bfloat16, gpu_memory_utilization=0.4, **arguments | {"max_num_seqs": 9000}
    )
    assert many["max_num_batched_tokens"] == 9000  # vLLM refuses fewer tokens than sequences


# --- what the trainer allocates later -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_moments_are_pending_until_the_first_step(precision):
    model = tiny.model()
    count = sum(parameter.numel() for parameter in model.parameters())
    learner = Learner(model, Ranks(), ReinforceConfig(mixed_precision=precision), learning_rate=1e-3, steps=2)
    assert learner.pending_moment_bytes == 8 * count
    learner.backward(model(torch.tensor([[40, 41]])).logits.float().sum())
    learner.step(learner.clip())
    assert learner.pending_moment_bytes == 0
    moments = [value for state in learner._masters.optimizer.state.values() for value in state.values() if value.dim()]
    assert sum(moment.nbytes for moment in moments) == 8 * count


def test_offloaded_moments_and_those_of_deepspeed_need_no_gpu_memory():
    learner = Learner(tiny.model(), Ranks(), ReinforceConfig(mixed_precision="no"), learning_rate=1e-3, steps=2)
    learner._ranks = SimpleNamespace(device=torch.device("cuda", 1), uses_deepspeed=False)
    assert learner.pending_moment_bytes == 0  # the masters are on the CPU
    learner._ranks = SimpleNamespace(device=torch.device("cpu"), uses_deepspeed=True)
    assert learner.pending_moment_bytes == 0


# --- waking up ------------------------------------------------------------------------------------------------------


def test_torch_returns_its_free_memory_before_vllm_wakes_up(monkeypatch):
    """vLLM maps memory itself, so it can't use what torch's allocator keeps from the update."""
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    engine = object.__new__(VllmEngine)
    engine._asleep, engine._weights_dropped, engine._llm = (
        True,
        False,
        SimpleNamespace(wake_up=lambda: calls.append("wake up")),
    )
    engine.wake_up()
    engine.wake_up()
    assert calls == ["empty", "wake up"] and not engine._asleep


# --- completions at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ranks", "on_cpu", "on_gpu"),
    [
        ({}, 1, 128, 128),  # a step has fewer
        ({"batch_size": 100, "num_generations": 4}, 1, 128, 400),
        ({"batch_size": 100, "num_generations": 4}, 3, 128, 136),  # 34 prompts of 100
        ({"batch_size": 512, "num_generations": 4}, 1, 128, 512),
        ({"batch_size": 512, "num_generations": 4, "rollout_batch_size": 7}, 1, 7, 7),
    ],
)
def test_vllm_on_a_gpu_generates_a_whole_step_at_a_time(changes, ranks, on_cpu, on_gpu):
    config = ReinforceConfig(**changes)
    assert [config.vllm_batch_size(ranks, on_gpu=where) for where in (False, True)] == [on_cpu, on_gpu]
    assert config.effective_rollout_batch_size == on_cpu
    shared = {"ranks": ranks, "device_kind": "cpu", "size": RowSize(100, 100)}
    jobs = [SimpleNamespace(**shared, vllm_on_gpu=where) for where in (False, True)]
    assert [Rows.of(config, job).concurrent for job in jobs] == [on_cpu, on_gpu]


def test_transformers_replaces_vllm_with_its_own_number_of_completions(monkeypatch):
    """It reserves a cache for all of them, so 512 could take too much memory."""

    def start(model, tokenizer, *, max_num_seqs, **_):
        started.append(max_num_seqs)
        raise RolloutError("no room.")

    started = []
    monkeypatch.setattr(vllm_integration, "VllmEngine", start)
    ranks = SimpleNamespace(count=1, run_or_raise_all=lambda function: function(), device=torch.device("cuda", 0))
    choice, config = EngineChoice("vllm", "", can_fall_back=True), ReinforceConfig(batch_size=300)
    with pytest.warns(UserWarning, match="come from transformers"):
        engine = start_training_engine(choice, prepared_model(), prepared_tokenizer(), config, ranks, 0, None, 40)
    assert started == [300] and engine.batch_size == 128
