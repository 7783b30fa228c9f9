"""The export command: a plain folder and its model card."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from made_runs import HOSTILE, evaluation_metrics, make_run

from reinforcepp.commands import cli
from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig, TrainConfig
from reinforcepp.config.values import accepted_values
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.training.publish import card as cards
from reinforcepp.training.publish.card import escaped, model_card, public_settings
from reinforcepp.training.publish.folder import finish_folder
from reinforcepp.training.publish.source import Source, find_source


@pytest.fixture
def trained(tmp_path, model_folder):
    """The folder of a training that is done: made-up figures beside a real model."""
    run = make_run(tmp_path / "runs" / "train")
    shutil.copytree(model_folder, run, dirs_exist_ok=True)
    return run


def card_of(run, **changes) -> str:
    return model_card(Source(str(run), read_run(run), **({"step": 12} | changes)), "someone/model")


def refusal(capsys, *arguments: object) -> str:
    assert cli.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# --- the folder -------------------------------------------------------------------------------------------------------


def test_transformers_can_load_the_folder(trained, tmp_path, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = tmp_path / "out"
    assert cli.main(["export", str(trained), "--output_dir", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    tokenizer = AutoTokenizer.from_pretrained(out)
    framed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    assert framed == "Why?"
    exported, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, model_folder))
    weights, before = exported.state_dict(), original.state_dict()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.eos_token_id)


def test_missing_eos_tokens_are_added_to_the_generation_settings(tmp_path, model_folder):
    from transformers import GenerationConfig

    folder = shutil.copytree(model_folder, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if "token_id" not in key}))
    assert cli.main(["export", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_the_number_format_is_the_model_s_own_or_the_one_asked_for(trained, tmp_path):
    from safetensors.torch import load_file

    def types(*flags: str) -> set[torch.dtype]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert cli.main(["export", "--model", str(trained), "--output_dir", str(out), *flags]) == 0
        return {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}

    assert types() == types("--dtype", "float32") == {torch.float32}
    assert types("--dtype", "bfloat16") == {torch.bfloat16}
    shutil.copytree(tmp_path / "out", trained, dirs_exist_ok=True)
    assert types() == {torch.bfloat16}


def test_sources_that_cannot_be_exported_are_errors(trained, tmp_path, capsys, reward_folder, model_folder):
    assert "is a reward model" in refusal(capsys, "export", reward_folder, "--output_dir", tmp_path / "out")
    assert "model folder not found" in refusal(capsys, "export", tmp_path / "none", "--output_dir", tmp_path / "out")
    assert "isn't empty" in refusal(capsys, "export", trained, "--output_dir", trained)
    unfinished = make_run(tmp_path / "unfinished")
    assert "no config.json" in refusal(capsys, "export", unfinished, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_training_names_its_checkpoint(tmp_path, capsys, model_folder):
    from reinforcepp.files import whole_folder

    run = make_run(tmp_path / "run", 40)
    (run / "checkpoints").mkdir()
    with whole_folder(run / "checkpoints" / "step-000010") as folder:
        shutil.copytree(model_folder, folder, dirs_exist_ok=True)
        (folder / "state.json").write_text("{}")
    message = refusal(capsys, "export", run, "--output_dir", tmp_path / "out")
    assert "isn't finished" in message and str(run / "checkpoints" / "step-000010") in message
    source = find_source(str(run / "checkpoints" / "step-000010"))
    assert source.step == 10 and source.record.facts["num_steps"] == 40


def test_a_demo_s_folder_means_its_policy(trained, tmp_path):
    trained.rename(tmp_path / "runs" / "policy")
    assert find_source(str(tmp_path / "runs")).name == str(tmp_path / "runs" / "policy")


def test_nothing_is_left_of_an_export_that_fails(trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr("reinforcepp.commands.export.command.model_card", fail)
    with pytest.raises(RuntimeError):
        cli.main(["export", str(trained), "--output_dir", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_shows_the_criteria_of_the_reward(tmp_path):
    criteria = [
        {"name": name, "figures": {"accuracy": value}}
        for name, value in (("safe", 0.75), ("short", 0.875), ("odd", 0.5))
    ]
    card = {"base_model": "distilgpt2", "figures": {}, "criteria": criteria}
    reward = {"name": "rm", "card": card, "outputs": {"safe": 1.0, "short": 0.5, "odd": 0.0}}
    text = card_of(make_run(tmp_path / "run", facts={"rewards": [reward]}))
    assert "| weights of the outputs | output 1\\: 1, output 2\\: 0.5 |" in text
    assert "| accuracy of output 1 on held-out pairs | 0.750 |" in text
    assert "| accuracy of output 2 on held-out pairs | 0.875 |" in text
    assert "output 3" not in text and "safe" not in text and "not measured" not in text


def test_the_card_shows_data_reward_model_settings_and_results(tmp_path):
    rewards = {
        "name": "reward_model",
        "card": {
            "base_model": "distilgpt2",
            "data": "feedback/my.csv",
            "data_sha256": "ab" * 32,
            "train_pairs": 731,
            "heldout_pairs": 122,
            "figures": {"accuracy": 0.9131},
        },
    }
    evaluations = {
        "before": evaluation_metrics(0.0, 0.4, kl=0.0),
        "after": evaluation_metrics(2.0, 0.8, length=25.0, kl=0.0512, truncated=0.25, distinct=0.75),
    }
    settings = {
        "data": "data/prompts.jsonl,org/prompts?split=train",
        "learning_rate": 3e-5,
        "eval_prompts": 6,
        "model": "distilgpt2",
    }
    run = make_run(tmp_path / "run", settings=settings, facts={"rewards": [rewards]}, evaluations=evaluations)
    card = card_of(run)
    rows = [
        "| prompt data | org/prompts, local files |",
        "| training prompts | 100 |",
        "| held-out prompts | 8 |",
        "| fingerprint of the prompts | fedcba9876543210 |",
        "| fingerprint of the initial weights | 0123456789abcdef |",
        "| base model | distilgpt2 |",
        "| preference data | local files |",
        f"| SHA-256 of the preferences | {'ab' * 32} |",
        "| training pairs | 731 |",
        "| held-out pairs | 122 |",
        "| accuracy on held-out pairs | 0.913 |",
        "| learning\\_rate | 3e-05 | by model size |",
        "| batch\\_size | 16 | 8 |",
        "| reward | 0.000 | 2.000 | +2.000 ± 0.283\\: improved |",
        "| judge, not used in training | 0.400 | 0.800 | +0.400 ± 0.057\\: improved |",
        "| KL to the reference policy, nats/token | 0.0000 | 0.0512 |  |",
        "| length, tokens | 20.0 | 25.0 |  |",
        "| truncated at the length limit | 0% | 25% |  |",
        "| distinct responses | 90% | 75% |  |",
    ]
    lines = card.splitlines()
    assert [row for row in rows if row not in lines] == []
    assert "One response to each of 6 held-out prompts." in card
    assert "estimator reinforce\\_plus\\_plus, 12 of 12 steps" in card
    assert "gamma" not in card, "a setting at its default"
    assert 'from_pretrained("someone/model")' in card


def test_the_hub_can_read_the_front_matter(tmp_path):
    from huggingface_hub import ModelCard

    def front_matter(model: str) -> dict:
        run = make_run(tmp_path / f"run of {abs(hash(model))}", settings={"model": model})
        return ModelCard(card_of(run)).data.to_dict()

    known = front_matter("distilgpt2")
    assert known["base_model"] == "distilgpt2"
    assert (known["library_name"], known["pipeline_tag"]) == ("transformers", "text-generation")
    assert "rlhf" in known["tags"]
    assert front_matter("Qwen/Qwen2.5-0.5B")["base_model"] == "Qwen/Qwen2.5-0.5B"
    (tmp_path / "models" / "base").mkdir(parents=True)
    for no_hub_name in ("builtin:tiny", "/home/me/base", "models/of/mine", "models/base", "a: b\nlicense: mit"):
        assert not {"base_model", "license"} & front_matter(no_hub_name).keys()


def test_a_card_never_contains_folder_names(tmp_path):
    settings = {"model": "/home/me/base", "data": "/home/me/a.csv,/home/me/b.csv", "reward_model": "/home/me/rm"}
    reward = {"name": "r", "card": {"base_model": "/home/me/base", "data": "/home/me/prefs.csv"}}
    run = make_run(
        tmp_path / "run",
        settings={**settings, "judge": "/home/me/j", "resume": "/home/me/c"},
        facts={"rewards": [reward]},
    )
    card = card_of(run)
    assert "/home" not in card and str(tmp_path) not in card
    assert "A model in a local folder, aligned" in card and "| prompt data | local files |" in card


def test_a_title_is_shown_as_it_is(tmp_path):
    rendered = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render
    name = "a|b [x](javascript:1) `c` **d** <img src=x> & @me\n# e"
    run = make_run(
        tmp_path / "run",
        settings={"model": f"x/y/{HOSTILE}", "lr_scheduler_type": name, "data": name},
        facts={"rewards": [{"name": HOSTILE, "card": None}], "judge": name},
    )
    page = rendered(model_card(Source(str(run), read_run(run), 12), name).partition("\n---\n")[2])
    assert "<script" not in page and "<img" not in page and "<a " not in page and "<strong>" not in page
    assert "\x1b" not in page and "\u202e" not in page
    assert "<h1>a|b [x](javascript:1) `c` **d** &lt;img src=x&gt; &amp; @me # e</h1>" in page


def test_escaping_leaves_plain_words_alone():
    assert escaped("my-file 2.0, v+1") == "my-file 2.0, v+1"
    assert escaped("*a*\n|b|") == r"\*a\* \|b\|"


def test_the_card_of_a_checkpoint_shows_its_own_results(tmp_path):
    evaluations = {
        "before": evaluation_metrics(0.0),
        "step 10": evaluation_metrics(1.5),
        "after": evaluation_metrics(9.0),
    }
    run = make_run(tmp_path / "run", evaluations=evaluations)
    assert "| reward | 0.000 | 1.500 |" in card_of(run, step=10) and "9.000" not in card_of(run, step=10)
    assert "10 of 12 steps" in card_of(run, step=10)
    assert "wasn't evaluated on held-out prompts" in card_of(run, step=8)


def test_a_model_of_unknown_origin_has_a_card_too(model_folder):
    card = model_card(find_source(str(model_folder)), "tiny")
    assert "No record of its training" in card
    assert "PATH_OF_THIS_FOLDER" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_the_card_s_code_runs(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(trained), "--output_dir", str(out)]) == 0
    code = (out / cards.CARD).read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("PATH_OF_THIS_FOLDER", str(out)).replace("256", "5"), {})
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("config", [TrainConfig, ReinforceConfig, RewardModelConfig, SftConfig])
def test_texts_of_settings_are_private_unless_they_are_choices(config):
    """Also those of a new setting: a card shows only numbers, choices, and names of layers."""
    names = accepted_values(config)
    for text in ("Be brief.", "/home/me", "http://host/x", "host", ["host"], ["a", "b c"], {"a": "b"}):
        shown = public_settings(config.__name__, dict.fromkeys(names, text))
        assert shown.keys() <= ({"lora_target_modules"} if text in ("host", ["host"]) else set())
    shown = public_settings(config.__name__, dict.fromkeys(names, 1))
    assert {"learning_rate", "seed", "lora_r"} <= shown.keys() and not {"output_dir", "hub_model_id"} & shown.keys()
    chosen = {"lr_scheduler_type": "cosine", "optim": "sgd", "lora_target_modules": ["q_proj", "mlp.up"]}
    assert public_settings(config.__name__, chosen) == chosen
    assert public_settings("Unknown", chosen) == {}


def test_a_card_names_rewards_of_the_hub_and_functions_but_no_server(tmp_path):
    sources = ["0.5*org/reward-model?output=1", "http://intranet:80/score", "/home/me/f.py:polite", "rule:length?max=9"]
    names = [
        ("reward-model", "a reward model"),
        ("intranet-80", "a reward server"),
        ("polite", "polite"),
        ("length", "length"),
    ]
    rewards = [{"name": name, "public_name": public, "card": None} for name, public in names]
    card = card_of(make_run(tmp_path / "run", settings={"rewards": sources}, facts={"rewards": rewards}))
    for name in ("org/reward-model", "a reward server", "polite", "length"):
        assert f"Reward: {escaped(name)}." in card
    assert "intranet" not in card and "/home" not in card
    old = make_run(tmp_path / "old", facts={"rewards": [{"name": "intranet", "card": None}]})
    assert "Reward: a reward function." in card_of(old) and "intranet" not in card_of(old)


@pytest.mark.parametrize("uploaded", [True, False])
def test_only_an_uploaded_adapter_loses_the_folder_of_its_base_model(tmp_path, capfd, uploaded):
    for base in ("org/base", "builtin:tiny", str(tmp_path), "~/base", "../base"):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        settings = {"base_model_name_or_path": base, "r": 8, "more": {"_name_or_path": base}}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        finish_folder(folder, "card", {"system_prompt": "Be brief."}, uploaded=uploaded)
        public = base if base in ("org/base", "builtin:tiny") else None
        expected = {"base_model_name_or_path": public if uploaded else base, "r": 8, "more": {"_name_or_path": public}}
        assert json.loads((folder / "adapter_config.json").read_text()) == expected
        shown = capfd.readouterr().err
        assert (f"base model is the local folder {base}" in shown) == (public is None)
        assert ("base_model_name_or_path" in shown) == (public is None) and "can read the system_prompt" in shown
