"""Check this package on a GPU: engine, trainings, rates and tests, each in a process with a time limit.

scripts/gpu_check.sh [FOLDER] [--device cpu] [--wheels FOLDER] [--only ITEM ...] [--seconds 720] [--list]

Each item writes FOLDER/ITEM.json, and its output goes to FOLDER/ITEM.log. A run of all items on a GPU also writes
FOLDER/gpu_check.json and benchmarks/results/gpu_check.json, with date and hardware. With ``--device cpu``, the items run with
tiny shapes, which tries their code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FEWEST_SECONDS = 20
"""An item isn't started if less than this is left."""
CPU_FACTOR = 3
"""Time limits on a CPU relative to those on a GPU; it can be busy."""


@dataclass(frozen=True)
class Item:
    """One check.

    Attributes:
        name: Its name.
        function: Its code, as ``module:function``.
        seconds: Its time limit.
        packages: Packages without which it is skipped.
        environment: Further variables.
        without: Variables that are removed.
    """

    name: str
    function: str
    seconds: int
    packages: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()


V2 = "VLLM_USE_V2_MODEL_RUNNER"
ITEMS = (
    Item("compile_cache", "engines:compile_cache", 200, ("vllm",)),
    Item("process_state", "engines:process_state", 90, ("vllm",), without=("OMP_NUM_THREADS",)),
    Item("weights", "engines:weights", 120, ("vllm",)),
    Item("close", "ends:close", 200, ("vllm",)),
    Item("failure_in_a_forward", "ends:failure_in_a_forward", 120, ("vllm",)),
    Item("tight_cache", "trainings:tight_cache", 240, ("vllm", "peft")),
    Item("memory_budget", "memory:budget", 150, ("vllm",)),
    Item("logprobs_v1", "engines:logprobs", 90, ("vllm",), ((V2, "0"),)),
    Item("logprobs_v2", "engines:logprobs", 90, ("vllm",), ((V2, "1"),)),
    Item("adapter_asleep", "engines:adapter_asleep", 90, ("vllm", "peft")),
    Item("two_engines", "ends:two_engines", 150, ("vllm",)),
    Item("timings_0.5B", "timings:timings_half", 180),
    Item("offload", "trainings:offload", 90),
    Item("qlora", "trainings:qlora", 90, ("bitsandbytes", "peft")),
    Item("torch_compile", "trainings:compiled", 120),
    Item("gpu_tests", "suite:gpu_tests", 300, ("pytest",)),
    Item("timings_1.5B", "timings:timings_large", 180),
)
"""The items, the most important ones first: the time can end before the last ones."""
PART = Item("start_once", "engines:start_once", 150, ("vllm",))
"""A part of ``compile_cache``, in a separate process."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=(__doc__ or "").partition("\n")[0])
    names = [item.name for item in ITEMS]
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/gpu_check"), help="folder for results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the code with tiny shapes")
    parser.add_argument("--dry-run", action="store_const", const="cpu", dest="device", help="the same as --device cpu")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run, offline")
    parser.add_argument("--only", nargs="+", choices=names, metavar="ITEM", help="run these items only")
    parser.add_argument("--seconds", type=float, default=720, help="time for everything")
    parser.add_argument("--list", action="store_true", help="print the items and stop")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder = given.folder.expanduser().resolve()
    if given.check:
        return check_node(given.device)
    if given.keep:
        return keep(given)
    if given.item:
        return run_item(given)
    if given.list:
        print("\n".join(f"{item.name:22}{item.seconds:4} s  {item.function}" for item in ITEMS))
        return 0
    return run_all(given)


# --- all items --------------------------------------------------------------------------------------------------------


def run_all(given: argparse.Namespace) -> int:
    """Run the items one after another; return 1 if one of them failed."""
    end = time.monotonic() + given.seconds
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
        (given.folder / "summary.json").write_text("[]\n")
    except OSError as error:
        stop(f"{given.folder}: {error.strerror}. Give a folder that you can write to.")
    environment = environment_of(given)
    if given.wheels is not None:
        install(given.wheels, given.folder / "packages")
    check = [sys.executable, str(HERE), "--device", given.device, "--check"]
    if subprocess.run(check, env=environment).returncode:  # Otherwise every item would fail for the same reason.
        return 2
    results: list[dict[str, Any]] = []
    chosen = [item for item in ITEMS if given.only is None or item.name in given.only]
    for item in chosen:
        left = end - time.monotonic()
        if left < FEWEST_SECONDS:
            results.append({"item": item.name, "status": "not run", "seconds": 0.0, "reason": "the time is used up"})
        else:
            limit = item.seconds * (1 if given.device == "cuda" else CPU_FACTOR)
            results.append(start(item, given, environment, min(limit, left)))
        print_row(results[-1])
    counts = {
        status: sum(result["status"] == status for result in results)
        for status in ("pass", "fail", "skipped", "not run")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    (given.folder / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    if given.device == "cuda" and given.only is None:
        subprocess.run([sys.executable, str(HERE), str(given.folder), "--keep"], env=environment, check=True)
    return int(counts["fail"] > 0)


def stop(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def check_node(device: str) -> int:
    """Check that this Python has the packages of the product and can use the device."""
    if missing := [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]:
        stop(
            f"{sys.executable} lacks {' and '.join(missing)}. Run make venv, or set PYTHON to an interpreter with them."
        )
    if device == "cuda":
        import torch

        from reinforcepp.errors import ConfigError, command_line
        from reinforcepp.models.devices import choose_device

        if not torch.cuda.is_available():
            try:
                with command_line():
                    choose_device()
            except ConfigError as error:
                stop(str(error))
            stop("no GPU found. To try the code without one, add --device cpu.")
    return 0


def environment_of(given: argparse.Namespace) -> dict[str, str]:
    cache = str(given.folder / "cache")
    search = [str(given.folder / "packages"), str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, [*search, os.environ.get("PYTHONPATH")])),
        "XDG_CACHE_HOME": cache,
        "VLLM_CACHE_ROOT": f"{cache}/vllm",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | own | ({"CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else {})


def install(wheels: Path, target: Path) -> None:
    """Install wheels without a network and without their dependencies, for this run only."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        stop(f"--wheels: no .whl file in {wheels}.")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), *files]
    begin = time.monotonic()
    if subprocess.run(command).returncode:
        stop("--wheels: pip failed; the lines above give the reason.")
    print(f"wheels installed: {len(files)}, in {time.monotonic() - begin:.0f} s")


def start(item: Item, given: argparse.Namespace, environment: dict[str, str], limit: float) -> dict[str, Any]:
    """Run one item in a separate process and return its result."""
    output = given.folder / f"{item.name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(HERE), str(given.folder), "--device", given.device, "--item", item.name]
    own = {name: value for name, value in environment.items() if name not in item.without} | dict(item.environment)
    begin = time.monotonic()
    reason = ""
    with open(given.folder / f"{item.name}.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            env=own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            code = process.wait(timeout=limit)
            reason = f"ended with code {code}, see {item.name}.log"
        except subprocess.TimeoutExpired:
            reason = f"not finished after {limit:.0f} s, see {item.name}.log"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result: dict[str, Any] = {"item": item.name, "status": "fail", "reason": reason}
    if output.is_file():
        result = json.loads(output.read_text())
    result["seconds"] = round(time.monotonic() - begin, 1)
    output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def print_row(result: dict[str, Any]) -> None:
    detail = result.get("reason") or " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in result.get("measured", {}).items()
        if not isinstance(value, dict)
    )
    line = " ".join(detail.split())
    print(f"{result['item']:22}{result['status']:9}{result['seconds']:6.1f} s  {line[:100]}", flush=True)


def keep(given: argparse.Namespace) -> int:
    """Write the results of a GPU, with date and hardware, into the repository and into the folder."""
    import torch
    from results import write_result

    from reinforcepp.models.devices import driver_version

    results = json.loads((given.folder / "summary.json").read_text())
    sys.argv.remove("--keep")  # The file names the command.
    facts = {"driver": driver_version(), "cuda": torch.version.cuda}
    path = write_result("gpu_check", facts | {"items": {result.pop("item"): result for result in results}})
    shutil.copy(path, given.folder)
    return 0


# --- one item, in its process -----------------------------------------------------------------------------------------


def run_item(given: argparse.Namespace) -> int:
    """Run the item ``given.item`` and write its result; return 1 if it failed."""
    from common import Node, Skipped, gpu_facts, installed

    item = next(item for item in (*ITEMS, PART) if item.name == given.item)
    result: dict[str, Any] = {"item": item.name, "status": "pass"}
    try:
        missing = [package for package in item.packages if not installed(package)]
        if missing:
            raise Skipped(f"{' and '.join(missing)} not installed")
        module, _, function = item.function.partition(":")
        result["gpu"] = gpu_facts()
        result["measured"] = getattr(importlib.import_module(module), function)(Node(given.device, given.folder))
    except Skipped as reason:
        result |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        result |= {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:1500]}
    given.output.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return int(result["status"] == "fail")


if __name__ == "__main__":
    sys.exit(main())
