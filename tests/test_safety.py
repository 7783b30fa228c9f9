"""Safety: no code from a model folder, no secrets in files, no control characters from model output."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from made_runs import make_run

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli
from reinforcepp.errors import ModelError, RolloutError
from reinforcepp.models import remote_code
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer
from reinforcepp.runtime.terminal import printable

SECRETS = {
    "HF_TOKEN": "hf_SecretSecretSecretSecret",
    "WANDB_API_KEY": "wandbSecretSecretSecret",
    "MY_PASSWORD": "passwordSecretSecret",
}


def test_secrets_reach_no_file_and_no_message(tmp_path, model_folder, reward_folder, pairs_csv, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    shared = ["--model", str(model_folder), "--data", str(pairs_csv), "--save_every", "1"]
    assert cli.main(["reward", *shared, "--output_dir", "reward", "--num_train_epochs", "1"]) == 0
    small = ["--max_steps", "2", "--max_prompt_length", "64", "--max_new_tokens", "8", "--rollout", "transformers"]
    assert cli.main(["train", *shared, "--output_dir", "run", "--reward_model", str(reward_folder), *small]) == 0
    printed = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for value in SECRETS.values():
        assert value not in printed.out + printed.err
        assert not [path for path in files if value.encode() in path.read_bytes()]


@pytest.fixture
def with_code(tmp_path, model_folder):
    """A model folder with custom code for its class and its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w').close()\nclass Own: pass\n")
    named = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config |= {"auto_map": named, "model_type": "own_type"} if name == "config.json" else {"auto_map": named}
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("load", [load_config, load_policy, load_tokenizer])
def test_code_in_a_model_folder_is_never_run(with_code, tmp_path, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # and never asked about
    with pytest.raises(ModelError, match="its own code"):
        load(str(with_code))
    assert not (tmp_path / "harm").exists()


OWN = """
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own_gpt2"

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_allowed_code_runs_and_the_saved_model_needs_permission_again(tmp_path, monkeypatch):
    """Training, resuming, and generation with the flag; without it, the error names the flag."""
    monkeypatch.setattr(remote_code, "_allowed", set())
    folder = tiny.save(tmp_path / "model")
    (folder / "own.py").write_text(OWN)
    named = {
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        "model_type": "own_gpt2",
    }
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | named))
    run, rows = tmp_path / "run", [{"prompt": "How do I check a host?"}] * 8
    settings = {"output_dir": str(run), "max_new_tokens": 4, "save_every": 1, "keep_last": 1}
    settings |= {"trust_remote_code": True}

    def reward(prompts, completions, completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    ReinforceTrainer(str(folder), reward, ReinforceConfig(max_steps=1, **settings), rows).train()
    resumed = {"resume": True, "allow_changes": "max_steps", "max_steps": 2}
    trainer = ReinforceTrainer(str(folder), reward, ReinforceConfig(**resumed, **settings), rows)
    assert trainer.train().global_step == 2 and type(trainer.model).__name__ == "OwnModel"
    monkeypatch.setattr(remote_code, "_allowed", set())
    for load in (load_config, load_policy):
        with pytest.raises(ModelError, match="only with trust_remote_code"):
            load(str(run))
    settings["output_dir"] = str(tmp_path / "other")
    with pytest.raises(RolloutError, match="vllm can't run the model's own code"):
        ReinforceTrainer(str(folder), reward, ReinforceConfig(rollout="vllm", **settings), rows)


def test_pickled_weights_are_not_loaded(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_policy(str(model_folder)).state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_policy(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "text", ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\rb", "\u202egnp.exe", "\x08", "\x00", "\ufeffx"]
)
def test_model_output_can_not_control_the_terminal(text):
    shown = printable(text)
    assert not set(shown) & set("\x1b\x9b\r\u202e\x07\x08\x00\ufeff")
    assert printable("Grüße, 東京 🙂\n\tok") == "Grüße, 東京 🙂\n\tok"


def test_text_in_the_data_never_becomes_part_of_a_path(tmp_path, model_folder, reward_folder, monkeypatch):
    """Neither a prompt, nor a column name, nor a response."""
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_text(
        "prompt,chosen,rejected,../../evil\n"
        + "".join(f'"../../etc/passwd{i}",/tmp/evil{i},~/evil{i},../x\n' for i in range(6))
    )
    flags = ["--max_steps", "1", "--max_prompt_length", "64", "--max_new_tokens", "8", "--rollout", "transformers"]
    inputs = ["--model", str(model_folder), "--reward_model", str(reward_folder), "--data", "data.csv"]
    assert cli.main(["train", *inputs, "--output_dir", "run", *flags]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "run"]
    assert not [path for path in Path("run").rglob("*") if "evil" in path.name or "passwd" in path.name]


def test_opening_a_run_of_others_imports_nothing(tmp_path, model_folder, monkeypatch, capsys):
    """Its files name a reward function and a class of its folder, and the commands don't ask the user about them."""
    run = make_run(tmp_path / "run", 4, settings={"reward_model": "evil.py:reward", "judge": "evil:judge"})
    for path in model_folder.iterdir():
        shutil.copy(path, run)
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(settings | {"reward_model": "evil.py:reward", "command": "python evil.py"})
    )
    monkeypatch.chdir(run)
    Path("evil.py").write_text(
        f"open({str(tmp_path / 'harm')!r}, 'w').close()\ndef reward(**_): return []\njudge = reward\n"
    )
    monkeypatch.syspath_prepend(str(run))  # as with python -m
    assert cli.main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert cli.main(["doctor", str(run)]) in (0, 1)
    assert cli.main(["export", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert (
        cli.main(
            ["generate", "--model", str(run), "--prompt", "Hi", "--max_new_tokens", "2", "--engine", "transformers"]
        )
        == 0
    )
    assert "error" not in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}", "{{ messages.append(1) }}"],
)
def test_a_chat_template_reaches_nothing(tmp_path, model_folder, template, capsys):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    flags = ["--prompt", "Hi", "--max_new_tokens", "2", "--engine", "transformers"]
    assert cli.main(["generate", "--model", str(folder), *flags]) == 2
    assert "chat template" in capsys.readouterr().err
