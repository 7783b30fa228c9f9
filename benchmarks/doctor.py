"""Does the doctor find what is wrong, and nothing where nothing is? Trainings with one fault each, and sound ones.

python benchmarks/doctor.py [--steps 40] [--seeds 5]

Every training is a real one on the built-in model. Sound runs have the gold judge or, at --steps 30 and above, also a
trained reward model as reward; none may have a finding. A faulty run counts as found if the finding with its name is among
its findings; others that follow from the fault are listed beside. Written to benchmarks/results/doctor.json.
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import write_result
from transformers import GPT2Config, GPT2LMHeadModel

from reinforcepp.config import ReinforceConfig, RewardModelConfig
from reinforcepp.data import load_prompts
from reinforcepp.data.builtin import data_paths
from reinforcepp.files import write_json
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.monitoring.doctor import diagnose
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.rewards.functions import GoldReward
from reinforcepp.training.reinforce_trainer import ReinforceTrainer
from reinforcepp.training.reward_trainer import train_reward_model

NOTHING_STOPS = {
    "kl_limit": 1e9,  # None would also omit the KL if kl_coef is 0
    "ratio_limit": 0.0,
    "collapse_length": 0.0,
    "collapse_entropy": 0.0,
    "collapse_distinct": 0.0,
}
LONG_RUN = 30
EVALUATED, HELD_OUT = 48, 80


# --- rewards that are no good -----------------------------------------------------------------------------------------


def words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def brevity(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text.split())) for text in completions]


def backticks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Pays for what every good answer has, however often."""
    return [float(text.count("`")) for text in completions]


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [text.count("e") / (1 + len(text)) for text in completions]


def constant(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def by_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [len(prompt) / 100 for prompt in prompts]


def extreme(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [100.0 * len(text) for text in completions]


def nearly_all(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(text.encode()) % 32 > 0) for text in completions]


def echo(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Pays for saying things twice."""
    return [float(len(text.split()) - len(set(text.split()))) for text in completions]


# --- faults that no setting makes -------------------------------------------------------------------------------------


def share_reference(trainer: ReinforceTrainer) -> None:
    """The reference is the policy itself."""
    trainer.reference = trainer.policy


def stale_engine(trainer: ReinforceTrainer) -> None:
    """The engine samples from the weights at the start, whatever it is given."""
    engine: Any = trainer.engine
    engine.model = copy.deepcopy(trainer.policy)
    engine.load_weights = lambda policy: None


def jumping_gradients(trainer: ReinforceTrainer) -> None:
    """Every fifth step's gradient is a thousand times too large."""
    weight = next(iter(trainer.policy.parameters()))
    weight.register_hook(lambda grad: grad * (1000.0 if trainer.run.state.step % 5 == 4 else 1.0))


def random_weights(tokenizer: Any) -> GPT2LMHeadModel:
    """A model that knows nothing, so that its entropy can fall a long way."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)).eval()


@dataclass(frozen=True)
class Case:
    """A training: the fault in it (None for a sound one), and what makes it. A reward's name means a trained model."""

    rule: str | None
    reward: Any = "judge"
    settings: dict[str, Any] = field(default_factory=dict)
    judge: bool = False
    prompts: int | None = None
    change: Callable[[ReinforceTrainer], None] | None = None
    random_model: bool = False
    steps: int = 0
    """At least so many, where a fault takes its time."""
    short: int = 0
    """So many where --steps is below 30, and a fault takes more of them or fewer than others."""

    def described(self) -> dict[str, Any]:
        told = {
            "reward": self.reward if isinstance(self.reward, str) else self.reward.__name__,
            "prompts": self.prompts,
            "change": self.change.__name__ if self.change else None,
            "judge": self.judge or None,
            "model": "random weights" if self.random_model else None,
        }
        return {name: value for name, value in told.items() if value is not None} | self.settings


FREE = {"learning_rate": 1e-3, "kl_coef": 0.0}
NARROW = {"learning_rate": 1e-2, "kl_coef": 0.0, "max_new_tokens": 24}
FASTER = {"learning_rate": 3e-3, "kl_coef": 0.0}
GROUPS = {"estimator": "grpo", "num_generations": 4, "batch_size": 4}
FAULTS = [
    Case("kl_explosion", vowels, FASTER),
    Case("kl_inert", change=share_reference),
    Case("entropy_collapse", vowels, NARROW, random_model=True, steps=60, short=60),
    Case("length_drift", words, FREE | {"max_new_tokens": 96}, short=15),
    Case("length_collapse", brevity, FREE | {"learning_rate": 2e-3}, short=15),
    Case("reward_hacking", backticks, FREE, judge=True, short=20),
    Case("reward_hacking", echo, FREE, short=20),
    Case("no_signal", constant),
    Case("no_signal", by_prompt, GROUPS),
    Case("reward_saturated", extreme, {"reward_clip": 10.0}),
    Case("reward_saturated", nearly_all),
    Case("truncation", settings={"max_new_tokens": 12}),
    Case("gradient_spikes", change=jumping_gradients, short=10),
    Case("learning_rate_low", settings={"learning_rate": 1e-8}, short=10),
    Case("engine_out_of_step", vowels, FREE, change=stale_engine),
    Case("trust_region", vowels, FREE | {"estimator": "flash_reinforce", "staleness": 1, "importance_max_kl": 1e-6}),
    Case("reward_model_chance", "chance", short=2),
    Case("reward_model_length", "length", short=2),
    Case("few_prompts", prompts=8, short=2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", help="write there instead of benchmarks/results/doctor.json")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rewards = make_rewards(Path(folder), arguments.steps)
        each = [(case, findings(case, rewards, Path(folder), arguments.steps)) for case in FAULTS]
        rows = [
            {"rule": c.rule, "fault": c.described(), "found": c.rule in names, "findings": names} for c, names in each
        ]
        sound = [
            Case(None, reward, {"seed": seed}, judge=True)
            for reward in ("judge", *(["sound"] if "sound" in rewards else []))
            for seed in range(arguments.seeds)
        ]
        healthy = [
            {**case.described(), "findings": findings(case, rewards, Path(folder), arguments.steps)} for case in sound
        ]
    result = {
        "injected": len(rows),
        "found": sum(row["found"] for row in rows),
        "healthy_runs": len(healthy),
        "false_alarms": sum(len(row["findings"]) for row in healthy),
        "steps": arguments.steps,
        "seconds": round(time.monotonic() - begin),
        "faulty": rows,
        "healthy": healthy,
    }
    if arguments.output:
        write_json(Path(arguments.output), result)
    else:
        write_result("doctor", result)


def make_rewards(folder: Path, steps: int) -> dict[str, str]:
    """Trained reward models: one on shuffled preferences, one on pairs of which the longer is the better, and a sound one."""
    with open(data_paths()[0], encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file))
    lots = random.Random(0)
    pairs = lots.sample(pairs, 400 if steps >= LONG_RUN else 160)
    turned = [(p["prompt"], *lots.sample([p["chosen"], p["rejected"]], 2)) for p in pairs]
    padding = " Then look at the result, and do the same on the other side, to be sure of it."
    longer = [(p["prompt"], p["chosen"] + padding, p["chosen"]) for p in pairs]
    made = {}
    for name, rows in (("chance", turned), ("length", longer)):
        path = folder / f"{name}.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt", "chosen", "rejected"), *rows])
        made[name] = train_reward(
            folder / name, data=str(path), num_train_epochs=1, heldout_fraction=HELD_OUT / len(pairs)
        )
    if steps >= LONG_RUN:
        made["sound"] = train_reward(folder / "sound", num_train_epochs=5, learning_rate=3e-4)
    return made


def train_reward(folder: Path, **settings: Any) -> str:
    train_reward_model(RewardModelConfig(output_dir=str(folder), batch_size=16, **settings))
    return str(folder)


def findings(case: Case, rewards: dict[str, str], folder: Path, steps: int) -> list[str]:
    """Train; returns the names of what the doctor finds."""
    _, train_rows, heldout_rows = load_prompts("builtin:network", heldout_fraction=0, seed=0)
    output = folder / "run"
    settings = {
        "batch_size": 16,
        "max_new_tokens": 64,
        "max_prompt_length": 64,
        "max_steps": max(steps, case.steps) if steps >= LONG_RUN else case.short or steps,
        "learning_rate": 1e-4,
        "kl_coef": 0.05,
        "rollout": "transformers",
        "save_every": 0,
        "eval_prompts": (EVALUATED if steps >= LONG_RUN else EVALUATED // 3) if case.judge else 0,
        "seed": 0,
    }
    tokenizer = load_tokenizer("builtin:tiny")
    reward = rewards.get(case.reward, GoldReward()) if isinstance(case.reward, str) else case.reward
    trainer = ReinforceTrainer(
        random_weights(tokenizer) if case.random_model else "builtin:tiny",
        reward,
        ReinforceConfig(
            output_dir=str(output), overwrite=output.exists(), **(settings | NOTHING_STOPS | case.settings)
        ),
        train_rows[: case.prompts],
        heldout_rows,
        processing_class=tokenizer,
        judge=GoldReward() if case.judge else None,
    )
    if case.change is not None:
        case.change(trainer)
    trainer.train()
    return [finding.rule for finding in diagnose(read_run(output)).findings]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
