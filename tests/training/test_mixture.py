"""Datasets mixed by probability: prompts of each step, metrics of each dataset, commands, and mistakes."""

import json
from collections import Counter

import pytest
import tiny

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli
from reinforcepp.config import TrainConfig
from reinforcepp.config.comparison import CompareAlgorithmsConfig
from reinforcepp.config.data_spec import data_entries
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.functions import Dropped, RewardScores
from reinforcepp.training.prompt_batches import InterleavedBatches, joined, source_metrics
from reinforcepp.types import Completion, Prompt


def prompts(**sizes):
    parts = {name: [Prompt(f"{name} {i}", (1,), i) for i in range(size)] for name, size in sizes.items()}
    return joined(parts)


def sources(found):
    return Counter(prompt.source for prompt in found)


def texts(found):
    return {prompt.text for prompt in found}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


# --- which prompts ----------------------------------------------------------------------------------------------------


def test_datasets_are_drawn_by_their_shares_and_each_is_passed_over():
    rows = prompts(a=10, b=1000)
    assert [prompt.key for prompt in rows] == list(range(1010))
    batches = InterleavedBatches(rows, 8, 3, [3.0, 1.0])
    drawn = [prompt for step in range(200) for prompt in batches.at(step)]
    assert len(drawn) == 1600 and 0.7 < sources(drawn)["a"] / 1600 < 0.8  # 5 standard deviations: 0.054
    times = Counter(prompt.text for prompt in drawn if prompt.source == "a")
    assert max(times.values()) - min(times.values()) <= 1 and len(times) == 10
    assert max(Counter(prompt.text for prompt in drawn if prompt.source == "b").values()) == 1
    again = InterleavedBatches(rows, 8, 3, [3.0, 1.0])
    assert again.at(150) == batches.at(150) and again.at(7) == batches.at(7)
    assert InterleavedBatches(rows, 8, 4, [3.0, 1.0]).at(7) != batches.at(7) != batches.at(8)


def test_a_step_has_no_prompt_twice():
    batches = InterleavedBatches(prompts(a=3, b=6), 8, 3, [100.0, 1.0], refills=1)
    for step in range(9):
        assert sources(batches.at(step)) == {"a": 3, "b": 5} and len(texts(batches.at(step))) == 8
        (refill,) = batches.at(step, 8)
        assert refill.source == "b" and refill not in batches.at(step)
    assert len(InterleavedBatches(prompts(a=3, b=6), 20, 3, [1.0, 1.0]).at(0)) == 9


def test_refills_are_drawn_by_the_same_shares():
    batches = InterleavedBatches(prompts(a=500, b=500), 100, 3, [9.0, 1.0], refills=2)
    refills = batches.at(4, 100)
    assert len(refills) == len(texts(refills)) == 200 and not texts(refills) & texts(batches.at(4))
    assert 0.8 < sources(refills)["a"] / 200 < 0.98
    assert batches.with_refills(4) == batches.at(4) + refills


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_each_dataset():
    """By hand: a has rewards 1, 0 and a dropped 1: mean 2/3; b has 0.5, which is a success; an unscored one doesn't count."""
    names = ["a", "a", "b", "b"]
    rows = [Completion(Prompt("?", (1,), i, source=name), (5,), (-1.0,), "x", "stop") for i, name in enumerate(names)]
    scores = RewardScores([1.0, 0.0, 0.5, None], {}, dropped=[Dropped(9, 1.0, 4, "a")])
    assert source_metrics(rows, scores, 0.5) == {
        "sources/a/reward": pytest.approx(2 / 3),
        "sources/a/success_rate": pytest.approx(2 / 3),
        "sources/a/completions": 3,
        "sources/b/reward": 0.5,
        "sources/b/success_rate": 1,
        "sources/b/completions": 1,
    }
    plain = [Completion(Prompt("?", (1,), 0), (5,), (-1.0,), "x", "stop")]
    assert source_metrics(plain, RewardScores([1.0], {}), 0.5) == {}


def length(completion_ids, **_):
    return [len(ids) / 4 for ids in completion_ids]


def trainer(base, folder, data, **settings):
    usual = {"batch_size": 4, "max_new_tokens": 4, "max_prompt_length": 40, "max_steps": 2, "rollout": "transformers"}
    return ReinforceTrainer(base, length, ReinforceConfig(output_dir=str(folder), **(usual | settings)), data)


def test_a_training_on_several_datasets(base, tmp_path):
    data = {name: [{"prompt": f"{name} {i}"} for i in range(5)] for name in ("a", "b")}
    trainer(base, tmp_path / "run", data, interleave_probs=(0.5, 0.5)).train()
    for metrics in read_metrics(tmp_path / "run"):
        number = [metrics.get(f"sources/{name}/completions", 0) for name in ("a", "b")]
        reward = [metrics.get(f"sources/{name}/reward", 0) for name in ("a", "b")]
        assert sum(number) == 4
        assert metrics["reward"] == pytest.approx(sum(n * r for n, r in zip(number, reward, strict=True)) / 4)
    with pytest.raises(ConfigError, match="isn't a single dataset"):
        trainer(base, tmp_path / "plain", data)


def test_the_command_draws_from_files_and_evaluates_each(base, tmp_path):
    for name in ("sums", "words"):
        lines = [json.dumps({"prompt": f"{name} {i}"}) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.jsonl").write_text(
        (tmp_path / "words.jsonl").read_text() + "\n" + lines[0].replace("words", "sums")
    )
    data = f"{tmp_path / 'sums.jsonl'}?weight=2,{tmp_path / 'words.jsonl'}"
    flags = [
        "--data",
        data,
        "--interleave_probs",
        "3",
        "1",
        "--heldout_fraction",
        "0.3",
        "--rewards",
        "rule:length?max=3",
    ]
    flags += ["--batch_size", "4", "--max_steps", "2", "--max_new_tokens", "4", "--max_prompt_length", "40"]
    assert cli.main(["train", "--model", base, "--output_dir", str(tmp_path / "run"), *flags]) in (0, None)
    keys = {key for metrics in read_metrics(tmp_path / "run") for key in metrics}
    assert {"sources/sums/success_rate", "sources/words/completions"} <= keys
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert {"sums_reward", "words_reward"} <= evaluation.keys()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_names_of_entries():
    texts = "data/math.jsonl?weight=2,org/name,reasoning_gym:chain_sum?size=9,b/math.jsonl,x-y/"
    assert list(data_entries(texts)) == ["math", "name", "chain_sum", "math_1", "x_y"]
    assert data_entries(texts)["math"] == "data/math.jsonl?weight=2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "a.csv,b.csv", "interleave_probs": (1.0,)}, r"1 shares for 2 entries of data \(a.csv, b.csv\)"),
        ({"data": "a.csv,b.csv", "interleave_probs": (1.0, 0.0)}, "1.0 0.0 aren't all above 0"),
        ({"data": "a.csv,b.csv", "interleave_probs": (1.0, 2.0), "streaming": True}, "streaming keeps rows on disk"),
    ],
)
def test_mistakes_in_settings(given, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**given)


def test_a_comparison_of_estimators_has_no_mixture():
    with pytest.raises(ConfigError, match="interleave_probs: a comparison of estimators"):
        CompareAlgorithmsConfig(data="a.csv,b.csv", interleave_probs=(1.0, 2.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompt": "a"}], "2 shares, but train_dataset isn't a dictionary"),
        ({"a": [{"prompt": "a"}]}, "2 shares, but"),
        ({"a": [{"prompt": "a"}], "b": iter([{"prompt": "a"}])}, r"train_dataset\['b'\]"),
    ],
)
def test_mistakes_in_datasets(base, tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        trainer(base, tmp_path / "run", data, interleave_probs=(0.5, 0.5))
