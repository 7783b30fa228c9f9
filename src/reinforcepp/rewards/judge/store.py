"""The file of a judge: verdicts by the request that gave them, and what was spent on each model.

A SQLite database that several processes of a node share, and that survives a kill at any time. What a request can cost at most is
recorded before it is sent, so that concurrent requests and killed processes never spend more than a budget.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError, RewardError

APPLICATION_ID, VERSION = 0x52504A31, 1
BUSY_TIMEOUT_SECONDS = 60.0
TABLES = """
    CREATE TABLE verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE spending (
        account TEXT PRIMARY KEY, requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
        dollars REAL NOT NULL
    ) WITHOUT ROWID;
"""


class BudgetSpent(RewardError):
    """The next request could exceed the budget."""


@dataclass(frozen=True)
class Spending:
    """Requests, tokens of requests and replies, and dollars."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0


class VerdictStore:
    """A file of verdicts.

    Args:
        path: of the database, which is created if it is missing; None keeps the verdicts in memory.

    Raises:
        ConfigError: the file can't be used, or isn't one of verdicts.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            self._database = _connect(path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"{path}: can't be used as the cache of a judge ({error}). Give another cache=FILE."
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the verdict for a request, or None."""
        with self._errors():
            row = self._database.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
            return None if row is None else dict(json.loads(row[0]))

    def put(self, key: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """Store a verdict and return the stored one, which is that of another process if it was first."""
        with self._errors():
            self._database.execute(
                "INSERT INTO verdicts VALUES (?, ?) ON CONFLICT DO NOTHING", (key, json.dumps(verdict))
            )
        return self.get(key) or verdict

    def spent(self, account: str) -> Spending:
        """Return what was spent on an account, with the most that requests in progress can cost."""
        with self._errors():
            row = self._database.execute(
                "SELECT requests, input_tokens, output_tokens, dollars FROM spending WHERE account = ?", (account,)
            ).fetchone()
        return Spending(*row) if row is not None else Spending()

    def reserve(self, account: str, dollars: float, max_requests: int | None, max_dollars: float | None) -> None:
        """Record a request that costs up to ``dollars``.

        Raises:
            BudgetSpent: it could exceed the budget; nothing is recorded.
        """
        with self._errors(), self._transaction():
            spent = self.spent(account)
            if max_requests is not None and spent.requests >= max_requests:
                raise BudgetSpent(
                    f"the budget is used up: {self.path} records {spent.requests} of {max_requests} requests"
                )
            if max_dollars is not None and spent.dollars + dollars > max_dollars:
                raise BudgetSpent(
                    f"the budget is used up: {self.path} records ${spent.dollars:.4f} of ${max_dollars:g}, and the next request "
                    f"can cost up to ${dollars:.4f}"
                )
            self._add(account, Spending(requests=1, dollars=dollars))

    def settle(self, account: str, reserved: float, cost: Spending) -> None:
        """Replace the reserved dollars of a finished request by its cost, and add its tokens."""
        change = Spending(0, cost.input_tokens, cost.output_tokens, cost.dollars - reserved)
        with self._errors(), self._transaction():
            self._add(account, change)

    def _add(self, account: str, more: Spending) -> None:
        self._database.execute(
            "INSERT INTO spending VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests, "
            "input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens, "
            "dollars = max(0, dollars + excluded.dollars)",
            (account, more.requests, more.input_tokens, more.output_tokens, more.dollars),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise RewardError(
                f"{self.path}: the judge's cache can't be used ({error}). Delete it, or give another."
            ) from error


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # reasons can quote private texts
    database = sqlite3.connect(
        path or ":memory:", timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
    )
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")  # A kill of the process loses nothing, only a power failure.
    database.execute("BEGIN IMMEDIATE")
    if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        for statement in (
            *TABLES.split(";\n"),
            f"PRAGMA application_id = {APPLICATION_ID}",
            f"PRAGMA user_version = {VERSION}",
        ):
            database.execute(statement)
    found = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    database.execute("COMMIT")
    if found != [APPLICATION_ID, VERSION]:
        database.close()
        raise sqlite3.DatabaseError("it is a database of another program or version")
    return database
