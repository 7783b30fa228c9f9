"""A lookup tool: the built-in model answers questions about facts that only the tool knows, with the tool and without.

The facts are the VLANs of hosts, drawn anew for each seed. Scores are those of hosts that no training sees: the gold judge gives
1 to an answer that names the VLAN, otherwise 0. SFT on demonstrations comes first, once for all seeds and with other facts,
because the built-in model has never seen a call: with the tool they show a call and the answer after its result, without it the
answer. Both models then train with the same estimator, reward, prompts and steps. ``environments.py`` runs this as its
part ``tool``.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from staleness import interval

from reinforcepp import ReinforceConfig, ReinforceTrainer, SftConfig, sft
from reinforcepp.environments.tools.schemas import load_tools, schemas
from reinforcepp.files import write_json
from reinforcepp.monitoring import read_metrics

SFT_SEED, SEEDS = 0, range(1, 6)
KNOWN, HELD_OUT = 400, 100
SFT: dict[str, Any] = {"max_steps": 400, "batch_size": 8, "learning_rate": 2e-3}
TRAINING: dict[str, Any] = {
    "batch_size": 32,
    "max_steps": 30,
    "max_new_tokens": 80,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "kl_coef": 0.01,
}
GOLD = r"rule:exact_match?name=gold&column=vlan&pattern=^\s*VLAN (\d+)\.?$"
QUESTIONS = ("Which VLAN is host {} in?", "What is the VLAN of host {}?", "Tell me the VLAN of host {}.")
TEMPLATE = (
    "{% for tool in tools or [] %}Tool: {{ tool['function']['name'] }}\n{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}Question: {{ m['content'] }}\n{% elif m['role'] == 'tool' %}\nResult: {{ m['content'] }}\n"
    "{% else %}Answer: {{ m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
TOOL = '''
VLANS = {}


def vlan(host: int) -> str:
    """Look up the VLAN of a host.

    Args:
        host: Number of the host.
    """
    return f"VLAN {{VLANS[host]}}."
'''


def tool(work: Path, processes: int = 2, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Return the results of all trainings; those that ``work`` has aren't repeated."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(with_tool, seed) for seed in seeds for with_tool in (True, False)]
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        pool.map(partial(fine_tuned, work), (True, False), chunksize=1)
        rows = pool.map(partial(measured, work), jobs, chunksize=1)
    found = {(row["with_tool"], row["seed"]): row for row in rows}

    def summary(with_tool: bool) -> dict[str, Any]:
        own = [found[with_tool, seed] for seed in seeds]
        return {
            "gold_before": interval([row["gold_before"] for row in own]),
            "gold_after": interval([row["gold_after"] for row in own]),
        }

    differences = [found[True, seed]["gold_after"] - found[False, seed]["gold_after"] for seed in seeds]
    return {
        "steps": TRAINING["max_steps"],
        "settings": {"training": TRAINING, "sft": SFT},
        "hosts": {"known": KNOWN, "held_out": HELD_OUT},
        "with_tool": summary(True),
        "without_tool": summary(False),
        "gold_difference": interval(differences),
        "rows": rows,
    }


def name_of(with_tool: bool, seed: int) -> str:
    """Return the name of a training's folder."""
    return f"{'with' if with_tool else 'without'}-{seed}"


def facts(folder: Path, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return questions about known and held-out hosts, and the tool, whose file is in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    hosts = draw.sample(range(100, 1000), KNOWN + HELD_OUT)
    vlans = {host: draw.randrange(100, 1000) for host in hosts}
    file = folder / "inventory.py"
    file.write_text(TOOL.format(vlans), encoding="utf-8")
    rows = [{"prompt": draw.choice(QUESTIONS).format(host), "vlan": str(vlans[host]), "host": host} for host in hosts]
    return rows[:KNOWN], rows[KNOWN:], f"{file}:vlan"


def fine_tuned(work: Path, with_tool: bool) -> Path:
    """Return the model after SFT on demonstrations."""
    folder = work / name_of(with_tool, SFT_SEED)
    output = folder / "sft"
    if not (output / "model.safetensors").is_file():
        rows, _, source = facts(folder, SFT_SEED)
        shown = [example for row in rows for example in demonstration(row, source if with_tool else None)]
        args = SftConfig(output_dir=str(output), overwrite=True, chat_template=TEMPLATE, seed=SFT_SEED, **SFT)
        sft(args, "builtin:tiny", shown)
    return output


def demonstration(row: dict[str, Any], source: str | None) -> list[dict[str, Any]]:
    """Return the rows of SFT for one question: with a tool, the call, and the answer after its result."""
    question, answer = {"role": "user", "content": row["prompt"]}, f"VLAN {row['vlan']}."
    if source is None:
        return [{"messages": [question, {"role": "assistant", "content": answer}]}]
    call = {"type": "function", "function": {"name": "vlan", "arguments": {"host": row["host"]}}}
    asked = [question, {"role": "assistant", "content": f"<tool_call>{json.dumps(call['function'])}</tool_call>"}]
    answered = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": answer},
    ]
    return [{"messages": messages, "tools": schemas(load_tools([source]))} for messages in (asked, answered)]


def measured(work: Path, job: tuple[bool, int]) -> dict[str, Any]:
    """Return the result of one training, from its file if there is one."""
    with_tool, seed = job
    result = work / f"{name_of(with_tool, seed)}.json"
    if not result.is_file():
        write_json(result, {"with_tool": with_tool, "seed": seed, **trained(work, with_tool, seed)})
    return dict(json.loads(result.read_text(encoding="utf-8")))


def trained(work: Path, with_tool: bool, seed: int) -> dict[str, Any]:
    """Train once, and return gold scores of held-out questions before and after, and the frequency of calls."""
    folder = work / name_of(with_tool, seed)
    rows, held_out, source = facts(folder, seed)
    args = ReinforceConfig(
        output_dir=str(folder / "policy"),
        overwrite=True,
        tools=(source,) if with_tool else (),
        max_turns=3,
        rollout="transformers",
        eval_prompts=HELD_OUT,
        seed=seed,
        **TRAINING,
    )
    trainer = ReinforceTrainer(str(fine_tuned(work, with_tool)), GOLD, args, rows, held_out, judge=GOLD)
    trainer.train()
    before, after, log = trainer.evaluations["before"], trainer.evaluations["after"], read_metrics(folder / "policy")
    return {
        "gold_before": before.judge,
        "gold_after": after.judge,
        "kl": after.kl,
        "reward": [row["reward"] for row in log],
        "call_frequency": [row["tools/call_frequency"] for row in log if with_tool],
        "example": after.completions[0].messages,
    }
