"""Model folders as they are found: leftover files, adapters, pointers of Git LFS, quantized weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from reinforcepp.commands.cli import main
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.loading import (
    check_trainable,
    load_config,
    load_policy,
    load_tokenizer,
    parameter_count,
    prompt_limit,
    weight_bytes,
)
from reinforcepp.models.reward_models import new_reward_model
from reinforcepp.models.tokenization import encode_example

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter whose weights aren't 0, without a tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_policy(str(base)), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@torch.no_grad()
def logits(name: Path) -> torch.Tensor:
    return load_policy(str(name))(input_ids=IDS).logits


def copy(source: Path, target: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copy(path, target)


# --- adapters -----------------------------------------------------------------------------------------------------------


def test_leftover_adapter_files_are_not_applied_to_merged_weights(base, adapter, folder, caplog):
    expected = logits(adapter)
    load_policy(str(adapter)).save_pretrained(folder)
    copy(base, folder, "tokenizer*")
    copy(adapter, folder, "adapter_*")
    assert torch.equal(logits(folder), expected)
    assert "Using the full weights and ignoring the adapter" in caplog.text
    model = load_policy(str(folder))
    assert not hasattr(model, "peft_config") and model.config.name_or_path == str(folder)


def test_a_configuration_next_to_an_adapter_does_not_make_it_a_full_model(base, adapter, folder):
    copy(adapter, folder, "adapter_*")
    copy(base, folder, "config.json")
    assert torch.equal(logits(folder), logits(adapter))
    assert not torch.equal(logits(folder), logits(base))


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(base, adapter):
    assert load_tokenizer(str(adapter)).get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert weight_bytes(str(adapter)) == weight_bytes(str(base)) > 0


def test_pickled_adapter_weights_are_refused(adapter, folder):
    copy(adapter, folder, "adapter_config.json")
    torch.save(load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors. Pickled weights .* never loaded.*Save"):
        load_policy(str(folder))


def test_an_adapter_with_more_tokens_than_its_base_is_merged(base, folder):
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = load_policy(str(base))
    model.resize_token_embeddings(328, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(str(folder))) == 321
    torch.testing.assert_close(logits(folder), adapted.eval()(input_ids=IDS).logits)


# --- files that aren't what their names say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(base, folder, name):
    copy(base, folder, "*")
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456789\n")
    with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer.*Run git lfs pull"):
        load_tokenizer(str(folder))
        load_policy(str(folder))


def test_the_reason_of_a_failure_is_more_than_its_announcement(base, folder):
    copy(base, folder, "*")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"(?i)tokenizer not found") as caught:
        load_tokenizer(str(folder))
    assert not str(caught.value).endswith(":")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "unknown"}}))
    with pytest.raises(ModelError, match=r"can't be loaded: .*"):
        load_tokenizer(str(folder))


# --- vocabulary ---------------------------------------------------------------------------------------------------------


def with_tokens(base: Path, folder: Path, *, special: bool, **named: str) -> Path:
    """Copy ``base`` with one more token than its vocabulary."""
    copy(base, folder, "*")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<image_soft_token>", special=special)])
    tokenizer.add_special_tokens(named)
    tokenizer.save_pretrained(folder)
    return folder


def test_special_tokens_without_an_embedding_are_accepted(base, folder, caplog):
    tokenizer = load_tokenizer(str(with_tokens(base, folder, special=True)))
    assert "no embedding for 1 special tokens of the tokenizer (<image_soft_token>)" in caplog.text
    assert max(encode_example(tokenizer, "An <image_soft_token>?", "<image_soft_token>")) < 320


def test_a_pad_token_without_an_embedding_is_replaced_by_eos(base, folder):
    tokenizer = load_tokenizer(str(with_tokens(base, folder, special=True, pad_token="<image_soft_token>")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_tokens_that_texts_contain_need_an_embedding(base, folder):
    with pytest.raises(ModelError, match="the tokenizer has 321 tokens, but the model only 320"):
        load_tokenizer(str(with_tokens(base, folder, special=False)))


@pytest.mark.parametrize("pad_id", [320, -1, 5])
def test_a_pad_id_beyond_the_vocabulary_does_not_keep_a_model_from_loading(base, folder, pad_id):
    copy(base, folder, "*")
    change_config(folder, pad_token_id=pad_id)
    assert torch.equal(logits(folder), logits(base))
    assert new_reward_model(str(folder), seed=0).config.pad_token_id < 320
    assert parameter_count(load_config(str(folder))) == parameter_count(load_config(str(base)))


# --- quantized weights --------------------------------------------------------------------------------------------------


def change_config(folder: Path, **settings) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | settings), encoding="utf-8")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "eetq", "compressed-tensors", "quanto"])
def test_quantized_weights_cannot_be_trained(base, folder, method):
    copy(base, folder, "*")
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    for use_peft in (False, True):
        with pytest.raises(
            ModelError, match=rf"quantized \({method}\), so they can't be trained. Give the unquantized model"
        ):
            check_trainable(str(folder), use_peft=use_peft)


def test_four_bit_weights_can_have_an_adapter(base, folder):
    copy(base, folder, "*")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    check_trainable(str(folder), use_peft=True)
    with pytest.raises(ModelError, match="Add use_peft=True"):
        check_trainable(str(folder), use_peft=False)
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match=r"bitsandbytes.*can't be trained"):
        check_trainable(str(folder), use_peft=True)


def test_a_missing_quantization_package_is_one_sentence(base, folder):
    copy(base, folder, "*")
    settings = {"quant_method": "eetq"}
    change_config(folder, quantization_config=settings)
    with pytest.raises(ModelError, match=r"quantized \(eetq\) and can't be loaded: .* Use the unquantized model"):
        load_policy(str(folder))


@pytest.mark.parametrize("command", ["sft", "train", "reward"])
def test_every_training_refuses_quantized_weights_at_once(base, folder, tmp_path, capsys, command):
    copy(base, folder, "*")
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    arguments = [command, "--model", str(folder), "--data", "builtin:network", "--output_dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "quantized (gptq)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prompt_can_fill_what_the_context_leaves():
    config = tiny.model().config
    context = config.max_position_embeddings
    assert prompt_limit(config, None, 100) == context - 100
    assert prompt_limit(config, None, 100, max_length=150) == 50
    assert prompt_limit(config, 30, 100) == 30
    with pytest.raises(ConfigError, match=f"max_new_tokens {context} leaves no room"):
        prompt_limit(config, None, context)
    with pytest.raises(ConfigError, match=f"context of {context}"):
        prompt_limit(config, context, 1)
