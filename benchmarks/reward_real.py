"""Train a sentence encoder as a reward model on real preference pairs, and measure its held-out accuracy by cross-validation.

Run ``python benchmarks/reward_real.py --model DIR --data FILE``; it writes ``results/reward_real.json``. The model is
all-MiniLM-L6-v2 (22 million parameters, 512 positions), the data the English DPO demo of LLaMA-Factory. Pairs beyond the
model's positions are skipped, as ``reinforcepp reward`` does. Each pair is scored by a model that wasn't trained on its prompt.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from results import write_result

from reinforcepp.config import RewardModelConfig
from reinforcepp.data import load_preferences
from reinforcepp.models.loading import context_length, load_config, load_tokenizer
from reinforcepp.models.tokenization import encode_example
from reinforcepp.reports.reward_model import analyze
from reinforcepp.rewards.trained import load_reward_model, score_pairs
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.types import Preference, ScoredPair

FOLDS = 3


def fitting_pairs(file: str, model: str) -> tuple[int, list[Preference]]:
    """Return the number of pairs in ``file``, and those whose texts fit into the model's positions."""
    _, pairs, _ = load_preferences(file, heldout_fraction=0, seed=0)
    tokenizer, limit = load_tokenizer(model), context_length(load_config(model)) or 512
    texts = (max(len(encode_example(tokenizer, p.prompt, a)) for a in (p.chosen, p.rejected)) for p in pairs)
    return len(pairs), [pair for pair, length in zip(pairs, texts, strict=True) if length <= limit]


def score_fold(train: Sequence[Preference], heldout: Sequence[Preference], model: str, epochs: int) -> list[ScoredPair]:
    """Train on ``train`` and return the scores of ``heldout``."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "train.csv", Path(folder) / "reward_model"
        with open(data, "w", encoding="utf-8", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(["prompt", "chosen", "rejected"])
            rows.writerows((p.prompt, p.chosen, p.rejected) for p in train)
        train_reward_model(
            RewardModelConfig(
                model=model,
                data=str(data),
                output_dir=str(output),
                heldout_fraction=0,
                num_train_epochs=epochs,
                save_every=0,
                mixed_precision="no",
            )
        )
        return score_pairs(load_reward_model(str(output)), heldout)


def main() -> None:
    """Run all folds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    total, pairs = fitting_pairs(arguments.data, arguments.model)
    prompts = list(dict.fromkeys(str(pair.prompt) for pair in pairs))
    fold_of = {prompt: index % FOLDS for index, prompt in enumerate(prompts)}
    started, scored, folds = time.monotonic(), [], []
    for fold in range(FOLDS):
        heldout = [pair for pair in pairs if fold_of[str(pair.prompt)] == fold]
        train = [pair for pair in pairs if fold_of[str(pair.prompt)] != fold]
        part = score_fold(train, heldout, arguments.model, arguments.epochs)
        folds.append({"train_pairs": len(train), "heldout_pairs": len(part), "accuracy": analyze(part).right.value})
        scored += part
        print(folds[-1], flush=True)
    analysis = analyze(scored)
    write_result(
        "reward_real",
        {
            "pairs_in_file": total,
            "pairs": len(scored),
            "folds": folds,
            "epochs": arguments.epochs,
            "accuracy": asdict(analysis.right),
            "longer_wins": analysis.metrics.longer_wins,
            "length_correlation": analysis.metrics.length_correlation,
            "accuracy_without_length": analysis.without_length,
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
