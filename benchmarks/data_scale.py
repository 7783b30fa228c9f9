"""Time and peak memory of loading, tokenizing and checking many pairs of real length, compared with datasets and TRL.

    python benchmarks/data_scale.py --source dpo_en_demo.json --tokenizer Qwen/Qwen3-0.6B [--rows 160000]

The script mixes the sentences of --source into pairs; a prompt with one answer has 186 tokens. Each measurement runs in a
separate process with one thread, alternating between the two sides, so that both see the same load of the machine. CPU
seconds don't depend on that load. The reference loads the
file with ``datasets`` and tokenizes it with the calls of TRL's RewardTrainer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from reinforcepp.data import load_preferences

TOKENS, PROMPT_TOKENS = 186, 62
"""Tokens of a prompt with one answer, and of the prompt alone."""
PARTS = ("reinforcepp", "reinforcepp, streamed", "datasets and TRL", "lint")
MAKE = "make pairs"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_pairs(source: str, tokenizer_name: str, rows: int, path: str) -> None:
    """Write pairs with distinct prompts; a prompt with one answer is a mix of sentences with about ``TOKENS`` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    pairs = load_preferences(source, heldout_fraction=0, seed=0)[1]
    sentences = sorted({line for pair in pairs for text in (pair.chosen, pair.rejected) for line in text.split(". ")})
    sized = [(line, len(tokenizer(line)["input_ids"]) + 1) for line in sentences if line.strip()]
    draw, answer = random.Random(0), TOKENS - PROMPT_TOKENS

    def text(total: int) -> str:
        found, length = [], 0
        while length < total:
            line, tokens = draw.choice(sized)
            words = line.split()
            keep = words if tokens <= total - length else words[: max(1, len(words) * (total - length) // tokens)]
            found.append(" ".join(keep))
            length += min(tokens, total - length)
        return ". ".join(found)

    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"prompt": f"{number}: {text(PROMPT_TOKENS)}", "chosen": text(answer), "rejected": text(answer)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- one measurement ------------------------------------------------------------------------------------------------


def ours(data: str, tokenizer_name: str, folder: str, *, streaming: bool) -> None:
    """Load and tokenize pairs as ``reinforcepp reward`` does."""
    from reinforcepp.models.loading import load_tokenizer
    from reinforcepp.training.reward_trainer import pair_ids
    from reinforcepp.training.supervised_setup import tokenize_rows

    _, train, _ = load_preferences(data, heldout_fraction=0, seed=0, streaming=streaming)
    tokenizer = load_tokenizer(tokenizer_name)
    tokenize_rows(train, partial(pair_ids, tokenizer), 4096, "training pairs", folder)


def reference(data: str, tokenizer_name: str, folder: str) -> None:
    """Load and tokenize pairs with ``datasets`` and the calls of TRL's RewardTrainer."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = {}
        for side in ("chosen", "rejected"):
            messages = [*asked, {"role": "assistant", "content": row[side]}]
            ids[f"{side}_ids"] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        return ids

    rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=folder)
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    rows.filter(lambda row: len(row["chosen_ids"]) <= 4096 and len(row["rejected_ids"]) <= 4096)


def check(data: str) -> None:
    """Check the file as ``reinforcepp lint`` does."""
    from reinforcepp.commands.lint.check import check_data
    from reinforcepp.config import LintConfig

    check_data(LintConfig(data=data))


def run_part(part: str, data: str, tokenizer: str, source: str, rows: int) -> None:
    """Write the pairs, or run one measurement, in this process."""
    if part == MAKE:
        make_pairs(source, tokenizer, rows, data)
        return
    with tempfile.TemporaryDirectory() as folder:
        if part == "datasets and TRL":
            reference(data, tokenizer, folder)
        elif part == "lint":
            check(data)
        else:
            ours(data, tokenizer, folder, streaming=part.endswith("streamed"))


def measure(part: str, data: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Return seconds, CPU seconds and peak memory of a part in a separate process.

    The peak of a process counts the memory of the one that starts it, so this one loads no library before.
    """
    begin = time.monotonic()
    command = [sys.executable, __file__, "--part", part, "--data", str(data), "--tokenizer", settings.tokenizer]
    command += ["--source", settings.source, "--rows", str(settings.rows)]
    environment = os.environ | ONE_THREAD
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{part}: exit code {process.returncode}.")
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin:network", help="Pairs whose sentences are mixed")
    parser.add_argument("--tokenizer", required=True, help="Folder or name of a model")
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each part")
    parser.add_argument("--part", choices=(MAKE, *PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.part:
        run_part(settings.part, settings.data, settings.tokenizer, settings.source, settings.rows)
        return
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "pairs.jsonl"
        measure(MAKE, data, settings)
        runs: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
        for _ in range(settings.rounds):
            for part in PARTS:
                runs[part].append(measure(part, data, settings))
                print(part, json.dumps(runs[part][-1]), flush=True)
        best = {part: min(found, key=lambda run: run["cpu_seconds"]) for part, found in runs.items()}
        ratios = [
            (part, measured, round(best[part][measured] / best["datasets and TRL"][measured], 2))
            for part in PARTS
            for measured in ("seconds", "cpu_seconds", "peak_gib")
            if part != "datasets and TRL"
        ]
        result = {
            "rows": settings.rows,
            "tokens_per_text": TOKENS,
            "file_mib": round(data.stat().st_size / 2**20),
            "threads": 1,
            "best": best,
            "runs": runs,
            "ratios": {f"{part}: {measured}": ratio for part, measured, ratio in ratios},
        }
        from results import write_result

        write_result("data_scale", result)


if __name__ == "__main__":
    main()
