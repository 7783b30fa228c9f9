"""Reward names: their meaning, errors before anything loads, and the weighted sum."""

import math
from pathlib import Path

import pytest

from reinforcepp.commands.cli import parse
from reinforcepp.config import ReinforceConfig, TrainConfig
from reinforcepp.config.reward_spec import RewardSource, parse_source
from reinforcepp.errors import ConfigError, ModelError, RewardError
from reinforcepp.rewards.functions import function_name
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import TrainedReward, load_reward_model
from reinforcepp.types import Completion, Prompt

GOOD = [Completion(Prompt("q?", (1,), 0, {"answer": "b"}), (5, 6), (-1.0, -1.0), "a", "stop")]


@pytest.mark.parametrize(
    ("text", "kind", "target", "weight"),
    [
        ("models/rm", "model", "models/rm", 1),
        ("0.5*models/rm", "model", "models/rm", 0.5),
        (" -2 * rule:regex?pattern=2*3 ", "rule", "regex?pattern=2*3", -2),
        ("1e-1*builtin:judge", "builtin", "builtin:judge", 0.1),
        ("my.rewards:helpful", "function", "my.rewards:helpful", 1),
        ("0*./x y.py:f", "function", "./x y.py:f", 0),
        (".5*http://h:1/get_reward?model=2", "server", "http://h:1/get_reward?model=2", 0.5),
        ("https://h/", "server", "https://h/", 1),
        ("2*3*x", "model", "3*x", 2),
        ("C:/models/rm", "model", "C:/models/rm", 1),
    ],
)
def test_a_name_is_parsed(text, kind, target, weight):
    assert parse_source(text) == RewardSource(kind, target, weight)


def test_a_folder_with_a_colon_in_its_name_is_a_folder(tmp_path):
    (tmp_path / "rm:v2").mkdir()
    assert parse_source(f"{tmp_path}/rm:v2").kind == "model" and parse_source(f"{tmp_path}/rm:v3").kind == "function"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("0.5*", "empty"),
        ("1e999*x", "finite number, not inf"),
        ("builtin:jugde", "Did you mean 'builtin:judge'"),
        ("rule:lenght", "Did you mean 'length'"),
        ("length?max=3", "Write rule:length"),
        ("http://", "isn't the address"),
        ("http://h:abc/x", "isn't the address"),
        ("http://h:0/x", "isn't the address"),
    ],
)
def test_an_invalid_name_raises(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_source(text)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hush@h:1/",
        "http://hush@h:1/",
        "http://h:1/?api_key=hush",
        "http://h:1/?a=b&access_token=hush",
        "http://u:p/hush@h/",
        "http://u:hush@h:abc/",
    ],
)
def test_a_url_with_a_secret_raises_without_showing_it(url):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(rewards=(url,))
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError):
        TrainConfig(judge=url)


def test_rewards_from_flags_and_yaml_are_the_same(tmp_path):
    texts = ("-0.5*rule:length?max=20", "models/rm", r"rule:regex?pattern=^\d+: -x$")
    file = tmp_path / "a.yaml"
    file.write_text("rewards:\n" + "".join(f"  - '{text}'\n" for text in texts) + "reward_clip: 3\n")
    from_file = parse("train", ["--config", str(file)])
    assert from_file == parse("train", ["--rewards", *texts, "--reward_clip", "3"])
    assert from_file.reward_sources == texts and from_file.reward_clip == 3
    assert parse("train", ["--reward_model", "models/x"]).reward_sources == ("models/x",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ("rule:lenght",)}, "Did you mean 'length'"),
        ({"rewards": ("models/a",), "reward_model": "models/b"}, "rewards replace reward_model"),
        ({"rewards": ("rule:length", "rule:length")}, "twice"),
        ({"rewards": ("runs/x/rm",), "output_dir": "runs/x"}, "holds the rewards runs/x/rm"),
        ({"rewards": ("runs/x/f.py:f",), "output_dir": "runs/x"}, "holds the rewards runs/x/f.py"),
        ({"rewards": ("~nobody-here/rm",)}, "home folder ~nobody-here"),
        ({"rewards": ("http://h/x",), "reward_timeout": 600.0, "reward_attempts": 3}, "watchdog_seconds"),
        ({"judge": "rule:lenght"}, "Did you mean 'length'"),
        ({"truncation_penalty": -1.0}, "truncation_penalty must be at least 0"),
        ({"reward_timeout": 0.0}, "reward_timeout"),
        ({"reward_attempts": 0}, "reward_attempts"),
        ({"reward_batch_size": 0}, "reward_batch_size"),
        ({"reward_label_column": ""}, "reward_label_column is empty"),
    ],
)
def test_contradictory_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_the_watchdog_leaves_time_for_a_server_that_fails():
    slow = {"reward_timeout": 600.0, "reward_attempts": 3}
    assert TrainConfig(rewards=("http://h/x",), watchdog_seconds=1801.0, **slow)
    assert TrainConfig(rewards=("http://h/x",), watchdog_seconds=0.0, **slow) and TrainConfig(**slow)


def test_an_unused_reward_model_can_be_in_the_output_dir():
    assert TrainConfig(rewards=("rule:length",), output_dir="models").rewards
    with pytest.raises(ConfigError, match="holds the reward_model"):
        TrainConfig(output_dir="models")


# --- sums -------------------------------------------------------------------------------------------------------------


def half(prompts, completions):
    return [0.5] * len(completions)


def test_weights_come_from_names_and_from_python():
    rewards = load_rewards(["2*rule:regex?pattern=a", half, "rule:exact_match"], weights=[1, -1, 10])
    assert (rewards.weights, rewards.names) == ([2, -1, 10], ["regex", "half", "exact_match"])
    scores = rewards.score(GOOD)
    assert scores.total == [1.5]
    assert scores.by_function == {"regex": [1.0], "half": [0.5], "exact_match": [0.0]}
    assert rewards.fingerprint() == "2*regex?pattern=a -1*half 10*exact_match"
    assert [part["weight"] for part in rewards.describe()] == [2, -1, 10]
    settings = ReinforceConfig(reward_weights=[0.5, 3])
    assert load_rewards([half, "2*rule:length"], settings).weights == [0.5, 6]
    with pytest.raises(ConfigError, match="in the settings and as an argument"):
        load_rewards([half, half], settings, [1, 1])
    with pytest.raises(ConfigError, match="2 weights for 1 rewards"):
        load_rewards(half, settings)


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "reward_weights: 1 weights for 2 rewards"), ([1.0, math.nan], "finite")]
)
def test_weights_that_dont_match_raise(weights, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards([half, half], weights=weights)


def test_an_empty_list_raises():
    with pytest.raises(ConfigError, match="reward_funcs: empty"):
        load_rewards([])


def test_a_missing_model_raises_before_anything_loads(reward_folder, monkeypatch):
    monkeypatch.setattr("reinforcepp.rewards.sources.load_reward_model", lambda name: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="nowhere: reward model folder not found"):
        load_rewards([str(reward_folder), "nowhere"])


def test_several_models_are_named_by_their_folders(reward_folder, tmp_path):
    (tmp_path / "other").symlink_to(reward_folder)
    one, other = str(reward_folder), str(tmp_path / "other")
    assert load_rewards(one).names == ["reward_model"]
    both = load_rewards([one, f"0.5*{other}"])
    assert both.names == ["reward_model", "other"] and [part["card"] is None for part in both.describe()] == [False] * 2
    first, second = both.score(GOOD).by_function.values()
    assert first == second and both.score(GOOD).total == pytest.approx([1.5 * first[0]])
    assert both.fingerprint().split()[1] == f"0.5*{both.fingerprint().split()[0]}"


# --- normalization ----------------------------------------------------------------------------------------------------


def test_normalized_scores_subtract_the_cards_mean_and_divide_by_its_std(reward_folder):
    raw, normal = (
        load_rewards(str(reward_folder), ReinforceConfig(reward_normalize=on)).score(GOOD).total[0]
        for on in (False, True)
    )
    card = load_reward_model(str(reward_folder)).card
    assert card.score_std != 1 and normal == pytest.approx((raw - card.score_mean) / card.score_std, abs=1e-6)


def test_normalizing_keeps_the_fingerprint(reward_folder):
    reward = load_reward_model(str(reward_folder))
    before = reward.fingerprint()
    reward.normalize()
    assert reward.fingerprint() == before


def test_normalizing_needs_a_card_with_a_positive_std(reward_folder):
    with pytest.raises(ConfigError, match=r"reward_normalize: .* none of the rewards is one"):
        load_rewards("rule:length", ReinforceConfig(reward_normalize=True))
    loaded = load_reward_model(str(reward_folder))
    with pytest.raises(ConfigError, match="has no card"):
        load_rewards(TrainedReward(loaded.model, loaded.tokenizer), ReinforceConfig(reward_normalize=True))
    object.__setattr__(loaded.card, "score_std", 0.0)
    with pytest.raises(ConfigError, match="score_std 0"):
        loaded.normalize()


# --- user code -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/", *__import__("sys").path])
    return tmp_path


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name


def test_a_module_in_the_current_folder(folder):
    written(folder, "rewards_of_mine_1.py", "def f(prompts, completions, **_):\n    return [2.0] * len(prompts)\n")
    rewards = load_rewards("0.5*rewards_of_mine_1:f")
    assert rewards.score(GOOD).total == [1.0] and rewards.names == ["f"]


def test_a_file_by_its_path_with_its_imports(folder):
    (folder / "deep").mkdir()
    written(folder / "deep", "helper_of_mine_2.py", "VALUE = 3.0\n")
    written(folder / "deep", "json.py", "import helper_of_mine_2 as h\ndef f(completions):\n    return [h.VALUE]\n")
    rewards = load_rewards("deep/json.py:f")
    assert rewards.score(GOOD).total == [3.0]
    assert "dumps" in vars(__import__("json")), "the file's name must not hide another module"


def test_a_resumed_run_notices_that_a_function_has_changed(folder):
    found = set()
    for value in (1, 2, 2):
        written(folder, "mine.py", f"def f(completions):\n    return [{value}]\n")
        found.add(load_rewards("mine.py:f").fingerprint())
        assert load_rewards("mine.py:f").score(GOOD).total == [value]
    assert len(found) == 2 and all(one.startswith("mine.py:f@") for one in found)


def test_checking_settings_runs_no_user_code(folder):
    written(folder, "mine.py", "open('run', 'w')\ndef f(completions):\n    return [1]\n")
    TrainConfig(rewards=("mine.py:f",))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("text", "source", "error", "message"),
    [
        (None, "nowhere_of_mine:f", ConfigError, r"nowhere_of_mine: Python module not found.*file\.py:function"),
        (None, "nowhere.py:f", ConfigError, r"nowhere\.py: file not found"),
        ("def helpful(): pass", "x.py:helpfull", ConfigError, "no function 'helpfull'.*Did you mean 'helpful'"),
        ("f = 3", "x.py:f", ConfigError, "can't be called"),
        (
            "import no_such_thing_here",
            "x.py:f",
            RewardError,
            r"x\.py: failed.*line 1.*No module named 'no_such_thing_here'",
        ),
        ("def f(:", "x.py:f", RewardError, r"x\.py: failed.*SyntaxError"),
        ("1 / 0", "y_of_mine_3:f", RewardError, "y_of_mine_3: failed.*ZeroDivisionError"),
    ],
)
def test_a_missing_function_raises_a_short_error(folder, text, source, error, message):
    if text is not None:
        written(folder, f"{source.partition(':')[0].removesuffix('.py')}.py", text)
    with pytest.raises(error, match=message):
        load_rewards(source)


def test_a_rule_can_be_named():
    assert function_name(load_rewards("rule:regex?name=polite&pattern=please").functions[0]) == "polite"
