"""The documented pipeline on a real pretrained model and real preference pairs: accuracy, time, memory and bandwidth.

    python benchmarks/real_model.py --model FOLDER --pairs FILE [--work FOLDER]

Every phase is a command of the documentation in a separate process: lint, a reward model on example_feedback_diverse.csv and
one on real pairs, policy steps with the latter, a comparison with the base model, and compare_performance. A phase that
``--work`` has a result of isn't repeated, so a stopped measurement continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from real_pairs import write_short_pairs
from results import write_result

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "example_feedback_diverse.csv"
PROMPT = "How do I check the IP address of my Linux machine?"
FLOAT32_BYTES = 4
Z_95 = 1.96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--pairs", required=True, help="preference file; its shortest pairs are used")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "real_model"), help="folder for the phases")
    parser.add_argument("--count", type=int, default=300, help="pairs")
    parser.add_argument("--heldout_fraction", default="0.25", help="of the pairs")
    parser.add_argument("--epochs", default="1", help="passes over the pairs")
    parser.add_argument("--sample_epochs", default="3", help="passes over example_feedback_diverse.csv")
    parser.add_argument("--steps", default="20", help="policy steps")
    parser.add_argument("--batch", default="4", help="completions per policy step")
    parser.add_argument("--tokens", default="48", help="tokens of a completion at most")
    parser.add_argument("--compared", default="8", help="prompts of the comparison")
    parser.add_argument("--phases", nargs="*", default=[], help="only these phases, if they aren't done")
    given = parser.parse_args()
    work = Path(given.work)
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(given, work)
    for number, (name, phase) in enumerate(pipeline.phases.items(), 1):
        if not pipeline.done(name) and (not given.phases or name in given.phases):
            print(f"{number}/{len(pipeline.phases)} {name} ({time.strftime('%H:%M:%S')})", flush=True)
            (work / f"{name}.json").write_text(json.dumps(phase()), encoding="utf-8")
        if pipeline.done(name):
            print(f"    {name}: {json.dumps(pipeline.result(name))[:300]}", flush=True)
    if all(map(pipeline.done, pipeline.phases)):
        write_result("real_model", pipeline.summary())


class Pipeline:
    """The phases, each of which returns what it measured."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work, self.pairs = given, work, work / "pairs.csv"
        self.reward, self.policy = work / "reward_model", work / "policy"
        self.phases: dict[str, Callable[[], dict[str, Any]]] = {
            "pairs": self.short_pairs,
            "lint": lambda: self.timed("lint", str(self.pairs), "--model", given.model, accepted=(0, 1)),
            "sample": self.sample,
            "real": self.real,
            "plan": self.plan,
            "train": self.train,
            "compare": self.compare,
            "performance": self.performance,
        }

    def done(self, name: str) -> bool:
        return (self.work / f"{name}.json").exists()

    def result(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))
        return found

    def timed(self, *arguments: str, script: str | None = None, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """Run a command; return its seconds and the peak memory of its process."""
        command = [sys.executable, str(ROOT / script)] if script else [sys.executable, "-m", "reinforcepp"]
        began = time.monotonic()
        with open(self.work / "output.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if (code := os.waitstatus_to_exitcode(status)) not in accepted:
            sys.exit(f"{' '.join(arguments)}: exit code {code}; see {self.work / 'output.txt'}")
        return {"seconds": time.monotonic() - began, "peak_gib": usage.ru_maxrss / 2**20}

    # --- phases -------------------------------------------------------------------------------------------------------

    def short_pairs(self) -> dict[str, Any]:
        return write_short_pairs(self.given.pairs, self.given.model, self.given.count, self.pairs)

    def sample(self) -> dict[str, Any]:
        return self._train_reward(str(SAMPLE), self.work / "sample_reward_model", self.given.sample_epochs)

    def real(self) -> dict[str, Any]:
        own = ["--heldout_fraction", self.given.heldout_fraction, "--max_length", "512"]
        return self._train_reward(str(self.pairs), self.reward, self.given.epochs, *own)

    def _train_reward(self, data: str, folder: Path, epochs: str, *more: str) -> dict[str, Any]:
        arguments = ["--model", self.given.model, "--data", data, "--output_dir", str(folder), "--overwrite"]
        arguments += ["--num_train_epochs", epochs, "--save_every", "0", "--micro_batch_size", "2"]
        arguments += ["--mixed_precision", "no"]
        found = self.timed("reward", *arguments, *more)
        figures = json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))["figures"]
        losses = [step["loss"] for step in lines(folder / "metrics.jsonl")]
        kept = {
            "accuracy": figures["accuracy"],
            "length_accuracy": figures["longer_wins"],
            "heldout_pairs": figures["pairs"],
        }
        return found | kept | {"losses": losses}

    def policy_settings(self) -> list[str]:
        given = self.given
        sizes = ["--batch_size", given.batch, "--micro_batch_size", given.batch, "--max_new_tokens", given.tokens]
        sizes += [
            "--max_prompt_length",
            "96",
            "--max_steps",
            given.steps,
            "--rollout",
            "transformers",
            "--eval_prompts",
            "0",
        ]
        sizes += ["--heldout_fraction", given.heldout_fraction, "--save_every", "0", "--mixed_precision", "no"]
        return ["--model", given.model, "--reward_model", str(self.reward), "--data", str(self.pairs), *sizes]

    def plan(self) -> dict[str, Any]:
        """The planner's estimate for the policy steps, and the rates of this machine."""
        import torch

        from reinforcepp.models.loading import load_config, meta_model
        from reinforcepp.planner.device import measured_rates

        own = [
            sys.executable,
            "-m",
            "reinforcepp",
            "plan",
            *self.policy_settings(),
            "--device",
            "cpu",
            "--format",
            "json",
        ]
        done = subprocess.run(own, capture_output=True, text=True)
        rates = measured_rates("cpu", torch.float32)
        read = meta_model(load_config(self.given.model), torch.float32).num_parameters() * FLOAT32_BYTES
        plan = json.loads(done.stdout)
        return {"plan": plan, "bytes_per_second": rates.bytes, "flops": rates.flops, "bytes_per_decode_step": read}

    def train(self) -> dict[str, Any]:
        found = self.timed("train", *self.policy_settings(), "--output_dir", str(self.policy), "--overwrite")
        steps = [
            a | b
            for a, b in zip(lines(self.policy / "metrics.jsonl"), lines(self.policy / "timings.jsonl"), strict=True)
        ]
        return found | {"steps": steps}

    def compare(self) -> dict[str, Any]:
        own = [
            self.given.model,
            str(self.policy),
            "--data",
            str(self.pairs),
            "--judge",
            str(self.reward),
            "--overwrite",
        ]
        own += [
            "--heldout_fraction",
            self.given.heldout_fraction,
            "--max_prompts",
            self.given.compared,
            "--engine",
            "transformers",
        ]
        own += [
            "--max_new_tokens",
            self.given.tokens,
            "--max_prompt_length",
            "96",
            "--output_dir",
            str(self.work / "compare"),
        ]
        found = self.timed("compare", *own)
        return found | {"result": json.loads((self.work / "compare" / "compare.json").read_text(encoding="utf-8"))}

    def performance(self) -> dict[str, Any]:
        own = ["--mode", "compare_performance", "--model_name", self.given.model, "--rlhf_model_path", str(self.policy)]
        return self.timed(
            *own, "--prompt", PROMPT, "--max_new_tokens", "16", script="test_reinforce.py", accepted=(0, 1)
        )

    # --- the result ---------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        real, sample, plan, trained = (self.result(name) for name in ("real", "sample", "plan", "train"))
        steps = trained["steps"]
        return {
            "model": Path(self.given.model).name,
            "reward_accuracy": real["accuracy"],
            "reward_accuracy_interval": wilson(real["accuracy"], real["heldout_pairs"]),
            "max_reward_loss": max(real["losses"] + sample["losses"]),
            "steps": len(steps),
            "seconds_per_step": median(step["step_time"] for step in steps),
            "peak_gib": trained["peak_gib"],
            "planned_gib": planned_peak(plan["plan"]),
            "decode_bandwidth_fraction": median(bandwidth_fraction(step, plan) for step in steps),
            "length_accuracy": real["length_accuracy"],
            "heldout_pairs": real["heldout_pairs"],
            "seconds": {name: self.result(name).get("seconds") for name in self.phases},
            "phase_seconds": {
                phase: median(step[f"time/{phase}"] for step in steps) for phase in ("rollout", "score", "update")
            },
            "reward_first_last": [steps[0]["reward"], steps[-1]["reward"]],
            "settings": {
                name: value for name, value in vars(self.given).items() if name not in ("model", "pairs", "work")
            },
        }


def bandwidth_fraction(step: dict[str, Any], plan: dict[str, Any]) -> float:
    """Seconds in which memory could deliver the weights once per token, divided by the seconds of the rollout.

    The longest completion of the batch decides how often the weights are read.
    """
    reads = step["completions/max_length"]
    return float(reads * plan["bytes_per_decode_step"] / plan["bytes_per_second"] / step["time/rollout"])


def planned_peak(plan: dict[str, Any]) -> float:
    return float(plan["memory"]["peak"]) / 2**30


def wilson(share: float, count: int) -> list[float]:
    """The 95% interval of a share."""
    middle = (share + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 * (share * (1 - share) / count + Z_95**2 / (4 * count**2)) ** 0.5 / (1 + Z_95**2 / count)
    return [middle - half, middle + half]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
