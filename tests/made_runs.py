"""Synthetic run folders of any length, with any gaps and texts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.monitoring.completion_log import evaluation_file, save_completions, step_file

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href=\"javascript:document.title='owned'\">x</a> </textarea>&lt;b&gt; \u202egnp.exe \x1b[31m ${1} \u2028 -->"
)
KEPT = "HOSTILE-END"


def evaluation_metrics(reward: float, judge: float | None = None, **more: float) -> dict[str, float]:
    """Return the metrics of an evaluation, with standard errors of 0.1 for the reward and 0.02 for the judge."""
    judged = {} if judge is None else {"judge": judge, "judge_error": 0.02}
    metrics = {
        "reward": reward,
        "reward_error": 0.1,
        **judged,
        "kl": 0.05,
        "length": 20.0,
        "truncated": 0.0,
        "distinct": 0.9,
    }
    return metrics | more


def step_of(step: int, draw: random.Random) -> dict[str, float]:
    """Return the logged metrics of a step, with timings."""
    reward = 2 * (1 - math.exp(-step / 20)) + draw.gauss(0, 0.2)
    return {
        "step": step,
        "epoch": step / 10,
        "loss": draw.gauss(0, 1e-3),
        "grad_norm": 0.2 + draw.random(),
        "learning_rate": 1e-5,
        "skipped_updates": 0.0,
        "clip_ratio/region_mean": 0.1 * draw.random(),
        "reward": reward,
        "reward_std": 0.7,
        "rewards/style/mean": reward - 1,
        "rewards/style/std": 0.5,
        "rewards/<b>length</b>/mean": 1.0,
        "rewards/<b>length</b>/std": 0.0,
        "kl": 0.001 * step + 0.01 * draw.random(),
        "entropy": 1.5,
        "completions/mean_length": 20 + draw.random(),
        "completions/min_length": 4,
        "completions/max_length": 40,
        "completions/clipped_ratio": 0.1 * draw.random(),
        "num_tokens": 1000.0 * step,
        "time/rollout": 1.0 + draw.random(),
        "time/update": 1.0,
        "step_time": 2.0,
    }


def make_run(
    folder: Path,
    steps: int = 12,
    *,
    evaluations: Mapping[str, Mapping[str, float]] | None = None,
    logged: int = 12,
    text: str = "",
    role: str = "",
    skipped: tuple[int, ...] = (),
    heldout: int = 8,
    settings: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    turns: int = 0,
) -> Path:
    """Write a run of ``steps`` steps, of which ``logged`` have completions; ``text`` is part of every model output.

    With a ``role``, each prompt is a conversation with a message of that role. With ``turns``, each completion is an episode with
    that many messages of the policy.
    """
    draw = random.Random(3)
    folder.mkdir(parents=True)
    if evaluations is None:
        evaluations = {"before": evaluation_metrics(0.0, 0.4), "after": evaluation_metrics(2.0, 0.8, length=25.0)}
    config = as_dict(TrainConfig(output_dir=str(folder), reward_model="models/rm", batch_size=16)) | dict(
        settings or {}
    )
    facts_of_run = {
        "kind": "TrainConfig",
        "num_steps": steps,
        "prompts": 100,
        "heldout_prompts": heldout,
        "inputs": {"model": "0123456789abcdef", "data": "fedcba9876543210", "reward_model": "00ff00ff00ff00ff"},
        "rewards": [{"name": "reward_model", "card": {"base_model": "builtin:tiny", "figures": {"accuracy": 0.91}}}],
        "judge": "judge",
        "started": "2026-11-22T10:00:00+0000",
        "command": "reinforcepp train --max_steps 12",
        "environment": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu"},
    } | dict(facts or {})
    (folder / "run.json").write_text(json.dumps({"settings": config} | facts_of_run), encoding="utf-8")
    log = [step_of(step, draw) for step in range(1, steps + 1)]
    for step in skipped:
        log[step - 1] = {key: log[step - 1][key] for key in ("step", "num_tokens", "step_time")} | {
            "skipped_updates": 1.0
        }
    timed = ("time/", "step_time")
    for name, wanted in (("metrics.jsonl", False), ("timings.jsonl", True)):
        lines = [json.dumps({k: v for k, v in step.items() if k.startswith(timed) == wanted}) for step in log]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(evaluations), encoding="utf-8")
    for step in range(1, min(logged, steps) + 1):
        save_completions(
            folder / "completions" / step_file(step),
            completions(step, text, draw) | conversations(16, text, role) | episodes(16, text, turns, f"step {step}"),
        )
    for when, own in evaluations.items():
        save_completions(
            evaluation_file(folder, when),
            heldout_answers(when, own["reward"], heldout, text, "judge" in own)
            | conversations(heldout, text, role)
            | episodes(heldout, text, turns, when),
        )
    return folder


def conversations(number: int, text: str, role: str) -> dict[str, list[Any]]:
    """Return the messages of ``number`` prompts, none without a ``role``."""
    if not role:
        return {}
    system, earlier = {"role": "system", "content": f"Be brief. {text}"}, {"role": role, "content": f"Earlier. {text}"}
    return {
        "messages": [
            [system, earlier, {"role": "user", "content": f"Question {i}?  {text}\nLine 2"}] for i in range(number)
        ]
    }


def episodes(number: int, text: str, turns: int, moment: str) -> dict[str, list[Any]]:
    """Return the column ``turns`` of ``number`` episodes, none if ``turns`` is 0."""
    return (
        {"turns": [json.dumps(episode(turns, f"{moment}, {i}. {text}", text)) for i in range(number)]} if turns else {}
    )


def episode(turns: int, text: str, name: str = "") -> list[dict[str, Any]]:
    """Return the turns of an episode: the policy calls a tool until its last message, which the environment answers."""
    found = []
    for i in range(turns - 1):
        asked = {
            "role": "assistant",
            "content": f'<tool_call>{{"name": "lookup", "arguments": {{"key": {i}}}}}</tool_call>',
        }
        answer = {"role": "tool", "name": f"lookup{name}", "content": f"Entry {i}. {text}"}
        found += [
            {"messages": [asked], "tokens": 20 + i, "sampled": True, "reward": 0.25 if i else None},
            {"messages": [answer], "tokens": 7, "sampled": False, "reward": None},
        ]
    last = {"role": "assistant", "content": f"The answer at {text}"}
    found.append({"messages": [last], "tokens": 9, "sampled": True, "reward": 1.0})
    end = {"role": "user", "content": f"Correct. {text}"}
    return [*found, {"messages": [end], "tokens": 0, "sampled": False, "reward": None}]


def completions(step: int, text: str, draw: random.Random, number: int = 16) -> dict[str, list[Any]]:
    """Return a step's table; rewards rise with the step and with the length."""
    rewards = [round(step / 10 + i / 100 + draw.gauss(0, 0.001), 6) for i in range(number)]
    return {
        "step": [step] * number,
        "prompt": [f"Prompt {i}? {text}" for i in range(number)],
        "completion": [f"Answer {i} of step {step}. {text}" for i in range(number)],
        "reward": rewards,
        "reward/style": rewards,
        "reward/<b>length</b>": [0.0] * number,
        "kl": [0.01] * number,
        "length": [4 + i for i in range(number)],
        "finish_reason": ["stop"] * (number - 1) + ["length"],
    }


def heldout_answers(when: str, reward: float, number: int, text: str, judged: bool) -> dict[str, list[Any]]:
    """Return an evaluation's table; the last prompt loses as much reward as the first gains."""
    sign = 0 if when == "before" else 1
    rewards = [reward + sign * (number / 2 - i) for i in range(number)]
    return {
        "prompt": [f"Held-out {i}? {text}" for i in range(number)],
        "completion": [f"{when} says {i}. {text}" for i in range(number)],
        "reward": rewards,
        **({"judge": [i / number for i in range(number)]} if judged else {}),
        "length": [10 + i for i in range(number)],
        "finish_reason": ["stop"] * number,
    }
