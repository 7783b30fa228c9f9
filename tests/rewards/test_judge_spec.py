"""The names of judges: options, errors before anything is sent, and what files of a run show of them."""

import pytest

from reinforcepp.commands.cli import parse
from reinforcepp.config import TrainConfig
from reinforcepp.config.judge_spec import RUBRICS, parse_judge
from reinforcepp.config.reward_spec import RewardSource, parse_source
from reinforcepp.errors import ConfigError
from reinforcepp.run_dir import changed_settings
from reinforcepp.runtime.redaction import redacted


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_a_name_is_parsed():
    target = "org/model:7b?rubric=Is it kind & short? Yes=good&scale=0-5&reason=False&temperature=none&max_requests=9&cache=c"
    assert parse_source(f"0.5*judge:{target}") == RewardSource("judge", target, 0.5)
    spec = parse_judge(target)
    assert (spec.model, spec.rubric, spec.bounds) == ("org/model:7b", "Is it kind & short? Yes=good", (0, 5))
    assert (spec.reason, spec.temperature, spec.max_requests, spec.metric) == (False, None, 9, "judge")
    assert parse_judge("m").metric == "judge_helpful" and parse_judge("m?name=kind").metric == "kind"
    assert parse_source("judge:m?rubric=a/style.md").path == "a/style.md" and parse_source("judge:m").path is None
    assert (
        parse("train", ["--rewards", "judge:m", "--judge", "judge:m?rubric=safe"]).judge_name == "judge:m?rubric=safe"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the model is missing"),
        ("m?rubic=safe", "option 'rubic' not found, only .*Did you mean 'rubric'"),
        ("m?rubric=helpfull", "neither one of helpful, correct, safe nor a file .*Did you mean 'helpful'"),
        ("m?scale=10", "scale must be LOW-HIGH"),
        ("m?scale=5-1", "scale must be LOW-HIGH"),
        ("m?scale=0-101", "from 0 to 100"),
        ("m?concurrency=0", "concurrency must be at least 1"),
        ("m?max_output=many", "max_output must be a whole number, not 'many'"),
        ("m?temperature=-1", "temperature must be at least 0"),
        ("m?temperature=nan", "temperature must be a number"),
        ("m?timeout=0", "timeout must be above 0"),
        ("m?format=xml", "format must be auto, json_schema or text"),
        ("m?no_verdict=zero", "no_verdict must be stop or skip"),
        ("m?reason=maybe", "reason must be true or false"),
        ("m?max_requests=5", "a budget needs cache=FILE"),
        ("m?max_requests=5&cache=none", "a budget needs cache=FILE"),
        ("m?max_dollars=5&cache=c&input_price=1", "max_dollars needs input_price and output_price"),
        ("m?model=x", "Write the model before the question mark"),
        ("m?base_url=127.0.0.1:8000", "isn't valid. Write it as in http"),
        ("m?base_url=http://h:0/v1", "isn't valid"),
    ],
)
def test_an_invalid_name_raises(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig(rewards=(f"judge:{options}",))
    assert str(caught.value).startswith("judge:")


@pytest.mark.parametrize(
    "options",
    [
        *("base_url=http://me:hush@h/v1", "base_url=http://hush@h/v1", "base_url=http://h/v1?key=hush"),
        *("base_url=http://h/v1#hush", "env=sk-hush", "env=HUSH", "base_url=ftp://hush@h/"),
    ],
)
def test_a_secret_in_a_name_raises_without_showing_it(options):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(rewards=(f"judge:m?{options}",))
    assert "hush" not in str(caught.value).lower()


def test_a_missing_server_or_key_raises(monkeypatch):
    with pytest.raises(ConfigError, match=r"judge:m: the server is missing\. Add base_url=.* or set OPENAI_BASE_URL"):
        parse_judge("m").url  # noqa: B018
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hush@h/v1")
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL holds more than an address on h"):
        parse_judge("m").url  # noqa: B018
    with pytest.raises(ConfigError, match="variable TEAM_KEY isn't set"):
        parse_judge("m?env=TEAM_KEY").key_variable  # noqa: B018


def test_the_watchdog_leaves_time_for_a_judge_that_fails():
    with pytest.raises(ConfigError, match=r"reward_timeout 500 x reward_attempts 4 is 2000 s, but the watchdog"):
        TrainConfig(rewards=("judge:m?timeout=500&attempts=4",))


def test_a_rubric_in_the_output_folder_is_refused():
    with pytest.raises(ConfigError, match=r"holds the rewards runs/x/style\.md"):
        TrainConfig(rewards=("judge:m?rubric=runs/x/style.md",), output_dir="runs/x")


def test_files_of_a_run_show_all_options():
    text = "0.5*judge:org/m?rubric=Is it kind?&base_url=https://host:8000/v1&scale=1-5&max_output=9&input_price=2"
    assert redacted(text) == text and redacted(f"rewards: {text}") == f"rewards: {text}"
    secret = "judge:m?base_url=https://me:pw@h/hook/0a1b2c3d4e5f&scale=1-5"
    assert redacted(secret) == "judge:m?base_url=https://***@h/hook/***&scale=1-5"
    assert redacted("see http://h/v1&scale=1-5") == "see http://h/***"


def test_limits_can_change_on_resume_and_the_rest_cannot():
    def changes(before, after):
        return changed_settings(
            {"rewards": [f"judge:m?{before}", "x.py:f"]}, {"rewards": (f"judge:m?{after}", "x.py:f")}
        )

    assert not changes("scale=1-5", "max_requests=9&cache=c&scale=1-5")
    assert not changes("max_dollars=1&cache=c&rubric=safe", "rubric=safe&max_dollars=2&concurrency=4&env=A_KEY")
    assert changes("scale=1-5", "scale=1-6") and changes("rubric=safe", "rubric=safe&max_output=9")
    assert changed_settings({"rewards": ["rule:regex?pattern=cache=1"]}, {"rewards": ["rule:regex?pattern=cache=2"]})


def test_the_built_in_rubrics_have_three_levels():
    assert all(text.count("\n- ") == 3 and text.isascii() for text in RUBRICS.values())
