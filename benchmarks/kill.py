"""Kill a training at many moments and resume it: is what comes out, byte for byte, what an undisturbed run writes?

python benchmarks/kill.py [--points 40 | --each_write]

Both trainers, and the policy trainer with episodes in an environment, on tiny models in float32 on the CPU, with several
optimizer steps per batch, a checkpoint after every step and a reward function that draws its own random numbers. Half of
the kills come after a random time, half at a random one of the moments in which files are written, some of those with half of
the file on the disk. Every tenth run is killed twice. With --each_write there is one kill per function that writes, in the
middle of a run, and one in an episode. Written to benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import write_result
from transformers import GPT2Config, GPT2LMHeadModel

from reinforcepp import files
from reinforcepp.config import ReinforceConfig, RewardModelConfig
from reinforcepp.data.builtin import model_path
from reinforcepp.files import write_json
from reinforcepp.models import saving
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.training import checkpoint
from reinforcepp.training.reinforce_trainer import ReinforceTrainer
from reinforcepp.training.reward_loop import ResumableRewardTrainer  # noqa: F401  (loaded here, once, for all the forks)
from reinforcepp.training.reward_trainer import train_reward_model

COMPARED = {
    "policy": ("model.safetensors", "metrics.jsonl", "evaluation.json", "completions", "evaluations"),
    "reward": ("model.safetensors", "metrics.jsonl", "reward_model.json", "heldout.parquet", "report.html"),
}
COMPARED["environment"] = COMPARED["policy"]
PROMPTS = [{"prompt": f"Why does host {i} answer slowly?"} for i in range(11)]


class Guess:
    """An environment of up to three turns, whose answers and rewards depend on the policy's messages."""

    def __init__(self) -> None:
        self.left = 3

    def reset(self, row: dict[str, Any]) -> None:
        """Begin with the row's own prompt."""

    def step(self, message: dict[str, str]) -> tuple[str, float, bool]:
        """Reward a message by its length."""
        self.left -= 1
        return f"No, {len(message['content'])}.", len(message["content"]) % 5 / 5, self.left == 0


WRITES = ((files, "flush"), (files, "move"), (checkpoint, "save_file"), (saving, "flush"), (shutil, "copyfile"))
IN_EPISODES = ((Guess, "step"),)


Moments = tuple[tuple[Any, str], ...]
"""Functions at whose calls a run is killed: the module or class, and the name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=40, help="for each trainer")
    parser.add_argument(
        "--each_write", action="store_true", help="one kill per function that writes, instead of --points"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write there instead of benchmarks/results/kill.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        gc.freeze()  # what is loaded here is no garbage in the forks, which would look for some among it
        points = 0 if arguments.each_write else arguments.points
        each = {kind: try_points(kind, Path(folder), points, arguments.seed) for kind in COMPARED}
    total = {key: sum(result[key] for result in each.values()) for key in ("points", "identical")}
    result = total | each
    if arguments.output:
        write_json(Path(arguments.output), result)
    else:
        write_result("kill", result)


def make_inputs(folder: Path) -> None:
    """A tiny model and a preference file."""
    tokenizer = load_tokenizer(str(model_path()))
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "model")
    model.generation_config.eos_token_id = [end, *range(0, len(tokenizer), 3)]  # a message ends after a few tokens
    model.save_pretrained(folder / "environment")
    tokenizer.save_pretrained(folder / "environment")
    tokenizer.save_pretrained(folder / "model")
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        rows = [(f"Is host {i} up?", f"Ping it {i} times.", "Who knows.") for i in range(11)]
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), *rows])


def train(kind: str, inputs: Path, output: Path) -> None:
    """One training to its end, going on from what ``output`` holds."""
    torch.set_num_threads(1)
    kept = {"output_dir": str(output), "seed": 3, "save_every": 1, "resume": (output / "run.json").is_file()}
    if kind == "reward":
        train_reward_model(
            RewardModelConfig(
                **kept,
                model=str(inputs / "model"),
                data=str(inputs / "pairs.csv"),
                batch_size=4,
                micro_batch_size=2,
                num_train_epochs=3,
                heldout_fraction=0.2,
            )
        )
        return
    config = ReinforceConfig(
        **kept,
        batch_size=8,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=5,
        max_new_tokens=50 if kind == "environment" else 6,
        max_prompt_length=40,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        eval_prompts=3,
        eval_every=2,
        keep_best="reward",
        rollout="transformers",
    )
    model, environment = ("environment", Guess) if kind == "environment" else ("model", None)
    held_out = PROMPTS[:3]
    ReinforceTrainer(str(inputs / model), noisy, config, PROMPTS, held_out, environment=environment).train()


def noisy(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that draws from a global random generator."""
    return [sum(ids) % 7 / 7 + random.random() for ids in completion_ids]


def in_child(job: Callable[[], None], *, after: float | None = None) -> int:
    """Do ``job`` in a fork, which is killed ``after`` so many seconds; returns its exit code."""

    def run() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        job()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    if after is not None:
        time.sleep(after)
        if child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode or 0


def killed_at_write(job: Callable[[], None], moment: int, moments: Moments, names: Path | None = None) -> None:
    """Do ``job``, but end the process at a call of ``moments``, the ``moment``-th; ``names`` gets a line for each call."""
    seen = 0

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if names is not None:
                with names.open("a") as lines:
                    lines.write(f"{name}\n")
            if seen == moment:
                if function.__name__ == "save_file":  # half of it gets there
                    function(*positional, **named)
                    os.truncate(positional[1], os.path.getsize(positional[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*positional, **named)

        return call

    for module, name in moments:
        setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
    job()


def try_points(kind: str, inputs: Path, points: int, seed: int) -> dict[str, Any]:
    """Train undisturbed, then ``points`` times with kills, 0 for one kill per function that writes; count equal results."""
    whole, draw = inputs / f"{kind}-whole", random.Random(seed)
    names = inputs / f"{kind}-writes"
    begin = time.monotonic()
    functions: Moments = WRITES + IN_EPISODES * (kind == "environment")
    if kind == "environment" and not points:
        functions = IN_EPISODES  # the writes are those of the policy
    code = in_child(lambda: killed_at_write(lambda: train(kind, inputs, whole), 0, functions, names))
    seconds = longest = time.monotonic() - begin
    written = names.read_text().splitlines()
    moments = [of_one[len(of_one) // 2] for of_one in occurrences(written).values()] if points == 0 else []
    assert code == 0, f"the undisturbed {kind} training ended with {code}"
    expected = hashes(kind, whole)
    rows = []
    for point in range(points or len(moments)):
        folder = inputs / f"{kind}-{point}"
        kills = []
        for _ in range(2 if points and point % 10 == 9 else 1):
            job = lambda folder=folder: train(kind, inputs, folder)  # noqa: E731
            if moments or point % 2:
                moment = moments[point] if moments else draw.randint(1, len(written))
                code = in_child(lambda job=job, moment=moment: killed_at_write(job, moment, functions))
                kills.append({"write": moment, "function": written[moment - 1], "killed": code == -signal.SIGKILL})
            else:
                after = draw.uniform(0, longest)
                code = in_child(job, after=after)
                if code != -signal.SIGKILL:  # the run had ended: it takes less time than the undisturbed one did
                    longest = after
                kills.append({"seconds": round(after, 3), "killed": code == -signal.SIGKILL})
        code = in_child(lambda folder=folder: train(kind, inputs, folder))
        found = hashes(kind, folder) if code == 0 else {}
        rows.append({"point": point, "kills": kills, "exit_code": code, "identical": found == expected})
        print(kind, rows[-1], flush=True)
        if found == expected:
            shutil.rmtree(folder)
    return {
        "points": len(rows),
        "killed": sum(any(kill["killed"] for kill in row["kills"]) for row in rows),
        "identical": sum(row["identical"] for row in rows),
        "writes_in_a_run": len(written),
        "seconds_of_a_run": seconds,
        "compared": COMPARED[kind],
        "sha256": expected,
        "rows": rows,
    }


def occurrences(written: list[str]) -> dict[str, list[int]]:
    """Return the moments, counted from 1, at which each function wrote."""
    found: dict[str, list[int]] = {}
    for moment, name in enumerate(written, 1):
        found.setdefault(name, []).append(moment)
    return found


def hashes(kind: str, folder: Path) -> dict[str, str]:
    """SHA-256 of each file or folder that is compared; the reward model's card without the settings, which name the folder."""
    found = {}
    for name in COMPARED[kind]:
        path = folder / name
        paths = [path] if path.is_file() else sorted(path.iterdir())
        contents = b"".join(p.name.encode() + p.read_bytes() if path.is_dir() else p.read_bytes() for p in paths)
        if name == "reward_model.json":
            contents = json.dumps(json.loads(contents) | {"settings": None}).encode()
        found[name] = hashlib.sha256(contents).hexdigest()
    return found


if __name__ == "__main__":
    main()
