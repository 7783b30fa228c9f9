"""Label with many clients at the same time while the server is killed: is every confirmed vote stored, and only once?

python benchmarks/label_load.py [--clients 8 --votes 2000 --kills 3]

For SQLite, and for PostgreSQL if its programs are installed: real HTTP clients vote on pairs, each unit once, and the server gets
SIGKILL at random moments and starts again on the same database. A vote is lost if a client saw the next page, but the
database doesn't have the vote. It is doubled if a unit has more votes than labelers asked for. Clients repeat a request
without a response, as the page does. Written to benchmarks/results/label_load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import sqlalchemy as sa
from results import write_result

from reinforcepp.data.feedback import Store, schema

HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="(\w*)">')
START_SECONDS = 60.0
POSTGRES_PROGRAMS = ("initdb", "postgres", "pg_ctl")


def main() -> None:
    """Measure both databases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--votes", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", help="write there instead of benchmarks/results/label_load.json")
    given = parser.parse_args()
    numbers = {"clients": given.clients, "votes": given.votes, "kills": given.kills}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows.append({"store": "sqlite", **measure(str(Path(folder) / "feedback.db"), Path(folder), **numbers)})
        if has_postgres():
            with postgres() as url:
                rows.append({"store": "postgresql", **measure(url, Path(folder), **numbers)})
    if given.output:
        Path(given.output).write_text(json.dumps({"rows": rows}))
    else:
        write_result("label_load", {"rows": rows})


def measure(database: str, folder: Path, *, clients: int, votes: int, kills: int) -> dict[str, Any]:
    """Return how many votes were lost and doubled."""
    data = folder / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _pairs(votes)))
    server = Server(database, data)
    server.start()
    people = [Client(server.url, f"labeler {number}") for number in range(clients)]
    threads = [threading.Thread(target=each.label) for each in people]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    draw, killed = random.Random(0), 0
    while any(thread.is_alive() for thread in threads):
        done = sum(len(each.confirmed) for each in people)
        if killed < kills and done >= votes * (killed + draw.uniform(0.6, 1.0)) / (kills + 1):
            server.kill()
            server.start()
            killed += 1
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    server.kill()
    confirmed = [vote for each in people for vote in each.confirmed]
    return {
        "clients": clients,
        "votes": len(confirmed),
        "kills": killed,
        **check(database, confirmed),
        "seconds": round(seconds, 1),
        "errors": [each.error for each in people if each.error],
    }


def check(database: str, confirmed: list[tuple[str, str]]) -> dict[str, int]:
    """Return the numbers of lost and doubled votes; ``confirmed`` are tokens and choices that clients saw stored."""
    a, v = schema.assignments, schema.votes
    store = Store(database, create=False)
    query = sa.select(a.c.token, a.c.unit_id, a.c.order, v.c.value).join(v, v.c.assignment_id == a.c.id)
    with store.read() as db:
        rows = db.execute(query.where(v.c.undone.is_(None))).all()
    store.close()
    stored = {row.token: str(row.order.index(row.value["better"]) + 1) for row in rows}
    units = [row.unit_id for row in rows]
    return {
        "lost": sum(stored.get(token) != choice for token, choice in confirmed),
        "doubled": len(units) - len(set(units)),
    }


class Client:
    """A labeler that votes until nothing is left."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.confirmed: list[tuple[str, str]] = []
        self.error = ""
        self._draw = random.Random(name)

    def label(self) -> None:
        """Log in and vote; an unexpected response ends the work with an error."""
        with httpx2.Client(base_url=self.url, headers={"origin": self.url}, follow_redirects=True, timeout=30) as http:
            page = self._request(http, "GET", "/login")
            page = self._request(http, "POST", "/login", {**dict(HIDDEN.findall(page.text)), "name": self.name})
            while (fields := dict(HIDDEN.findall(page.text))).get("unit"):
                choice = self._draw.choice("12")
                page = self._request(http, "POST", "/vote", {**fields, "choice": choice, "seconds": "0.1"})
                if page.status_code != 200:
                    self.error = f"status {page.status_code}"
                    return
                self.confirmed.append((fields["unit"], choice))

    def _request(self, http: httpx2.Client, method: str, path: str, data: dict[str, str] | None = None) -> Any:
        while True:
            try:
                response = http.request(method, path, data=data)
                if response.status_code < 500:
                    return response
            except httpx2.TransportError:
                pass
            time.sleep(0.2)


class Server:
    """``reinforcepp label`` as a process on a fixed port."""

    def __init__(self, database: str, data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--data", data, "--database", database, "--port", port, "--repeat_every", 0, "--no_open_browser"]
        self._command = [sys.executable, "-P", "-m", "reinforcepp", "label", *map(str, flags)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx2.get(f"{self.url}/health")
                return
            except httpx2.TransportError:
                if self._process.poll() is not None or time.monotonic() > end:
                    assert self._process.stderr is not None
                    sys.exit(f"The server doesn't answer: {self._process.stderr.read().decode()[-2000:]}")
                time.sleep(0.1)

    def kill(self) -> None:
        """End it with SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def has_postgres() -> bool:
    """Return whether a PostgreSQL server can be started."""
    return all(map(shutil.which, POSTGRES_PROGRAMS))


@contextmanager
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server for this block and yield the URL of its database."""
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
    try:
        flags = ["--username=label", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"]
        subprocess.run([*as_user, "initdb", *flags, "-D", folder / "data"], check=True, capture_output=True, cwd="/")
        options = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories= -p {port}"
        control = [*as_user, "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log"]
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd="/")
        try:
            yield f"postgresql://label@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pairs(number: int) -> Iterator[dict[str, Any]]:
    for i in range(number):
        yield {"prompt": f"Question {i}?", "answers": [f"The first answer to {i}.", f"The second answer to {i}."]}


if __name__ == "__main__":
    main()
