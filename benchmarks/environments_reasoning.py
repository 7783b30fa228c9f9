"""A pretrained model on a task of reasoning-gym: accuracy on held-out questions before, during and after a training.

    python benchmarks/environments_reasoning.py --model FOLDER --work FOLDER [--minutes 100]

REINFORCE++-baseline with LoRA on questions whose answer is one number. Held-out questions have other seeds than those of the
training, and none of them is a training question. Accuracy is the fraction with the verifier's score 1, of greedy answers and of
answers sampled at temperature 1, as in training; intervals are 95% bootstrap intervals over the questions. ``--work`` keeps the
parts, and a stopped training resumes, so the script can be started again. ``environments.py`` runs it as its part ``reasoning``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from reinforcepp import ReinforceConfig, ReinforceTrainer, generate
from reinforcepp.data import load_prompts
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.reasoning_gym import ReasoningGymReward

TASK = (
    "reasoning_gym:number_format?size=4000&min_num_candidates=2&max_num_candidates=3&min_n=1000&max_n=10000&max_delta=1000"
    "&heldout=200"
)
"""Pick the largest or smallest of two or three numbers that are written in different formats."""
SETTINGS: dict[str, Any] = {
    "estimator": "reinforce_plus_plus_baseline",
    "num_generations": 8,
    "batch_size": 6,
    "max_new_tokens": 32,
    "use_peft": True,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
    "kl_coef": 0.0,
    "kl_limit": None,  # needs no reference policy
    "max_steps": 1000,
    "rollout": "transformers",
    "eval_prompts": 100,
    "eval_every": 15,
    "save_every": 5,
    "seed": 42,
}
"""Settings of the training; the time limit ends it."""
EXAMPLES, RESAMPLES = 6, 10_000


def reasoning(model: str, work: Path, minutes: float) -> dict[str, Any]:
    """Return accuracies, curve and examples; what ``work`` has isn't repeated."""
    work.mkdir(parents=True, exist_ok=True)
    run = work / "run"
    before = _kept(work / "before.json", lambda: answers(model))
    seconds = _kept(work / "trained.json", lambda: train(model, run, minutes * 60))
    after = _kept(work / "after.json", lambda: answers(str(run)))
    steps = read_metrics(run)
    evaluations = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    curve = {name: {key: found[key] for key in ("accuracy", "reward", "length")} for name, found in evaluations.items()}
    return {
        "task": TASK,
        "settings": SETTINGS,
        "steps": len([step for step in steps if "reward" in step]),
        "seconds": round(seconds),
        "questions": len(before["greedy"]),
        **{kind: gain(before[kind], after[kind]) for kind in ("greedy", "sampled")},
        "curve": curve,
        "training_accuracy": [round(step["accuracy"], 3) for step in steps if "accuracy" in step],
        "examples": [
            {"prompt": prompt, "answer": right, "before": old, "after": new}
            for prompt, right, old, new in zip(
                before["prompts"], before["answers"], before["texts"], after["texts"], strict=True
            )
        ][:EXAMPLES],
    }


def answers(model: str) -> dict[str, Any]:
    """Return the scores of greedy and of sampled answers to the held-out questions, and the greedy texts."""
    _, _, heldout = load_prompts(TASK, heldout_fraction=0.1, seed=SETTINGS["seed"])
    rows = [{"prompt": row.prompt, **row.columns} for row in heldout]
    found = {
        kind: generate(
            model,
            rows,
            max_new_tokens=SETTINGS["max_new_tokens"],
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            reward_model=ReasoningGymReward(),
            engine="transformers",
            dtype="bfloat16",
        )
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    return {
        **{kind: [float((response.reward or 0) >= 1) for response in found[kind]] for kind in found},
        "prompts": [row.prompt for row in heldout],
        "answers": [row.columns["answer"] for row in heldout],
        "texts": [response.text for response in found["greedy"]],
    }


def gain(before: list[float], after: list[float]) -> dict[str, Any]:
    """Return both accuracies and their difference with a 95% bootstrap interval over the questions, which are paired."""
    differences = np.array(after) - np.array(before)
    draw = np.random.default_rng(0)
    means = differences[draw.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "before": round(float(np.mean(before)), 3),
        "after": round(float(np.mean(after)), 3),
        "gain": round(float(differences.mean()), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
    }


def train(model: str, run: Path, seconds: float) -> float:
    """Train for this long, from the latest checkpoint if there is one, and return the seconds of all steps."""
    _, rows, heldout = load_prompts(TASK, heldout_fraction=0.1, seed=SETTINGS["seed"])
    config = ReinforceConfig(output_dir=str(run), **SETTINGS)
    callbacks = [TimeLimit(seconds - trained_seconds(run))]
    trainer = ReinforceTrainer(model, ["reasoning_gym"], config, rows, eval_dataset=heldout, callbacks=callbacks)
    begun = any((run / "checkpoints").glob("*")) or (run / "adapter_config.json").is_file()
    trainer.train(resume_from_checkpoint=begun)
    trainer.engine.close()
    return trained_seconds(run)


class TimeLimit(TrainerCallback):
    """Ends a training normally after ``seconds``, so that it is evaluated and saved."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop at the end of the step that exceeds the limit."""
        control.should_training_stop |= time.monotonic() > self.end


def trained_seconds(run: Path) -> float:
    """Return the seconds of all steps so far."""
    timings = run / "timings.jsonl"
    lines = timings.read_text(encoding="utf-8").splitlines() if timings.is_file() else []
    return sum(json.loads(line)["step_time"] for line in lines)


def _kept(path: Path, measure: Any) -> Any:
    """Return what ``path`` holds, measured and written if it doesn't exist."""
    if not path.is_file():
        value = measure()
        path.with_suffix(".part").write_text(json.dumps(value), encoding="utf-8")
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--work", required=True, help="folder for the parts and the run")
    parser.add_argument("--minutes", type=float, default=100, help="training time")
    given = parser.parse_args()
    print(json.dumps(reasoning(given.model, Path(given.work), given.minutes), indent=2))


if __name__ == "__main__":
    main()
