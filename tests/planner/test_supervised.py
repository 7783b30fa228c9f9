"""The estimated memory of SFT and reward trainings, compared with real passes, and what is printed about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from reinforcepp.commands.cli import main
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.models import loading as models
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.reward_models import head_modules, prepare_scoring
from reinforcepp.planner import supervised
from reinforcepp.planner.supervised import SupervisedMemory, supervised_memory
from reinforcepp.planner.trace import Line, MemoryTracker, Peak
from reinforcepp.training.learner import training_submodules

GIB = 1 << 30
LENGTH = 96
CONFIGS = {
    "gpt2": tiny.model("gpt2").config,
    "llama": tiny.model("llama").config,
    "bert": BertConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    ),
}


def real_peak(config, family, number):
    """Most bytes alive in a pass that starts with all gradients, apart from the weights."""
    pairs = isinstance(config, RewardModelConfig)
    if pairs:
        model = prepare_scoring(models.with_fused_gelu(AutoModelForSequenceClassification.from_config(CONFIGS[family])))
    else:
        model = models.with_fused_gelu(tiny.model(family))
    if config.use_peft:
        model = with_adapter(model, config, seed=0, heads=head_modules(model) if pairs else ())
    model.eval()  # as TRL, which turns off the dropout of a reward model
    for part in training_submodules(model, checkpointing=config.gradient_checkpointing):
        part.training = True
    ids = torch.randint(1, 320, (number, LENGTH))
    mask = torch.ones_like(ids)
    mask[: number // 2, -3:] = 0

    def run():
        if pairs:
            return model(input_ids=ids, attention_mask=mask).logits.sum()
        outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        outputs.logits[:, :-1].detach().contiguous()
        return outputs.loss

    run().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    with MemoryTracker() as live:
        run().backward()
    return gradients + max(map(sum, live.snapshots))


EXACT = {"mixed_precision": "no"}
CASES = {
    "gpt2": (RewardModelConfig(**EXACT), "gpt2"),
    "llama": (RewardModelConfig(**EXACT), "llama"),
    "bert": (RewardModelConfig(**EXACT), "bert"),
    "recomputed": (RewardModelConfig(**EXACT, gradient_checkpointing=True), "llama"),
    "lora": (RewardModelConfig(**EXACT, use_peft=True, lora_r=4), "llama"),
    "sft": (SftConfig(**EXACT), "llama"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_real_pass(name):
    config, family = CASES[name]
    found = supervised_memory(config, CONFIGS[family], LENGTH)
    number = 6
    rows = number // found.texts
    expected = found.gradients(rows) + found.activations(rows) / (1 + found.overhead)
    assert expected == pytest.approx(real_peak(config, family, number), rel=0.1)


def test_weights_and_moments():
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"])
    config = RewardModelConfig(criteria=("a", "b", "c"), **EXACT)
    found = supervised_memory(config, CONFIGS["llama"], LENGTH)
    parameters = sum(p.numel() for p in model.parameters()) + 64  # three outputs instead of the two of transformers
    assert (found.weights, found.moments) == (4 * parameters, 8 * parameters)
    half = supervised_memory(replace(config, mixed_precision="bf16"), CONFIGS["llama"], LENGTH)
    assert half.weights == 6 * parameters and half.activations(4) < 0.75 * found.activations(4)
    assert supervised_memory(replace(config, mixed_precision="fp16"), CONFIGS["llama"], LENGTH) == half
    narrow = supervised_memory(replace(config, dtype="bfloat16"), CONFIGS["llama"], LENGTH)
    assert (narrow.weights, narrow.moments) == (2 * parameters, 4 * parameters)
    adapted = supervised_memory(replace(config, use_peft=True, lora_r=4), CONFIGS["llama"], LENGTH)
    assert adapted.moments < 0.2 * found.moments and adapted.weights > found.weights


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.fixture
def printed(monkeypatch, tmp_path, capfd):
    """Returns what is printed for a training with a given free memory; a pair of 4096 tokens needs 1 GiB."""
    monkeypatch.setattr(supervised, "SMALL_TOKENS", 0)
    costs = SupervisedMemory(2 * GIB, 4 * GIB, Peak((Line(2 * GIB, 0.0, GIB / 2),)), 2, 0.0)
    monkeypatch.setattr(supervised, "supervised_memory", lambda *_: costs)
    monkeypatch.setattr(supervised.torch.accelerator, "is_available", lambda: False)

    def report(free, **settings):
        monkeypatch.setattr(supervised, "free_memory", lambda **_: free * GIB)
        supervised.report_memory(RewardModelConfig(**settings), 4096)
        return capfd.readouterr().err.strip().replace("\n", " ")

    return report


def test_the_memory_is_reported(printed):
    parts = "weights 2 GiB, AdamW 4 GiB, gradients 2 GiB, activations of 8 pairs of up to 4,096 tokens 8 GiB"
    assert printed(17) == f"Memory: about 16 GiB at the peak ({parts}); 17 GiB free"


def test_too_little_memory_is_a_warning_with_a_fix(printed):
    assert printed(13).endswith(
        "13 GiB free. Training will probably run out of memory. Set micro_batch_size 4, gradient_checkpointing, a lower "
        "max_length or use_peft."
    )
    assert "micro_batch_size 1, a lower max_length" in printed(8, gradient_checkpointing=True)
    assert "micro_batch_size" not in printed(8, batch_size=1)
    assert "activations of 2 pairs" in printed(13, micro_batch_size=2)


def test_free_memory_is_that_of_the_system_or_of_the_group(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(supervised, "MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(supervised, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert supervised.free_memory(on_gpu=False) == 2048 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert supervised.free_memory(on_gpu=False) == 999_000
    (tmp_path / "memory.max").write_text("max\n")
    assert supervised.free_memory(on_gpu=False) == 2048 * 1024


@pytest.mark.parametrize("command", ["reward", "sft"])
def test_the_commands_report_the_memory_of_the_longest_row(
    command, monkeypatch, model_folder, pairs_csv, tmp_path, capfd
):
    monkeypatch.setattr(supervised, "SMALL_TOKENS", 0)
    monkeypatch.setattr(supervised, "free_memory", lambda **_: 1 << 20)
    flags = ["--model", model_folder, "--data", pairs_csv, "--output_dir", tmp_path / "out", "--num_train_epochs", 1]
    assert main([command, *map(str, flags)]) == 0
    err = capfd.readouterr().err
    longest = err.partition(" has ")[2].partition(" of ")[0]
    noun = "pairs" if command == "reward" else "rows"
    assert f"activations of 8 {noun} of up to {longest} tokens" in err and "1 MiB free. Training will probably" in err
    assert "--micro_batch_size 1" in err


def test_small_trainings_are_not_estimated(monkeypatch, capfd):
    monkeypatch.setattr(supervised, "supervised_memory", None)
    supervised.report_memory(RewardModelConfig(), 1000)
    assert capfd.readouterr().err == ""
