"""Secrets and private texts of a training: where do they land?"""

from __future__ import annotations

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from hub import serving, use_hub

from reinforcepp import ReinforceConfig, ReinforceTrainer, RewardModelConfig, RewardTrainer
from reinforcepp.commands import cli
from reinforcepp.config import TrainConfig
from reinforcepp.rewards.remote import RemoteReward

PATH_TOKEN, CODE, KEY = "9f8e7d6c5b4a3210ffee", "kR7pW2vXq9", "s3cr3tEnvironmentValue"
SECRETS = (PATH_TOKEN, CODE, KEY)
SYSTEM_PROMPT = "You answer for Blofeld Industries."
PRIVATE = ("127.0.0.1", "mallory", "Blofeld", "volcano", *SECRETS)
"""Words of the address, the home folder, the prompt, and the names of data and models."""
PAIRS = [
    {"prompt": [{"role": "user", "content": text}]}
    | {
        kind: [{"role": "assistant", "content": answer}]
        for kind, answer in (("chosen", f"{text} Yes."), ("rejected", "no"))
    }
    for text in ("Hm?", "Why?", "Who?", "Where?")
]


class Scores(BaseHTTPRequestHandler):
    """A reward server behind a secret address; it fails as many web frameworks do, with the request in the response."""

    failing = False

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps({"rewards": [len(text) % 5 for text in body["query"]]})
        if self.failing:
            content = f"Cannot POST {self.path} with {CODE}"
        self.send_response(404 if self.failing else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Scores) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a telling name, a model and data."""
    home = tmp_path_factory.mktemp("home") / "mallory"
    tiny.model(vocab_size=330).save_pretrained(home / "volcano")
    tiny.chat_tokenizer().save_pretrained(home / "volcano")
    rows = [json.dumps({"prompt": f"Why is host {i} up?"}) for i in range(8)]
    (home / "volcano.jsonl").write_text("\n".join(rows))
    return home


def arguments(home: Path, server, folder: str, *more: str) -> list[str]:
    url = f"http://127.0.0.1:{server.server_port}/hook/{PATH_TOKEN}?code={CODE}"
    paths = ["--model", str(home / "volcano"), "--data", str(home / "volcano.jsonl"), "--rewards", f"0.5*{url}"]
    sizes = (
        "--max_steps 1 --batch_size 2 --max_new_tokens 4 --rollout transformers --heldout_fraction 0.25 --save_every 1"
    )
    more = ("--system_prompt", SYSTEM_PROMPT, "--run_name", KEY, "--keep_last", "1", *more)
    return ["train", *paths, *sizes.split(), "--report_to", "tensorboard", *more, "--output_dir", str(home / folder)]


def called(monkeypatch, capfd, *command: str) -> tuple[int, str]:
    """Return the exit code and the output of a command of a process whose environment has a key."""
    monkeypatch.setenv("VOLCANO_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["reinforcepp", *command])
    code = cli.main(list(command))
    return code, "".join(capfd.readouterr())


@pytest.fixture
def run(home, server, monkeypatch, capfd):
    """The folder of a finished run, and what the terminal showed."""
    output = ""
    if not (home / "run").exists():
        code, output = called(monkeypatch, capfd, *arguments(home, server, "run"))
        assert code == 0, output
    return home / "run", output


def found_in(folder: Path, words) -> dict[str, list[str]]:
    """Return the words that occur in each file of a folder that has one.

    The chat template isn't searched: it is a part of the model, as documented, and adds the system prompt to each prompt.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "chat_template.jinja")
    files = {path: path.read_bytes() for path in paths}
    found = {str(path.relative_to(folder)): [w for w in words if w.encode() in data] for path, data in files.items()}
    return {name: words for name, words in found.items() if words}


def described(found) -> str:
    return "; ".join(f"{name}: {len(words)} secrets" for name, words in found.items()) or "no file has one"


@pytest.mark.attack("M2", "search the files of a run for secrets of the reward server's address")
def test_files_of_a_run_hold_no_secret(outcome, run):
    found = found_in(run[0], SECRETS)
    outcome(described(found))
    assert found == {}


@pytest.mark.attack("M2", "read the address of a reward server on a shared terminal and in a run's report")
def test_terminal_and_report_show_no_secret(outcome, run, home, server, monkeypatch, capfd):
    folder, trained = run
    commands = {
        "report": ["report", str(folder), "--output", str(home / "page.html")],
        "doctor": ["doctor", str(folder)],
        "train --dry_run": arguments(home, server, "dry", "--dry_run"),
        "train --resume": arguments(home, server, "run", "--resume"),
    }
    texts = {name: called(monkeypatch, capfd, *command) for name, command in commands.items()}
    assert {name: code for name, (code, _) in texts.items() if code not in (0, 1)} == {}, texts
    texts |= {"train": (0, trained), "page": (0, (home / "page.html").read_text())}
    found = {name: [secret for secret in SECRETS if secret in text] for name, (_, text) in texts.items()}
    found = {name: secrets for name, secrets in found.items() if secrets}
    outcome(described(found))
    assert found == {}
    assert "which stands for a secret" in texts["page"][1]


@pytest.mark.attack("M2", "let a failing reward server repeat the secret address in its answer")
def test_errors_show_no_secret(outcome, home, server, monkeypatch, capfd):
    monkeypatch.setattr(Scores, "failing", True)
    code, output = called(monkeypatch, capfd, *arguments(home, server, "failed"))
    found = [secret for secret in SECRETS if secret in output]
    found += [secret for secrets in found_in(home / "failed", SECRETS).values() for secret in secrets]
    outcome(f"exit code {code}; {len(found)} secrets in the error and the run's files")
    assert code == 2 and "404" in output and found == []


@pytest.mark.attack("M2", "read the log of a program that turns on logging, and settings that a notebook prints")
def test_logs_and_printed_settings_show_no_secret(outcome, server, caplog):
    url = f"http://127.0.0.1:{server.server_port}/hook/{PATH_TOKEN}?code={CODE}"
    caplog.set_level(logging.INFO)
    assert RemoteReward(url)(["How?"], ["So."]) == [2]
    assert "POST" in caplog.text
    texts = {"log": caplog.text, "settings": repr(TrainConfig(rewards=[url]))}
    found = {name: [secret for secret in SECRETS if secret in text] for name, text in texts.items()}
    found = {name: secrets for name, secrets in found.items() if secrets}
    outcome(described(found))
    assert found == {}


@pytest.mark.attack("M2", "search an exported model and its public card for private texts of the author")
def test_an_exported_folder_holds_nothing_private(outcome, run, home, monkeypatch, capfd):
    target = home.parent / "exported"
    code, output = called(monkeypatch, capfd, "export", str(run[0]), "--output_dir", str(target))
    found = found_in(target, PRIVATE)
    outcome("; ".join(f"{name}: {', '.join(words)}" for name, words in found.items()) or "no file has one")
    assert code == 0, output
    assert found == {} and "learning" in (target / "README.md").read_text()


def length(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as hub:
        hub.tokens["hf_aVerySecretToken"] = "ada"
        use_hub(monkeypatch, hub.url, "hf_aVerySecretToken", tmp_path / "cache")
        yield hub


def published(hub, folder: Path) -> dict[str, list[str]]:
    for name, content in hub.repos["ada/public"]["files"].items():
        path = folder / "uploaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return found_in(folder / "uploaded", (*PRIVATE, str(folder)))


@pytest.mark.attack("M2", "search an adapter on the Hub for the author's home folder and prompt")
def test_a_published_adapter_holds_nothing_private(outcome, home, tmp_path, hub):
    private = {"system_prompt": SYSTEM_PROMPT, "run_name": "volcano", "push_to_hub": True, "hub_model_id": "public"}
    sizes = {"max_steps": 1, "batch_size": 2, "max_new_tokens": 4, "rollout": "transformers", "use_peft": True}
    args = ReinforceConfig(output_dir=str(tmp_path / "volcano"), **private, **sizes)
    prompts = [{"prompt": f"Why is host {i} up?"} for i in range(2)]
    ReinforceTrainer(str(home / "volcano"), length, args, prompts).train()
    found = published(hub, tmp_path)
    outcome("; ".join(f"{name}: {', '.join(words)}" for name, words in found.items()) or "no file has one")
    assert found == {}


@pytest.mark.attack("M2", "search a reward model on the Hub for the author's home folder and prompt")
def test_a_published_reward_model_holds_nothing_private(outcome, home, tmp_path, hub):
    private = {"system_prompt": SYSTEM_PROMPT, "run_name": "volcano", "push_to_hub": True, "hub_model_id": "public"}
    config = RewardModelConfig(output_dir=str(tmp_path / "volcano"), max_steps=1, batch_size=4, **private)
    RewardTrainer(str(home / "volcano"), config, train_dataset=PAIRS, eval_dataset=PAIRS).train()
    found = published(hub, tmp_path)
    outcome("; ".join(f"{name}: {', '.join(words)}" for name, words in found.items()) or "no file has one")
    assert found == {}
