"""Tutorials work: the files they list are written, and their commands run one after another, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_answers
from scripts import ROOT, SOURCE

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(page: Path, folder: Path) -> str:
    """Do what ``page`` says in ``folder``; returns what its commands printed."""
    tools = folder / ".bin"
    tools.mkdir()
    for name, command in (("python", ""), ("reinforcepp", "-m reinforcepp")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said = ""
    for kind, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(text, encoding="utf-8")
        elif kind == "bash":
            done = subprocess.run(
                ["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            said += done.stdout + done.stderr
    return said


def test_every_tutorial_has_a_test():
    elsewhere = {"feedback"}  # test_tutorial_feedback.py answers the conversation in it
    assert {page.stem for page in TUTORIALS} == {
        "reward_function",
        "math_with_rules",
        "my_csv",
        "chat_lora",
    } | elsewhere


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_block_is_a_command_or_a_file(page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) == page.read_text(encoding="utf-8").count("```") / 2
    assert all((kind == "bash") != bool(title) for kind, title, _ in blocks)


def test_reward_function(tmp_path):
    said = follow(ROOT / "docs/tutorials/reward_function.md", tmp_path)
    assert "[1.0, 0.0]" in said
    run = tmp_path / "runs" / "mine"
    steps = read_metrics(run)
    assert len(steps) == 5 and (run / "report.html").is_file()
    for name in ("names_a_command", "opinion", "length"):
        assert all(f"rewards/{name}/mean" in step for step in steps)
        assert f"reward/{name}" in read_answers(run / "completions")[0]


def test_math_with_rules(tmp_path):
    said = follow(ROOT / "docs/tutorials/math_with_rules.md", tmp_path)
    assert "What is 49 + 97?,146" in said and "frac_reward_zero_std" in said
    steps = read_metrics(tmp_path / "runs" / "sums")
    assert len(steps) == 3
    for name in ("exact_match", "regex", "repetition"):
        assert all(f"rewards/{name}/mean" in step for step in steps)


def test_my_csv(tmp_path):
    said = follow(ROOT / "docs/tutorials/my_csv.md", tmp_path)
    assert "Fits: " in said and "the completion that follows is what is trained on" in said
    assert len(read_metrics(tmp_path / "runs/mine")) == 3
    assert (tmp_path / "models/mine/report.html").is_file() and (tmp_path / "runs/mine/report.html").is_file()


def test_chat_lora(tmp_path):
    said = follow(ROOT / "docs/tutorials/chat_lora.md", tmp_path)
    assert said.count("<system>\\nYou are a patient network engineer.\\n<user>\\n") == 3
    assert "adapter_model.safetensors" in said and "\n reference " not in said
    assert not list((tmp_path / "runs/chat").glob("model*.safetensors"))
    assert (tmp_path / "models/chat/model.safetensors").is_file()
    template = (tmp_path / "models/chat/chat_template.jinja").read_text(encoding="utf-8")
    assert "You are a patient network engineer." in template
