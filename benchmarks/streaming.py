"""Peak memory of streamed trainings on a large file, compared with an eighth of the file in memory.

    python benchmarks/streaming.py [--megabytes 2048] [--folder /var/tmp]

The script writes a JSONL file of pairs under --folder, which needs free space of five times its size. Each training runs in a
separate process and is measured by its peak resident memory. The policy trains three steps. The reward model is stopped by
Ctrl-C after twenty steps, because an epoch on this file takes days.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import write_result

from reinforcepp.data import load_preferences
from reinforcepp.data.builtin import data_paths

MIB = 1 << 20
STEPS = 3
MEASURED_STEPS = 20
COMMON = ["--model", "builtin:tiny", "--seed", "0"]
TRAINING = ["--rewards", "rule:length?max=200", "--max_steps", STEPS, "--max_new_tokens", 16, "--eval_prompts", 8]
REWARD = ["--streaming", "--batch_size", 8, "--micro_batch_size", 2]
TRAINING += ["--rollout", "transformers", "--batch_size", 8]


def make_file(path: Path, size: int) -> int:
    """Write pairs of about a kilobyte from the words of the built-in data, with distinct prompts; return their number."""
    train, _ = data_paths()
    pairs = load_preferences(train, heldout_fraction=0, seed=0)[1]
    words = sorted({word for pair in pairs for word in f"{pair.prompt} {pair.chosen} {pair.rejected}".split()})
    draw, rows = random.Random(0), 0

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            row = {"prompt": f"{rows}: {text(45)}?", "chosen": text(60), "rejected": text(45)}
            file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def measure(command: str, data: Path, folder: Path, *more: Any) -> dict[str, Any]:
    """Return peak memory and seconds of a training; a reward training is stopped after ``MEASURED_STEPS``."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    arguments = [command, *COMMON, "--data", data, "--output_dir", output, *more]
    begin = time.monotonic()
    environment = os.environ | {"TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "reinforcepp", *map(str, arguments)], env=environment, start_new_session=True
    )
    log, first_step, interrupted = output / "metrics.jsonl", None, False
    while True:
        steps = log.read_text().count("\n") if log.is_file() else 0
        first_step = first_step or (time.monotonic() - begin if steps else None)
        if command == "reward" and steps >= MEASURED_STEPS and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.5)
    process.returncode = os.waitstatus_to_exitcode(status)
    expected = 130 if command == "reward" else 0
    if process.returncode != expected:
        raise SystemExit(f"{command} on {data}: exit code {process.returncode}, expected {expected}.")
    assert first_step is not None
    return {
        "peak_mib": round(usage.ru_maxrss / 1024),
        "seconds_to_the_first_step": round(first_step, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        large, small = folder / "large.jsonl", folder / "small.jsonl"
        result: dict[str, Any] = {
            "rows": make_file(large, settings.megabytes * MIB),
            "file_mib": round(large.stat().st_size / MIB),
        }
        make_file(small, settings.megabytes * MIB // 8)
        runs = {
            "train, streamed": ("train", large, *TRAINING, "--streaming"),
            "train, streamed, an eighth": ("train", small, *TRAINING, "--streaming"),
            "train, in memory, an eighth": ("train", small, *TRAINING),
            "reward, streamed, an eighth": ("reward", small, *REWARD),
            "reward, streamed": ("reward", large, *REWARD),
        }
        result["runs"] = {}
        for title, (command, data, *more) in runs.items():
            found = measure(command, data, folder, *more)
            result["runs"][title] = {"file_mib": round(data.stat().st_size / MIB), **found}
            print(title, json.dumps(result["runs"][title]), flush=True)
    write_result("streaming", result)


if __name__ == "__main__":
    main()
