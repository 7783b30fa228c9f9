"""The planner: hand-counted shapes and bytes, comparison with real passes, the largest batches, and the printed plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise, product

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.traced import frozen_model, trained_model

from reinforcepp.commands import cli
from reinforcepp.config import ComputeConfig, PlanConfig
from reinforcepp.config.accelerators import ACCELERATORS
from reinforcepp.config.reinforce import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models import loading as models
from reinforcepp.models import precision
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.token_logprobs import CHUNK_BYTES
from reinforcepp.planner import device, lengths, memory, report, search, timing
from reinforcepp.planner.command import _engine, make_plan
from reinforcepp.planner.memory import Job, Rows
from reinforcepp.planner.model_costs import Pass, RowSize, TrainedModel
from reinforcepp.planner.trace import Line, MemoryTracker, Peak, peak_of
from reinforcepp.rollout.vllm.memory import activation_size
from reinforcepp.training.critic import Critic
from reinforcepp.training.learner import Learner
from reinforcepp.types import Completion, Prompt

F32, BF16 = torch.float32, torch.bfloat16
SIZE = RowSize(prompt=12, new=20)
# of tests/tiny.py
WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS, INNER = 64, 2, 2, 320, 256, 128
GPT2 = VOCABULARY * WIDTH + POSITIONS * WIDTH + LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH
LLAMA = 2 * VOCABULARY * WIDTH + LAYERS * (WIDTH * WIDTH * 3 + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH


@cache
def shape(family: str = "gpt2", dtype: torch.dtype = F32, size: RowSize = SIZE, **changes) -> TrainedModel:
    return trained_model(tiny.model(family, tied=family != "llama").config, dtype, size, **changes)


@cache
def job(dtype: torch.dtype = F32, gpus: int = 0, critic: bool = False, engine: str = "transformers") -> Job:
    return Job(
        policy=shape(dtype=dtype),
        reward=frozen_model(tiny.model().config, dtype, SIZE),
        critic=shape(dtype=dtype, values=True) if critic else None,
        judge=None,
        size=SIZE,
        dtype=dtype,
        engine=engine,
        gpus=gpus,
        ranks=max(1, gpus),
    )


def rows(step: int = 8, micro: int = 4, passes: int = 2, evaluated: int = 0, concurrent: int = 128) -> Rows:
    return Rows(step, step, evaluated, concurrent, micro, passes)


def config(**changes) -> PlanConfig:
    lengths = {"max_prompt_length": SIZE.prompt, "max_new_tokens": SIZE.new, "eval_prompts": 0}
    return PlanConfig(**(lengths | changes))


# --- what is counted of a model -------------------------------------------------------------------------------------


def test_parameters_equal_those_of_the_real_model():
    assert GPT2 == 136_960 and LLAMA == 115_008
    for family, expected in (("gpt2", GPT2), ("llama", LLAMA)):
        assert shape(family).parameters == expected
        assert expected == sum(p.numel() for p in tiny.model(family, tied=family != "llama").parameters())


def test_a_reward_model_has_a_score_head_instead_of_the_output_layer():
    assert frozen_model(tiny.model().config, F32, SIZE).parameters == GPT2 + WIDTH
    llama = tiny.model("llama", tied=False).config
    assert frozen_model(llama, F32, SIZE).parameters == LLAMA - VOCABULARY * WIDTH + WIDTH


def test_a_critic_has_a_separate_output_layer():
    values = shape(values=True)
    assert (values.parameters, values.head, values.vocabulary) == (GPT2 + WIDTH, WIDTH, 1)
    assert shape("llama", values=True).parameters == LLAMA - VOCABULARY * WIDTH + WIDTH


def test_sizes_of_the_output_layer_the_cache_and_the_packed_weights():
    policy = shape()
    assert (policy.head, policy.tied, policy.vocabulary, policy.layers) == (20_480, True, 320, 2)
    assert policy.packed == LAYERS * 12 * WIDTH**2 + VOCABULARY * WIDTH == 118_784
    assert policy.cache_per_token == 2 * LAYERS * WIDTH * 4 == 1024
    llama = shape("llama", BF16)
    assert llama.cache_per_token == 2 * LAYERS * (WIDTH // 2) * 2 == 256  # one head of keys for two of queries
    assert not llama.tied
    assert (policy.widened_cache, llama.widened_cache) == (0, 0)
    narrow = shape(dtype=BF16)  # the transformers engine on a CPU keeps its cache in float32
    assert narrow.cache_per_token == narrow.widened_cache == 512
    assert replace(job(), policy=narrow, dtype=BF16).cache_per_token == 1024
    assert replace(job(), policy=narrow, dtype=BF16, gpus=1).cache_per_token == 512


def test_flops_are_two_per_weight_and_token_plus_attention():
    policy, body = shape(), LAYERS * 12 * WIDTH**2
    pairs = 4 * WIDTH * LAYERS
    assert policy.row_flops == 2 * body * SIZE.length + pairs * SIZE.length**2
    assert policy.prompt_flops == 2 * body * SIZE.prompt + pairs * SIZE.prompt**2
    assert policy.token_flops == 2 * (body + VOCABULARY * WIDTH) + pairs
    assert frozen_model(tiny.model().config, F32, SIZE).row_flops == policy.row_flops


def test_activations_that_gpt2_keeps_for_the_backward_pass():
    """Of a token in a layer: input and output of both norms, queries, keys and values, attention's output, and four times
    the width before and after the activation; the norms' statistics, attention's sums, and a row of the mask."""
    length = SIZE.length
    layer = 16 * WIDTH + 4 + HEADS + length
    last = 2 * WIDTH + 2
    floats = (LAYERS * layer + last) * length + SIZE.new * WIDTH
    line = shape().first.at_head
    assert line == Line(gradients=0, constant=0, per_row=4 * floats + 8 * length)
    assert shape().later.at_head.gradients == 4 * GPT2


def test_the_score_pass_keeps_only_the_last_hidden_states():
    line = shape().score.at_head
    assert line.at(3) == 3 * 4 * WIDTH * SIZE.length
    assert shape().score.peak.at(3).other < shape().first.peak.at(3).other / 3


def test_gradients_end_up_in_float32_one_by_one():
    later = shape(dtype=BF16).later
    assert later.at_head.gradients == 4 * GPT2
    assert sum(later.peak.at(1)) < 6 * GPT2  # With all gradients in bfloat16, too, it would be more.


def test_capped_logits_count_in_the_pass_of_the_model():
    from transformers import Gemma2Config

    capped = Gemma2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
    )
    assert capped.final_logit_softcapping
    with_cap = trained_model(capped, F32, SIZE)
    capped.final_logit_softcapping = None
    without = trained_model(capped, F32, SIZE)
    assert (with_cap.separate_logits, without.separate_logits) == (False, True)
    assert with_cap.first.at_head.per_row - without.first.at_head.per_row > 4 * VOCABULARY * SIZE.new
    assert memory.chunk_bytes(job(), with_cap, 4) == 0


def test_a_mixture_of_experts_counts_active_experts_per_token():
    from transformers import MixtralConfig

    mixture = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
    )
    counted = trained_model(mixture, BF16, SIZE)
    experts = 4 * 3 * 64 * 128
    assert counted.parameters > experts
    dense = 2 * (VOCABULARY * WIDTH + WIDTH * WIDTH * 3 + experts // 2)  # two of the four work on each token
    assert counted.token_flops == pytest.approx(dense, rel=0.02)


def test_unsupported_models_are_errors():
    from transformers import BloomConfig, CLIPConfig

    with pytest.raises(ModelError, match="no causal language model of the type clip"):
        trained_model(CLIPConfig(), F32, SIZE)
    with pytest.raises(ModelError, match=r"type bloom .* meta device"):
        trained_model(BloomConfig(hidden_size=64, n_head=2, n_layer=1, vocab_size=VOCABULARY), F32, SIZE)


# --- compared with real passes ---------------------------------------------------------------------------------------------


def real_peak(
    family: str, dtype: torch.dtype, number: int, passes: int, values: bool, computing: ComputeConfig | None = None
) -> int:
    """Most bytes alive in real passes of the trainer's own code, apart from the weights."""
    chosen = asdict(computing or ComputeConfig()) | {"mixed_precision": "bf16" if dtype == BF16 else "no"}
    settings = ReinforceConfig(**chosen, learning_rate=1e-5)
    model = models.with_fused_gelu(tiny.model(family, tied=family != "llama"))
    if settings.use_peft:
        model = with_adapter(model, settings, seed=0)
    kind = (lambda *args, learning_rate, **named: Critic(*args, **named)) if values else Learner
    learner = kind(model, Ranks(), settings, learning_rate=1e-5, steps=1)
    generator = torch.Generator().manual_seed(0)
    lengths = [SIZE.prompt - i % 3 for i in range(number)]  # of different length, so that they are padded
    prompts, answers = (
        [tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()) for n in sizes]
        for sizes in (lengths, [SIZE.new] * number)
    )
    completions = [
        Completion(Prompt("", ids, 0), answer, (), "", "length") for ids, answer in zip(prompts, answers, strict=True)
    ]

    def run() -> torch.Tensor:
        if values:
            return learner.values(completions, range(number), SIZE.new, 0)
        return response_logprobs(learner.model, prompts, answers, pad_id=0)[0]

    run().sum().backward()  # what is set up at the first pass isn't counted
    learner.drop_gradients()
    with MemoryTracker() as live:
        for _ in range(passes):
            with learner.learning():
                learner.backward(run().sum())
    return max(map(sum, live.snapshots))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", F32),
        ("qwen2", BF16),
        pytest.param("gpt2", BF16, marks=pytest.mark.full),
        pytest.param("llama", F32, marks=pytest.mark.full),
    ],
)
def test_the_peak_of_a_real_update(family, dtype, passes, values):
    number = 6
    learner = shape(family, dtype, values=values)
    counted = replace(job(dtype), policy=learner)
    expected = sum(memory.training(counted, rows(number, number, passes)).values())
    real = real_peak(family, dtype, number, passes, values)
    assert expected == pytest.approx(real, rel=0.06)


LORA = ComputeConfig(use_peft=True, lora_r=4)
SAVING = {
    "lora": LORA,
    "both": replace(LORA, gradient_checkpointing=True),
    "recomputed": ComputeConfig(gradient_checkpointing=True),
}
DEFAULT = {("lora", F32, "gpt2"), ("both", BF16, "llama"), ("recomputed", F32, "llama")}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype", "family"),
    [
        pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.full)
        for case in product(SAVING, [F32, BF16], ["gpt2", "llama"])
    ],
)
def test_the_peak_of_a_real_update_with_adapters_or_recomputed_activations(name, dtype, family, passes):
    number, settings = 6, SAVING[name]
    learner = shape(family, dtype, settings=settings)
    expected = sum(memory.training(replace(job(dtype), policy=learner), rows(number, number, passes)).values())
    assert expected == pytest.approx(real_peak(family, dtype, number, passes, False, settings), rel=0.1)


def test_sizes_of_an_adapter():
    rank, learner = 4, shape("llama", settings=LORA)
    per_layer = rank * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + WIDTH // 2) + 3 * (WIDTH + INNER))
    assert learner.trained == LAYERS * per_layer
    assert learner.parameters == LLAMA + learner.trained
    assert learner.stored == 4 * learner.parameters
    adapted = replace(job(), policy=learner)
    assert memory.static(adapted) == {
        "policy": 4 * learner.parameters,
        "AdamW's moments": 8 * learner.trained,
        "reward model": 4 * (GPT2 + WIDTH),
    }
    assert memory.loading(adapted) == {"policy": 4 * learner.parameters, "reward model": 4 * (GPT2 + WIDTH)}
    assert memory.stepping(adapted) == {"gradients": 4 * learner.trained}
    assert memory.saving(adapted) == {"checkpoint copies": 8 * learner.trained}
    narrow = replace(job(BF16), policy=shape("llama", BF16, settings=LORA))
    assert memory.static(narrow)["float32 weights"] == 4 * learner.trained
    plain = config()
    assert timing.update_flops(adapted, rows(), plain) < 0.75 * timing.update_flops(job(), rows(), plain) * (
        learner.row_flops / job().policy.row_flops
    )
    again = timing.update_flops(job(), rows(), config(gradient_checkpointing=True))
    assert again == pytest.approx(4 / 3 * timing.update_flops(job(), rows(), plain))


def test_sizes_of_4_bit_weights():
    learner = shape("llama", BF16, settings=replace(LORA, load_in_4bit=True))
    linear = LLAMA - 2 * VOCABULARY * WIDTH - (2 * LAYERS + 1) * WIDTH
    own = 2 * (LLAMA - linear) + round(linear * (4 + 8 / 64 + 32 / 256 / 64) / 8)
    assert learner.stored == own + 2 * learner.trained
    assert learner.packed == 0


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_offloading_adamw_frees_gpu_memory_and_costs_time(dtype):
    here = replace(job(dtype, gpus=1), policy=shape("gpt2", dtype))
    near = replace(here, offload=True)
    away = replace(near, policy=shape("gpt2", dtype, cpu_sums=True), sums_on_cpu=True)
    assert set(memory.static(away)) == set(memory.static(near)) == {"policy", "reference", "reward model"}
    assert memory.stepping(near) == memory.stepping(here) == {"gradients": 4 * GPT2}
    assert memory.stepping(away) == {"gradients": 0}
    one, many = rows(passes=1), rows(passes=3)
    assert memory.training(away, one)["gradients"] == memory.training(away, many)["gradients"]
    assert memory.training(away, many)["gradients"] <= 2 * VOCABULARY * WIDTH * dtype.itemsize
    assert sum(memory.training(away, many).values()) < sum(memory.training(here, many).values())
    assert timing.adam_seconds(away, one, config(), 1e15) > timing.adam_seconds(here, one, config(), 1e15)
    assert timing.adam_seconds(away, many, config(), 1.0) > timing.adam_seconds(away, one, config(), 1.0)
    assert timing.adam_seconds(near, many, config(), 1.0) == timing.adam_seconds(away, one, config(), 1.0)


def test_a_plan_with_an_offloaded_optimizer(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    settings = {
        "model": str(tmp_path),
        "gpus": 1,
        "gpu_memory": 1.0,
        "mixed_precision": "bf16",
        "rollout": "transformers",
    }
    here, away = (make_plan(config(**settings, offload_optimizer=offload)) for offload in (False, True))
    assert memory.total(here.phases["adamw"]) - memory.total(away.phases["adamw"]) >= 12 * GPT2
    settings["gpu_memory"] = 15 * GPT2 / 2**30  # too small for the sums of the gradients
    here, away = (make_plan(config(**settings, offload_optimizer=offload)) for offload in (False, True))
    assert memory.total(here.phases["adamw"]) - memory.total(away.phases["adamw"]) >= 16 * GPT2
    assert any("16 bytes per weight" in note for note in report.assumptions(away))
    assert not any("CPU memory" in note for note in report.assumptions(here))
    on_cpu = make_plan(config(model=str(tmp_path), device="cpu", offload_optimizer=True))
    assert "AdamW's moments" in on_cpu.phases["adamw"]


# --- lines and peaks ------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 50)),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 500),
)
def test_the_peak_equals_the_largest_snapshot(moments, number):
    few, many = ([(g, c + s * n) for g, c, s in moments] for n in (2, 4))
    from reinforcepp.planner.trace import Snapshot

    peak = peak_of([[Snapshot(*m) for m in few], [Snapshot(*m) for m in many]])
    assert sum(peak.at(number)) == max(g + c + s * number for g, c, s in moments)


def test_runs_with_different_operations_give_the_line_through_their_peaks():
    from reinforcepp.planner.trace import Snapshot

    peak = peak_of([[Snapshot(0, 10), Snapshot(0, 30)], [Snapshot(0, 50), Snapshot(0, 20), Snapshot(0, 40)]])
    assert peak.at(6) == (0, 70)


def test_tensors_count_while_they_are_alive():
    with MemoryTracker() as live:
        a = torch.zeros(100)
        b = a * 2
        del a
        c = b[:50]  # a view takes nothing
        del b
        d = c + 1
    assert [m.other for m in live.snapshots] == [400, 800, 400, 600]
    assert (d.numel(), live.operations) == (50, 4)


# --- bytes of the parts ---------------------------------------------------------------------------------------------


def test_static_memory():
    plain = memory.static(job())
    reward = GPT2 + WIDTH
    assert plain == {
        "policy": 4 * GPT2,
        "AdamW's moments": 8 * GPT2,
        "reference": 4 * GPT2,
        "reward model": 4 * reward,
    }
    assert memory.static(job(BF16)) == {
        "policy": 2 * GPT2,
        "float32 weights": 4 * GPT2,
        "AdamW's moments": 8 * GPT2,
        "reference": 2 * GPT2,
        "reward model": 2 * reward,
    }
    assert memory.static(job(critic=True))["critic"] == 12 * (GPT2 + WIDTH)
    assert memory.static(job(BF16, critic=True))["critic"] == 14 * (GPT2 + WIDTH)
    assert "gradient buckets" not in memory.static(job(gpus=1))
    assert memory.static(job(gpus=2))["gradient buckets"] == 4 * GPT2
    assert "gradient buckets" not in memory.static(job(BF16, gpus=2))
    judged = replace(job(), judge=job().reward)
    assert memory.static(judged)["judge"] == 4 * reward
    assert memory.static(replace(job(BF16), rollout_copies=3))["copies to sample"] == 3 * 2 * GPT2


def test_memory_while_models_are_loaded():
    assert memory.loading(job()) == {"policy": 4 * GPT2, "reference": 4 * GPT2, "reward model": 4 * (GPT2 + WIDTH)}
    assert memory.loading(job(BF16, critic=True)) == {
        "policy": 4 * GPT2,
        "float32 weights": 4 * GPT2,
        "reward model": 2 * (GPT2 + WIDTH),
        "critic": 6 * (GPT2 + WIDTH),
    }


def test_memory_of_the_optimizer_step_and_the_checkpoint():
    assert memory.stepping(job()) == {"gradients": 4 * GPT2}
    assert memory.stepping(job(critic=True)) == {"gradients": 4 * (2 * GPT2 + WIDTH)}
    assert memory.saving(job()) == {"checkpoint copies": 8 * GPT2}
    assert memory.saving(job(BF16)) == {"checkpoint copies": 12 * GPT2}
    assert memory.saving(job(gpus=1)) == {}


@pytest.mark.parametrize(("prompt", "new", "room"), [(32, 64, 160), (32, 129, 160), (32, 130, 289), (32, 448, 547)])
def test_the_cache_length_equals_that_of_the_preallocated_cache(prompt, new, room):
    from reinforcepp.rollout.kv_cache import preallocated_cache

    assert memory.cache_length(RowSize(prompt, new)) == room
    model = tiny.model("llama", num_hidden_layers=1)
    cache = preallocated_cache(model.config)
    layer = cache.layers[0]
    layer.update(torch.zeros(1, 1, prompt, 4), torch.zeros(1, 1, prompt, 4))
    for _ in range(new - 1):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert layer._buffers[0].shape[-2] == room


def test_memory_of_rollouts_by_transformers():
    parts = memory.generating(job(), rows(step=8, concurrent=5))
    cache = 5 * (12 + 128) * 1024
    assert parts == {
        "key-value cache": cache * 1.5,  # one of two layers is held twice
        "logits": 5 * VOCABULARY * (4 + 4 + 1),
        "packed weights": 4 * 118_784,
    }
    evaluated = memory.generating(job(), rows(step=8, evaluated=20))
    assert evaluated["key-value cache"] == 20 * (12 + 128) * 1024 * 1.5
    on_gpu = memory.generating(job(BF16, gpus=1), rows(step=8))
    assert "packed weights" not in on_gpu
    assert on_gpu["logits"] == 8 * VOCABULARY * (4 + 4 + 2 + 1)


def test_a_long_prompt_with_many_rows_peaks_before_the_first_token():
    long = replace(job(), size=RowSize(200, 2), policy=shape(size=RowSize(200, 2)))
    parts = memory.generating(long, rows(step=8))
    assert parts["activations"] == long.policy.prefill.peak.at(8).other > 0
    shared = memory.generating(long, replace(rows(step=8), prompts=1))
    assert shared.get("activations", 0) == 0


def test_vllm_holds_its_weights_in_every_phase_only_on_a_cpu():
    here, there = job(engine="vllm"), job(gpus=1, engine="vllm")
    block = 32 * 1024  # of the 32 tokens of a sequence
    assert memory.vllm_memory(here, rows(concurrent=4)) == {
        "vLLM's weights": 4 * (GPT2 + 20_480),
        "key-value cache": (4 + 1) * block,
    }
    on_gpu = memory.vllm_memory(there, rows(concurrent=4))
    assert on_gpu["vLLM's weights"] == 4 * GPT2
    assert on_gpu["activations"] == activation_size(tiny.model().config, F32).peak(4) > 768 << 20
    assert memory.vllm_memory(here, rows(concurrent=10**6))["key-value cache"] == 256 << 20
    everywhere, rollout_only = memory.phases(here, rows()), memory.phases(there, rows())
    assert all("vLLM's weights" in parts for parts in everywhere.values())
    assert [name for name, parts in rollout_only.items() if "vLLM's weights" in parts] == ["rollout"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_memory_of_servers_is_not_counted(gpus):
    assert memory.generating(job(gpus=gpus, engine="servers"), rows()) == {}
    asked = config(rollout="vllm://a:1,b:2")
    engine, note = _engine(asked, on_gpu=False)
    assert engine == "servers" and "aren't included" in note


def test_bytes_of_the_rollout_batch():
    assert memory.batch_bytes(job(gpus=1), rows(step=10)) == 10 * 20 * (7 * 4 + 3 * 8)
    assert memory.batch_bytes(job(), rows(step=10)) == 10 * 20 * (7 * 4 + 3 * 8 + 72)


# --- logits ---------------------------------------------------------------------------------------------------------


def test_logits_that_fit_into_a_chunk_are_kept_and_overwritten_by_their_gradient():
    policy = shape()
    assert memory.chunk_bytes(job(), policy, 4) == 4 * 20 * VOCABULARY * 4
    logits, weights = memory.logits_bytes(job(), policy, 4)
    assert (logits, weights) == (3 * 4 * 20 * VOCABULARY * 4, 0)  # with probabilities and products


def test_bytes_of_softmax_blocks():
    policy = shape()
    assert memory.block_bytes(job(), policy, 4) == 2 * 4 * 20 * VOCABULARY * 4
    assert memory.block_bytes(job(BF16), policy, 4) == 3 * 4 * 20 * VOCABULARY * 4
    assert memory.block_bytes(job(), policy, 1000) == 2 * ((2 << 20) // (4 * VOCABULARY)) * 4 * VOCABULARY
    assert memory.block_bytes(job(), replace(policy, vocabulary=1 << 20), 1000) == 2 * (4 << 20)
    assert memory.block_bytes(job(gpus=1), policy, 10**6) == 2 * ((128 << 20) // (4 * VOCABULARY)) * 4 * VOCABULARY


def test_more_logits_are_computed_in_chunks():
    large = replace(shape(), vocabulary=1 << 20, head=1 << 24)
    limit = CHUNK_BYTES["cpu"]
    assert memory.chunk_bytes(job(), large, 100) == limit == limit // (4 << 20) * (4 << 20)
    # a chunk of logits and blocks with one gradient of the output layer, or a chunk with two of them
    blocks = 2 * (4 << 20)
    assert memory.logits_bytes(job(), replace(large, head=1), 100) == (limit + blocks, 4)
    heavy = replace(large, head=1 << 27)
    assert memory.logits_bytes(job(), heavy, 100) == (limit, 2 * (4 << 27))
    single = replace(heavy, vocabulary=VOCABULARY)
    assert memory.logits_bytes(job(), single, 1) == (20 * VOCABULARY * 4, 4 << 27)


# --- phases ---------------------------------------------------------------------------------------------------------


def passing(line: Line, at_head: Line | None = None) -> Pass:
    return Pass(Peak((line,)), at_head or line)


def made_up(first: Line, later: Line, **changes) -> TrainedModel:
    return replace(shape(), separate_logits=False, vocabulary=1, first=passing(first), later=passing(later), **changes)


def test_gradients_of_earlier_passes_count_from_the_second_pass_on():
    policy = made_up(Line(0, 1000, 10), Line(500, 1000, 10))
    one = replace(job(), policy=policy)
    assert memory.training(one, rows(micro=3, passes=1)) == {"gradients": 0, "activations": 1030, "logits": 0}
    assert memory.training(one, rows(micro=3, passes=2)) == {"gradients": 500, "activations": 1030, "logits": 0}


def test_policy_and_critic_each_train_while_the_other_holds_gradients():
    policy = made_up(Line(0, 9000, 0), Line(400, 9000, 0), trained=100)
    critic = made_up(Line(0, 5000, 0), Line(800, 5000, 0), trained=200)
    both = replace(job(), policy=policy, critic=critic)
    assert memory.training(both, rows(passes=1))["gradients"] == 0
    assert memory.training(both, rows(passes=2)) == {"gradients": 1200, "activations": 9000, "logits": 0}
    larger = replace(both, critic=replace(critic, first=passing(Line(0, 9000, 0)), later=passing(Line(800, 9000, 0))))
    assert memory.training(larger, rows(passes=1)) == {"gradients": 400, "activations": 9000, "logits": 0}


def test_scoring_runs_larger_micro_batches_than_training():
    reward = replace(job().reward, score=passing(Line(0, 0, 10**6)))
    policy = replace(shape(), score=Pass(Peak((Line(0, 0, 10),)), Line(0, 0, 10)))
    asked = replace(job(), reward=reward, policy=policy)
    assert memory.scoring(asked, rows(step=200, micro=16))["activations"] == 64_000_000
    assert memory.scoring(asked, rows(step=5, evaluated=30, micro=16))["activations"] == 30_000_000
    free = replace(asked, reward=replace(reward, score=passing(Line(0, 0, 0))))
    chunk = 4 * 20 * VOCABULARY * 4
    assert memory.scoring(free, rows(micro=1)) == {"activations": 40, "logits": 3 * chunk}
    assert memory.scoring(free, rows(micro=1, evaluated=30))["activations"] == 160
    judged = replace(free, judge=replace(reward, score=passing(Line(0, 0, 10**7))))
    assert memory.scoring(judged, rows(evaluated=3))["activations"] == 3 * 10**7


def test_every_phase_contains_static_memory_and_its_own():
    found = memory.phases(job(), rows())
    assert tuple(found) == memory.PHASES
    for name in memory.PHASES[1:]:
        assert memory.static(job()).items() <= found[name].items()
        own = [part for part in found[name] if part not in (*memory.static(job()), "libraries", "rollout batch")]
        counted = sum(found[name][part] for part in own if part != "allocator")
        assert found[name]["allocator"] == pytest.approx(memory.ALLOCATOR["cpu"] * counted)
    assert {part for parts in found.values() for part in parts} <= set(memory.PARTS)
    assert all(parts["libraries"] == memory.LIBRARIES["cpu"] for parts in found.values())
    ahead = memory.phases(replace(job(), rollout_copies=1), rows())[
        "update"
    ]  # and beside it, completions are generated
    beside = memory.generating(job(), rows())
    assert ahead["packed weights"] == beside["packed weights"] and ahead["gradients"] == found["update"]["gradients"]
    assert ahead["logits"] == pytest.approx(found["update"]["logits"] + beside["logits"])
    with_vllm = memory.phases(job(engine="vllm"), rows())
    assert with_vllm["save"]["libraries"] == memory.LIBRARIES["cpu"] + memory.VLLM["cpu"]


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        ({}, 0, Rows(8, 8, 0, 128, 8, 1)),
        ({"batch_size": 10, "num_generations": 3, "micro_batch_size": 4}, 1, Rows(30, 10, 0, 128, 4, 8)),
        ({"batch_size": 10, "micro_batch_size": 4, "gradient_accumulation_steps": 2}, 0, Rows(10, 10, 0, 128, 4, 2)),
        ({"batch_size": 10, "micro_batch_size": 8}, 4, Rows(3, 3, 0, 128, 3, 1)),
        ({"eval_prompts": 7, "rollout_batch_size": 5}, 0, Rows(8, 8, 7, 5, 8, 1)),
        ({"max_tokens_per_micro_batch": 100}, 0, Rows(8, 8, 0, 128, 3, 3)),
        ({"max_tokens_per_micro_batch": 100, "micro_batch_size": 2}, 0, Rows(8, 8, 0, 128, 2, 4)),
        ({"max_tokens_per_micro_batch": 9}, 0, Rows(8, 8, 0, 128, 1, 8)),
        ({"batch_size": 2000}, 0, Rows(2000, 2000, 0, 128, 64, 32)),
        ({"batch_size": 2000}, 1, Rows(2000, 2000, 0, 128, 256, 8)),
    ],
)
def test_rows_of_a_device(changes, gpus, expected):
    assert Rows.of(config(**changes), job(gpus=gpus)) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 200), st.sampled_from([0, 1]), st.booleans())
def test_more_rows_never_need_less_memory(step, micro, concurrent, gpus, critic):
    one = job(gpus=gpus, critic=critic)

    def peaks(step: int, micro: int, concurrent: int) -> list[float]:
        return [memory.total(p) for p in memory.phases(one, rows(step, micro, 2, concurrent=concurrent)).values()]

    before = peaks(step, micro, concurrent)
    for larger in (
        peaks(step + 1, micro, concurrent),
        peaks(step, micro + 1, concurrent),
        peaks(step, micro, concurrent + 1),
    ):
        assert all(a <= b for a, b in zip(before, larger, strict=True))


def test_longer_rows_need_more_memory():
    sizes = [RowSize(12, 20), RowSize(13, 20), RowSize(12, 40), RowSize(50, 200)]
    for short, long in pairwise(sizes):
        peaks = [
            sum(memory.training(replace(job(), policy=shape(size=size), size=size), rows()).values())
            for size in (short, long)
        ]
        assert peaks[0] < peaks[1]


# --- the largest batches --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.9, 1.6),
    st.integers(2, 24),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["transformers", "vllm"]),
    st.integers(1, 3),
)
def test_the_largest_batch_fits_and_one_more_row_does_not(factor, batch_size, accumulation, engine, mini):
    one = job(engine=engine)
    wanted = config(batch_size=batch_size, micro_batch_size=min(mini, batch_size // 2), eval_prompts=3)
    wanted = replace(wanted, gradient_accumulation_steps=accumulation)
    limit = factor * max(memory.total(p) for p in memory.phases(one, Rows.of(wanted, one)).values())
    found = search.largest(one, wanted, limit)

    def fits(changed: Rows, names=memory.PHASES) -> bool:
        return all(memory.total(memory.phases(one, changed)[name]) <= limit for name in names)

    now = Rows.of(wanted, one)
    others = [name for name in memory.PHASES if name != "rollout"]
    upper = batch_size if accumulation is None else batch_size // accumulation
    sizes = [n for n in range(1, upper + 1) if fits(search.with_micro(now, wanted, n), others)]
    assert found.micro_batch_size == max(sizes, default=0)
    generated = memory.PHASES if engine == "vllm" else ["rollout"]
    numbers = [n for n in range(1, max(batch_size, 3) + 1) if fits(replace(now, concurrent=n), generated)]
    assert found.rollout_batch_size == max(numbers, default=0)
    if found.batch_size:
        assert fits(search.with_prompts(now, wanted, found.batch_size, one))
    if found.batch_size < search.MAX_PROMPTS:
        assert not fits(search.with_prompts(now, wanted, found.batch_size + 1, one))


def test_limits_equal_the_plans_of_those_settings():
    wanted = config(batch_size=12, num_generations=2, micro_batch_size=4)
    assert search.with_micro(Rows.of(wanted, job()), wanted, 5) == Rows.of(replace(wanted, micro_batch_size=5), job())
    assert search.with_prompts(Rows.of(wanted, job()), wanted, 3, job()) == Rows.of(
        replace(wanted, batch_size=3), job()
    )
    plain = config(batch_size=2)
    assert search.with_prompts(Rows.of(plain, job()), plain, 30, job()) == Rows.of(config(batch_size=30), job())


def test_one_pass_can_fit_if_two_smaller_ones_do_not():
    assert search.largest_fitting(8, lambda size: size in (1, 2, 3, 8)) == 8
    assert search.largest_fitting(8, lambda size: size <= 5) == 5
    assert search.largest_fitting(8, lambda size: False) == 0
    assert search.largest_fitting(1, lambda size: True) == 1


# --- time -----------------------------------------------------------------------------------------------------------


def test_adamw_moves_28_bytes_per_weight():
    assert timing.adam_bytes(job(), config()) == 28 * GPT2
    assert timing.adam_bytes(job(BF16), config()) == 30 * GPT2
    assert timing.adam_bytes(job(), config(num_iterations=3)) == 3 * 28 * GPT2
    several = config(micro_batch_size=2, gradient_accumulation_steps=2)
    assert timing.adam_bytes(job(), several) == 2 * 28 * GPT2


def test_flops_of_scoring_and_update():
    policy, answers = shape(), shape().row_flops + 2 * 20_480 * 20
    assert timing.forward_flops(policy, 20) == answers
    assert timing.update_flops(job(), rows(step=8), config()) == 3 * 8 * answers
    assert timing.update_flops(job(), rows(step=8), config(num_iterations=2)) == 6 * 8 * answers
    assert timing.reward_flops(job(), rows(step=8)) == 8 * policy.row_flops
    assert timing.logprob_flops(job(), rows(step=8, passes=1), config()) == 8 * answers
    again = config(num_iterations=2)  # the policy has moved on, so its own log-probabilities are asked for
    assert timing.logprob_flops(job(), rows(step=8), again) == 8 * 2 * answers
    chunks = replace(job(), policy=replace(policy, vocabulary=1 << 20))
    assert timing.update_flops(chunks, rows(step=8), config()) == 8 * (3 * answers + 2 * 20_480 * 20)
    both = job(critic=True)
    assert timing.update_flops(both, rows(step=8), config()) == 24 * (answers + both.critic.row_flops)
    assert timing.logprob_flops(both, rows(step=8, passes=1), config()) == 8 * (answers + both.critic.row_flops)


FULL = lengths.full_length(SIZE.new)
NEVER = 1e30


def speeds(products: float = NEVER, decoding: float = NEVER, reading: float = NEVER, **calls: float) -> timing.Speeds:
    return timing.Speeds(products, decoding, reading, **calls)


def test_seconds_of_a_rollout():
    policy, one = shape(), job()
    read = 4 * 118_784 + 8 * (12 + 10) * 1024
    assert timing.rollout_seconds(one, rows(8), speeds(reading=1e6), FULL) == pytest.approx(20 * read / 1e6)
    in_two = 20 * (2 * 4 * 118_784 + 8 * (12 + 10) * 1024) / 1e6
    assert timing.rollout_seconds(one, rows(8, concurrent=4), speeds(reading=1e6), FULL) == pytest.approx(in_two)
    assert timing.batches(rows(8, concurrent=3)) == [3, 3, 2]
    prompts = 8 * (policy.prompt_flops + 2 * 20_480) / 1e6
    assert timing.rollout_seconds(one, rows(8), speeds(products=1e6), FULL) == pytest.approx(prompts)
    tokens = 20 * 8 * policy.token_flops / 1e6
    assert timing.rollout_seconds(one, rows(8), speeds(decoding=1e6), FULL) == pytest.approx(tokens)
    calls = 20 * policy.token_calls * 1e-5
    assert timing.rollout_seconds(one, rows(8), speeds(call=1e-5), FULL) == pytest.approx(calls)
    assert timing.rollout_seconds(job(engine="vllm"), rows(8), speeds(call=1e-5), FULL) == pytest.approx(0)
    both = speeds(reading=1e6, decoding=1e6)
    assert timing.rollout_seconds(one, rows(8), both, FULL) == pytest.approx(max(tokens, 20 * read / 1e6))


def test_4_bit_weights_are_read_in_their_stored_size():
    narrow = replace(job(), policy=replace(shape(), packed=0, stored=1000, cache_per_token=0))
    assert timing.rollout_seconds(narrow, rows(8), speeds(reading=1e6), FULL) == pytest.approx(20 * 1000 / 1e6)


def test_library_calls_overlap_with_the_work_of_a_gpu():
    read = 20 * (4 * 118_784 + 8 * 22 * 1024) / 1e9
    for call in (1e-6, 2e-5):
        calls, slow = 20 * shape().token_calls * call, speeds(reading=1e9, call=call)
        assert timing.rollout_seconds(job(gpus=1), rows(8), slow, FULL) == pytest.approx(max(read, calls))
        assert timing.rollout_seconds(job(), rows(8), slow, FULL) == pytest.approx(read + calls)
    passes = 3 * 2 * shape().token_calls * 1e-4
    work = timing.update_flops(job(), rows(8), config()) / 1e9
    slow = speeds(products=1e9, pass_call=1e-4)
    assert timing.pass_seconds(job(gpus=1), rows(8), config(), slow, FULL) == pytest.approx(max(work, passes))
    assert timing.pass_seconds(job(), rows(8), config(), slow, FULL) == pytest.approx(work + passes)


def test_library_calls_of_scoring():
    calls = shape().token_calls

    def counted(one: Job, step: int, wanted: PlanConfig) -> float:
        return timing.scoring_seconds(one, rows(step, micro=1), wanted, speeds(pass_call=1.0), FULL) / calls

    assert counted(job(), 8, config()) == pytest.approx(2 + 2)  # the reward model and the reference, each in two
    assert counted(job(), 80, config(batch_size=80)) == pytest.approx(20 + 20)
    assert counted(job(), 8, config(num_iterations=2)) == pytest.approx(2 + 2 * 2)
    assert counted(job(critic=True), 8, config()) == pytest.approx(2 + 2 * 2)
    assert counted(replace(job(), reward=replace(job().reward, parameters=0)), 8, config()) == pytest.approx(2)


def test_a_step_reaches_a_fraction_of_the_peak_rates():
    sheet = timing.achieved(device.Rates(1e9, 1e9, measured=False))
    assert sheet == timing.Speeds(0.4e9, 0.4e9, 0.6e9, 10e-6, 10e-6)
    here = timing.achieved(device.Rates(1e9, 2e9, measured=True))
    shares = timing.UTILIZATION_OF_MEASURED
    assert here == (shares.products * 1e9, shares.decoding * 1e9, shares.reading * 2e9, shares.call, shares.pass_call)
    assert timing.achieved(device.Rates(10.0, 10.0, measured=True), timing.Utilization(0.1, 0.2, 0.3, 4, 5)) == (
        1,
        2,
        3,
        4,
        5,
    )
    seconds = timing.step_seconds(job(gpus=1), rows(8), config(), speeds(products=1e6, reading=1e9), FULL)
    operations = timing.update_flops(job(gpus=1), rows(8), config())
    assert seconds["update"] == pytest.approx(operations / 1e6 + 28 * GPT2 / 1e9)
    scoring = timing.reward_flops(job(), rows(8)) + timing.logprob_flops(job(), rows(8), config())
    assert seconds["scoring"] == pytest.approx(scoring / 1e6)


# --- the device -----------------------------------------------------------------------------------------------------


def test_rates_of_a_data_sheet():
    found = device.device_for(config(device="h100"), BF16)
    assert (found.title, found.gpus, found.memory) == ("NVIDIA H100", 1, 80e9)
    assert found.rates == device.Rates(989e12, 3350e9, measured=False)
    assert device.device_for(config(device="h100"), F32).rates.flops == 67e12
    assert device.device_for(config(device="h100"), torch.float16).rates.flops == 989e12
    assert device.device_for(config(device="l4", gpu_memory=20.0, gpus=3), BF16).memory == 20 << 30
    assert device.device_for(config(device="l4", gpus=3), BF16).gpus == 3
    for sheet in ACCELERATORS.values():
        assert sheet.float32_tflops < sheet.half_tflops


def test_rates_and_memory_of_this_node(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    here = device.device_for(config(gpus=0), F32)
    assert here.gpus == 0 and here.memory == device.cpu_memory() and here.rates.measured
    assert here.rates.flops > 1e8 and here.rates.bytes > 1e8
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CGROUP_LIMIT", limit)
    before = device.cpu_memory()
    limit.write_text("1000000\n")
    assert device.cpu_memory() == 1_000_000
    limit.write_text("max\n")
    assert device.cpu_memory() == before
    unknown = device.device_for(config(gpus=2, gpu_memory=24.0), F32)
    assert (unknown.gpus, unknown.memory, unknown.rates) == (2, 24 << 30, None)
    with pytest.raises(ConfigError, match=r"gpus: .* 2, but this node has no GPU.*example device h100.*gpu_memory 24"):
        device.device_for(config(gpus=2), F32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "cpu", "gpus": 2}, "device cpu has no GPUs, but gpus is 2"),
        ({"device": "h100", "gpus": 0}, "device h100 is a GPU, but gpus is 0"),
        ({"gpus": 9}, "batch_size: 8 can't be shared by 9 GPUs"),
        ({"device": "h10"}, "device must be one of auto, cpu, b200.*Did you mean 'h100'"),
        ({"gpu_memory": 0.0}, "gpu_memory must be greater than 0"),
    ],
)
def test_contradictory_settings_are_errors(changes, named):
    with pytest.raises(ConfigError, match=named):
        config(**changes)


# --- the command ----------------------------------------------------------------------------------------------------


LENGTHS = ("--max_prompt_length", "12", "--max_new_tokens", "20", "--max_length", "64")
ASKED = ("plan", "--model", "model", *LENGTHS, "--rollout", "transformers")


def run(capsys, *flags: str) -> tuple[int, str, str]:
    code = cli.main([*ASKED, *flags])
    return code, *capsys.readouterr()


def test_a_plan_as_text(folder, capsys):
    code, out, err = run(capsys, "--device", "h100", "--gpus", "2", "--batch_size", "16")
    assert (code, err) == (0, "")
    assert "model, 0.1 million parameters, reinforce_plus_plus, float32, on 2 x NVIDIA H100 with 74.5 GiB." in out
    assert "Per step on each: 8 completions of 20 tokens for prompts of 12, 8 generated and 8 trained at a time." in out
    assert max(len(line) for line in out.split("Fits:")[0].splitlines()[2:]) <= 80
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert {"AdamW's moments", "gradients", "activations", "KV cache", "gradient buckets", "total"} <= set(lines)
    assert "load" in lines["MiB"] and "adamw" in lines["MiB"]
    assert "Fits: " in out and " of 74.5 GiB on each GPU" in out
    assert "micro_batch_size            8 (the whole step)" in out and "Time per step: about" in out
    assert "The reward model models/reward_model doesn't exist yet" in out
    assert "every GPU holds all weights" in out
    assert list(folder.iterdir()) == [folder / "model"]


def test_a_plan_as_json(folder, capsys):
    code, out, err = run(capsys, "--device", "rtx4090", "--format", "json", "--mixed_precision", "bf16")
    told = json.loads(out)
    assert (code, err, told["fits"]) == (0, "", True)
    assert told["parameters"] == {"policy": LLAMA, "reward_model": LLAMA - VOCABULARY * WIDTH + WIDTH}
    assert told["phases"]["adamw"]["AdamW's moments"] == 8 * LLAMA
    assert told["phases"]["update"]["policy"] == 2 * LLAMA
    peak = told["memory"]["peak_phase"]
    assert told["memory"]["peak"] == pytest.approx(sum(told["phases"][peak].values()), abs=20)
    assert told["memory"]["peak"] >= max(sum(parts.values()) for parts in told["phases"].values()) - 20
    assert told["memory"]["available"] == 24e9
    largest = {"micro_batch_size": 8, "mini_batch_size": 8, "rollout_batch_size": 64, "batch_size": 65536}
    largest["max_tokens_per_micro_batch"] = 8 * (12 + 20)
    assert told["largest_that_fits"] == largest
    seconds = told["seconds"]
    assert seconds["step"] == pytest.approx(seconds["rollout"] + seconds["scoring"] + seconds["update"])
    assert told["device"] == {"name": "NVIDIA GeForce RTX 4090", "gpus": 1} and told["engine"] == "transformers"


def least(capsys, *flags: str) -> dict:
    return json.loads(run(capsys, "--format", "json", "--device", "h100", "--eval_prompts", "0", *flags)[1])


def test_a_plan_that_does_not_fit_reports_one_that_does(folder, capsys):
    flags = ("--batch_size", "64", "--micro_batch_size", "64")
    full = least(capsys, *flags)
    half = least(capsys, "--batch_size", "64", "--micro_batch_size", "20")
    between = (half["memory"]["peak"] + 1000) / 2**30
    assert half["memory"]["peak"] < full["memory"]["peak"]
    limited = ("--device", "h100", "--eval_prompts", "0", "--gpu_memory", str(between))
    code, out, err = run(capsys, *flags, *limited)
    assert (code, err) == (1, "")
    assert "Does not fit: " in out and "in phase 'update'. It fits with --micro_batch_size 20: " in out
    assert "micro_batch_size            20\n" in out
    code, out, _ = run(capsys, "--batch_size", "64", "--micro_batch_size", "20", *limited)
    assert code == 0 and "This is close" in out
    assert run(capsys, "--batch_size", "64", "--micro_batch_size", "21", *limited)[0] == 1


def test_a_cache_of_vllm_that_does_not_fit_can_be_reduced(folder, capsys):
    flags = ("--rollout", "vllm", "--batch_size", "8", "--micro_batch_size", "1")
    between = (least(capsys, *flags, "--rollout_batch_size", "8")["memory"]["peak"] + 1000) / 2**30
    limited = ("--device", "h100", "--eval_prompts", "0", "--gpu_memory", str(between))
    code, out, _ = run(capsys, *flags, *limited)
    assert code == 1 and "in phase 'rollout'. It fits with --rollout_batch_size 8: " in out


def test_a_plan_that_can_not_fit_says_so(folder, capsys):
    code, out, _ = run(capsys, "--device", "h100", "--gpu_memory", "0.1", "--eval_prompts", "0")
    assert code == 1
    assert "Even one completion at a time needs" in out and "Use a device with more memory" in out
    assert "micro_batch_size            none" in out and "batch_size                  none" in out
    assert "eval_prompts" not in out
    code, out, _ = run(capsys, "--device", "h100", "--gpu_memory", "0.1", "--eval_prompts", "64")
    assert "fewer eval_prompts" in out


def test_an_unknown_device_with_known_memory_has_no_time(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, _ = run(capsys, "--gpus", "2", "--gpu_memory", "24")
    assert code == 0 and "of 24.0 GiB" in out
    assert "Name the GPU (--device)" in out


def test_the_settings_file_of_a_training_is_accepted(folder, capsys):
    (folder / "recipe.yaml").write_text(
        "model: model\ndata: nowhere.csv\nreward_model: model\nestimator: grpo\nnum_generations: 4\nbatch_size: 16\n"
        "micro_batch_size: 8\nmax_prompt_length: 12\nmax_new_tokens: 20\nlearning_rate: 1e-6\noutput_dir: runs/x\n"
        "save_every: 10\nmixed_precision: bf16\nrollout: transformers\nreport_to: [tensorboard]\n"
    )
    assert cli.main(["plan", "--config", "recipe.yaml", "--device", "a100"]) == 0
    out = capsys.readouterr().out
    assert "grpo, bfloat16, on NVIDIA A100" in out and "64 completions of 20 tokens" in out
    assert "doesn't exist yet" not in out
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model", "nothing/here/atall"), ["nothing/here/atall: model folder not found"]),
        (("--gpus", "3", "--gpu_memory", "0"), ["gpu_memory must be greater than 0"]),
        (("--gpus", "3"), ["this node has no GPU", "--device", "--gpu_memory"]),
        (("--max_length", "600", "--max_new_tokens", "500"), ["max_new_tokens 500", "the model's context of 256"]),
        (("--batch_size", "2", "--device", "h100", "--gpus", "4"), ["batch_size: 2", "4 GPUs"]),
        (("--judge", "models/other", "--reward_model", "."), ["not a model", "config.json"]),
    ],
)
def test_invalid_input_is_a_one_line_error(folder, capsys, monkeypatch, flags, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, err = run(capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in named if word not in err] == []


def test_an_unknown_device_is_an_error(folder, capsys):
    assert cli.main([*ASKED, "--device", "h1000"]) == 2
    assert "--device must be one of" in (error := capsys.readouterr().err) and "Did you mean 'h100'?" in error


def test_the_engine_equals_the_choice_of_a_training(folder, monkeypatch):
    from reinforcepp.errors import RolloutError
    from reinforcepp.planner import command

    for installed in (True, False):
        monkeypatch.setattr(
            command.importlib.util, "find_spec", lambda name, found=installed: object() if found else None
        )
        for on_gpu, cpu_build in ((True, False), (False, True), (False, False)):
            monkeypatch.setattr(command, "built_for_cpu", lambda found=cpu_build: found)
            usable = installed and (on_gpu or cpu_build)
            assert command._engine(config(), on_gpu=on_gpu)[0] == ("vllm" if usable else "transformers")
            assert command._engine(config(rollout="transformers"), on_gpu=on_gpu)[0] == "transformers"
            if not usable:
                reason = "installed vLLM needs a GPU" if installed else "vllm isn't installed"
                with pytest.raises(RolloutError, match=reason):
                    command._engine(config(rollout="vllm"), on_gpu=on_gpu)


@pytest.fixture
def slow_bf16(monkeypatch):
    """A CPU that emulates bfloat16, as measured on one with AVX2 only."""
    speeds = {F32: 55e9, BF16: 0.23e9}
    monkeypatch.setattr(precision, "cpu_flops", lambda: (speeds[BF16], speeds[F32]))
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype, *rest: speeds[dtype])


def test_slow_bfloat16_on_a_cpu_is_a_warning_with_both_speeds(folder, slow_bf16, capsys):
    expected = (
        "mixed_precision bf16: a core of this CPU reaches 0.23 GFLOP/s in bfloat16, compared with 55 GFLOP/s in float32"
    )
    code, out, _ = run(capsys, "--device", "cpu", "--mixed_precision", "bf16")
    assert code == 0 and f"Warning: {expected}" in out and "Use --mixed_precision no" in out
    told = json.loads(run(capsys, "--device", "cpu", "--mixed_precision", "bf16", "--format", "json")[1])
    assert expected in told["warnings"][0]
    assert json.loads(run(capsys, "--device", "cpu", "--format", "json")[1])["warnings"] == []
    assert (
        json.loads(run(capsys, "--device", "h100", "--mixed_precision", "bf16", "--format", "json")[1])["warnings"]
        == []
    )


def test_automatic_precision_is_that_of_the_planned_device(folder, slow_bf16, monkeypatch, capsys):
    monkeypatch.setattr(precision, "SMALL_PARAMETERS", 0)

    def planned(*arguments):
        found = json.loads(run(capsys, "--mixed_precision", "auto", *arguments, "--format", "json")[1])
        assert not found["warnings"]
        return found["mixed_precision"], found["assumptions"][0]

    speeds = "a core of this CPU reaches 0.23 GFLOP/s in bfloat16, compared with 55 GFLOP/s in float32"
    assert planned("--device", "cpu") == ("no", f"Mixed precision no: {speeds}.")
    assert planned("--device", "h100") == ("bf16", "Mixed precision bf16: NVIDIA H100 has bfloat16 instructions.")
    assert planned("--gpus", "2", "--gpu_memory", "24")[0] == "bf16"
    assert "bfloat16, on NVIDIA H100" in run(capsys, "--mixed_precision", "auto", "--device", "h100")[1]
    monkeypatch.setattr(precision, "cpu_flops", lambda: (199e9, 102e9))
    monkeypatch.setattr(device, "matmul_flops", lambda *rest: 199e9)
    assert planned("--device", "cpu")[0] == "bf16"


def test_implausible_rates_are_a_warning(folder, monkeypatch, capsys):
    monkeypatch.setattr(device, "matmul_flops", lambda *rest: 0.2e9)
    assert "Warning: The time isn't reliable: this CPU reached only 0.2 GFLOP/s" in run(capsys, "--device", "cpu")[1]


def test_measured_speeds_are_those_of_the_product():
    assert precision.matmul_flops("cpu", F32, 64, 0.0) > 1e5
    times = iter([0.0, 1.0, 3.0, 4.0, 4.5])  # two rounds, of 2 and 0.5 seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision.time, "perf_counter", lambda: next(times))
        assert precision.least_seconds("cpu", lambda: None, 3.4, 9) == 0.5


def test_times_have_units_that_a_reader_can_judge():
    assert [report._time(s) for s in (0.04, 59, 90, 63651.8)] == ["0.0 s", "59.0 s", "2 min", "17 h 41 min"]


def test_a_judge_needs_memory_and_the_built_in_judge_none(folder):
    own = config(model="model", rollout="transformers", device="h100", data="mine.csv")
    assert make_plan(own).job.judge is None
    assert make_plan(replace(own, data="builtin:network")).job.judge is None
    judged = make_plan(replace(own, judge="model", reward_model="model"))
    assert judged.phases["score"]["judge"] == 4 * (LLAMA - VOCABULARY * WIDTH + WIDTH)
    assert not any("doesn't exist yet" in sentence for sentence in judged.notes)


def test_only_reward_models_among_the_rewards_need_memory_and_time(folder):
    own = config(model="model", rollout="transformers", device="h100", data="mine.csv")
    size = LLAMA - VOCABULARY * WIDTH + WIDTH
    without = make_plan(replace(own, rewards=("rule:length", "mine.py:f", "http://h/x")))
    assert without.job.reward.parameters == without.job.reward.row_flops == 0
    assert (
        without.phases["score"]["reward model"] == 0
        and "Memory and time of mine.py:f aren't included." in without.notes
    )
    one = make_plan(replace(own, rewards=("0.5*model", "rule:length")))
    two = make_plan(replace(own, rewards=("0.5*model", "./model")))
    assert [plan.job.reward.parameters for plan in (one, two)] == [size, 2 * size]
    assert any("With staleness" in told for told in make_plan(replace(own, staleness=1)).notes)
    elsewhere = make_plan(replace(own, rewards=("0.5*model",), rollout="ray://auto", reward_workers=1))
    assert elsewhere.job.reward.parameters == 0
    assert two.job.reward.row_flops == 2 * one.job.reward.row_flops > 0
    assert two.job.reward.score.peak.at(64) == one.job.reward.score.peak.at(64) != without.job.reward.score.peak.at(64)


def test_sizes_are_shown_with_three_significant_digits():
    assert [report.gib(x * 2**30) for x in (0.123, 9.994, 12.34)] == ["0.12", "9.99", "12.3"]
