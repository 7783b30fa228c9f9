"""The feedback database: open it, add prompts and answers, lease units, and store votes.

One SQLite file, or a PostgreSQL server for a team. Every change is one transaction, and transactions that write run one after
another: SQLite locks the file, and on PostgreSQL each takes the same advisory lock. So two labelers can't lease the same unit,
and a process that is killed leaves either the whole change or nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from reinforcepp.config.labeling import Task
from reinforcepp.data.feedback import schema
from reinforcepp.data.feedback.records import (
    NewUnit,
    Unit,
    add_units,
    clean,
    find_unit,
    new_id,
    put_outside_vote,
    units_by_id,
)
from reinforcepp.data.feedback.votes import Vote, reordered
from reinforcepp.errors import ConfigError, DataError, first_line

SQLITE_BUSY_SECONDS = 30.0
"""How long a transaction waits for the lock of the file."""
ADVISORY_LOCK = 0x1ABE1
"""Number of the lock that writing transactions take on PostgreSQL."""
PRIVATE = 0o600
"""Permissions of a new file, which holds the secret of the sessions."""
MIGRATIONS = Path(__file__).parent / "migrations"
WRITES = {"reinforcepp_writes": True}
LabelerKind = Literal["human", "judge"]


def database_url(name: str) -> URL:
    """Return the URL of a database that a user names: the path of an SQLite file, or a URL.

    Raises:
        ConfigError: The URL is malformed, or of another kind of database.
    """
    if "://" not in name:
        return URL.create("sqlite", database=str(Path(name).expanduser()))
    try:
        url = make_url(name)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "database: the URL is malformed. Write it as in postgresql://user@host/name, or give a file name."
        ) from None
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ConfigError(f"database: {backend} isn't supported. Use an SQLite file or postgresql://user@host/name.")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


class Store:
    """An open feedback database. Threads can share it; other processes can open the same database.

    Args:
        name: Path of an SQLite file, or URL of a database. See :func:`database_url`.
        create: Whether to create the file and to bring its tables up to date. Otherwise they must be.

    Raises:
        ConfigError: The database can't be opened, or isn't one of this version.
    """

    def __init__(self, name: str | Path, *, create: bool = True) -> None:
        url = database_url(str(name))
        self.name = url.render_as_string(hide_password=True) if "://" in str(name) else str(name)
        if url.get_backend_name() == "sqlite" and not create and not Path(str(url.database)).is_file():
            raise ConfigError(f"database: {self.name}: no such file. Check the path.")
        self._new_file: Path | None = None
        if url.get_backend_name() == "sqlite" and create and not Path(str(url.database)).exists():
            with suppress(OSError):  # The connection reports the reason.
                Path(str(url.database)).touch(mode=PRIVATE)
                self._new_file = Path(str(url.database))
        try:
            self.engine = _engine(url)
            with self._errors():
                self._migrate(create)
        except (ModuleNotFoundError, NoSuchModuleError):
            raise ConfigError(
                f"database: {self.name} needs the package psycopg. Install it: pip install 'reinforcepp[postgres]'"
            ) from None

    @classmethod
    @contextmanager
    def opened(cls, name: str | Path) -> Iterator[Store]:
        """Yield an open database, and close it. If the block fails, a new file without units is deleted."""
        store = cls(name)
        try:
            yield store
        except BaseException:
            if store._new_file is not None and not store.has_units():
                store.close()
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{store._new_file}{suffix}").unlink(missing_ok=True)
            raise
        finally:
            store.close()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the database."""
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection whose changes are on the disk after the block, or undone if it raises.

        No other process or thread writes at the same time.
        """
        with self._errors(), self.engine.connect() as connection:
            connection.execution_options(**WRITES)
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
                yield connection

    # --- settings ---------------------------------------------------------------------------------------------------

    def setting(self, name: str, default: Any) -> Any:
        """Return the stored setting ``name``; store ``default`` first if there is none."""
        rows = schema.settings
        with self.write() as db:
            found = db.execute(sa.select(rows.c.value).where(rows.c.name == name)).scalar()
            if found is None:
                db.execute(rows.insert().values(name=name, value=default))
                return default
            return found

    # --- prompts, answers, units ------------------------------------------------------------------------------------

    def add_units(self, units: Sequence[NewUnit]) -> int:
        """Add units in one transaction, and return how many are new: one with the same task on the same answers isn't.

        That one gets the given priority and overlap, unless one of both is a gold unit.
        """
        with self.write() as db:
            return add_units(db, units, update=True)

    def open_units(self, task: Task) -> list[Unit]:
        """Return the units that need votes, gold units not included."""
        u = schema.units
        wanted = sa.select(u.c.id).where(u.c.task == task, u.c.gold.is_(None), u.c.votes < u.c.overlap).order_by(u.c.id)
        with self.read() as db:
            return list(units_by_id(db, list(db.execute(wanted).scalars())).values())

    def set_priorities(self, priorities: Mapping[int, float]) -> None:
        """Set the priorities of units by id; labelers get units with lower numbers first."""
        u = schema.units
        values = [{"unit": unit_id, "number": number} for unit_id, number in priorities.items()]
        with self.write() as db:
            if values:
                change = u.update().where(u.c.id == sa.bindparam("unit")).values(priority=sa.bindparam("number"))
                db.execute(change, values)

    def has_units(self, task: Task | None = None) -> bool:
        """Return whether there is any unit, or any with this task."""
        found = sa.select(schema.units.c.id).limit(1)
        with self.read() as db:
            return db.execute(found if task is None else found.where(schema.units.c.task == task)).first() is not None

    def answered(self, model: str, sampling: Mapping[str, Any]) -> set[str]:
        """Return the :func:`prompt_digest` of the prompts to which ``model`` responded with these sampling parameters."""
        a, p = schema.answers, schema.prompts
        query = sa.select(p.c.digest, a.c.sampling).join(a, a.c.prompt_id == p.c.id).where(a.c.model == model)
        with self.read() as db:
            return {row.digest for row in db.execute(query) if row.sampling == dict(sampling)}

    def unit(self, unit_id: int) -> Unit:
        """Return a unit.

        Raises:
            DataError: It doesn't exist.
        """
        with self.read() as db:
            found = units_by_id(db, [unit_id])
        if not found:
            raise DataError(f"unit {unit_id} isn't in {self.name}.")
        return found[unit_id]

    # --- labelers and votes -----------------------------------------------------------------------------------------

    def find_labeler(self, name: str) -> int | None:
        """Return the id of a labeler, or None if the name is new."""
        with self.read() as db:
            return db.execute(sa.select(schema.labelers.c.id).where(schema.labelers.c.name == clean(name))).scalar()

    def labeler(self, name: str, kind: LabelerKind = "human") -> int:
        """Return the id of a labeler, who is added under a new name.

        Raises:
            DataError: The name belongs to another kind.
        """
        rows = schema.labelers
        with self.write() as db:
            found = db.execute(sa.select(rows.c.id, rows.c.kind).where(rows.c.name == clean(name))).first()
            if found is None:
                added = db.execute(rows.insert().values(name=clean(name), kind=kind, created=time.time()))
                return new_id(added)
        if found.kind != kind:
            raise DataError(f"labeler: {name!r} is the name of a {found.kind}. Choose another name.")
        return int(found.id)

    def unjudged(self, judge: str, task: Task = "pair", limit: int | None = None) -> list[Unit]:
        """Return the units without a vote of ``judge``, those with the lowest priority numbers first."""
        wanted = _unjudged(judge, task).order_by(schema.units.c.priority, schema.units.c.id).limit(limit)
        with self.read() as db:
            return list(units_by_id(db, list(db.execute(wanted).scalars())).values())

    def count_unjudged(self, judge: str, task: Task = "pair") -> int:
        """Return the number of units without a vote of ``judge``."""
        with self.read() as db:
            return int(
                db.execute(sa.select(sa.func.count()).select_from(_unjudged(judge, task).subquery())).scalar_one()
            )

    def details(self, judge: str) -> list[dict[str, Any]]:
        """Return what was stored about each vote of ``judge`` that counts; see :meth:`add_judgment`."""
        a, people, v = schema.assignments, schema.labelers, schema.votes
        wanted = (
            sa.select(v.c.details)
            .join(a, sa.and_(a.c.id == v.c.assignment_id, v.c.undone.is_(None)))
            .join(people, people.c.id == a.c.labeler_id)
            .where(people.c.name == clean(judge))
        )
        with self.read() as db:
            return [dict(each) for each in db.execute(wanted).scalars()]

    def add_judgment(
        self, judge: str, unit_id: int, vote: Vote, *, seconds: float = 0.0, details: Mapping[str, Any] | None = None
    ) -> None:
        """Store the vote of a judge on a unit; an earlier vote of the same judge is replaced.

        Votes of judges don't keep people from getting the unit.

        Args:
            judge: Name of the judge.
            unit_id: The unit.
            vote: The vote.
            seconds: Time of the requests.
            details: JSON for people: model, rubric, explanation, the votes by order.
        """
        labeler = self.labeler(judge, "judge")
        with self.write() as db:
            put_outside_vote(db, labeler, unit_id, vote, seconds, details)

    def add_votes(self, votes: Sequence[tuple[NewUnit, str, Vote, float]]) -> int:
        """Store votes that were made elsewhere, with their units, and return how many units are new.

        Args:
            votes: Unit, name of the person, vote by the positions of its answers, and time in seconds.

        Raises:
            DataError: A name belongs to a judge.
        """
        labelers = {name: self.labeler(name) for name in dict.fromkeys(name for _, name, _, _ in votes)}
        with self.write() as db:
            added = add_units(db, [unit for unit, *_ in votes])
            for unit, name, vote, seconds in votes:
                unit_id, positions = find_unit(db, unit)
                put_outside_vote(db, labelers[name], unit_id, reordered(vote, positions), seconds, None)
        return added

    # --- inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as error:
            reason = first_line(error.orig) if error.orig is not None else first_line(error)
            raise ConfigError(
                f"database: {self.name} can't be used ({reason}). Check the name and your permissions."
            ) from error

    def _migrate(self, create: bool) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        scripts = ScriptDirectory.from_config(config)
        with self.read() as db:
            tables = sa.inspect(db).get_table_names()
            version = MigrationContext.configure(db).get_current_revision()
        if version == scripts.get_current_head():
            return
        if version is None and tables:
            raise ConfigError(f"database: {self.name} holds other tables. Give a new database, or one of this command.")
        if version is not None and version not in {each.revision for each in scripts.walk_revisions()}:
            raise ConfigError(f"database: {self.name} was written by a newer version. Upgrade reinforcepp.")
        if not create:
            raise ConfigError(f"database: {self.name} isn't up to date. Open it once: reinforcepp label --database ...")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with self.write() as db:
            config.attributes["connection"] = db
            command.upgrade(config, "head")


def _unjudged(judge: str, task: Task) -> sa.Select[Any]:
    a, people, v, u = schema.assignments, schema.labelers, schema.votes, schema.units
    done = (
        sa.select(a.c.unit_id)
        .join(people, people.c.id == a.c.labeler_id)
        .join(v, sa.and_(v.c.assignment_id == a.c.id, v.c.undone.is_(None)))
        .where(people.c.name == clean(judge))
    )
    return sa.select(u.c.id).where(u.c.task == task, u.c.id.not_in(done))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_SECONDS, "isolation_level": None})

    def configure(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # A vote survives a power failure, too.
        connection.execute("PRAGMA foreign_keys=ON")

    def begin(connection: Connection) -> None:
        # A transaction that begins as a reader can't always become a writer, so a writer locks at once.
        writes = connection.get_execution_options().get("reinforcepp_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", begin)
    return engine
