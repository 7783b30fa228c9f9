"""Run code of TRL users with TRL's classes and with ours, and write how much of the code has to change.

Each behavior in ``trl_compat_behaviors`` is user code with assertions about its effect. It must pass with TRL first. ``level``
is the result of a run: ``unchanged`` if the same code passes with ours, ``names`` or ``small change`` if a variant of the code
does, otherwise ``impossible``. Writes results/trl_compat.json; a run that stopped resumes from its log. Two behaviors use TRL's
``accuracy_reward``, which needs ``pip install math-verify``.

python benchmarks/trl_compat.py [--part settings] [--only NAME ...] [--library reinforcepp|trl] [--again]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from results import write_result

LEVELS = ("unchanged", "names", "small change", "impossible")
LIMIT_SECONDS = 180


def main() -> None:
    """Run the behaviors and write their levels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="One part: models, data, rewards, settings, trainer, examples or reward model")
    parser.add_argument("--only", nargs="+", help="Ids of the behaviors to run; writes no result")
    parser.add_argument("--library", choices=("reinforcepp", "trl"), help="Run with one library; writes no result")
    parser.add_argument("--again", action="store_true", help="Don't resume: run everything again")
    parser.add_argument("--output", type=Path, help="Another file for the result")
    asked = parser.parse_args()
    behaviors = [
        behavior
        for behavior in all_behaviors()
        if asked.part in (None, behavior.part) and (not asked.only or behavior.id in asked.only)
    ]
    partial = bool(asked.part or asked.only or asked.library)
    log = Path(tempfile.gettempdir()) / "trl_compat.jsonl"
    done = {} if partial or asked.again or not log.exists() else read_log(log)
    if not done and not partial:
        log.unlink(missing_ok=True)
    if done:
        print(f"Resuming: {len(done)} behaviors are in {log}; --again runs them again.")
    rows = []
    start = time.perf_counter()
    for number, behavior in enumerate(behaviors, 1):
        row = done.get(behavior.id)
        if row is None:
            row = run(behavior, asked.library)
            if not partial:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
        left = (time.perf_counter() - start) / number * (len(behaviors) - number)
        print(f"{number:3}/{len(behaviors)} {left:5.0f} s left  {described(row)}", flush=True)
    print("\n" + summary(rows))
    if not partial and asked.output is None:
        counts = Counter(row["level"] for row in rows)
        write_result(
            "trl_compat", {"counts": {level: counts[level] for level in LEVELS}, "rows": list(map(kept, rows))}
        )
        log.unlink()
    elif asked.output is not None:
        asked.output.write_text(json.dumps({"rows": rows}), encoding="utf-8")


def all_behaviors() -> list[Any]:
    """Import the parts in their order, which registers their behaviors."""
    from trl_compat_behaviors import data, examples, models, objective, reward_model, rewards, settings, trainer
    from trl_compat_behaviors.common import BEHAVIORS

    order = [
        module.part.name for module in (models, data, rewards, objective, settings, trainer, examples, reward_model)
    ]
    return sorted(BEHAVIORS.values(), key=lambda behavior: order.index(behavior.part))


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["behavior"]: row for row in rows}


def run(behavior: Any, library: str | None = None) -> dict[str, Any]:
    """Run one behavior; return its row. ``library``: with this one only, which gives no level for TRL alone."""
    from trl_compat_behaviors.common import our_library, trl_library

    row: dict[str, Any] = {"behavior": behavior.id, "part": behavior.part, "source": behavior.source}
    if library != "reinforcepp":
        problem = "" if behavior.not_on_trl else attempt(behavior.check, trl_library())
        row["trl"] = f"not run: {behavior.not_on_trl}" if behavior.not_on_trl else problem or "passed"
    if library == "trl":
        return row
    problem = attempt(behavior.check, our_library())
    if not problem:
        return row | {"level": "unchanged"}
    row["problem"] = problem
    for level, change, check in sorted(behavior.variants, key=lambda one: LEVELS.index(one[0])):
        failure = attempt(check, our_library())
        if not failure:
            return row | {"level": level, "change": change}
        row["problem"] += f" | {level}: {failure}"
    return row | {"level": "impossible", "change": behavior.reason or "none that works"}


def attempt(check: Any, lib: Any) -> str:
    """Return what fails, or "" if the code passes: in its own folder, from fixed seeds, with captured output, in limited time."""
    from transformers import set_seed

    with isolated() as folder:
        set_seed(0)
        try:
            with limited(LIMIT_SECONDS):
                check(lib, folder)
        except Exception as error:
            failed = traceback.extract_tb(error.__traceback__)[-1]
            message = " ".join((str(error) or f"{failed.line} (line {failed.lineno})").split())[:300]
            return f"{type(error).__name__}: {message}".replace(str(folder), "FOLDER")
        except SystemExit as error:
            return f"SystemExit: {error.code}"
    return ""


@contextlib.contextmanager
def isolated() -> Iterator[Path]:
    """A fresh working directory; output and warnings go nowhere; environment variables are restored."""
    before, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(name)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                yield Path(name)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """Return what of a row is worth keeping: the error only of an impossible behavior, without paths of this machine."""
    if row["level"] != "impossible":
        return {key: value for key, value in row.items() if key != "problem"}
    return row | {"problem": re.sub(r"/[\w.-]+(/[\w.-]+)+", "PATH", row["problem"])}


def described(row: dict[str, Any]) -> str:
    parts = [f"{row['behavior']:44}"]
    if row.get("trl", "passed") != "passed":
        parts.append(f"TRL: {row['trl']}")
    if "level" in row:
        parts.append(f"{row['level']:12} {row.get('problem', '')}")
    return " ".join(parts)


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table of levels per part."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["part"], Counter())[row.get("level", "TRL")] += 1
    counts["all"] = sum(counts.values(), Counter())
    lines = [f"{'part':16}{'n':>5}" + "".join(f"{level:>14}" for level in LEVELS)]
    for part, levels in counts.items():
        numbers = "".join(f"{levels[level]:14}" for level in LEVELS)
        lines.append(f"{part:16}{sum(levels.values()):5}{numbers}")
    return "\n".join(lines)


def prepare() -> None:
    """One thread, no network, quiet libraries, and a wide terminal for tables."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "160",
    }
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    prepare()
    main()
