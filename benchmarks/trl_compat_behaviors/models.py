"""Behaviors of the ``model`` argument: names, families, loaded models, and how a model is loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

from .common import (
    PROMPTS,
    Library,
    Part,
    error_of,
    load,
    load_tokenizer,
    make,
    policy,
    prompts,
    reward_model,
    train,
    trained,
    unchanged,
    weights,
)

part = Part("models")


@part.behavior("init-minimal", "test_init_minimal", not_on_trl="its default, bf16, needs a GPU")
def only_model_reward_and_data(lib: Library, folder: Path) -> None:
    trainer = lib.Trainer(model=policy(), reward_funcs=reward_model(), train_dataset=prompts())
    assert isinstance(trainer.args, lib.Config) and isinstance(trainer.model, torch.nn.Module)


@part.behavior("train-str-model", "test_train")
def model_by_name(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, model=policy())
    assert trainer.state.global_step == 2
    assert "train_loss" in trainer.state.log_history[-1]


def family_trains(lib: Library, folder: Path, family: str) -> None:
    # Attention of some families ignores a bias, and experts that no token chose have no gradient.
    train(make(lib, folder, model=policy(family)), share=0.7)


for family in ("gpt2", "llama", "cohere2", "qwen3moe", "gptoss", "neox"):
    part.behavior(f"family-{family}", "test_train")(partial(family_trains, family=family))


@part.behavior("loaded-model-and-tokenizer", "examples/scripts/ppo/ppo.py")
def loaded_model_and_tokenizer(lib: Library, folder: Path) -> None:
    model, tokenizer = load(), load_tokenizer()
    before = weights(model)
    trainer = trained(lib, folder, model=model, processing_class=tokenizer)
    assert trainer.processing_class(PROMPTS)["input_ids"] == tokenizer(PROMPTS)["input_ids"]
    assert not unchanged(before, model), "the given model is trained in place"


@part.behavior("loaded-model-no-tokenizer", "test_train_peft_config")
def loaded_model_alone(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, model=load())
    assert trainer.processing_class.get_vocab() == load_tokenizer().get_vocab()


@part.behavior("model_init_kwargs-dtype", "examples/scripts/rloo.py")
def dtype(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"model_init_kwargs": {"dtype": torch.bfloat16}})
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


@part.behavior("model_init_kwargs-attn", "examples/scripts/gspo.py")
def attention(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"model_init_kwargs": {"attn_implementation": "eager"}})
    assert trainer.model.config._attn_implementation == "eager"


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def remote_folder(folder: Path) -> str:
    """Write a model folder whose classes are in a Python file of that folder."""
    where = folder / "remote"
    load().save_pretrained(where)
    load_tokenizer().save_pretrained(where)
    (where / "remote.py").write_text(REMOTE)
    config = json.loads((where / "config.json").read_text())
    maps = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    config |= {"model_type": "remote_llama", "architectures": ["RemoteForCausalLM"], "auto_map": maps}
    (where / "config.json").write_text(json.dumps(config))
    return str(where)


@part.behavior("trust_remote_code", "test_trust_remote_code")
def trust_remote_code(lib: Library, folder: Path) -> None:
    remote = remote_folder(folder)
    assert "trust_remote_code" in error_of(lambda: make(lib, folder, model=remote))
    trainer = make(lib, folder, {"trust_remote_code": True}, model=remote)
    assert type(trainer.model).__name__ == "RemoteForCausalLM"


@part.behavior("quantization_config-arg", "RLOOTrainer.__init__")
def quantization(lib: Library, folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    trainer = trained(lib, folder, quantization_config=four_bits, peft_config=LoraConfig())
    assert any("4bit" in type(module).__name__ for module in trainer.model.modules())
