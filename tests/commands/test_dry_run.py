"""``--dry_run``: all that a training starts from is shown, nothing is loaded and nothing written."""

import pytest
import yaml

from reinforcepp.commands.cli import main
from reinforcepp.commands.dry_run import settings
from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.models import loading as models
from reinforcepp.models.conversations import format_prompt
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.tokenization import encode, encode_example


@pytest.fixture(autouse=True)
def nothing_is_loaded_or_written(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(models, "load_weights", refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def shown(capsys, *arguments) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_a_policy_training(model_folder, reward_folder, pairs_csv, capsys):
    arguments = ["--model", model_folder, "--reward_model", reward_folder, "--data", pairs_csv, "--batch_size", 4]
    out = shown(capsys, "train", *arguments, "--dry_run", "--rollout", "transformers", "--system_prompt", "Be short.")
    assert "  batch_size: 4  # default: 8\n" in out and "  learning_rate: null\n" in out
    assert "Fits: " in out and "AdamW's moments" in out
    assert out.count("completion that follows is trained on") == 3
    assert out.count(r"Be short.\n\nQuestion: ") == 3


ENVIRONMENT = """
class Twice:
    def reset(self, row):
        self.left = 2

    def step(self, message):
        self.left -= 1
        return "Again.", 0.5, not self.left
"""


def test_the_tokens_and_masks_of_an_episode(model_folder, pairs_csv, tmp_path_factory, capsys):
    file = tmp_path_factory.mktemp("environment") / "twice.py"
    file.write_text(ENVIRONMENT)
    arguments = ["--model", model_folder, "--data", pairs_csv, "--environment", f"{file}:Twice", "--dry_run"]
    out = shown(capsys, "train", *arguments)
    assert out.count("rewards: 0.5, 0.5") == 3 and out.count("Again.") == 3
    text, mask = (
        next(line for line in out.splitlines() if line.startswith(f"  {name}  ")) for name in ("text", "mask")
    )
    tokenizer = load_tokenizer(str(model_folder))
    stand_in = [*encode(tokenizer, "..."), tokenizer.eos_token_id]
    assert text.count("...") == 2 and mask.split().count("1") == 2 * len(stand_in)


@pytest.mark.parametrize("command", ["train", "sft", "reward"])
def test_the_precision_is_printed_once(command, model_folder, reward_folder, pairs_csv, capsys):
    rewards = ["--reward_model", str(reward_folder)] if command == "train" else []
    assert main([command, "--model", str(model_folder), "--data", str(pairs_csv), *rewards, "--dry_run"]) == 0
    assert "".join(capsys.readouterr()).count("Mixed precision no: ") == 1


def test_the_tokens_are_those_that_the_model_gets(model_folder, pairs_csv, capsys):
    assert main(["reward", "--model", str(model_folder), "--data", str(pairs_csv), "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert "Learning rate 0.0001: the default for full training of" in err
    assert out.count("the score is read at the last") == 6
    tokenizer = load_tokenizer(str(model_folder))
    prompt, chosen = "How do I see my routes?", "Run ip route and read the default line."
    ids, length = encode_example(tokenizer, prompt, chosen), len(encode(tokenizer, format_prompt(tokenizer, prompt)))
    if f"text    '{prompt}" in out:  # unless it is held out
        tokens = " ".join(f"{str(tokenizer.decode([i]))!r}:{i}" for i in ids)
        assert f"  tokens  {tokens}\n" in out
        assert f"  mask    {' '.join('0' * length + '1' * (len(ids) - length))}\n" in out
    assert str(tokenizer.eos_token) in out


def test_the_judgments_by_criterion_are_shown(model_folder, tmp_path_factory, capsys):
    data = tmp_path_factory.mktemp("data") / "pairs.csv"
    grades = ("chosen,1,3", "tie,3,1", ",2,2")
    rows = [f"Why {i}?,Because.,No.,{grade}" for i, grade in enumerate(grades)]
    data.write_text("prompt,chosen,rejected,safe,chosen_length,rejected_length\n" + "\n".join(rows))
    criteria = ["--criteria", "safe", "short=-length", "--criteria_margins", "--heldout_fraction", 0]
    out = shown(capsys, "reward", "--model", model_folder, "--data", data, *criteria, "--dry_run")
    for lines in (
        "safe: chosen\n  short: chosen, margin 2",
        "safe: tie\n  short: rejected, margin 2",
        "safe: none\n  short: tie",
    ):
        assert f"judgments\n  {lines}\n" in out


def test_the_settings_are_a_configuration_file():
    config = TrainConfig(report_to=("tensorboard",), system_prompt="No: 'yes'.", batch_size=3)
    read = yaml.safe_load("\n".join(settings(config)))
    assert read == {name: list(v) if isinstance(v, tuple) else v for name, v in as_dict(config).items()}


def test_errors_are_those_of_the_training(capsys, pairs_csv):
    assert main(["train", "--dry_run", "--data", "no.csv"]) == 2
    assert "no.csv" in capsys.readouterr().err
    assert main(["reward", "--dry_run", "--data", str(pairs_csv), "--model", "no/such/model"]) == 2
    assert "no/such/model" in capsys.readouterr().err


def test_plan_is_the_same_with_dry_run(capsys):
    arguments = ["plan", "--device", "h100", "--rollout", "transformers", "--format", "json"]
    assert shown(capsys, *arguments, "--dry_run") == shown(capsys, *arguments)
