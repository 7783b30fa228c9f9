"""One training step of ours beside one of TRL's: the same work, on this machine, in turns.

bash benchmarks/setup_peers.sh && python benchmarks/peers.py

The work: a GPT-2-shaped policy with random weights made on the spot, a reward model and a reference of the same shape,
16 completions of exactly 64 tokens (8 prompts of 32 tokens, twice each), one optimiser step. TRL's RLOO and GRPO come
from the installed release; its PPO from 1.12.0, the last that had one, which setup_peers.sh puts aside. Every trainer
runs in a separate process; the processes take turns. Written to benchmarks/results/peers_cpu.json.

On a GPU: python benchmarks/peers.py --shape 0.5b --precisions bf16 --name peers_cuda_0.5b, and 1.5b likewise; memory then is
that of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from peer_worker import DEVICE, SHAPES, make_models
from results import FOLDER, worker_result, write_result

PPO_PACKAGES = FOLDER.parents[1] / "build" / "trl-1.12.0"
OURS = ("ours", "ours_vllm", "ours_ppo")
PEERS = ("trl_rloo", "trl_grpo", "trl_ppo")
BF16_SETTINGS = ("autocast", "weights")
"""TRL computes in bfloat16 by autocast, or with all its weights in bfloat16."""
PRECISIONS = {
    "bf16": (*OURS, *PEERS),
    "bf16_masters": ("ours", *PEERS),
    "float32": ("ours", *PEERS),
}
"""Who is measured in each: TRL in its faster way, TRL with the float32 weights that ours always has, all in float32."""


MEANING = {
    "speedup": "seconds of a step of theirs over seconds of one of ours, round by round; above 1, ours is faster",
    "memory_ratio": "our peak memory over theirs, round by round; below 1, ours takes less",
    "limit_fraction": "least seconds that the machine's rates allow over seconds taken, by phase of our step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--shape", default="82m", choices=SHAPES)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured in each round, after a warm-up step")
    parser.add_argument("--name", default=f"peers_{DEVICE}")
    parser.add_argument("--add", action="store_true", help="to what the result file holds in other precisions")
    arguments = parser.parse_args()
    rows, best, commands = earlier(arguments) if arguments.add else ([], {}, [])
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), SHAPES[arguments.shape])
        best = {name: best_setting(name, folder, arguments) for name in arguments.trainers} | best
        for turn in range(arguments.rounds):
            for precision in arguments.precisions:
                names = [name for name in arguments.trainers if name in PRECISIONS[precision]]
                for name in names[turn % 2 :] + names[: turn % 2]:
                    setting = {"float32": "float32", "bf16": best[name]["chosen"]}.get(precision)
                    setting = setting or ("weights" if name in OURS else "autocast")
                    row = measured(name, setting, folder, arguments)
                    rows.append({"round": turn, "trainer": name, "precision": precision, "setting": setting} | row)
                    print(json.dumps({k: v for k, v in rows[-1].items() if k != "phases"}), flush=True)
            work = vars(arguments) | {"model": SHAPES[arguments.shape]}
            result = {"meaning": MEANING, "work": work, "best_bf16_setting": best, "earlier_commands": commands}
            write_result(arguments.name, result | summary(rows) | limits(rows) | {"rounds": rows})


def earlier(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Rounds in other precisions, settings and commands of an earlier result on the same work."""
    found = json.loads((FOLDER / f"{arguments.name}.json").read_text(encoding="utf-8"))
    for name in ("shape", "completions", "new_tokens"):
        if found["work"][name] != getattr(arguments, name):
            sys.exit(f"{arguments.name}.json has {name} {found['work'][name]}: give the same, or another --name.")
    rows = [row for row in found["rounds"] if row["precision"] not in arguments.precisions]
    return rows, found["best_bf16_setting"], [*found.get("earlier_commands", []), found["command"]]


def best_setting(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the ways a trainer can compute in bfloat16, the one whose step is shortest."""
    if name in OURS or "bf16" not in arguments.precisions:
        return {"chosen": "weights"}
    seconds = {s: measured(name, s, folder, arguments, steps=1)["seconds"][0] for s in BF16_SETTINGS}
    print(name, seconds, flush=True)
    return {"chosen": min(seconds, key=seconds.__getitem__), "seconds": seconds}


def measured(
    name: str, setting: str, folder: str, arguments: argparse.Namespace, steps: int | None = None
) -> dict[str, Any]:
    """Seconds of each step, by phase, and the peak of resident memory, from a fresh process."""
    job = {
        "name": name,
        "setting": setting,
        "folder": folder,
        "completions": arguments.completions,
        "new_tokens": arguments.new_tokens,
        "steps": steps or arguments.steps,
        "warm_up": getattr(arguments, "warm_up", 1),
    }
    path = [str(PPO_PACKAGES)] if name == "trl_ppo" else []
    environment = {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "GOMP_SPINCOUNT": "10000",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return worker_result(name, [str(FOLDER.parent / "peer_worker.py"), json.dumps(job)], environment)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ours against each of the others, round by round.

    ``speedup`` is their seconds over ours, ``memory_ratio`` our peak over theirs.
    """
    result: dict[str, Any] = {"seconds": {}, "phases": {}, "peak_rss_mib": {}, "speedup": {}, "memory_ratio": {}}
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for precision in precisions:
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["precision"] == precision:
                by_name.setdefault(row["trainer"], []).append(row)
        for name, own in by_name.items():
            for key in ("seconds", "phases", "peak_rss_mib"):
                result[key].setdefault(precision, {})
            result["seconds"][precision][name] = spread([s for row in own for s in row["seconds"]])
            result["peak_rss_mib"][precision][name] = spread([row["peak_rss_mib"] for row in own])
            names = own[0]["phases"]
            result["phases"][precision][name] = {
                phase: median(s for row in own for s in row["phases"][phase]) for phase in names
            }
        if "ours" not in by_name:
            continue
        target = result if precision == precisions[0] else result.setdefault(precision, {})
        pairs = {name: list(zip(by_name["ours"], own, strict=True)) for name, own in by_name.items() if name != "ours"}
        target["speedup"] = {
            name: spread([median(their["seconds"]) / median(our["seconds"]) for our, their in both])
            for name, both in pairs.items()
        }
        target["memory_ratio"] = {
            name: spread([our["peak_rss_mib"] / their["peak_rss_mib"] for our, their in both])
            for name, both in pairs.items()
        }
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def limits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How near our phases come to what the machine could do, measured in the same runs."""
    result: dict[str, Any] = {"limit_fraction": {}, "utilisation": {}, "machine_rates": {}}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if (row["trainer"], row["precision"]) == ("ours", precision)]
        if not own:
            continue
        bounds = {phase: median(row["bounds"][phase] for row in own) for phase in own[0]["bounds"]}
        taken = {phase: median(s for row in own for s in row["phases"][phase]) for phase in bounds}
        fractions = {phase: bounds[phase] / taken[phase] for phase in bounds}
        fractions["step"] = sum(bounds.values()) / median(s for row in own for s in row["seconds"])
        result["limit_fraction"][precision] = fractions
        if "utilisation" in own[0]:
            alone = {key: median(row["utilisation"][key] for row in own) for key in own[0]["utilisation"]}
            result["utilisation"][precision] = {
                "update_mfu": alone["update_products"] / taken["update"],
                "decode_bandwidth": alone["decode_reads"] / taken["rollout"],
            }
        result["machine_rates"][precision] = {key: median(row["rates"][key] for row in own) for key in own[0]["rates"]}
    return result


if __name__ == "__main__":
    main()
