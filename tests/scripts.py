"""Run commands as a user does: scripts of benchmarks/, whose results are read, and scripts on several ranks."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from warm import FORKS, ROOT, SOURCE, fork_server, warm_python

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""Environment in which a launched training shards its weights."""


def result_of(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Return the result that ``python benchmarks/NAME.py *flags`` writes, with one thread and into ``folder``."""
    output = folder / f"{name}.json"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [warm_python(), ROOT / "benchmarks" / f"{name}.py", *flags, "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def launched(processes: int, *command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` with one thread per rank, under torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    search = os.pathsep.join([str(ROOT / "tests"), str(SOURCE)])
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "RAY_worker_niceness": "0"} | environment
    words = [sys.executable, *(launcher if processes > 1 else []), *map(str, command)]
    return subprocess.run(words, env=given, capture_output=True, text=True, timeout=300)


def benchmark(name: str) -> ModuleType:
    """Return the script ``benchmarks/NAME.py`` as a module, to call its functions in this process."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def forked(processes: int, script: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script on ``processes`` ranks, as :func:`launched` does, but as forks of a process that has loaded the trainers.

    Loading them takes several CPU seconds per rank, more than most of these scripts.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives rank 0, as torchrun's does
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    agent |= {"TORCHELASTIC_RESTART_COUNT": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    given = fork_server(**environment)
    with tempfile.TemporaryDirectory() as logs:
        started = []
        for rank in range(processes):
            place = agent | {"RANK": rank, "LOCAL_RANK": rank}
            own = given | {name: str(value) for name, value in place.items()} if processes > 1 else given
            words = [str(script), *map(str, arguments)]
            started.append(FORKS.Process(target=_run_script, args=(f"{logs}/{rank}", own, words)))
            started[-1].start()
        end = time.monotonic() + 300
        while any(process.is_alive() for process in started):
            if any(process.exitcode for process in started):
                end = min(end, time.monotonic() + 20)  # the others fail by themselves, or wait for the failed rank
            if time.monotonic() > end:
                for process in started:
                    process.kill()
            time.sleep(0.02)
        streams = (
            "".join(Path(f"{logs}/{rank}.{name}").read_text() for rank in range(processes)) for name in ("out", "err")
        )
        code = next((process.exitcode for process in started if process.exitcode), 0)
        return subprocess.CompletedProcess([str(script), *map(str, arguments)], code, *streams)


def _run_script(log: str, environment: dict[str, str], words: list[str]) -> None:
    """Be ``python *words`` in this process."""
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{log}.{name}", "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
