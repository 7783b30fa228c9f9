"""Seconds and tokens until the held-out gold score reaches 0.85: ours, and TRL's GRPO and RLOO.

python benchmarks/time_to_quality.py

Same model, reward model, prompts, completions per step, KL coefficient, learning rate schedule and precision for all. The
gold judge scores held-out prompts and has no part in training; evaluations are outside of the clock. The learning rate is
tuned for each trainer over the same three values with other seeds: the one that reaches the target most often wins,
then the one with the fewest tokens. Then the trainers take turns, each run in a separate process. Written to
benchmarks/results/time_to_quality.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from results import worker_result, write_result

if TYPE_CHECKING:
    from transformers import TrainerCallback

TRAINERS = ("ours", "trl_grpo", "trl_rloo")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEEDS = (100, 101, 102, 103, 104)
TARGET = 0.85
COMPLETIONS, SAMPLES_PER_PROMPT = 64, 4
"""Completions per step, and TRL's ``num_generations``; ours samples one completion per prompt."""
MAX_STEPS, EVAL_EVERY, EVAL_SAMPLES = 90, 1, 2
NEW_TOKENS, KL = 64, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only tune")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS)
    parser.add_argument("--folder", default="runs/time_to_quality", help="keeps the reward model and finished runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(train(json.loads(arguments.worker))))
        return
    folder = Path(arguments.folder)
    reward_model = trained_reward_model(folder)
    rates, steps = arguments.learning_rates, arguments.max_steps
    tuning = {name: tuning_rows(folder, reward_model, name, rates, steps) for name in arguments.trainers}
    best = {name: best_rate(rows) for name, rows in tuning.items()}
    rows = []
    for turn, seed in enumerate(arguments.seeds):
        names = arguments.trainers[turn % len(best) :] + arguments.trainers[: turn % len(best)]
        rows += [run(folder, reward_model, name, best[name], seed, steps) for name in names]
    work = {
        "completions_per_step": COMPLETIONS,
        "num_generations": {name: 1 if name == "ours" else SAMPLES_PER_PROMPT for name in best},
        "max_new_tokens": NEW_TOKENS,
        "kl_coef": KL,
        "max_steps": steps,
        "target": TARGET,
        "eval_every": EVAL_EVERY,
        "precision": "float32",
    }
    tried = [
        {key: value for key, value in row.items() if "seconds" not in key and key != "curve"}
        for own in tuning.values()
        for row in own
    ]
    measured = {"work": work, "learning_rates": best, "summary": summary(rows), "rows": rows, "tuning": tried}
    write_result("time_to_quality", measured)


def tuning_rows(
    folder: Path, reward_model: Path, name: str, rates: list[float], max_steps: int
) -> list[dict[str, Any]]:
    """Run a trainer with every rate and tuning seed, without the rates that can no longer reach the target most often."""
    rows: list[dict[str, Any]] = []
    for done, seed in enumerate(TUNING_SEEDS):
        reached = {rate: sum(row["reached"] for row in rows if row["rate"] == rate) for rate in rates}
        hopeful = [rate for rate in rates if reached[rate] + len(TUNING_SEEDS) - done >= max(reached.values())]
        rows += [run(folder, reward_model, name, rate, seed, max_steps) for rate in hopeful]
    return rows


def best_rate(rows: list[dict[str, Any]]) -> float:
    """Return the learning rate that reached the target most often; of several, the one with the fewest tokens."""

    def rank(rate: float) -> tuple[int, float]:
        own = [row for row in rows if row["rate"] == rate]
        return -sum(row["reached"] for row in own), median(row["tokens"] for row in own)

    return min(dict.fromkeys(row["rate"] for row in rows), key=rank)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by trainer, how many seeds reached the target, and the medians of seconds and tokens over all seeds.

    ``times_ours`` is the median over seeds of their value over ours. A seed that didn't reach the target counts with what
    it used, so its ratio is a lower bound.
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys(row["trainer"] for row in rows):
        own = [row for row in rows if row["trainer"] == name]
        result[name] = {"reached": sum(row["reached"] for row in own), "seeds": len(own)}
        for key in ("seconds", "tokens", "steps"):
            result[name][key] = median(row[key] for row in own)
        ours = {row["seed"]: row for row in rows if row["trainer"] == "ours"}
        if name != "ours" and ours:
            result[name]["times_ours"] = {
                key: median(row[key] / ours[row["seed"]][key] for row in own) for key in ("seconds", "tokens")
            }
    return result


# --- one run --------------------------------------------------------------------------------------------------------


def trained_reward_model(folder: Path) -> Path:
    """Train the demo's reward model once."""
    from reinforcepp.commands.demo import demo_settings
    from reinforcepp.config import DemoConfig
    from reinforcepp.rewards.card import REWARD_CARD
    from reinforcepp.training.reward_trainer import train_reward_model

    settings, _ = demo_settings(DemoConfig(seed=0), folder)
    if not (Path(settings.output_dir) / REWARD_CARD).is_file():
        train_reward_model(settings)
    return Path(settings.output_dir)


def run(folder: Path, reward_model: Path, name: str, rate: float, seed: int, max_steps: int) -> dict[str, Any]:
    """Return the result of one run in a fresh process, or that of the same run before."""
    finished = folder / "rows" / f"{name}-{rate:g}-{seed}-{max_steps}.json"
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    job = {"trainer": name, "rate": rate, "seed": seed, "max_steps": max_steps, "reward_model": str(reward_model)}
    environment = {
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    measured = worker_result(name, [__file__, "--worker", json.dumps(job)], environment)
    row = {key: job[key] for key in ("trainer", "seed", "rate")} | measured
    finished.parent.mkdir(parents=True, exist_ok=True)
    finished.write_text(json.dumps(row), encoding="utf-8")
    print(json.dumps({key: value for key, value in row.items() if key != "curve"}), flush=True)
    return row


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train until the held-out gold score reaches the target; return the seconds and tokens until then."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reinforcepp.data import load_prompts
    from reinforcepp.data.builtin import DATA_NAME, model_path

    _, train_rows, heldout_rows = load_prompts(DATA_NAME, heldout_fraction=0, seed=0)
    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path(), padding_side="left")
    clock = stopwatch(tokenizer, heldout_rows)
    rows = [{"prompt": [{"role": "user", "content": row.prompt}]} for row in train_rows]
    with tempfile.TemporaryDirectory() as output:
        build = build_ours if job["trainer"] == "ours" else build_trl
        trainer = build(job, model, tokenizer, rows, clock, output)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    steps = len(clock.seconds)
    gold = clock.curve[-1]["gold"]
    return {
        "reached": gold >= TARGET,
        "seconds": sum(clock.seconds),
        "tokens": round(sum(entry["completions/mean_length"] * COMPLETIONS for entry in log[:steps])),
        "steps": steps,
        "gold": gold,
        "first_reward": next(entry["reward"] for entry in log),
        "seconds_per_step": fmean(clock.seconds),
        "curve": clock.curve,
    }


def stopwatch(tokenizer: Any, heldout_rows: Any) -> Any:
    """Return a callback that measures the seconds of each step, and stops the training at the target."""
    import time

    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.curve: list[dict[str, float]] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begin)
            if state.global_step % EVAL_EVERY == 0:
                gold = gold_score(model, tokenizer, heldout_rows)
                self.curve.append({"step": state.global_step, "seconds": sum(self.seconds), "gold": gold})
                control.should_training_stop |= gold >= TARGET

    return Stopwatch()


def gold_score(model: Any, tokenizer: Any, heldout_rows: Any) -> float:
    """Return the gold judge's mean score of completions sampled for the held-out prompts; random state stays."""
    from reinforcepp.data.builtin.judge import GoldJudge
    from reinforcepp.models.tokenization import encode_prompts
    from reinforcepp.rollout.engine import preserve_random_state
    from reinforcepp.rollout.transformers_engine import TransformersEngine
    from reinforcepp.types import Sampling

    judge = GoldJudge()
    with preserve_random_state():
        prompts, _ = encode_prompts(tokenizer, heldout_rows, max_prompt_length=NEW_TOKENS)
        engine = TransformersEngine(model, tokenizer, batch_size=256)
        completions = engine.generate(prompts, Sampling(NEW_TOKENS, num_samples=EVAL_SAMPLES, seed=12345))
    return fmean(judge.score(completion.prompt.text, completion.text) for completion in completions)


def build_ours(job: dict[str, Any], model: Any, tokenizer: Any, rows: Any, clock: TrainerCallback, output: str) -> Any:
    """Return this package's trainer, with its default estimator."""
    from reinforcepp import ReinforceConfig, ReinforceTrainer

    config = ReinforceConfig(
        output_dir=output,
        overwrite=True,
        seed=job["seed"],
        max_steps=job["max_steps"],
        batch_size=COMPLETIONS,
        max_prompt_length=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        learning_rate=job["rate"],
        lr_scheduler_type="linear",
        kl_coef=KL,
        rollout="transformers",
        mixed_precision="no",
        eval_prompts=0,
        logging_steps=1,
    )
    return ReinforceTrainer(model, job["reward_model"], config, rows, processing_class=tokenizer, callbacks=[clock])


def build_trl(job: dict[str, Any], model: Any, tokenizer: Any, rows: Any, clock: TrainerCallback, output: str) -> Any:
    """Return TRL's GRPOTrainer or RLOOTrainer; all completions of a step are one batch, the fastest way here."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind = {"trl_rloo": "RLOO", "trl_grpo": "GRPO"}[job["trainer"]]
    config = getattr(trl, f"{kind}Config")(
        output_dir=output,
        seed=job["seed"],
        max_steps=job["max_steps"],
        per_device_train_batch_size=COMPLETIONS,
        gradient_accumulation_steps=1,
        num_generations=SAMPLES_PER_PROMPT,
        max_completion_length=NEW_TOKENS,
        learning_rate=job["rate"],
        lr_scheduler_type="linear",
        beta=KL,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(job["reward_model"], num_labels=1),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(job["reward_model"]),
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()
