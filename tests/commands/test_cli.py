"""The ``reinforcepp`` command: exit codes, one-line errors, complete files, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from warm import warm_python

from reinforcepp.commands import cli
from reinforcepp.commands.table import COMMANDS, Command
from reinforcepp.errors import ConfigError, DataError, ModelError, TrainingDiverged
from reinforcepp.locks import file_lock, folder_lock
from scripts import SOURCE

USER_COMMANDS = ["sft", "reward", "train", "generate", "compare", "plan", "lint", "report", "doctor", "demo"]
USER_COMMANDS += ["chat", "serve", "serve-reward", "export", "push", "recipes", "migrate"]
USER_COMMANDS += ["label", "label export", "label import", "label agreement"]
SMALL = ["--max_prompt_length", "64", "--max_new_tokens", "8"]


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder, reward_folder, pairs_csv):
    """The working directory: ``model``, ``reward`` and ``pairs.csv`` are there and good."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "model")
    shutil.copytree(reward_folder, "reward")
    shutil.copy(pairs_csv, "pairs.csv")
    return tmp_path


@pytest.fixture
def refused(place, capsys, monkeypatch):
    """``refused("train", "--x", ...)``: the one-line error, after exit code 2.

    No weights may be loaded and no file made or changed on the way to it.
    """
    from transformers import PreTrainedModel

    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the mistake was found")

    def run(command: str, *flags: str, may_load: bool = False) -> str:
        inputs = {"--model": "model", "--data": "pairs.csv", "--output_dir": "out", "--reward_model": "reward"}
        own = ("--model", "--data", "--output_dir")
        wanted = {"sft": own, "reward": own, "train": tuple(inputs)}.get(command, ("--model",))
        given = [word for name in wanted if name not in flags for word in (name, inputs[name])]
        given += ["--rollout", "transformers"] if command == "train" else []
        before = listing(place)
        with monkeypatch.context() as patch:
            if not may_load:
                patch.setattr(PreTrainedModel, "from_pretrained", loaded)
            assert cli.main([command, *given, *flags]) == 2
        assert listing(place) == before
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        *earlier, last = err.splitlines()
        assert last.startswith("error: ")
        assert not [line for line in earlier if "error" in line.lower()]
        return err

    return run


@pytest.fixture
def acting(monkeypatch):
    """``acting("train", error)``: the command does nothing but raise ``error``, or return if that is None."""

    def act(command: str, error: BaseException | None) -> None:
        def action(config):
            if error is not None:
                raise error

        load = Command.load
        monkeypatch.setattr(
            Command, "load", lambda self, config: action if self.name == command else load(self, config)
        )

    return act


# --- the command itself -----------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [command for command in (*USER_COMMANDS, "--config") if command not in out] == []
    assert cli.main([]) == 2
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", USER_COMMANDS)
def test_help_of_a_command_lists_every_setting_with_description_and_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.replace("│", " ").split())
    for name, value in vars(COMMANDS[command].config()).items():
        assert f"--{name}" in out
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert f"(default: {shown})" in words or isinstance(value, bool)
    if command == "train":
        assert "bias the policy ratio" in words


def test_version(capsys):
    import reinforcepp

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"reinforcepp {reinforcepp.__version__}\n"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("trian", ["'trian'", "Did you mean 'train'", "reinforcepp --help"]),
        ("--batch_size 3", ["Command '--batch_size' not found"]),
        ("train --bacth_size 3", ["--bacth_size", "Did you mean '--batch_size'", "reinforcepp train --help"]),
        ("train --bacth-size=3", ["--bacth_size", "Did you mean '--batch_size'"]),
        ("train --zzzz", ["--zzzz not found"]),
        ("train --batch 3", ["--batch not found."]),  # no guessing of shortened names
        ("train stray", ["'stray'", "quotes"]),
        ("generate --prompt How do I", ["'do'", "quotes"]),
        ("train --batch_size abc", ["batch_size must be a whole number, not 'abc'"]),
        ("train --batch_size=2.5", ["batch_size must be a whole number, not '2.5'"]),
        (
            "train --max_tokens_per_micro_batch abc",
            ["max_tokens_per_micro_batch must be a whole number or None", "'abc'"],
        ),
        ("train --learning-rate fast", ["learning_rate must be a number or None, not 'fast'"]),
        ("train --estimator ppu", ["estimator must be one of", "'ppu'", "reinforce_plus_plus_baseline"]),
        ("train --padding_free maybe", ["padding_free must be one of auto, off, not 'maybe'"]),
        ("generate --engine vlm", ["engine must be one of", "Did you mean 'vllm'"]),
        ("train --device cuda", ["--device must be auto (the GPU", "'cuda'", "CUDA_VISIBLE_DEVICES"]),
        ("train --batch_size 0", ["batch_size must be greater than 0, not 0"]),
        ("train --learning_rate nan", ["learning_rate", "finite", "nan"]),
        ("train --resume --overwrite", ["overwrite", "resume"]),
        ("reward --micro_batch_size 3", ["micro_batch_size 3", "batch_size 8"]),
        ("demo --max_steps 0", ["max_steps"]),
    ],
)
def test_wrong_command_lines_are_one_line_errors(command, named, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("it was run"))
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [word for word in named if word not in err] == []


def test_numbers_can_have_an_exponent_and_none_any_case():
    flags = ["--max_tokens_per_micro_batch", "1e4", "--max-steps=2e1", "--learning_rate", "none"]
    config = cli.parse("train", flags)
    assert (config.max_tokens_per_micro_batch, config.max_steps, config.learning_rate) == (10_000, 20, None)
    assert cli.parse("train", ["--seed", "4294967295"]).seed == 4294967295
    assert (
        cli.parse("train", ["--estimator", "grpo", "--num_generations", "2", "--scale_rewards=none"]).scale_rewards
        == "none"
    )


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("train --batch_size", ["--batch_size", "value"]),
        ("train --padding_free", ["--padding_free", "value"]),
    ],
)
def test_missing_values_name_the_flag(command, named, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("it was run"))
    with pytest.raises(SystemExit) as stop:
        cli.main(command.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert [word for word in named if word not in err] == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (DataError("x is wrong: mend it."), 2, "error: x is wrong: mend it.\n"),
        (TrainingDiverged("The loss is nan."), 1, "error: The loss is nan.\n"),
        (
            OSError(28, "No space left on device", "out/x"),
            2,
            "error: No space left on device (out/x). Files saved earlier are intact.\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
    ],
)
def test_exit_codes(acting, capfd, error, code, said):
    acting("train", error)
    standard_output = os.dup(1)
    try:
        assert cli.main(["train"]) == code
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_that_can_not_show_a_character_replaces_it(tmp_path, encoding):
    """Files are UTF-8 whatever the terminal is."""
    (tmp_path / "日本 → ✓.csv").write_text("prompt,chosen,rejected\na,雨,雪\nb,c,d\n", encoding="utf-8")
    command = [sys.executable, "-m", "reinforcepp", "lint", "--data", "日本 → ✓.csv", "--fail_on", "never"]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": encoding}}
    shown = subprocess.run(command, capture_output=True, check=True, **options)
    assert shown.stdout.startswith(b"?? ? ?.csv: 2 rows")
    subprocess.run(
        [*command, "--format", "json", "--output", "report.json"], capture_output=True, check=True, **options
    )
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["data"] == "日本 → ✓.csv"


def test_undecodable_bytes_in_an_argument(tmp_path):
    command = [sys.executable, "-m", "reinforcepp", "generate", b"--prompt", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: --prompt: 'caf\\udce9' isn't valid UTF-8.")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("keep_best needs checkpoints: set save_every.", "--keep_best needs checkpoints: set --save_every."),
        ("device: no GPU. The device of seed 3 is new.", "--device: no GPU. The device of seed 3 is new."),
        ("'reward_model' and \"reward_model\" are columns", "'reward_model' and \"reward_model\" are columns"),
        ("the model's save_every isn't 0", "the model's --save_every isn't 0"),
        ("runs/reward_model/chat_template.jinja: no", "runs/reward_model/chat_template.jinja: no"),
        ("--allow_changes seed save_every; save_every", "--allow_changes seed save_every; --save_every"),
        ("a.yaml: save_every must be 1", "a.yaml: save_every must be 1"),
        ("save_every_2 and my_save_every", "save_every_2 and my_save_every"),
    ],
)
def test_errors_name_settings_as_flags(message, shown, acting, capsys):
    acting("train", ConfigError(message))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == f"error: {shown}\n"


@pytest.mark.parametrize("at", ["flag", "file", "folder", "library"])
def test_errors_leave_other_text_that_looks_like_a_setting(acting, capsys, tmp_path, monkeypatch, at):
    text = "reward_model" if at in ("flag", "file") else "my save_every runs"
    error = ModelError(f"{text}: not found. Set max_new_tokens.")
    flags = ["--reward_model", text] if at == "flag" else []
    if at == "file":
        flags = ["--config", "a.yaml"]
        (tmp_path / "a.yaml").write_text(f"rewards: [{text}]")
    if at == "folder":
        (tmp_path / text).mkdir()
        monkeypatch.chdir(tmp_path / text)
        error = ModelError(f"{tmp_path / text / 'rm'}: not found. Set max_new_tokens.")
    else:
        monkeypatch.chdir(tmp_path)
    error.__cause__ = OSError(text) if at == "library" else None
    acting("train", error)
    assert cli.main(["train", *flags]) == 2
    expected = str(error).replace("max_new_tokens", "--max_new_tokens")
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_errors_in_a_deleted_folder(acting, capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    acting("doctor", ConfigError("fail_on: bad"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: --fail_on: bad\n"
    acting("doctor", FileNotFoundError("from os.getcwd()"))
    assert cli.main(["doctor"]) == 2
    assert "error: The current folder was deleted. Change to another one" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="getcwd"):
        cli.main(["doctor"])


def test_a_device_that_is_no_choice(capsys):
    assert cli.main(["train", "--device", "gpu"]) == 2
    assert "--device must be auto (the GPU if this node has one) or cpu, not 'gpu'. Use auto" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(acting):
    acting("train", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train"])


# --- data -------------------------------------------------------------------------------------------------------------

HEAD = "prompt,chosen,rejected\n"

BAD_DATA = {
    "missing": (None, ["bad.csv", "no such file"]),
    "empty": ("", ["bad.csv", "empty", "prompt,chosen,rejected"]),
    "header only": (HEAD, ["bad.csv", "no row"]),
    "latin-1": (HEAD.encode() + b"a,b,c\nd,caf\xe9,f\n", ["bad.csv:3", "0xe9", "UTF-8", "iconv"]),
    "column": ("prompt,chosn,rejected\na,b,c\nd,e,f\n", ["'chosen'", "'chosn'", "'rejected'", "Did you mean 'chosn'"]),
    "one row": (HEAD + "a,b,c\n", ["1 usable pair", "at least 2"]),
    "empty cells": (
        HEAD + "a,b,c\nd, ,f\n,h,i\n",
        ["1 usable pair", "1 empty chosen (row 3)", "1 empty prompt (row 4)"],
    ),
    "equal": (HEAD + "a,b,c\nd,e,e\nf,g, g \n", ["1 usable pair", "2 with chosen equal to rejected (rows 3, 4)"]),
    "duplicates": (HEAD + "a,b,c\n" * 4, ["1 usable pair", "3 duplicates (rows 3, 4, 5)"]),
    "quote": (HEAD + 'a,"b,c\n', ["bad.csv:2", "double quote"]),
    "cells": (HEAD + "a,b,c\nd,e,f,g\n", ["bad.csv:3", "4 cells", "3"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_preference_data(refused, case):
    data, named = BAD_DATA[case]
    if data is not None:
        Path("bad.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    message = refused("reward", "--data", "bad.csv")
    assert [word for word in named if word not in message] == []


@pytest.mark.parametrize("case", ["missing", "empty", "header only", "latin-1", "quote", "cells"])
def test_unusable_prompt_data(refused, case):
    data, named = BAD_DATA[case]
    if data is not None:
        Path("bad.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    message = refused("train", "--data", "bad.csv")
    assert [word for word in named if word not in message and "chosen" not in word] == []


def test_a_column_by_another_name(refused):
    Path("bad.csv").write_text("ask,good,bad\na,b,c\nd,e,f\n")
    message = refused("train", "--data", "bad.csv")
    assert [word for word in ("'prompt'", "'ask', 'good', 'bad'", "--prompt_column") if word not in message] == []
    assert "--chosen_column" in refused("reward", "--data", "bad.csv", "--prompt_column", "ask")
    assert "both name" in refused("reward", "--chosen_column", "a", "--rejected_column", "a")


def test_skipped_rows_are_counted_and_the_rest_is_used(place, capsys):
    with open("pairs.csv", "a", encoding="utf-8") as file:
        file.write("How do I see my routes?,Run ip route and read the default line.,Reboot it.\nwhy,,x\nwhy,y,y\n")
    assert cli.main(["reward", "--model", "model", "--data", "pairs.csv", "--num_train_epochs", "1"]) == 0
    err = capsys.readouterr().err
    assert "8 usable pairs; skipped 3 rows" in err
    for reason in ("1 duplicate (row 10)", "1 empty chosen (row 11)", "1 with chosen equal to rejected (row 12)"):
        assert reason in err
    card = json.loads(Path("models/reward_model/reward_model.json").read_text())
    assert card["train_pairs"] + card["heldout_pairs"] == 8


# --- prompts and answers over the limit -------------------------------------------------------------------------------


def train(*flags: str) -> list[str]:
    inputs = ["--model", "model", "--data", "pairs.csv", "--reward_model", "reward", "--output_dir", "out"]
    return ["train", *inputs, *SMALL, "--rollout", "transformers", *flags]


@pytest.mark.parametrize(("action", "did", "steps"), [("cut", "truncated", 8), ("drop", "skipped", 7)])
def test_long_prompts_are_counted_and_truncated_or_dropped(place, capsys, action, did, steps):
    head, _, *rest = Path("pairs.csv").read_text(encoding="utf-8").splitlines()
    Path("pairs.csv").write_text("\n".join([head, *rest, f"{'why ' * 100},a,b"]), encoding="utf-8")
    flags = ["--long_prompts", action, "--heldout_fraction", "0", "--batch_size", "1"]
    assert cli.main(train(*flags)) == 0
    err = capsys.readouterr().err
    assert "1 of 8 training prompts are longer than 64 tokens" in err and f"were {did} (rows 9)" in err
    assert did in err
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == steps


def test_a_limit_below_every_prompt(refused):
    flags = ("--max_prompt_length", "4", "--prompt_format", "question_answer")
    assert "leaves no room" in refused("train", *flags)
    message = refused("train", "--max_prompt_length", "4", "--long_prompts", "drop")
    assert "training prompt" in message and "max_prompt_length" in message
    assert "max_length 9" in refused("reward", "--max_length", "9")


def test_more_tokens_than_the_context_of_the_model(refused):
    message = refused("train", "--max_prompt_length", "128", "--max_new_tokens", "400")
    assert [word for word in ("128", "400", "512 tokens") if word not in message] == []
    message = refused("train", "--max_new_tokens", "512")
    assert "max_new_tokens 512 leaves no room" in message


# --- models -----------------------------------------------------------------------------------------------------------


def edit(path: str, **changes) -> None:
    values = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(values | changes))


def copy(source: str, target: str) -> None:
    shutil.copytree(source, target)


BAD_MODELS = {
    "absent path": (lambda: None, "./modle", ["model folder not found", "./modle", "Did you mean 'model'"]),
    "a file": (lambda: None, "pairs.csv", ["pairs.csv", "a file", "folder"]),
    "no model in it": (lambda: Path("bad").mkdir(), "bad", ["bad", "not a model", "config.json"]),
    "one level up": (lambda: copy("model", "bad/inner"), "bad", ["no config.json", "inner"]),
    "unknown builtin": (lambda: None, "builtin:tyni", ["builtin:tyni", "builtin:tiny"]),
    "configuration": (
        lambda: (copy("model", "bad"), Path("bad/config.json").write_text("{")),
        "bad",
        ["bad/config.json", "JSON"],
    ),
    "unknown type": (
        lambda: (copy("model", "bad"), edit("bad/config.json", model_type="zorg")),
        "bad",
        ["bad", "zorg"],
    ),
    "no tokenizer": (
        lambda: (copy("model", "bad"), [p.unlink() for p in Path("bad").glob("tokenizer*")]),
        "bad",
        ["bad", "tokenizer not found", "tokenizer.json"],
    ),
    "vocabulary": (
        lambda: (copy("model", "bad"), edit("bad/config.json", vocab_size=100)),
        "bad",
        ["bad", "320 tokens", "only 100", "tokenizer files"],
    ),
    "no end": (
        lambda: (copy("model", "bad"), edit("bad/tokenizer_config.json", eos_token=None)),
        "bad",
        ["bad", "no EOS token", "eos_token"],
    ),
}


@pytest.mark.parametrize("command", ["sft", "reward", "train", "generate"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_unusable_models(refused, command, case):
    make, name, named = BAD_MODELS[case]
    make()
    message = refused(command, "--model", name, *(["--prompt", "hi"] if command == "generate" else []))
    assert [word for word in named if word not in message] == []


BAD_WEIGHTS = {
    "none": (lambda: Path("model/model.safetensors").unlink(), ["model", "model.safetensors"]),
    "cut short": (lambda: os.truncate("model/model.safetensors", 2000), ["model", "can't be loaded"]),
    "another shape": (lambda: edit("model/config.json", n_embd=128), ["model", "don't match", "config.json"]),
    "some missing": (lambda: edit("model/config.json", n_layer=3), ["model", "don't match", "missing"]),
}


@pytest.mark.parametrize("command", ["sft", "reward", "train", "generate"])
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_unusable_weights(refused, command, case):
    make, named = BAD_WEIGHTS[case]
    make()
    message = refused(command, *(["--prompt", "hi"] if command == "generate" else []), may_load=True)
    assert [word for word in named if word not in message] == []


@pytest.mark.parametrize("command", ["sft", "train", "generate"])
def test_a_model_that_is_not_causal(refused, command):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).save_pretrained("bert")
    tiny.tokenizer().save_pretrained("bert")
    message = refused(command, "--model", "bert", *(["--prompt", "hi"] if command == "generate" else []))
    assert [word for word in ("bert", "encoder", "causal language model") if word not in message] == []


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no network"])
@pytest.mark.parametrize("name", ["distilgpt2", "org/name", "not a name"])
def test_a_model_that_is_neither_local_nor_on_the_hub(refused, monkeypatch, tmp_path, name, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("reinforcepp.runtime.process.getproxies", dict)
    begin = time.monotonic()
    message = refused("train", "--model", name)
    assert time.monotonic() - begin < 10
    for word in (name, "can't be downloaded", "'builtin:tiny'", f"hf download {name}"):
        assert word in message
    assert "Retrying" not in message


# --- reward models ----------------------------------------------------------------------------------------------------


def reshape_head() -> None:
    weights = load_file("reward/model.safetensors")
    save_file(weights | {"score.weight": torch.zeros(2, 64)}, "reward/model.safetensors", {"format": "pt"})


def behead() -> None:
    weights = load_file("reward/model.safetensors")
    del weights["score.weight"]
    save_file(weights, "reward/model.safetensors", {"format": "pt"})


def make_language_model() -> None:
    shutil.copy("reward/reward_model.json", "model")
    shutil.rmtree("reward")
    copy("model", "reward")


BAD_REWARDS = {
    "absent": (lambda: shutil.rmtree("reward"), ["reward model folder not found", "reinforcepp reward"]),
    "no card": (
        lambda: Path("reward/reward_model.json").unlink(),
        ["reward", "not a reward model", "reward_model.json"],
    ),
    "damaged card": (lambda: Path("reward/reward_model.json").write_text("{}"), ["reward_model.json", "damaged"]),
    "no model": (lambda: Path("reward/config.json").unlink(), ["reward", "config.json"]),
    "no weights": (lambda: Path("reward/model.safetensors").unlink(), ["reward", "no safetensors weights"]),
    "headless": (behead, ["reward", "no score head", "score.weight"]),
    "a language model": (make_language_model, ["reward", "no score head", "isn't a reward model"]),
    "another shape": (reshape_head, ["reward", "[2, 64]", "[1, 64]", "reward model again"]),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_unusable_reward_models(refused, case):
    make, named = BAD_REWARDS[case]
    make()
    message = refused("train")
    assert [word for word in named if word not in message] == []


def test_a_reward_model_with_a_smaller_vocabulary_than_its_tokenizer(refused):
    tiny.tokenizer(330).save_pretrained("reward")
    message = refused("train", may_load=True)
    assert [
        word for word in ("reward", "tokens, but the model only 321", "Copy the tokenizer") if word not in message
    ] == []


def test_a_reward_model_whose_scores_changed_since_it_was_saved(refused):
    weights = load_file("reward/model.safetensors")
    save_file(weights | {"score.weight": weights["score.weight"] * 2}, "reward/model.safetensors", {"format": "pt"})
    message = refused("train", may_load=True)
    assert [word for word in ("reward", "scores its probe texts differently", "train") if word not in message] == []


# --- the output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "reward", "train"])
def test_unusable_output_folders(refused, command, monkeypatch):
    assert "pairs.csv is a file" in refused(command, "--output_dir", "pairs.csv/out")
    copy("reward", "taken")
    assert "--overwrite" in refused(command, "--output_dir", "taken")
    Path("taken/thesis.tex").touch()
    assert "thesis.tex" in refused(command, "--output_dir", "taken", "--overwrite")
    copy("model", "other")
    assert "files that reinforcepp didn't write" in refused(command, "--output_dir", "other", "--overwrite")
    assert "output_dir" in refused(command, "--output_dir", "model", "--overwrite")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission" in refused(command)


@pytest.mark.parametrize(
    "command",
    ["reward", "train"],
)
def busy_commands():
    return {
        "sft": ("--model", "model", "--data", "pairs.csv", "--output_dir", "out"),
        "reward": ("--model", "model", "--data", "pairs.csv", "--output_dir", "out"),
        "train": ("--model", "model", "--data", "pairs.csv", "--output_dir", "out", "--reward_model", "reward"),
        "compare": ("model", "model", "--data", "pairs.csv", "--judge", "reward", "--output_dir", "out"),
        "compare-algorithms": ("--data", "pairs.csv", "--reward_model", "reward", "--output_dir", "out"),
        "demo": ("--output_dir", "out"),
        "export": ("model", "--output_dir", "exported"),
        "generate": ("--model", "model", "--prompt", "Hello", "--output", "answers.jsonl"),
        "lint": ("--data", "pairs.csv", "--fix", "fixed.csv"),
    }


@pytest.mark.parametrize("command", busy_commands())
def test_an_output_that_another_process_writes(place, capsys, command):
    with (
        folder_lock(Path("out")),
        file_lock(Path("exported")),
        file_lock(Path("answers.jsonl")),
        file_lock(Path("fixed.csv")),
    ):
        before = listing(place)
        assert cli.main([command, *busy_commands()[command]]) == 2
        assert listing(place) == before
    assert "is being written by another process" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["reward", "train"])
def test_no_disk_space(refused, command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 2048, 2048))
    message = refused(command)
    assert [word for word in ("output_dir: out", "2 KiB free") if word not in message] == []


@pytest.mark.parametrize("command", ["reward", "train"])
def test_an_error_keeps_the_run_that_overwrite_would_replace(refused, command):
    copy("reward", "out")
    refused(command, "--overwrite", "--data", "none.csv")
    refused(command, "--overwrite", "--model", "./none")
    os.truncate("model/model.safetensors", 2000)
    refused(command, "--overwrite", may_load=True)


def test_overwrite_replaces_the_run(place):
    assert cli.main(train("--max_steps", "2", "--save_every", "1")) == 0
    assert cli.main(train("--max_steps", "1", "--overwrite")) == 0
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 1
    assert not Path("out/checkpoints").exists()


def test_nothing_to_resume(refused):
    assert "no checkpoint to resume from" in refused("train", "--resume")


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "flags", "said"),
    [
        ([], [], "Nothing was saved. To start over, run the same command again."),
        (["run.json"], [], "Nothing was saved. To start over, run the same command again with --overwrite."),
        (["checkpoints/step-000002.partial/state.json"], [], "Nothing was saved"),
        (
            ["checkpoints/step-000002/state.json"],
            [],
            "Saved a checkpoint in out. To resume, run the same command with --resume",
        ),
        (["checkpoints/step-000002/state.json"], ["--overwrite"], "with --resume instead of --overwrite"),
    ],
)
def test_ctrl_c_prints_the_saved_checkpoint_and_how_to_resume(
    acting, tmp_path, monkeypatch, capsys, files, flags, said
):
    monkeypatch.chdir(tmp_path)
    for name in files:
        path = Path("out", name)
        path.parent.mkdir(parents=True)
        path.touch()
    acting("train", KeyboardInterrupt("after step 2 of 9"))
    assert cli.main(["train", "--output_dir", "out", *flags]) == 130
    err = capsys.readouterr().err
    assert err.startswith("\nInterrupted after step 2 of 9. ")
    assert said in err


@pytest.mark.parametrize("command", ["reward", "generate", "demo"])
def test_ctrl_c_in_a_command_without_checkpoints(acting, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    acting(command, KeyboardInterrupt())
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "\nInterrupted. Nothing was saved. To start over, run the same command again.\n"


def test_ctrl_c_before_the_command_starts(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\nInterrupted before anything was started.\n"


def test_ctrl_c_while_libraries_are_loaded_ends_it_cleanly():
    # An import that swallows the exception, as those of large libraries may.
    program = """
import os, signal, sys

class Swallow:
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                raise ImportError("half loaded") from None

sys.meta_path.insert(0, Swallow())
from reinforcepp.commands.cli import main
sys.exit(main(["train"]))
"""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted before anything was started.\n")


LONG = ("--max_steps", "30", "--batch_size", "4", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear")


def untimed(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "step_time" and not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model_folder, reward_folder, pairs_csv) -> Path:
    """A folder with ``out``, a run that a real Ctrl-C stopped, and ``said``, what it said to that."""
    folder = tmp_path_factory.mktemp("stopped")
    for source, name in ((model_folder, "model"), (reward_folder, "reward")):
        (folder / name).symlink_to(source)
    (folder / "pairs.csv").symlink_to(pairs_csv)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = str(SOURCE)
    with open(folder / "said", "w") as said:
        command = [warm_python(), "-m", "reinforcepp", *train(*LONG)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        try:
            log, begin = folder / "out" / "metrics.jsonl", time.monotonic()
            while not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
                assert process.poll() is None, (folder / "said").read_text()
                assert time.monotonic() - begin < 120
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    return folder


def test_a_real_ctrl_c_saves_a_checkpoint_and_prints_how_to_resume(stopped):
    said = (stopped / "said").read_text()
    done = len(untimed(stopped / "out" / "metrics.jsonl"))
    assert 2 <= done < 30
    assert (
        f"Interrupted after step {done} of 30. Saved a checkpoint in out. To resume, run the same command with --resume"
        in said
    )
    assert "Traceback" not in said
    assert [p.name for p in (stopped / "out" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert not (stopped / "out" / "model.safetensors").exists()


@pytest.fixture
def resumable(stopped, tmp_path, monkeypatch) -> Path:
    """A copy of the stopped run, in the working directory."""
    shutil.copytree(stopped, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "out"


def test_a_resumed_run_ends_like_an_uninterrupted_run(resumable):
    assert cli.main(train(*LONG, "--resume")) == 0
    whole = resumable.parent / "whole"
    assert cli.main([*train(*LONG), "--output_dir", "whole"]) == 0
    assert [line["step"] for line in untimed(whole / "metrics.jsonl")] == list(range(1, 31))
    assert untimed(resumable / "metrics.jsonl") == untimed(whole / "metrics.jsonl")
    ours, theirs = load_file(resumable / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(resumable.parent / "model" / "model.safetensors")
    assert not torch.equal(ours["transformer.wte.weight"], start["transformer.wte.weight"])


def test_a_resumed_run_keeps_the_evaluation_before_training(resumable):
    before = json.loads((resumable / "evaluation.json").read_text())["before"]
    assert cli.main(train(*LONG, "--resume")) == 0
    after = json.loads((resumable / "evaluation.json").read_text())
    assert after.keys() == {"before", "after"}
    assert after["before"] == before


def test_without_resume_the_stopped_run_is_kept(resumable, capsys):
    before = listing(resumable)
    assert cli.main(train(*LONG)) == 2
    assert "--resume" in capsys.readouterr().err
    assert listing(resumable) == before


@pytest.mark.parametrize(("flag", "value"), [("--learning_rate", "2e-3"), ("--batch_size", "8"), ("--seed", "1")])
def test_a_run_is_not_resumed_with_other_settings(resumable, capsys, flag, value):
    before = listing(resumable)
    assert cli.main(train(*LONG, "--resume", flag, value)) == 2
    err = capsys.readouterr().err
    assert f"--allow_changes {flag.removeprefix('--')}" in err
    assert flag.removeprefix("--") in err
    assert listing(resumable) == before
