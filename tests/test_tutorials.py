"""Tutorials work: the files they list are written, and their commands run one after another, as a reader would."""

import json

import pytest
from tutorials import BLOCK, FOLDER, follow

from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions

TUTORIALS = sorted(FOLDER.glob("*.md"))


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.full)], ids=["in process", "by a shell"])
def followed(request, tmp_path):
    """Return a function: follow the tutorial of that name in ``tmp_path``, return the output of its commands."""
    return lambda name: "".join(follow(name, tmp_path, in_process=request.param))


def test_each_tutorial_has_a_test():
    elsewhere = {"feedback"}  # test_tutorial_feedback.py checks the outcome of its conversation
    assert {page.stem for page in TUTORIALS} == {
        "reward_function",
        "math_with_rules",
        "my_csv",
        "chat_lora",
        "reasoning_gym",
        "tools",
    } | elsewhere


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_block_is_a_command_or_a_file(page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) == page.read_text(encoding="utf-8").count("```") / 2
    assert all((kind == "bash") != bool(title) for kind, title, _ in blocks)


def test_reward_function(followed, tmp_path):
    output = followed("reward_function")
    assert "[1.0, 0.0]" in output
    run = tmp_path / "runs" / "mine"
    steps = read_metrics(run)
    assert len(steps) == 5 and (run / "report.html").is_file()
    for name in ("names_a_command", "opinion", "length"):
        assert all(f"rewards/{name}/mean" in step for step in steps)
        assert f"reward/{name}" in read_completions(run / "completions")[0]


def test_math_with_rules(followed, tmp_path):
    output = followed("math_with_rules")
    assert "What is 49 + 97?,146" in output and "frac_reward_zero_std" in output
    steps = read_metrics(tmp_path / "runs" / "sums")
    assert len(steps) == 3
    for name in ("exact_match", "regex", "repetition"):
        assert all(f"rewards/{name}/mean" in step for step in steps)


@pytest.mark.full  # takes 15 seconds
def test_reasoning_gym(followed, tmp_path):
    pytest.importorskip("reasoning_gym")
    output = followed("reasoning_gym")
    assert "State the final answer" in output and "Judge reasoning_gym" in output
    steps = read_metrics(tmp_path / "runs" / "sums")
    assert len(steps) == 3 and all("accuracy" in step for step in steps)
    row = json.loads((tmp_path / "before.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["prompt"].startswith("State the final answer") and 0 <= row["reward"] <= 1
    assert (tmp_path / "runs" / "compared" / "compare.html").is_file()


@pytest.mark.full  # takes 20 seconds
def test_tools(followed, tmp_path):
    output = followed("tools")
    assert "Tool: vlan\\nQuestion: Which VLAN is host 107 in?" in output
    assert "<tool_call>...</tool_call>" not in output
    steps = read_metrics(tmp_path / "runs" / "tools")
    assert len(steps) == 3
    assert all("tools/call_frequency" in step and "tools/failure_frequency" in step for step in steps)


def test_my_csv(followed, tmp_path):
    output = followed("my_csv")
    assert "Fits: " in output and "completion that follows is trained on" in output
    assert len(read_metrics(tmp_path / "runs/mine")) == 3
    assert (tmp_path / "models/mine/report.html").is_file() and (tmp_path / "runs/mine/report.html").is_file()


@pytest.mark.full  # takes 16 seconds
def test_chat_lora(followed, tmp_path):
    output = followed("chat_lora")
    # Three examples of the dry run, and one at the start of each of the two trainings.
    assert output.count("<system>\\nYou are a patient network engineer.\\n<user>\\n") == 5
    assert "adapter_model.safetensors" in output and "\n reference " not in output
    assert not list((tmp_path / "runs/chat").glob("model*.safetensors"))
    assert (tmp_path / "models/chat/model.safetensors").is_file()
    template = (tmp_path / "models/chat/chat_template.jinja").read_text(encoding="utf-8")
    assert "You are a patient network engineer." in template
