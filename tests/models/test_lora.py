"""LoRA: only the adapter is trained, the reference is the model without it, and merging keeps the outputs."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands.cli import main
from reinforcepp.config import AdapterConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer
from reinforcepp.models.lora import (
    ADAPTER_WEIGHTS,
    AdapterDisabled,
    base_model,
    full_weights,
    load_trainable_weights,
    make_reference,
    trainable_weights,
    with_adapter,
)
from reinforcepp.models.reward_models import load_reward_weights, new_reward_model
from reinforcepp.models.saving import save_model
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.training.setup import start_policy

FAMILIES = ["gpt2", "llama", "qwen2"]
VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}]
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: str(tiny.save(tmp_path_factory.mktemp(family), family)) for family in FAMILIES}


def adapted(base, seed=1, **settings):
    """A model with an adapter that has been somewhere: fresh ones say nothing."""
    model = with_adapter(load_policy(base), AdapterConfig(use_peft=True, lora_r=4, **settings), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", VARIANTS, ids=["lora", "rslora", "dora"])
def test_a_new_adapter_changes_no_output_and_only_it_is_trainable(bases, family, settings):
    plain = load_policy(bases[family])
    model = with_adapter(load_policy(bases[family]), AdapterConfig(use_peft=True, lora_r=4, **settings), seed=0)
    assert_same(logits(model), logits(plain))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    linear = {
        name.rsplit(".", 1)[-1] for name, p in plain.named_modules() if p.__class__.__name__ in ("Linear", "Conv1D")
    }
    targets = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in learning}
    assert targets == linear - {"lm_head"}


def test_rank_alpha_and_rslora_reach_peft(bases):
    for settings, scale in [({}, 8.0), ({"use_rslora": True}, 16.0), ({"lora_alpha": 4.0}, 1.0)]:
        model = with_adapter(load_policy(bases["llama"]), AdapterConfig(use_peft=True, lora_r=4, **settings), seed=0)
        layer = base_model(model).model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale
        assert layer.lora_A["default"].weight.shape == (4, 64)


def test_the_seed_sets_the_initial_weights_and_keeps_the_generators(bases):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (
        trainable_weights(with_adapter(load_policy(bases["gpt2"]), AdapterConfig(use_peft=True), seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.rand(1) == expected
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", VARIANTS, ids=["lora", "rslora", "dora"])
def test_merging_keeps_the_outputs_in_memory_and_on_disk(bases, tmp_path, family, settings):
    model = adapted(bases[family], **settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    live = tiny.model(family)
    live.load_state_dict(dict(full_weights(model)))
    expected = logits(model)
    assert_same(logits(live), expected)
    assert not torch.allclose(expected, logits(load_policy(bases[family])), atol=0.1)
    save_model(model, load_tokenizer(bases[family]), tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "README.md").exists()
    loaded = load_policy(str(tmp_path))
    assert type(loaded) is type(live)
    assert_same(logits(loaded), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_same(logits(model), expected, atol=0)


def test_peft_loads_the_saved_adapter(bases, tmp_path):
    from peft import AutoPeftModelForCausalLM

    model = adapted(bases["llama"])
    save_model(model, load_tokenizer(bases["llama"]), tmp_path)
    assert_same(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_reference_shares_the_weights_with_the_adapter_disabled(bases):
    plain, model = load_policy(bases["llama"]), adapted(bases["llama"])
    reference = make_reference(model, new_adapter=True)
    assert isinstance(reference, AdapterDisabled)
    assert_same(logits(reference), logits(plain))
    assert not torch.allclose(logits(model), logits(plain), atol=0.1)
    before, held = plain.state_dict(), reference.state_dict()
    assert before.keys() == held.keys() and all(torch.equal(before[name], held[name]) for name in before)
    places = {p.data_ptr() for p in model.parameters()}
    assert all(tensor.data_ptr() in places for tensor in held.values())  # no second copy
    copied = make_reference(plain.requires_grad_(True), new_adapter=False)
    assert copied is not plain and not any(p.requires_grad for p in copied.parameters())


def test_trainable_weights_round_trip(bases):
    one, other = adapted(bases["gpt2"], seed=1), adapted(bases["gpt2"], seed=2)
    taken = {name: value.clone() for name, value in trainable_weights(one).items()}
    load_trainable_weights(other, taken)
    assert_same(logits(other), logits(one), atol=0)


def test_an_adapter_on_an_adapter(bases, tmp_path):
    first = adapted(bases["llama"])
    save_model(first, load_tokenizer(bases["llama"]), tmp_path / "first")
    second = adapted(str(tmp_path / "first"), seed=5)
    save_model(second, load_tokenizer(bases["llama"]), tmp_path / "second")
    assert_same(logits(load_policy(str(tmp_path / "second"))), logits(second))
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "first"
    )
    assert load_config(str(tmp_path / "second")).name_or_path == str(tmp_path / "second")


def test_the_built_in_model_is_saved_by_its_name(tmp_path):
    model = adapted("builtin:tiny")
    save_model(model, load_tokenizer("builtin:tiny"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "builtin:tiny"
    assert_same(logits(load_policy(str(tmp_path))), logits(model), atol=1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_missing_layers_raise(bases):
    with pytest.raises(ConfigError, match=r"lora_target_modules: query matches no layer.*q_proj"):
        adapted(bases["llama"], lora_target_modules=("query",))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_r": 8}, "use_peft=True"),
        ({"load_in_4bit": True}, "use_peft=True"),
        ({"use_peft": True, "lora_target_modules": ()}, "lora_target_modules is empty"),
        ({"use_peft": True, "lora_target_modules": ("all-linear", "q_proj")}, "all-linear"),
        ({"use_peft": True, "load_in_4bit": True, "use_dora": True}, "use_dora needs"),
    ],
)
def test_contradictory_settings_raise(settings, named):
    with pytest.raises(ConfigError, match=named):
        ReinforceConfig(**settings)


def test_settings_from_json_are_the_same():
    assert ReinforceConfig(lora_target_modules=["all-linear"]).use_peft is False
    adapted_by_list = with_adapter(
        tiny.model(), AdapterConfig(use_peft=True, lora_target_modules=["all-linear"]), seed=0
    )
    assert len(trainable_weights(adapted_by_list)) == 2 * 2 * 4


def test_unusable_adapter_folders_raise(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    save_model(adapted(str(base)), load_tokenizer(bases["llama"]), tmp_path / "adapter")
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    for load in (load_policy, load_config):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors: damaged"):
            load(str(tmp_path / "adapter"))
    weights.write_bytes(whole)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"base model .*base not found.*base_model_name_or_path"):
        load_config(str(tmp_path / "adapter"))
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="no base model"):
        load_config(str(tmp_path / "adapter"))
    config.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_config(str(tmp_path / "adapter"))


def test_models_in_memory(bases, tmp_path):
    made = {"processing_class": tiny.tokenizer(), "train_dataset": PROMPTS, "reward_funcs": likes_early_tokens}
    settings = {"max_new_tokens": 4, "max_prompt_length": 40, "rollout": "transformers", "eval_prompts": 0}
    with pytest.raises(ConfigError, match=r"use_peft: .*in memory"):
        ReinforceTrainer(tiny.model(), args=ReinforceConfig(str(tmp_path / "a"), use_peft=True, **settings), **made)
    given = adapted(bases["gpt2"])
    with pytest.raises(ConfigError, match=r"use_peft: .* an adapter already"):
        ReinforceTrainer(given, args=ReinforceConfig(str(tmp_path / "b"), use_peft=True, **settings), **made)
    with pytest.raises(ConfigError, match="ppo: can't copy a model with an adapter"):
        ReinforceTrainer(given, args=ReinforceConfig(str(tmp_path / "c"), estimator="ppo", **settings), **made)
    run = ReinforceTrainer(given, args=ReinforceConfig(str(tmp_path / "d"), max_steps=1, **settings), **made)
    before = {name: p.clone() for name, p in run.policy.named_parameters()}
    run.train()
    changed = {name for name, p in run.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    given.requires_grad_(False)  # as PeftModel.from_pretrained leaves it
    with pytest.raises(ConfigError, match="is_trainable=True"):
        ReinforceTrainer(given, args=ReinforceConfig(str(tmp_path / "e"), **settings), **made)


@pytest.mark.parametrize("variant", VARIANTS, ids=["lora", "rslora", "dora"])
def test_the_reference_of_a_given_adapter_is_the_policy_as_given(bases, tmp_path, variant):
    given = adapted(bases["llama"], **variant)
    expected = logits(given)
    args = ReinforceConfig(
        str(tmp_path), max_steps=2, max_new_tokens=4, max_prompt_length=40, learning_rate=1e-2, rollout="transformers"
    )
    run = ReinforceTrainer(given, likes_early_tokens, args, PROMPTS, HELD_OUT, processing_class=tiny.tokenizer())
    run.train()
    assert run.evaluations["before"].kl == 0
    assert run.evaluations["after"].kl > 0
    assert_same(logits(run.reference), expected, atol=0)
    shared = {weight.data_ptr() for weight in run.policy.parameters() if not weight.requires_grad}
    copied = [name for name, weight in run.reference.named_parameters() if weight.data_ptr() not in shared]
    assert copied and all("lora_" in name for name in copied), "the base weights aren't held twice"


# --- training -------------------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(32)]
HELD_OUT = [{"prompt": f"Why does router {i} drop packets?"} for i in range(20)]


def likes_early_tokens(prompts, completions, completion_ids, **_):
    return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]


def trainer(base, folder, **settings):
    usual = {
        "max_new_tokens": 6,
        "max_prompt_length": 40,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "kl_coef": 0.003,
        "seed": 5,
        "rollout": "transformers",
        "use_peft": True,
    }
    return ReinforceTrainer(
        base, likes_early_tokens, ReinforceConfig(output_dir=str(folder), **(usual | settings)), PROMPTS, HELD_OUT
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.full),  # emulated where the CPU lacks bfloat16
        {"lora_dropout": 0.1, "gradient_checkpointing": True},
        pytest.param({"estimator": "ppo", "critic_learning_rate": 1e-2, "max_steps": 50}, marks=pytest.mark.full),
    ],
    ids=["plain", "bf16", "dropout", "ppo"],
)
def test_training_generalizes_and_changes_only_the_adapter(bases, tmp_path, settings):
    run = trainer(bases["llama"], tmp_path / "run", **({"max_steps": 30} | settings))
    frozen = {name: p.clone() for name, p in run.policy.named_parameters() if "lora_" not in name}
    log = tiny.train(run)
    before, after = run.evaluations["before"], run.evaluations["after"]
    assert before.kl == pytest.approx(0, abs=1e-5)
    # A mean over 20 held-out prompts has a standard error of 0.05, one over the 160 completions of 5 steps 0.02. Which tokens
    # are sampled depends on the CPU's rounding, so each margin is at least two standard errors below the usual gain.
    assert after.reward > before.reward + 0.1
    rewards = [metrics["reward"] for metrics in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.15
    assert after.kl > 0.001
    assert all(torch.equal(p, frozen[name]) for name, p in run.policy.named_parameters() if name in frozen)
    saved = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert saved == [ADAPTER_WEIGHTS]
    if not settings:
        plain = load_policy(str(tmp_path / "run"))
        assert_same(logits(plain), logits(run.policy))


@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "bf16", "lora_dropout": 0.2}, {"estimator": "ppo"}])
def test_a_resumed_run_ends_with_the_same_adapter(bases, tmp_path, settings):
    usual = {"max_steps": 4, "save_every": 2, "keep_last": 5, "eval_prompts": 4} | settings
    trainer(bases["gpt2"], tmp_path / "whole", **usual).train()
    checkpoint = tmp_path / "whole/checkpoints/step-000002"
    assert not list(checkpoint.glob("model*.safetensors"))
    trainer(bases["gpt2"], tmp_path / "again", **usual, resume=str(checkpoint)).train()
    one, other = ((tmp_path / run / ADAPTER_WEIGHTS).read_bytes() for run in ("whole", "again"))
    assert one == other


def test_dropout_applies_in_training_only(bases, tmp_path):
    run = trainer(bases["llama"], tmp_path / "run", lora_dropout=0.5)
    assert not run.update.on_policy  # the pass that learns isn't the one that sampled
    with torch.no_grad():
        for name, parameter in run.policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    quiet = logits(run.policy)
    assert_same(logits(run.policy), quiet, atol=0)
    with run.update.policy.learning():
        assert not torch.allclose(logits(run.policy), quiet)
    assert_same(logits(run.policy), quiet, atol=0)


# --- reward models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], ["--use_dora"], ["--mixed_precision", "bf16", "--gradient_checkpointing"]])
def test_a_reward_model_keeps_its_head(bases, pairs_csv, tmp_path, settings):
    arguments = [
        "--model",
        bases["llama"],
        "--data",
        pairs_csv,
        "--output_dir",
        tmp_path / "rm",
        "--use_peft",
        *settings,
    ]
    assert main(["reward", *map(str, arguments), "--num_train_epochs", "2", "--learning_rate", "0.01"]) == 0
    loaded = load_reward_model(str(tmp_path / "rm"))  # proves that it scores its probes as it did when it was saved
    assert max(abs(a - b) for a, b in zip(loaded.fingerprint(), loaded.card.fingerprint, strict=True)) < 1e-4
    fresh = new_reward_model(bases["llama"], seed=42)
    assert not torch.equal(loaded.model.score.weight, fresh.score.weight)
    assert torch.equal(loaded.model.model.embed_tokens.weight, fresh.model.embed_tokens.weight)


def test_merging_keeps_the_scores(bases, tmp_path):
    model = new_reward_model(bases["qwen2"], seed=0).eval()
    model = with_adapter(model, AdapterConfig(use_peft=True), seed=0, heads=[model.score])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_model(model, load_tokenizer(bases["qwen2"]), tmp_path)
    asked = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        assert_same(load_reward_weights(tmp_path)(**asked).logits, model(**asked).logits)


def test_an_adapter_without_a_score_head_is_not_a_reward_model(bases, tmp_path):
    save_model(adapted(bases["llama"]), load_tokenizer(bases["llama"]), tmp_path)
    with pytest.raises(ModelError, match="no score head"):
        load_reward_weights(tmp_path)


def test_a_reward_model_can_start_from_an_adapter(bases, tmp_path):
    model = adapted(bases["llama"])
    save_model(model, load_tokenizer(bases["llama"]), tmp_path)
    started = new_reward_model(str(tmp_path), seed=0).eval()
    with torch.no_grad():
        before = base_model(load_policy(str(tmp_path))).model(input_ids=IDS).last_hidden_state
        assert_same(started.model(input_ids=IDS).last_hidden_state, before)


def test_a_resumed_reward_training_ends_with_the_same_adapter(bases, pairs_csv, tmp_path):
    usual = ["reward", "--model", bases["gpt2"], "--data", str(pairs_csv), "--use_peft", "--batch_size", "2"]
    usual += ["--save_every", "2", "--keep_last", "9", "--lora_dropout", "0.1", "--num_train_epochs", "2"]
    assert main([*usual, "--output_dir", str(tmp_path / "whole")]) == 0
    checkpoint = str(tmp_path / "whole/checkpoints/step-000004")
    assert main([*usual, "--output_dir", str(tmp_path / "again"), "--resume", checkpoint]) == 0
    one, other = ((tmp_path / run / ADAPTER_WEIGHTS).read_bytes() for run in ("whole", "again"))
    assert one == other


# --- QLoRA ----------------------------------------------------------------------------------------------------------

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"mixed_precision": "bf16", "gradient_checkpointing": True}, marks=pytest.mark.full)],
)
def test_an_adapter_on_4_bit_weights_trains(bases, tmp_path, settings):
    run = trainer(bases["llama"], tmp_path / "run", load_in_4bit=True, max_steps=45, **settings)
    layer = base_model(run.policy).model.layers[0].self_attn.q_proj
    rounded = layer.base_layer.weight.detach().clone()
    assert rounded.dtype == torch.uint8 and base_model(run.policy).lm_head.weight.is_floating_point()
    run.train()
    before, after = run.evaluations["before"], run.evaluations["after"]
    assert before.kl == pytest.approx(0, abs=1e-5)
    assert after.reward > before.reward + 0.08
    assert torch.equal(layer.base_layer.weight, rounded)
    used, plain = load_policy(str(tmp_path / "run")), load_policy(bases["llama"])
    merged_delta = used.model.layers[0].self_attn.q_proj.weight - plain.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged_delta, layer.get_delta_weight("default").float(), atol=1e-5, rtol=1e-2)


@needs_bitsandbytes
def test_gradients_through_4_bit_weights_equal_those_through_dequantized_weights(bases):
    from bitsandbytes.functional import dequantize_4bit

    settings = ReinforceConfig(use_peft=True, load_in_4bit=True, lora_r=4, mixed_precision="no")
    rounded = with_adapter(start_policy(bases["llama"], settings), settings, seed=0)
    plain = with_adapter(load_policy(bases["llama"]), settings, seed=0)
    parts = dict(base_model(plain).named_modules())
    with torch.no_grad():
        for name, part in base_model(rounded).named_modules():
            if hasattr(part, "base_layer"):
                weight = part.base_layer.weight
                parts[name].base_layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
        for model in (rounded, plain):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    assert_same(logits(rounded), logits(plain))  # before any gradient is wanted: weights may be repacked then
    for model in (rounded, plain):
        model(input_ids=IDS).logits.log_softmax(-1)[..., 5].sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in rounded.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 28
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_4_bit_reward_model_scores_as_its_card_says(bases, pairs_csv, tmp_path, family):
    arguments = ["--model", bases[family], "--data", pairs_csv, "--output_dir", tmp_path / "rm", "--use_peft"]
    assert main(["reward", *map(str, arguments), "--load_in_4bit", "--learning_rate", "0.01"]) == 0
    loaded = load_reward_model(str(tmp_path / "rm"))
    assert max(abs(a - b) for a, b in zip(loaded.fingerprint(), loaded.card.fingerprint, strict=True)) < 1e-5


@needs_bitsandbytes
def test_a_given_quantization_config_is_used(bases, tmp_path):
    args = ReinforceConfig(output_dir=str(tmp_path / "run"), rollout="transformers", max_steps=1, max_new_tokens=4)
    given = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")}
    rows = [{"prompt": "How do I check a host?"}] * 8
    adapter = LoraConfig(r=4, target_modules="all-linear")
    run = ReinforceTrainer(bases["llama"], likes_early_tokens, args, rows, peft_config=adapter, **given)
    layer = base_model(run.policy).model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.quant_state.quant_type == "fp4" and run.args.load_in_4bit
    run.train()
    assert bool(layer.lora_B["default"].weight.any())
    with pytest.raises(ConfigError, match="Add peft_config or use_peft"):
        ReinforceTrainer(bases["llama"], likes_early_tokens, args, rows, **given)


@needs_bitsandbytes
def test_adapters_cannot_be_quantized(bases, tmp_path):
    save_model(adapted(bases["llama"]), load_tokenizer(bases["llama"]), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"load_in_4bit: .*adapter.*reinforcepp export"):
        trainer(str(tmp_path / "adapter"), tmp_path / "run", load_in_4bit=True)


def test_4_bit_weights_need_bitsandbytes_and_a_separate_engine(bases, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="load_in_4bit: vLLM"):
        ReinforceConfig(use_peft=True, load_in_4bit=True, rollout="vllm")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match="bitsandbytes isn't installed"):
        trainer(bases["llama"], tmp_path / "run", load_in_4bit=True)


# --- exported and served --------------------------------------------------------------------------------------------


def test_export_merges_the_adapter_or_keeps_it(bases, tmp_path):
    from transformers import AutoModelForCausalLM

    run = trainer(bases["llama"], tmp_path / "run", max_steps=2, learning_rate=0.05)
    run.train()
    assert main(["export", str(tmp_path / "run"), "--merge", "--output_dir", str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_same(logits(plain), logits(run.policy))
    assert not list((tmp_path / "plain").glob("adapter*"))
    assert main(["export", str(tmp_path / "run"), "--no_merge", "--output_dir", str(tmp_path / "alone")]) == 0
    assert sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors")) == [ADAPTER_WEIGHTS]
    assert_same(logits(load_policy(str(tmp_path / "alone"))), logits(run.policy))


def test_serve_merges_the_adapter(bases, tmp_path):
    from reinforcepp.commands.serve import _plain_folder
    from reinforcepp.training.publish.source import find_source

    model = adapted(bases["llama"])
    save_model(model, load_tokenizer(bases["llama"]), tmp_path / "adapter")
    with _plain_folder(find_source(str(tmp_path / "adapter")), tmp_path / "plain") as folder:
        assert Path(folder).resolve() == tmp_path / "plain"
        assert_same(logits(load_policy(folder)), logits(model))
    with _plain_folder(find_source(bases["llama"]), tmp_path / "no") as folder:
        assert folder == bases["llama"]
