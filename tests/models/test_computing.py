"""Mixed precision, gradient checkpointing, attention and torch.compile: the results stay the same."""

import os
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands.cli import main
from reinforcepp.config import ComputeConfig, RewardModelConfig
from reinforcepp.errors import ConfigError, TrainingDiverged
from reinforcepp.models import precision
from reinforcepp.models.master_weights import LossScale
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.runtime.process import protect_compiled_code
from reinforcepp.training.setup import loading

PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base"), "llama"))


def spread(prompts, completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def trainer(base, folder, reward=spread, **settings):
    usual = {
        "max_new_tokens": 6,
        "max_prompt_length": 40,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "micro_batch_size": 4,
        "rollout": "transformers",
        "eval_prompts": 0,
    }
    return ReinforceTrainer(base, reward, ReinforceConfig(output_dir=str(folder), **(usual | settings)), PROMPTS)


def trained(base, folder, **settings):
    run = trainer(base, folder, **settings)
    run.train()
    return run


def largest_gap(one, other):
    theirs = other.policy.state_dict()
    return max(
        float((value.float() - theirs[name].float()).abs().max()) for name, value in one.policy.state_dict().items()
    )


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"mixed_precision": "bf16"}, {"estimator": "ppo"}], ids=["float32", "bf16", "ppo"]
)
def test_gradient_checkpointing_gives_the_same_weights(base, tmp_path, settings, monkeypatch):
    plain = trained(base, tmp_path / "plain", **settings)
    again = trainer(base, tmp_path / "again", gradient_checkpointing=True, **settings)
    layer = next(part for part in again.policy.modules() if isinstance(part, GradientCheckpointingLayer))
    forwards = []
    layer.self_attn.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    again.train()
    assert largest_gap(plain, again) == 0
    learning = sum(forwards)
    assert learning == 2 * 3 * 2  # each of a step's two micro-batches, and in the backward pass once more
    assert not again.policy.training and not any(part.training for part in again.policy.modules())


def test_gradient_checkpointing_is_off_by_default(base, tmp_path):
    run = trainer(base, tmp_path / "run")
    layer = next(part for part in run.policy.modules() if isinstance(part, GradientCheckpointingLayer))
    forwards = []
    layer.self_attn.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    run.train()
    assert sum(forwards) == 3 * 2


# --- attention ------------------------------------------------------------------------------------------------------


def test_the_attention_setting_applies(base, tmp_path):
    usual, eager = trained(base, tmp_path / "a"), trained(base, tmp_path / "b", attn_implementation="eager")
    assert usual.policy.config._attn_implementation == "sdpa"
    assert eager.policy.config._attn_implementation == "eager"
    assert largest_gap(usual, eager) < 1e-4


def test_missing_attention_packages_raise():
    with pytest.raises(ConfigError, match="flash_attention_2: package flash_attn isn't installed"):
        loading(ReinforceConfig(attn_implementation="flash_attention_2"))
    assert loading(RewardModelConfig()) == {}


# --- the compiler ---------------------------------------------------------------------------------------------------


def test_a_compiled_model_trains_the_same(base, tmp_path, monkeypatch):
    plain = trained(base, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # all but the machine code
    compiled = trained(base, tmp_path / "compiled", torch_compile=True)
    assert hasattr(compiled.update.policy.model, "_orig_mod") and not hasattr(compiled.policy, "_orig_mod")
    assert largest_gap(plain, compiled) < 1e-6
    torch._dynamo.reset()


def test_compiled_code_is_kept_where_only_the_user_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    protect_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "home").write_text("")  # a home that is no folder
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    protect_compiled_code()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700


# --- float16 --------------------------------------------------------------------------------------------------------


def test_loss_scale_against_hand_computed_values():
    scale = LossScale(torch.float16)
    assert scale.scale(torch.tensor(0.5)) == 4096
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([8192.0, 16384.0])
    scale.unscale([weight, torch.zeros(1, requires_grad=True)])
    assert weight.grad.tolist() == [1, 2]
    scale.update(float("inf"))
    assert scale.value == 2048
    scale.update(float("nan"))
    assert scale.value == 512
    for _ in range(499):
        scale.update(1.0)
    assert scale.value == 512
    scale.update(1.0)
    assert scale.value == 1024
    other = LossScale(torch.float16)
    other.load_state_dict(scale.state_dict())
    assert vars(other) == vars(scale)
    for _ in range(20):
        scale.update(float("inf"))
    assert scale.value == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_need_no_loss_scale(dtype):
    scale = LossScale(dtype)
    scale.update(float("inf"))
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    scale.unscale([weight])
    assert (scale.scale(torch.tensor(3.0)), weight.grad) == (3, 1)


def test_float16_trains_like_float32(base, tmp_path):
    """From the same completions, because rounding error changes some sampled tokens depending on the CPU."""
    wide, narrow = trainer(base, tmp_path / "wide"), trainer(base, tmp_path / "narrow", mixed_precision="fp16")
    assert narrow.policy.dtype == torch.float16
    start = {name: weight.detach().clone() for name, weight in wide.policy.named_parameters()}
    generated = []
    generate = wide.engine.generate
    wide.engine.generate = lambda *given: generated.append(generate(*given)) or generated[-1]
    wide.train()
    replay = iter(generated)
    narrow.engine.generate = lambda *given: next(replay)
    narrow.train()
    masters = zip(start, narrow.update.policy._masters.masters, strict=True)
    one = torch.cat([(weight.detach() - start[name]).flatten() for name, weight in wide.policy.named_parameters()])
    other = torch.cat([(master.detach() - start[name]).flatten() for name, master in masters])
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_float16_overflow_skips_an_update_and_lowers_the_scale(base, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**40)
    run = trainer(base, tmp_path / "run", mixed_precision="fp16", max_steps=1)
    skipped = [row["skipped_updates"] for row in tiny.train(run)]
    assert skipped == [1.0]
    assert run.update.policy._scale.value == 2.0**38
    with pytest.raises(TrainingDiverged):
        trainer(base, tmp_path / "next", mixed_precision="fp16", max_steps=5).train()


def test_the_loss_scale_is_resumed(base, tmp_path):
    usual = {"mixed_precision": "fp16", "save_every": 1, "keep_last": 9}
    first = trainer(base, tmp_path / "whole", **usual)
    first.update.policy._scale.value = 64.0
    first.train()
    again = trainer(base, tmp_path / "again", **usual, resume=str(tmp_path / "whole/checkpoints/step-000002"))
    again.train()
    assert again.update.policy._scale.value == 64.0
    assert largest_gap(first, again) == 0


# --- reward models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [["--mixed_precision", "bf16"], ["--gradient_checkpointing"], ["--attn_implementation", "eager"]],
    ids=" ".join,
)
def test_reward_models_accept_the_same_settings(base, pairs_csv, tmp_path, settings, monkeypatch):
    from reinforcepp.training import reward_loop

    seen = []
    made = reward_loop.RewardConfig
    monkeypatch.setattr(reward_loop, "RewardConfig", lambda **named: seen.append(named) or made(**named))
    arguments = ["--model", base, "--data", pairs_csv, "--output_dir", tmp_path / "rm", "--num_train_epochs", "1"]
    assert main(["reward", *map(str, arguments), *settings]) == 0
    loaded = load_reward_model(str(tmp_path / "rm"))
    assert max(abs(a - b) for a, b in zip(loaded.fingerprint(), loaded.card.fingerprint, strict=True)) < 1e-5
    assert seen[0]["bf16"] == ("bf16" in settings)
    assert seen[0]["gradient_checkpointing"] == ("--gradient_checkpointing" in settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_reward_model_in_float16_needs_a_gpu(base, pairs_csv, tmp_path, capsys):
    arguments = ["--model", base, "--data", pairs_csv, "--output_dir", tmp_path / "rm", "--mixed_precision", "fp16"]
    assert main(["reward", *map(str, arguments)]) == 2
    assert "fp16 needs a GPU for reward model training" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "reward", "sft"])
def test_emulated_bfloat16_is_a_warning_before_training(command, base, pairs_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_flops", lambda: (0.23e9, 55e9))
    arguments = ["--model", base, "--data", pairs_csv, "--output_dir", tmp_path / "run", "--mixed_precision", "bf16"]
    short = ["--max_prompt_length", 40, "--max_new_tokens", 6]
    rest = [*short, "--reward_model", tmp_path / "missing"] if command == "train" else ["--max_length", 1]
    assert main([command, *map(str, [*arguments, *rest])]) == 2  # neither command starts to train
    warning = capsys.readouterr().err
    assert "a core of this CPU reaches 0.23 GFLOP/s in bfloat16, compared with 55 GFLOP/s in float32" in warning
    assert "Use --mixed_precision no" in warning


def test_native_bfloat16_is_no_warning_but_emulated_float16_is_one(monkeypatch):
    speeds = {torch.bfloat16: (30e9, 30e9), torch.float16: (0.11e9, 30e9)}
    monkeypatch.setattr(precision, "cpu_flops", lambda dtype=torch.bfloat16: speeds[dtype])
    warning = precision.slow_precision(ComputeConfig(mixed_precision="fp16"))
    assert "0.11 GFLOP/s in float16, compared with 30 GFLOP/s in float32" in warning and "'no'" in warning
    assert precision.slow_precision(ComputeConfig(mixed_precision="fp16"), on_gpu=True) == ""
    assert precision.slow_precision(ComputeConfig(mixed_precision="bf16")) == ""
