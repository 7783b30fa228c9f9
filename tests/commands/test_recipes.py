"""Recipes: their descriptions, their memory plans, and their commands."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import Qwen2Config

from reinforcepp.commands import cli, recipes
from reinforcepp.commands.demo import demo_settings
from reinforcepp.config import DemoConfig, RewardModelConfig, TrainConfig, as_dict, read_yaml
from reinforcepp.monitoring import read_metrics
from scripts import ROOT

NAMES = recipes.names()
QWEN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
}
"""As their publishers give them."""


TWO_STEPS = ["--max_steps", "2", "--batch_size", "16", "--eval_prompts", "8", "--rollout", "transformers"]


def file(name: str) -> Path:
    return recipes.FOLDER / f"{name}.yaml"


def settings(name: str) -> dict:
    return yaml.safe_load(file(name).read_text(encoding="utf-8"))


def qwen(name: str) -> Qwen2Config:
    *sizes, vocabulary, tied = SIZES[name]
    own = dict(zip(QWEN, sizes, strict=True))
    return Qwen2Config(**own, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768)


# --- description -----------------------------------------------------------------------------------------------------


def test_the_list_shows_description_hardware_and_commands_of_each_recipe(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert NAMES == ["cpu_demo", "gpu_24gb_lora", "gpu_80gb_full", "math_rules", "several_nodes"]
    for name in NAMES:
        recipe = recipes.read_preset(name)
        assert recipe.about.endswith(".") and len(recipe.commands) == 1 + file(f"{name}.reward").is_file()
        for words in (name, recipe.about, recipe.hardware, *recipe.commands):
            assert words in out


def test_the_table_in_the_documentation_is_that_of_the_recipes():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    read = [recipes.read_preset(name) for name in NAMES]
    rows = ["| recipe | what | hardware |", "| --- | --- | --- |"]
    rows += [f"| `{one.name}` | {one.about} | {one.hardware} |" for one in read]
    assert page.partition("<!-- recipes -->\n")[2].partition("\n<!-- end -->")[0] == "\n".join(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_and_that_of_its_reward_model_belong_together(name):
    train = TrainConfig(**read_yaml(str(file(name)), TrainConfig) | _as_tuples(settings(name)))
    if not file(f"{name}.reward").is_file():
        assert train.rewards and all("rule:" in source for source in train.rewards)
        return
    reward = RewardModelConfig(**read_yaml(str(file(f"{name}.reward")), RewardModelConfig))
    assert reward.output_dir == train.reward_model
    for shared in ("data", "seed", "heldout_fraction", "prompt_column"):  # so the same prompts are held out
        assert getattr(reward, shared) == getattr(train, shared)
    assert reward.max_length is None or reward.max_length >= train.max_prompt_length + train.max_new_tokens
    assert f"of {name}.yaml" in file(f"{name}.reward").read_text(encoding="utf-8").splitlines()[0]


def _as_tuples(values: dict) -> dict:
    return {key: tuple(value) for key, value in values.items() if isinstance(value, list)}


def test_the_first_run_is_the_demo():
    reward, train = demo_settings(DemoConfig(), Path("x"))
    for name, config in (("cpu_demo.reward", reward), ("cpu_demo", train)):
        own = as_dict(type(config)(**settings(name)))
        theirs = as_dict(config)
        places = ("output_dir", "reward_model", "eval_prompts")
        assert {key: own[key] for key in own if key not in places} == {
            key: theirs[key] for key in theirs if key not in places
        }
    assert settings("cpu_demo")["eval_prompts"] >= 122


# --- where it fits ----------------------------------------------------------------------------------------------------


def plan(name: str, *flags: str) -> int:
    command, *arguments = shlex.split(recipes.read_preset(name).plan.replace(f"{name}.yaml", str(file(name))))
    assert command == "reinforcepp"
    return cli.main([*arguments, *flags])


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> Path:
    """The working directory, where the models that recipes name are folders with the true configurations."""
    monkeypatch.chdir(tmp_path)
    for name in SIZES:
        qwen(name).save_pretrained(name)
    for name in NAMES:
        if file(f"{name}.reward").is_file() and name != "cpu_demo":
            model = settings(f"{name}.reward")["model"]
            qwen(model).save_pretrained(settings(name)["reward_model"])
    return tmp_path


TRACED = {"cpu_demo"}
"""Recipes in the default tier: tracing the passes of a model with dozens of layers takes up to half a minute."""


@pytest.mark.parametrize(
    "name", [name if name in TRACED else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_the_plan_of_each_recipe_fits(shapes, capsys, name):
    assert plan(name) == 0
    out = capsys.readouterr().out
    assert out.count("Fits: ") == 1
    assert "doesn't exist yet, so its size is assumed" not in out or name == "cpu_demo"


# --- whether it runs --------------------------------------------------------------------------------------------------


def stand_in(folder: Path) -> None:
    """A tiny model that ends its answers after some tokens, as a large one that is trained does."""
    model = tiny.model("qwen2", tied=False, max_position_embeddings=2048)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[0, 0] = 1.5
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Where the models that recipes name are tiny."""
    folder = tmp_path_factory.mktemp("models")
    for name in SIZES:
        stand_in(folder / name)
    with open(folder / "math.csv", "w", newline="") as data:
        rows = [(f"What is {a} + {b}?", a + b) for a in range(10) for b in range(10)]
        csv.writer(data).writerows([("prompt", "answer"), *rows])
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_run_as_they_stand(models, pairs_csv, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").symlink_to(models / "Qwen")
    (tmp_path / "math.csv").symlink_to(models / "math.csv")
    assert cli.main(["recipes", "copy", name]) == 0
    recipe = recipes.read_preset(name)
    assert sorted(path.name for path in tmp_path.glob(f"{name}*")) == sorted(
        path.name for path in recipes.FOLDER.glob(f"{name}*")
    )
    for command in recipe.commands:
        arguments = shlex.split(command)
        if "-m" in arguments:
            from torch.distributed.run import get_args_parser

            launch = get_args_parser().parse_args(arguments[1:])
            assert (launch.module, launch.training_script, launch.nnodes) == (True, "reinforcepp", "2")
            arguments = arguments[arguments.index("-m") + 1 :]
        few = ["--data", str(pairs_csv)] if arguments[1] == "reward" else TWO_STEPS
        assert arguments[0] == "reinforcepp" and cli.main([*arguments[1:], *few]) == 0
    steps = read_metrics(tmp_path / settings(name)["output_dir"])
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["num_tokens"] > 0 and "reward" in step for step in steps)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_names_itself_and_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "cpu_demo", "mine.yaml"]) == 0
    said = capsys.readouterr().err
    assert "reinforcepp reward --config mine.reward.yaml && reinforcepp train --config mine.yaml" in " ".join(
        said.split()
    )
    assert "cpu_demo.yaml" not in Path("mine.yaml").read_text() + Path("mine.reward.yaml").read_text()
    assert yaml.safe_load(Path("mine.yaml").read_text()) == settings("cpu_demo")
    Path("mine.yaml").unlink()
    Path("mine.reward.yaml").write_text("mine")
    assert cli.main(["recipes", "copy", "cpu_demo", "mine.yaml"]) == 2
    assert "mine.reward.yaml already exists" in capsys.readouterr().err
    assert not Path("mine.yaml").exists() and Path("mine.reward.yaml").read_text() == "mine"
    assert cli.main(["recipes", "copy", "cpu_demo", "mine.yaml", "--overwrite"]) == 0
    assert yaml.safe_load(Path("mine.reward.yaml").read_text()) == settings("cpu_demo.reward")


@pytest.mark.parametrize("name", ["math_rules", "cpu_demo.reward"])
def test_a_recipe_is_shown_as_it_is(capsys, name):
    assert cli.main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == file(name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["copy", "cpu_dmo"], ["'cpu_dmo' not found", "Did you mean 'cpu_demo'?"]),
        (["show", "../recipes/cpu_demo"], ["not found"]),
        (["copy", "cpu_demo.reward"], ["part of cpu_demo"]),
        (["copy"], ["recipes copy needs the name"]),
        (["copy", "cpu_demo", "no/such/folder.yaml"], ["file: no/such/folder.yaml", "folder no/such doesn't exist"]),
        (["shwo", "cpu_demo"], ["Did you mean 'show'?"]),
        (["list", "cpu_demo"], ["recipes show cpu_demo"]),
        (["show", "cpu_demo", "x.yaml"], ["recipes copy cpu_demo x.yaml"]),
        (["copy", "cpu_demo", "a.yaml", "b.yaml"], ["'b.yaml'"]),
    ],
)
def test_mistakes_are_one_line_errors(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and [words for words in said if words not in err] == []
    assert list(tmp_path.iterdir()) == []
