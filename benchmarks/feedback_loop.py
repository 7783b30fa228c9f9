"""Improve a policy in rounds of feedback: does its gold score rise, and does it help to label uncertain pairs first?

python benchmarks/feedback_loop.py [--seeds 0 1 2 --rounds 3 --labels 40 --folder runs/feedback_loop]

Each round runs the commands of docs/label.md on the built-in model: ``label`` with responses of the last policy to training
prompts, ``reward`` on the votes of all rounds, ``train`` from the last policy, and ``compare`` with it on held-out prompts. A
simulated person votes over HTTP as the gold judge does; 10% of the votes are wrong. The first round has no reward model that
could be uncertain, so both selections share it. Finished rounds in the folder aren't repeated. Written to
benchmarks/results/feedback_loop.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from labeler import NoisyJudge, label, serving
from results import write_result

from reinforcepp.commands import cli
from reinforcepp.commands.compare_estimators.run import mean_and_interval
from reinforcepp.data import load_preferences
from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.rewards.trained import load_reward_model, score_pairs

MODEL, DATA = "builtin:tiny", "builtin:network"
SELECTIONS = ("random", "uncertain")
NOISE = 0.1
LENGTH = ("--max_new_tokens", "48")


@dataclass(frozen=True)
class Round:
    """What a round begins with.

    Attributes:
        folder: For its files.
        seed: Of everything random.
        number: From 1.
        policy: The last policy.
        databases: Votes of the earlier rounds.
        reward_model: That of the last round, which chooses the pairs; None for random ones.
    """

    folder: Path
    seed: int
    number: int
    policy: str
    databases: tuple[str, ...]
    reward_model: str | None

    @property
    def database(self) -> str:
        """The votes of this round."""
        return str(self.folder / "feedback.db")


def main() -> None:
    """Run all rounds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=40, help="votes per round")
    parser.add_argument("--prompts", type=int, default=120, help="prompts with responses per round")
    parser.add_argument("--steps", type=int, default=8, help="training steps of the policy per round")
    parser.add_argument("--batch_size", type=int, default=32, help="responses per training step")
    parser.add_argument("--heldout", type=int, default=0, help="held-out prompts; 0 uses all")
    parser.add_argument("--folder", type=Path, default=Path("runs/feedback_loop"), help="of the rounds' files")
    parser.add_argument("--output", help="write there instead of benchmarks/results/feedback_loop.json")
    given = parser.parse_args()
    rows = [row for seed in given.seeds for selection in SELECTIONS for row in run(seed, selection, given)]
    settings = {
        name: getattr(given, name) for name in ("rounds", "labels", "prompts", "steps", "batch_size", "heldout")
    }
    result = {"settings": {**settings, "noise": NOISE}, "rows": rows, "summary": summary(rows)}
    if given.output:
        Path(given.output).write_text(json.dumps(result))
    else:
        write_result("feedback_loop", result)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over the seeds with 95% intervals per round; differences are those of the same seed."""
    found = []
    for number in sorted({row["round"] for row in rows}):
        by_selection = {
            selection: [row for row in rows if (row["selection"], row["round"]) == (selection, number)]
            for selection in SELECTIONS
        }
        line: dict[str, Any] = {"round": number, "labels": by_selection["random"][0]["labels"]}
        for key in ("rm_accuracy", "gold") if number else ("gold",):
            values = {selection: [row[key] for row in group] for selection, group in by_selection.items()}
            values["difference"] = [b - a for a, b in zip(values["random"], values["uncertain"], strict=True)]
            line[key] = {name: mean_and_interval(each) for name, each in values.items()}
        found.append(line)
    return found


def run(seed: int, selection: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a seed and a selection; round 0 is the model before the first one."""
    policy, databases, reward_model = MODEL, (), None
    rows: list[dict[str, Any]] = []
    for number in range(1, given.rounds + 1):
        folder = given.folder / f"seed-{seed}" / (selection if number > 1 else "both") / f"round-{number}"
        chooses = reward_model if selection == "uncertain" else None
        this = Round(folder, seed, number, policy, databases, chooses)
        found = measured(this, given)
        common = {"seed": seed, "selection": selection}
        if not rows:
            rows.append({**common, "round": 0, "labels": 0, "rm_accuracy": None, "gold": found["gold_before"]})
        labels = rows[-1]["labels"] + found["labels"]
        more = {name: found[name] for name in ("rm_accuracy", "gold", "ties")}
        rows.append({**common, "round": number, "labels": labels, **more})
        print(rows[-1], flush=True)
        policy, databases = str(folder / "policy"), (*databases, this.database)
        reward_model = str(folder / "reward_model")
    return rows


def measured(this: Round, given: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of a round, which is run unless it is finished."""
    finished = this.folder / "round.json"
    if not finished.is_file():
        shutil.rmtree(this.folder, ignore_errors=True)
        this.folder.mkdir(parents=True)
        finished.write_text(json.dumps(play(this, given)))
    found: dict[str, Any] = json.loads(finished.read_text())
    return found


def play(this: Round, given: argparse.Namespace) -> dict[str, Any]:
    """Sample, label, train a reward model and the policy, and compare."""
    seed = ("--seed", str(100 * this.seed + this.number))
    reward_model, policy = str(this.folder / "reward_model"), str(this.folder / "policy")
    chosen = ["--select", "uncertain", "--reward_model", this.reward_model] if this.reward_model else []
    words = [this.policy, "--data", DATA, "--max_prompts", str(given.prompts), *LENGTH, "--repeat_every", "0"]
    words += ["--temperature", "1", "--top_p", "1", "--engine", "transformers", "--database", this.database, *seed]
    with serving([*words, *chosen]) as url:
        votes = label(url, "Ada", NoisyJudge(NOISE, seed[1]), given.labels)
    data = ",".join([*this.databases, this.database])
    reward = ["--model", MODEL, "--data", data, "--heldout_fraction", "0", "--output_dir", reward_model, *seed]
    command("reward", *reward, "--learning_rate", "3e-4", "--num_train_epochs", "5", "--batch_size", "16")
    train = ["--model", this.policy, "--data", DATA, "--reward_model", reward_model, "--output_dir", policy, *seed]
    train += ["--max_steps", str(given.steps), "--batch_size", str(given.batch_size), "--learning_rate", "2e-4"]
    train += ["--kl_coef", "0.05", "--eval_prompts", "0", "--rollout", "transformers", *LENGTH]
    command("train", *train)
    compared = this.folder / "compare"
    compare = ["--max_prompts", str(given.heldout), "--engine", "transformers", "--output_dir", str(compared), *LENGTH]
    command("compare", this.policy, policy, *compare)
    scores = json.loads((compared / "compare.json").read_text())["figures"]
    pairs = load_preferences(this.database, heldout_fraction=0.0, seed=0)[1]
    return {
        "labels": votes,
        "ties": sum(pair.tie for pair in pairs),
        "rm_accuracy": accuracy(reward_model),
        "gold_before": scores["A"]["judge"],
        "gold": scores["B"]["judge"],
    }


def command(verb: str, *words: str) -> None:
    """Run ``reinforcepp VERB *words`` in this process."""
    if code := cli.main([verb, *words]):
        sys.exit(f"reinforcepp {verb} {' '.join(words)}: exit code {code}")


def accuracy(reward_model: str) -> float:
    """Return the share of held-out pairs that a reward model orders as the gold judge does."""
    judge = GoldJudge()
    pairs = load_preferences(DATA, heldout_fraction=0.0, seed=0)[2]
    gold = [judge.score(pair.prompt, pair.chosen) - judge.score(pair.prompt, pair.rejected) for pair in pairs]
    scored = score_pairs(load_reward_model(reward_model), pairs)
    return fmean(float(pair.margin * gap > 0) for pair, gap in zip(scored, gold, strict=True) if gap)


if __name__ == "__main__":
    main()
