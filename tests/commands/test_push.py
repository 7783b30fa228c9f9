"""The push command against a local Hub: its uploads and its errors."""

from __future__ import annotations

import shutil

import pytest
from hub import serving, use_hub
from made_runs import make_run

from reinforcepp.commands import cli
from reinforcepp.config import PushConfig
from reinforcepp.errors import ConfigError

TOKEN = "hf_aVerySecretToken"


@pytest.fixture
def hub():
    with serving() as hub:
        hub.tokens[TOKEN] = "ada"
        yield hub


@pytest.fixture
def run(tmp_path, model_folder):
    folder = make_run(tmp_path / "policy", settings={"model": "distilgpt2"})
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def push(tmp_path, run, monkeypatch, capfd):
    """``push(endpoint, token, *flags)``: the command's exit code and output, which never contains the token."""

    def start(endpoint: str, token: str | None, *flags: str) -> tuple[int, str]:
        use_hub(monkeypatch, endpoint, token, tmp_path / "home")
        code = cli.main(["push", str(run), *flags])
        output = "".join(capfd.readouterr())
        assert token is None or token not in output
        assert "Traceback" not in output
        return code, output

    return start


def test_the_model_and_its_card_arrive(hub, push, run, tmp_path):
    from safetensors.torch import load_file

    code, output = push(hub.url, TOKEN, "--repo", "aligned", "--private")
    assert code == 0, output
    assert f"Uploaded to {hub.url}/ada/aligned" in output.replace("\n", "")
    repo = hub.repos["ada/aligned"]
    assert repo["private"] is True
    files = repo["files"]
    assert set(files) - {".gitattributes"} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    (tmp_path / "arrived").write_bytes(files["model.safetensors"])
    arrived, sent = load_file(tmp_path / "arrived"), load_file(run / "model.safetensors")
    assert arrived.keys() == sent.keys() and all(bool((arrived[k] == sent[k]).all()) for k in sent)
    card = files["README.md"].decode()
    assert "base_model: distilgpt2" in card and "# ada/aligned" in card and 'from_pretrained("ada/aligned")' in card
    assert sorted(path.name for path in run.parent.iterdir() if path.name != "arrived" and path.name != "home") == [
        "policy"
    ]


def test_an_existing_repository_is_updated_but_a_public_one_is_refused_with_private(hub, push):
    hub.repos["ada/policy"] = {"private": False, "files": {}}
    code, output = push(hub.url, TOKEN, "--private")
    assert code == 2 and "is public" in output
    assert hub.repos["ada/policy"]["files"] == {}
    code, output = push(hub.url, TOKEN)
    assert code == 0, output
    assert "README.md" in hub.repos["ada/policy"]["files"]


def error_of(outcome: tuple[int, str]) -> str:
    code, output = outcome
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_a_missing_token_is_an_error_with_the_fix(hub, push):
    message = error_of(push(hub.url, None))
    assert "hf auth login" in message and "HF_TOKEN" in message
    assert hub.asked == []


def test_refused_requests_and_an_unreachable_hub(hub, push):
    assert "token is invalid" in error_of(push(hub.url, "hf_wrong"))
    assert "can't write" in error_of(push(hub.url, TOKEN, "--repo", "someone/else"))
    assert hub.repos == {}
    assert "can't be reached" in error_of(push("http://127.0.0.1:9", TOKEN))


@pytest.mark.parametrize("name", ["a/b/c", "a b", "../x", "", "a/", "-x", "a--b", "a..b", "x.", "a\nb"])
def test_invalid_repository_names(name):
    with pytest.raises(ConfigError, match=r"repo.*isn't a valid name"):
        PushConfig(model="runs/train", repo=name)


def test_the_name_is_that_of_the_folder_unless_given():
    assert PushConfig(model="runs/train").repository == "train"
    assert PushConfig(model="runs/train", repo="ada/x").repository == "ada/x"
