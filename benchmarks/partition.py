"""How long machines take to notice that they no longer reach each other, and what comes then, with settings as they are.

python benchmarks/partition.py

Two machines, network namespaces, are parted in the middle of a training: by a cable that is pulled out, and by packets that
are lost on the way. Seconds are from then on: until the trainer's sentence, or until its next step; and until it has ended.
Needs the rights to make network namespaces; written to benchmarks/results/partition.json.
"""

from __future__ import annotations

import argparse
import csv
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from results import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machines import PORT, Machines, training, two_machines

from reinforcepp.monitoring import read_metrics

WATCHDOG = 10
STALL = 5.0
"""Seconds without a step that are no longer a step's own."""
STRIKES = ("cut", "lose")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--name", default="partition")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        for strike in STRIKES:
            with two_machines() as machines, tempfile.TemporaryDirectory() as place:
                rows += [
                    {"scenario": name, "strike": strike} | row for row in SCENARIOS[name](machines, strike, Path(place))
                ]
            print(rows[-1], flush=True)
    write_result(arguments.name, {"watchdog_seconds": WATCHDOG, "rows": rows})


def flags(place: Path, *more: object) -> list[str]:
    """Of a training on the built-in model."""
    data = place / "prompts.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([f"How do I check host {i}?"] for i in range(8))])
    return training("builtin:tiny", data, place / "run", "--save_every", 1, *more)


def steps(place: Path) -> int:
    """That are done."""
    with suppress(FileNotFoundError, ValueError):
        return len(read_metrics(place / "run"))
    return 0


def ends(machines: Machines, processes: dict[str, psutil.Popen], strike: str) -> list[Row]:
    """Part the machines; when each of the processes says why it ends, and when it has ended."""
    rows: dict[str, Row] = {who: {"who": who} for who in processes}
    begin = time.monotonic()
    getattr(machines.network, strike)()
    while any("ended" not in row for row in rows.values()):
        time.sleep(0.05)
        now = time.monotonic() - begin
        for who, process in processes.items():
            if "told" not in rows[who] and "\nerror: " in "\n" + machines.text(process):
                rows[who]["told"] = now
            if "ended" not in rows[who] and process.poll() is not None:
                rows[who] |= {"ended": now, "code": process.returncode}
        assert now < 600, "nobody says anything for ten minutes"
    return list(rows.values())


def torchrun(machines: Machines, strike: str, place: Path) -> list[Row]:
    """Two processes that train together."""
    both = machines.processes(flags(place, "--rollout", "transformers", "--watchdog_seconds", WATCHDOG))
    machines.until(lambda: steps(place) > 1, *both)
    return ends(machines, {"first process": both[0], "second process": both[1]}, strike)


def pool(machines: Machines, place: Path, head: str, health: dict[str, str]) -> psutil.Popen:
    """The trainer of a pool, after its first steps."""
    rollout = "--rollout", f"ray://{head}:{PORT}"
    trainer = machines.start(False, "-m", "reinforcepp", "train", *flags(place, *rollout), **health)
    machines.until(lambda: steps(place) > 1, trainer)
    return trainer


def ray_head(machines: Machines, strike: str, place: Path) -> list[Row]:
    """The head, on which the pool's worker is, is parted from the trainer's machine."""
    health = settings()
    machines.ray_node(far=True, cpus=1, head=True, **health)
    machines.ray_node(far=False, cpus=0, head_far=True, **health)
    trainer = pool(machines, place, machines.network.host, health)
    return ends(machines, {"trainer": trainer}, strike)


def ray_node(machines: Machines, strike: str, place: Path) -> list[Row]:
    """One of two machines of the pool is parted from trainer and head, in the middle of a step."""
    health = settings()
    machines.ray_node(far=False, cpus=1, head=True, **health)
    machines.ray_node(far=True, cpus=1, **health)
    trainer = pool(machines, place, machines.network.here, health)
    machines.until(lambda: workers(machines) == 2, trainer)
    time.sleep(3)  # until the second has its weights and takes part
    getattr(machines.network, strike)()
    last, done = time.monotonic(), steps(place)
    while True:
        machines.until(lambda done=done: steps(place) > done, trainer)
        now = time.monotonic()
        if now - last > STALL:
            break
        last, done = now, steps(place)
    machines.until(lambda: steps(place) > done + 2, trainer)  # and it goes on
    machines.kill(trainer)
    return [{"who": "trainer", "goes_on": now - last}]


def workers(machines: Machines) -> int:
    """Of the pool, on both machines."""
    return sum(p.info["name"].startswith("ray::Worker") for p in psutil.process_iter(["name"]))


def settings() -> dict[str, str]:
    """Ray as it is, but for a token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


SCENARIOS: dict[str, Callable[[Machines, str, Path], list[Row]]] = {
    "torchrun": torchrun,
    "ray node": ray_node,
    "ray head": ray_head,
}

if __name__ == "__main__":
    main()
