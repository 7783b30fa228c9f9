"""A ``python`` that runs programs as forks of a process that has already loaded torch, transformers and the trainers.

Loading them takes up to six CPU seconds per process, which is most of the time of many tests that start a command. Signals,
standard streams, working directory, environment and exit code are those of the started program; its imports aren't, so tests of
start-up, warnings at import and memory must start ``sys.executable``.
"""

from __future__ import annotations

import array
import atexit
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock

from reinforcepp.commands.cli import ENVIRONMENT
from reinforcepp.runtime.process import is_main

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FORKS = multiprocessing.get_context("forkserver")
LOADED = [
    "reinforcepp.training.reinforce_trainer",
    "reinforcepp.training.reward_trainer",
    "reinforcepp.training.sft_trainer",
    "reinforcepp.commands.cli",
    "transformers.models.auto.tokenization_auto",
    "deepspeed",
    "pandas",
    "trl",
    "tyro",
]
FORKS.set_forkserver_preload(["scripts", "tiny", *LOADED])


def fork_server(**environment: str) -> dict[str, str]:
    """Start the process that loads everything, if necessary; return the environment for its forks."""
    search = os.pathsep.join([str(ROOT / "tests"), str(SOURCE)])
    given = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search} | environment
    with mock.patch.dict(os.environ, given):
        forkserver.ensure_running()
    return given


@cache
def warm_python() -> str:
    """Return the path of the executable."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))  # short, because paths of sockets are limited to 107 bytes
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    (folder / "client.py").write_text(CLIENT.format(address=str(folder / "socket")))
    executable = folder / "python"
    executable.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -ISE {folder / "client.py"} "$@"\n')
    executable.chmod(0o755)
    threading.Thread(target=_serve, args=(listener, str(executable)), daemon=True).start()
    return str(executable)


CLIENT = """
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
body = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(body)
code = int(server.recv(16))
if code < 0:  # end by the same signal
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""The executable passes its arguments, environment, folder and streams to :func:`_serve`, and waits for the exit code."""


def _serve(listener: socket.socket, executable: str) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_run, args=(client, executable), daemon=True).start()


def _run(client: socket.socket, executable: str) -> None:
    """Run the program that a client asks for."""
    size, rights, *_ = client.recvmsg(4, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i", rights[0][2])
    body = b""
    while len(body) < int.from_bytes(size, "big"):
        body += client.recv(1 << 16)
    fork_server()
    call = executable, [DupFd(stream) for stream in streams], json.loads(body)
    process = FORKS.Process(target=_run_program, args=call)
    process.start()
    for stream in streams:
        os.close(stream)
    while client in wait([client, process.sentinel]):
        number = client.recv(1)
        os.kill(process.pid, number[0] if number else signal.SIGKILL)  # a client that is gone was killed
        if not number:
            break
    process.join()
    with suppress(OSError):
        client.send(str(process.exitcode).encode())
    client.close()


def _run_program(executable: str, streams: list[Any], call: tuple[list[str], dict[str, str], str]) -> None:
    """Be ``python *words`` in this process."""
    import torch

    from reinforcepp.training.monitor import console

    words, environment, folder = call
    for number, stream in enumerate(streams):
        os.dup2(stream.detach(), number)
    # The streams last as long as the process. Those of the parent may be seekable, unlike the pipes that replace them.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console.__init__(stderr=True, highlight=False, quiet=not is_main())
    sys.executable = executable
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    if "OMP_NUM_THREADS" in environment:  # OpenMP read the variable when torch was loaded
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    while words[0] in ("-u", "-B", "-P"):
        del words[0]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, folder)
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
