"""Secrets in texts: what is hidden, and what a reader still sees."""

import sys
import time

import pytest

from reinforcepp.commands.cli import parse
from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, RewardError
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.reports.run.settings import reproduce
from reinforcepp.run_dir import changed_settings, describe_run
from reinforcepp.runtime.redaction import redacted, without_secrets
from reinforcepp.runtime.terminal import echo, logger, print_error, warn

SLACK = "hooks.slack.com"
SHOWN = {
    "http://me:hunter22@10.0.0.1:5000/get_reward": "http://***@10.0.0.1:5000/get_reward",
    "http://me:a/b#c?d@host/x": "http://***@host/x",
    "http://host/score?code=abc&version=2#part": "http://host/score?code=***&version=***#***",
    "0.5*http://host/score?code=it's": "0.5*http://host/score?code=***",
    "HTTPS://host/api/9f8e7d6c5b4a;id=1?x": "HTTPS://host/api/***?***",
    f"https://{SLACK}/services/TEAM/B0/plainword": f"https://{SLACK}/***/***/***/***",
    "http://host/hook/short": "http://host/hook/***",
    "http://host/%61b1c2d3e4": "http://host/***",
    "mysql://root:pw@db:3306/runs": "mysql://***@db:3306/runs",
    "http://a/x?k=1,http://b/y?k=2": "http://a/x?k=***,http://b/y?k=***",
    "Reward server http://host:5/x?code=abc: it failed (http://host/?k=1).": (
        "Reward server http://host:5/x?code=***: it failed (http://host/?k=***)."
    ),
    "{'Authorization': 'Bearer s3cret-value'}": "{'Authorization': 'Bearer ***'}",
    "{'X-Api-Key': 's3cret'}": "{'X-Api-Key': '***'}",
    "sk_" + "live_AbCdEfGhIjKlMnOp, SG.AbCdEfGhIjKlMnOp.AbCdEfGhIjKlMnOp": "***, ***",
    "Cannot POST /score?code=abc.": "Cannot POST /score?code=***.",
    "token hf_AbCdEfGhIjKlMnOpQrStUvWx, key sk-proj-AbCdEfGhIjKlMn0pQrStUv": "token ***, key ***",
}
KEPT = [
    "http://127.0.0.1:5000/get_reward",
    "http://[::1]:8000/v1/chat/completions",
    "https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/resolve/main/config.json",
    "See https://docs.example.com/en/v0.32.0/openai_compatible_server.html).",
    "http://a:8000,http://b:8000",
    "file:///home/me/0123456789abcdef",
    "models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567",
    "rule:length?max=200",
    "runs/reward?output=1&dtype=bfloat16",
    "Bearer authentication is missing",
]


@pytest.mark.parametrize("text", SHOWN)
def test_secrets_are_hidden_and_twice_changes_nothing_more(text):
    assert redacted(text) == SHOWN[text]
    assert redacted(SHOWN[text]) == SHOWN[text]


@pytest.mark.parametrize("text", KEPT)
def test_addresses_names_and_paths_without_a_secret_stay(text):
    assert redacted(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "cörrect horse")
    monkeypatch.setenv("SHORT_KEY", "policy")
    monkeypatch.setenv("MONKEY", "reinforce")
    assert redacted("cörrect horse, c%C3%B6rrect%20horse, policy, reinforce") == "***, ***, policy, reinforce"


def test_secrets_of_an_address_are_hidden_where_they_occur_alone():
    url = "http://me:longpassword@host/hook/0a1b2c3d4e5f?code=with%20space"
    body = "404: /hook/0a1b2c3d4e5f, code 'with space', user me, longpassword"
    assert redacted(body, url) == "404: /hook/***, code '***', user me, ***"


def test_settings_without_a_secret_stay_and_the_others_are_hidden_at_any_depth():
    settings = as_dict(TrainConfig())
    assert without_secrets(settings) == settings
    nested = {"rewards": ("http://h/?a=b",), "more": [{"http://h/?a=b": 1.5}], "none": None}
    assert without_secrets(nested) == {
        "rewards": ("http://h/?a=***",),
        "more": [{"http://h/?a=***": 1.5}],
        "none": None,
    }


@pytest.mark.parametrize("piece", ["a", "sk-", "eyJ-", "token", "http://", "a:", "bearer ", ".", "/aa-aa-aa-aa!", ",a"])
def test_long_hostile_texts_take_linear_time(piece):
    began = time.monotonic()
    for text in (piece * 5000, "http://h/?" + piece * 5000 + "b"):
        redacted(text)
    assert time.monotonic() - began < 5


URL = "https://host/hook/0a1b2c3d4e5f?code=kR7p"
SHOWN_URL = "https://host/hook/***?code=***"


def test_settings_for_files_hide_secrets_but_the_configuration_keeps_them():
    config = TrainConfig(rewards=(f"0.5*{URL}",))
    assert config.rewards == (f"0.5*{URL}",) and config.reward_sources[0].endswith(URL)
    for shown in (as_dict(config), config.to_dict(), config.to_sanitized_dict()):
        assert shown["rewards"] == (f"0.5*{SHOWN_URL}",)
    assert "kR7p" not in config.to_json_string()
    assert repr(config).startswith("TrainConfig(") and SHOWN_URL in repr(config)


def test_a_run_resumes_with_another_secret_but_not_with_another_address():
    began, now = {"rewards": [URL]}, {"rewards": [URL.replace("kR7p", "new")]}
    assert changed_settings(began, now) == {}  # a run of an earlier version, which stored the secret
    assert changed_settings(without_secrets(began), without_secrets(now)) == {}
    changed = changed_settings(began, {"rewards": [URL.replace("host", "other")]})
    assert "other" in changed["rewards"] and "kR7p" not in changed["rewards"]


def test_the_address_in_a_record_is_not_used_as_an_address(tmp_path):
    describe_run(tmp_path, as_dict(TrainConfig(rewards=(URL,))), {"kind": "TrainConfig"})
    assert "0a1b2c" not in (tmp_path / "run.json").read_text()
    assert SHOWN_URL in reproduce(read_run(tmp_path)).yaml
    with pytest.raises(ConfigError, match="Write the secret there"):
        parse_source(SHOWN_URL)


def test_errors_and_messages_hide_secrets(capfd, caplog):
    assert str(RewardError(f"{URL} failed")) == f"{SHOWN_URL} failed"
    echo(f"echo {URL}")
    print_error(ValueError(f"error {URL}"))
    logger("reinforcepp.test").warning("log %s", URL)
    with pytest.warns(UserWarning, match="warn https") as warned:
        warn(f"warn {URL}")
    texts = [*capfd.readouterr().err.splitlines(), caplog.text, str(warned[0].message)]
    shown = [text for text in texts if SHOWN_URL in text]
    assert len(shown) == 4 and not any("kR7p" in text or "0a1b2c" in text for text in texts)


def test_a_secret_on_the_command_line_is_a_warning(caplog):
    parse("train", ["--rewards", "http://host/get_reward", "--output_dir", "runs/x"])
    assert caplog.text == ""
    assert parse("train", ["--rewards", URL]).rewards == (URL,)
    assert caplog.text.count("can read a secret") == 1 and SHOWN_URL in caplog.text and "kR7p" not in caplog.text


def test_trackers_start_while_the_command_line_holds_no_secret(tmp_path, monkeypatch):
    """W&B records the arguments of the process by itself."""
    seen = []
    ranks = Ranks(("tensorboard",), tmp_path)
    monkeypatch.setattr(ranks.accelerator, "init_trackers", lambda *_, **__: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["train.py", "--rewards", URL])
    ranks.start_trackers({"run_name": None}, 0)
    assert seen == ["train.py", "--rewards", SHOWN_URL] and sys.argv[2] == URL
