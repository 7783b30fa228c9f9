"""Follow a tutorial: write the files that it lists and run its commands in order, as a reader would."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from warm import warm_python

from reinforcepp.commands import cli
from reinforcepp.data import builtin
from scripts import ROOT, SOURCE, benchmark

FOLDER = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HANG_SECONDS = (
    3600  # only for a command that never ends: a CPU without native bfloat16 or with other work takes minutes
)
PAIRS = 96  # of the built-in preferences, in the test process


def follow(name: str, folder: Path, *, in_process: bool) -> list[str]:
    """Do what ``docs/tutorials/NAME.md`` says in ``folder``; return the output of each block of commands.

    Args:
        in_process: run ``reinforcepp`` in this process, which has its libraries loaded, and with fewer built-in pairs. The first
            command, and what needs a shell, runs in a fork of a process that has them, too.
    """
    outputs = []
    for kind, title, text in BLOCK.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(text, encoding="utf-8")
        elif kind == "bash":
            lines = text.replace("\\\n", " ").splitlines()
            if lines[0].startswith("reinforcepp label builtin"):
                outputs.append(_label(lines[0], folder, warm=in_process))
                continue
            plain = all(re.match(r"(reinforcepp|ls|head|tail) [^|<>]*$", line) for line in lines)
            if in_process and outputs and plain:
                outputs.append("".join(_reinforcepp(line, folder) for line in lines))
            else:
                outputs.append(_bash(text, folder, warm=in_process))
    return outputs


def _reinforcepp(line: str, folder: Path) -> str:
    program, *words = shlex.split(line)
    if program != "reinforcepp":
        return _bash(line, folder, warm=True)
    with open(builtin.data_paths()[0], encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[: 1 + PAIRS]
    with open(folder / ".pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    fewer = (folder / ".pairs.csv", builtin.data_paths()[1])
    output = io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.object(builtin, "data_paths", lambda: fewer),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        code = cli.main(words)
    assert code == 0, f"{line}\n{output.getvalue()}"
    return output.getvalue()


def _label(line: str, folder: Path, *, warm: bool) -> str:
    """Run the server of a command, vote for the longer response until nothing is left, and press Ctrl-C."""
    command, environment = _shell(f"exec {line} --port 0 --no_open_browser", folder, warm=warm)
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        links = [server.stdout.readline(), server.stdout.readline()]
        url = links[0].removeprefix("Label at ").strip()
        if url:
            votes = benchmark("labeler").label(url, "Ada", lambda _, texts: str(1 + texts.index(max(texts, key=len))))
            links.append(f"{votes} votes")
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=60)
    assert server.returncode == 0, errors
    return "\n".join([*links, output, errors])


def _bash(text: str, folder: Path, *, warm: bool) -> str:
    command, environment = _shell(text, folder, warm=warm)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _shell(text: str, folder: Path, *, warm: bool) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs ``text`` with bash, and its environment, in which ``reinforcepp`` is this package."""
    tools = folder / ".bin"
    tools.mkdir(exist_ok=True)
    python = warm_python() if warm else sys.executable
    for name, command in (("python", ""), ("reinforcepp", "-m reinforcepp")):
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(python)} {command} "$@"\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return ["bash", "-euo", "pipefail", "-c", text], environment
