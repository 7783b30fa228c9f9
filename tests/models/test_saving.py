"""Save models and tokenizers: everything that loads can be saved, and a saved tokenizer encodes texts as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.files import PARTIAL
from reinforcepp.models import tokenizer_files
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.saving import check_savable, save_model
from reinforcepp.models.tokenizer_files import save_tokenizer
from reinforcepp.training.preflight import checkpoint_bytes
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama"), "llama", vocab_size=600)


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Host {i}?", "chosen": f"Ping {i}.", "rejected": "No."} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write(path: Path, **settings) -> Path:
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path.parent


# --- generation config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"top_k": 20, "min_p": 0.1}, {"do_sample": True, "top_k": 20, "min_p": 0.1}),
        (
            {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
            {"length_penalty": None, "early_stopping": None},
        ),
        ({"pad_token_id": -1, "temperature": 0.5}, {"pad_token_id": None, "do_sample": True, "temperature": 0.5}),
        ({"output_scores": True}, {"output_scores": None}),
        ({"do_sample": False, "eos_token_id": [0, 1]}, {"do_sample": False, "eos_token_id": [0, 1]}),
    ],
)
def test_a_generation_config_that_transformers_refuses_is_repaired(folder, tmp_path, settings, saved):
    name = str(write(folder / "generation_config.json", **settings))
    save_model(load_policy(name), load_tokenizer(name), tmp_path)
    reloaded = GenerationConfig.from_pretrained(tmp_path)
    reloaded.validate(strict=True)
    assert {key: getattr(reloaded, key) for key in saved} == saved


def test_a_repair_is_logged(folder, caplog):
    name = str(write(folder / "generation_config.json", temperature=0.3))
    check_savable(load_policy(name), load_tokenizer(name), folder)
    assert "do_sample set to true" in caplog.text and name in caplog.text


# --- before training ----------------------------------------------------------------------------------------------------


def test_the_trial_leaves_no_file(llama, tmp_path):
    check_savable(load_policy(str(llama)), load_tokenizer(str(llama)), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_configuration_that_cannot_be_saved_is_refused(llama, tmp_path):
    model = load_policy(str(llama))
    model.config.temperature = 0.5  # transformers accepts it in the generation config only
    with pytest.raises(ModelError, match=r"configuration can't be saved.*Fix"):
        check_savable(model, load_tokenizer(str(llama)), tmp_path)
    assert not (tmp_path / f"model{PARTIAL}").exists()


def train_policy(model: Path, data: Path, output: Path, **settings) -> None:
    sizes = {"batch_size": 2, "max_steps": 1, "max_new_tokens": 2, "max_prompt_length": 64}
    args = ReinforceConfig(output_dir=str(output), rollout="transformers", **sizes, **settings)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    ReinforceTrainer(str(model), lambda prompts, **_: [0.0] * len(prompts), args, rows).train()


def train_reward(model: Path, data: Path, output: Path, **settings) -> None:
    train_reward_model(
        RewardModelConfig(model=str(model), data=str(data), output_dir=str(output), batch_size=2, **settings)
    )


def train_sft(model: Path, data: Path, output: Path, **settings) -> None:
    columns = {"prompt_column": "prompt", "completion_column": "chosen"}
    files = {"model": str(model), "data": str(data), "output_dir": str(output)}
    train_language_model(SftConfig(batch_size=2, **files, **columns, **settings))


@pytest.mark.parametrize("train", [train_policy, train_reward, train_sft])
def test_every_training_checks_before_its_first_step(llama, pairs, tmp_path, monkeypatch, train):
    def changed(tokenizer, folder):
        raise ModelError("the tokenizer changes")

    monkeypatch.setattr("reinforcepp.models.saving.save_tokenizer", changed)
    with pytest.raises(ModelError, match="the tokenizer changes"):
        train(llama, pairs, tmp_path / "run")
    assert not any((tmp_path / "run").glob("metrics.jsonl")) or not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_disk_too_small_for_the_checkpoints_is_refused(llama, pairs, tmp_path, monkeypatch, capsys):
    free = 3 * sum(p.nbytes for p in load_policy(str(llama)).parameters())  # one checkpoint, and no saved model
    monkeypatch.setattr("reinforcepp.training.supervised_setup.weight_bytes", lambda name: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
    with pytest.raises(ConfigError, match=r"output_dir: .* free, but the checkpoints need up to .*keep_last"):
        train_sft(llama, pairs, tmp_path / "run")
    assert "Disk: 1 checkpoint of" in capsys.readouterr().err


def test_the_announced_size_is_that_of_a_checkpoint(llama, pairs, tmp_path):
    model = load_policy(str(llama)).requires_grad_(True)
    settings = {"prompt_column": "prompt", "completion_column": "chosen", "save_every": 1, "num_train_epochs": 1}
    settings["keep_last"] = 1
    train_language_model(
        SftConfig(model=str(llama), data=str(pairs), output_dir=str(tmp_path / "run"), batch_size=8, **settings)
    )
    files = (tmp_path / "run/checkpoints/step-000001").glob("*.safetensors")
    assert checkpoint_bytes([model]) == pytest.approx(sum(f.stat().st_size for f in files), rel=0.02)


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def sentencepiece() -> Tokenizer:
    """Return a tokenizer like Llama 2's: spaces are a character, and bytes are a fallback."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator([*tiny.TEXT, "[INST] word [/INST]"], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **settings) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder / "tokenizer_config.json", **settings)


LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    "settings",
    [
        {"legacy": True},
        {"legacy": True, "add_bos_token": True, "add_eos_token": True},
        {"legacy": False},
        {"add_bos_token": False},
        {"legacy": False, "add_prefix_space": False},
    ],
)
def test_a_saved_llama_tokenizer_encodes_as_before(folder, tmp_path, settings):
    with_tokenizer(folder, sentencepiece(), tokenizer_class="LlamaTokenizer", **LLAMA2, **settings)
    original = AutoTokenizer.from_pretrained(folder)
    shutil.copy(folder / "config.json", tmp_path)
    save_tokenizer(load_tokenizer(str(folder)), tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<s>[INST word</s>[INST] a  b", "[INST", " x", *tokenizer_files.PROBES):
        assert saved(text)["input_ids"] == original(text)["input_ids"]
        plain = saved(text, add_special_tokens=False)["input_ids"]
        assert plain == original(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_saving_changes_is_copied_or_refused(folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(folder))
    save = type(tokenizer).save_pretrained

    def damaging(self, target):
        save(self, target)
        state = json.loads((Path(target) / "tokenizer.json").read_text(encoding="utf-8"))
        state["pre_tokenizer"]["add_prefix_space"] = True
        (Path(target) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", damaging)
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("word")["input_ids"] == tokenizer("word")["input_ids"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="after saving, the tokenizer encodes texts differently"):
        save_tokenizer(tokenizer, tmp_path)


def test_a_tokenizer_is_read_again_only_if_other_files_are_saved(folder, tmp_path, monkeypatch):
    """Reading a real tokenizer takes seconds, and every checkpoint saves it."""
    tokenizer, read = load_tokenizer(str(folder)), []
    original = tokenizer_files.read_tokenizer
    monkeypatch.setattr(tokenizer_files, "read_tokenizer", lambda path: read.append(path) or original(path))
    for name, count in (("first", 1), ("second", 1)):
        save_tokenizer(tokenizer, tmp_path / name)
        assert len(read) == count
    tokenizer.add_tokens(["plainword"])
    save_tokenizer(tokenizer, tmp_path / "third")
    assert len(read) == 2


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_a_byte_level_tokenizer_of_a_wrong_class_is_read_from_its_file(folder, tmp_path, caplog, declared):
    raw = Tokenizer.from_str(tiny._backend(320))
    state = json.loads(raw.to_str())
    single_digits = {"type": "Digits", "individual_digits": True}  # GPT2Tokenizer would replace this
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [single_digits, state["pre_tokenizer"]]}
    raw = Tokenizer.from_str(json.dumps(state))
    with_tokenizer(folder, raw, tokenizer_class=declared, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer = load_tokenizer(str(folder))
    for text in tokenizer_files.PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    shutil.copy(folder / "config.json", tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a 你好")["input_ids"] == tokenizer("a 你好")["input_ids"]


def test_a_tokenizer_with_its_right_class_is_kept(llama, folder, caplog):
    with_tokenizer(folder, sentencepiece(), tokenizer_class="LlamaTokenizer", **LLAMA2, legacy=False)
    assert type(load_tokenizer(str(folder))).__name__ == "LlamaTokenizer"
    assert caplog.text == ""


def test_added_tokens_and_the_pad_token_are_saved(llama, tmp_path):
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_tokens([AddedToken("<tool>", special=True), "plainword"])
    save_tokenizer(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved("a<tool>plainword")["input_ids"] == tokenizer("a<tool>plainword")["input_ids"]
    assert saved.pad_token == tokenizer.pad_token


# --- chat templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "chosen"), [(("default", "tool_use"), "default"), (("rag", "tool_use"), "tool_use")])
def test_one_of_several_chat_templates_is_used_and_all_are_saved(folder, tmp_path, caplog, names, chosen):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {name: name + CHAT for name in names}
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == chosen + CHAT
    assert f"using the chat template '{chosen}'" in caplog.text
    model = load_policy(str(folder))
    for _ in range(2):  # a second save replaces the first one
        save_model(model, tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert saved == {"default": chosen + CHAT} | {name: name + CHAT for name in names if name != "default"}


def test_chat_templates_without_a_default_are_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"rag": CHAT, "code": CHAT}
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="chat templates code, rag, but none called default"):
        load_tokenizer(str(folder))


# --- keep_best ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [train_policy, train_reward, train_sft])
def test_an_unknown_metric_of_keep_best_ends_the_first_step(llama, pairs, tmp_path, train):
    """The first checkpoint is 50 steps away."""
    with pytest.raises(ConfigError, match="keep_best: metric 'losss' not found"):
        train(llama, pairs, tmp_path / "run", keep_best="-losss")
