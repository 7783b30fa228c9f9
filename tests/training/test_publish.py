"""Model cards and uploads of the trainers, against a local Hub."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import yaml
from hub import serving, use_hub
from peft import LoraConfig
from small_trainer import PROMPTS, spread, trainer

from reinforcepp import ConfigError, ModelError, ReinforceConfig, RewardModelConfig, RewardTrainer

TOKEN = "hf_aVerySecretToken"
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
PAIRS = [{"prompt": text, "chosen": f"{text} Yes.", "rejected": "no"} for text in ("Hm?", "Why?", "Who?", "Where?")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as hub:
        hub.tokens[TOKEN] = "ada"
        use_hub(monkeypatch, hub.url, TOKEN, tmp_path / "home")
        yield hub


def files_of(hub, name):
    return {name: content for name, content in hub.repos[name]["files"].items() if name != ".gitattributes"}


def test_training_uploads_the_model_and_its_card_alone(base, tmp_path, hub, capfd):
    settings = {"push_to_hub": True, "hub_model_id": "routes", "hub_private_repo": True, "max_steps": 1}
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2], **settings)
    run.train()
    repo, folder = hub.repos["ada/routes"], tmp_path / "run"
    files = {name for name in repo["files"] if name != ".gitattributes"}
    assert repo["private"] and files >= MODEL
    assert all("token" in name or name in MODEL or "config" in name or "template" in name for name in files)
    assert repo["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = repo["files"]["README.md"].decode()
    assert '"ada/routes"' in card and "| reward |" in card and "1 of 1 steps" in card and "hub_model_id" not in card
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written) and TOKEN not in "".join(capfd.readouterr())


def test_the_card_and_the_upload_take_the_arguments_of_trl(base, tmp_path, hub):
    run = trainer(base, tmp_path / "My-Run", spread, max_steps=1, arguments={"peft_config": LoraConfig()})
    run.train()
    readme = tmp_path / "My-Run" / "README.md"
    assert "# My-Run" in readme.read_text()
    run.create_model_card(model_name="Routes", dataset_name="prompts", tags=["networking"])
    assert "# Routes" in readme.read_text() and "- networking" in readme.read_text()
    hub.tokens["hf_other"] = "eve"
    future = run.push_to_hub("Done", blocking=False, token="hf_other", dataset_name="AI-MO/NuminaMath-TIR", tags="x")
    assert "/eve/My-Run/commit/" in future.result()
    files = files_of(hub, "eve/My-Run")
    front_matter = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front_matter["datasets"] == ["AI-MO/NuminaMath-TIR"] and "x" in front_matter["tags"]
    assert front_matter["library_name"] == "peft" and "adapter_model.safetensors" in files
    assert "vllm serve" not in files["README.md"].decode()


def test_a_run_that_cannot_be_uploaded_ends_before_it_begins(base, tmp_path, hub, monkeypatch):
    run = trainer(base, tmp_path / "run", spread, push_to_hub=True, hub_model_id="ada/x", max_steps=1)
    use_hub(monkeypatch, "http://127.0.0.1:9", TOKEN, tmp_path / "home")
    with pytest.raises(ModelError, match="can't be reached"):
        run.train()
    assert not (tmp_path / "run").exists()
    use_hub(monkeypatch, hub.url, None, tmp_path / "home")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        run.push_to_hub()
    assert hub.repos == {}


def test_a_reward_model_is_uploaded_without_its_pairs_and_folders(base, tmp_path, hub):
    private = shutil.copytree(base, tmp_path / "secret_project" / "base")
    config = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 4, "push_to_hub": True}
    run = RewardTrainer(str(private), RewardModelConfig(**config), train_dataset=PAIRS, eval_dataset=PAIRS)
    run.train()
    files = files_of(hub, "ada/run")
    assert MODEL | {"reward_model.json"} <= set(files) and not any(name.endswith(".parquet") for name in files)
    assert not any(b"secret_project" in content for content in files.values())
    card = files["README.md"].decode()
    assert "| accuracy on held-out pairs |" in card and "text-classification" in card and '"ada/run"' in card
    assert json.loads(files["reward_model.json"])["train_pairs"] == 4
    run.create_model_card(tags="mine")
    assert "- mine" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("config", [ReinforceConfig, RewardModelConfig])
def test_a_token_in_the_settings_is_refused_and_not_shown(config):
    with pytest.raises(ConfigError, match="Set HF_TOKEN") as error:
        config(hub_token=TOKEN)
    assert TOKEN not in str(error.value)
