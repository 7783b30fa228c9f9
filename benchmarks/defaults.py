"""Which learning rates, warmups and score heads train without divergence: the defaults and their page follow from it.

    python benchmarks/defaults.py [--model FOLDER ...] [--pairs FILE] [--work FOLDER]

Reward models, SFT and policies are trained on the built-in data, each in a separate process. ``--model`` adds language models,
which make few steps, and encoders. ``--pairs`` adds real preference pairs for the encoders. A training that ``--work`` has a
result of isn't repeated, so a stopped measurement continues where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import FOLDER, write_result

DIVERGED_LOSS = 1.5
"""A reward model that knows nothing has a loss of 0.69."""
DIVERGED_KL = 1.0
"""Mean of k3 per token of a policy, in nats."""
DIVERGED_FACTOR = 2.0
"""SFT that doubles the held-out loss."""
HEADS = ("1/(d+1)", "0.02")
DEFAULT_WARMUP = {"reward": 0.1, "sft": 0.1, "policy": 0.0}
TINY = "builtin:tiny"
MANY = {"pairs": 320, "num_train_epochs": 1, "heldout_fraction": 0.25}
FEW = {"pairs": 40, "batch_size": 4, "num_train_epochs": 1, "heldout_fraction": 0.4}
"""Of the built-in pairs; few are for a language model that takes a minute per step."""
MANY_STEPS = {"max_steps": 20, "batch_size": 32, "micro_batch_size": 32, "max_prompt_length": 64, "max_new_tokens": 48}
FEW_STEPS = {"max_steps": 6, "batch_size": 4, "micro_batch_size": 4, "max_prompt_length": 64, "max_new_tokens": 32}
LORA = {"use_peft": True}


def jobs(models: list[str], pairs: str | None) -> list[dict[str, Any]]:
    """Every training, the most informative ones of each model first."""
    from reinforcepp.models.encoders import is_encoder
    from reinforcepp.models.loading import load_config

    found = list(reward_jobs(TINY, (1e-5, 1e-3, 1e-2), MANY))
    for name in models:
        if is_encoder(load_config(name)):
            if pairs is not None:
                found.append(reward_job(name, None, 0.1, HEADS[0], {"max_length": 512}, pairs))
            found += reward_jobs(name, (2e-5, 3e-4, 1e-3), MANY)
        else:
            cells = [(None, 0.1, 0), (1e-4, 0.1, 1), (1e-4, 0.1, 0), (2e-5, 0.1, 0), (None, 0.0, 0), (2e-5, 0.1, 1)]
            found += [reward_job(name, rate, warmup, HEADS[head], FEW) for rate, warmup, head in cells]
            found += [policy_job(name, None, 0.0, FEW_STEPS), policy_job(name, None, 0.0, FEW_STEPS | LORA)]
            found += [sft_job(name, None, FEW), sft_job(name, None, FEW | LORA)]
            found += [reward_job(name, None, 0.1, HEADS[0], FEW | LORA)]
    found += [reward_job(TINY, rate, 0.1, HEADS[0], MANY | LORA) for rate in (None, 1e-2)]
    found += [sft_job(TINY, rate, MANY) for rate in (None, 1e-3, 1e-2)]
    found += [sft_job(TINY, rate, MANY | LORA) for rate in (None, 1e-2)]
    cells = [(None, 0.0), (1e-5, 0.0), (1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0)]
    found += [policy_job(TINY, rate, warmup, MANY_STEPS) for rate, warmup in cells]
    return found + [policy_job(TINY, rate, 0.0, MANY_STEPS | LORA) for rate in (None, 1e-2)]


def reward_jobs(name: str, rates: tuple[float, ...], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rate with the default warmup and head, and the highest one with every other warmup and head."""
    cells = [(rate, 0.1, 0) for rate in (None, *rates)] + [
        (rates[-1], *cell) for cell in ((0.0, 0), (0.1, 1), (0.0, 1))
    ]
    return [reward_job(name, rate, warmup, HEADS[head], settings) for rate, warmup, head in cells]


def reward_job(
    name: str, rate: float | None, warmup: float, head: str, settings: dict[str, Any], data: str = "builtin:network"
) -> dict[str, Any]:
    own = {"learning_rate": rate, "warmup_ratio": warmup, **settings}
    return {"training": "reward", "model": name, "data": data, "head": head, "settings": own}


def sft_job(name: str, rate: float | None, settings: dict[str, Any]) -> dict[str, Any]:
    own = {"learning_rate": rate, "warmup_ratio": DEFAULT_WARMUP["sft"], **settings}
    return {"training": "sft", "model": name, "data": "builtin:network", "head": "", "settings": own}


def policy_job(name: str, rate: float | None, warmup: float, settings: dict[str, Any]) -> dict[str, Any]:
    own = {"learning_rate": rate, "warmup_ratio": warmup, **settings, "eval_prompts": 0, "kl_coef": 0.05}
    return {"training": "policy", "model": name, "data": "builtin:network", "head": "", "settings": own}


# --- one training, in its own process ---------------------------------------------------------------------------------


def measured(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"reward": measured_reward, "sft": measured_sft, "policy": measured_policy}
        return kinds[job["training"]](job, Path(folder))


def measured_reward(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    from torch import nn

    from reinforcepp.config import RewardModelConfig
    from reinforcepp.models import reward_models
    from reinforcepp.training.reward_trainer import train_reward_model

    def wide_head(model: Any, missing: set[str]) -> None:
        nn.init.normal_(reward_models.score_head(model)[1].weight, std=0.02)

    if job["head"] != HEADS[0]:
        reward_models._initialize_head = wide_head
    settings = dict(job["settings"])
    data = few_pairs(folder, settings.pop("pairs")) if "pairs" in settings else job["data"]
    config = RewardModelConfig(
        model=job["model"], data=data, output_dir=str(folder / "rm"), save_every=0, mixed_precision="no", **settings
    )
    found: dict[str, Any] = {"heldout_accuracy": None}
    try:
        figures = train_reward_model(config).card.figures
        found = {"heldout_accuracy": figures["accuracy"], "length_accuracy": figures["longer_wins"]}
        found |= {"heldout_pairs": figures["pairs"]}
    except Exception as error:  # the row says so, and the other trainings are still worth their time
        found["error"] = str(error)
    losses = [step["loss"] for step in lines(folder / "rm")]
    found |= {"steps": len(losses), "max_loss": max(losses, default=None), "last_loss": losses[-1] if losses else None}
    found["diverged"] = "error" in found or not losses or not max(losses) <= DIVERGED_LOSS
    return found | chosen(folder / "rm")


def measured_sft(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    from reinforcepp.config import SftConfig
    from reinforcepp.training.sft_trainer import train_language_model

    settings = dict(job["settings"])
    data = few_pairs(folder, settings.pop("pairs"))
    config = SftConfig(
        model=job["model"], data=data, output_dir=str(folder / "run"), save_every=0, mixed_precision="no", **settings
    )
    heldout = train_language_model(config)
    losses = [step["loss"] for step in lines(folder / "run")]
    found = {"heldout_before": heldout["before"].loss, "heldout_after": heldout["after"].loss}
    found |= {"steps": len(losses), "max_loss": max(losses), "last_loss": losses[-1]}
    doubled = not found["heldout_after"] < DIVERGED_FACTOR * found["heldout_before"]
    return found | {"diverged": doubled} | chosen(folder / "run")


def measured_policy(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    from statistics import fmean

    from reinforcepp.config import ReinforceConfig
    from reinforcepp.data import load_prompts
    from reinforcepp.errors import TrainingDiverged
    from reinforcepp.training.reinforce_trainer import ReinforceTrainer

    _, rows, _ = load_prompts(job["data"], heldout_fraction=0, seed=0)
    config = ReinforceConfig(
        output_dir=str(folder / "run"), rollout="transformers", save_every=0, mixed_precision="no", **job["settings"]
    )
    trainer = ReinforceTrainer(job["model"], "builtin:judge", config, rows)
    try:
        trainer.train()
        error = None
    except TrainingDiverged as reason:
        error = str(reason)
    steps = lines(folder / "run")
    rewards, largest = [step["reward"] for step in steps], max(step["kl"] for step in steps)
    found = {
        "steps": len(steps),
        "max_kl": largest,
        "reward_first": fmean(rewards[:3]),
        "reward_last": fmean(rewards[-3:]),
    }
    return found | {"diverged": error is not None or largest > DIVERGED_KL} | chosen(folder / "run")


def few_pairs(folder: Path, count: int) -> str:
    """The first built-in pairs, evenly spaced."""
    from reinforcepp.data import builtin

    with open(Path(builtin.__file__).parent / "network_train.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    path = folder / "pairs.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows[:: len(rows) // count][:count]])
    return str(path)


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def chosen(run: Path) -> dict[str, Any]:
    """The learning rate that the training used."""
    path = run / "run.json"
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.exists() else {}
    return {"learning_rate": settings.get("learning_rate")}


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="folders of language models and encoders")
    parser.add_argument("--pairs", help="preference file for the encoders")
    parser.add_argument(
        "--work", default=str(Path(tempfile.gettempdir()) / "defaults"), help="folder for finished rows"
    )
    parser.add_argument("--only", default="", help="measure only the rows whose model's name contains this")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no training after so many minutes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(measured(json.loads(given.job))))
        return
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    planned = jobs(given.model, given.pairs)
    waiting = [job for job in planned if not place(work, job).exists() and given.only in job["model"]]
    began = time.monotonic()
    for number, job in enumerate(waiting):
        past = time.monotonic() - began
        if past > given.minutes * 60:
            break
        left = f"{past / number * (len(waiting) - number) / 60:.0f} min left" if number else ""
        print(
            f"{number + 1}/{len(waiting)} {job['training']} {job['model']} {job['head']} {job['settings']} {left}",
            flush=True,
        )
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        if done.returncode:
            print(done.stderr[-2000:])
            continue
        place(work, job).write_text(done.stdout.splitlines()[-1], encoding="utf-8")
        print(f"    {done.stdout.splitlines()[-1]}", flush=True)
    rows = [
        row(job, json.loads(place(work, job).read_text(encoding="utf-8")))
        for job in planned
        if place(work, job).exists()
    ]
    limits = {"diverged_loss": DIVERGED_LOSS, "diverged_kl": DIVERGED_KL, "diverged_sft_factor": DIVERGED_FACTOR}
    write_result("defaults", limits | {"rows": rows})


def place(work: Path, job: dict[str, Any]) -> Path:
    return work / f"{hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]}.json"


def row(job: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A row of the result; ``default`` says whether all three settings are the defaults."""
    default = job["settings"]["learning_rate"] is None and job["head"] in (HEADS[0], "")
    default = default and job["settings"]["warmup_ratio"] == DEFAULT_WARMUP[job["training"]]
    model, data = Path(job["model"]).name, Path(job["data"]).name
    named = {"training": job["training"], "model": model, "data": data, "head": job["head"], "default": default}
    named["lora"] = job["settings"].get("use_peft", False)
    return named | {"warmup_ratio": job["settings"]["warmup_ratio"], **found}


if __name__ == "__main__":
    assert FOLDER.is_dir()
    main()
