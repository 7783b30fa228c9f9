"""The feedback database: open it, add prompts and answers, lease units, and store votes.

One SQLite file, or a PostgreSQL server for a team. Every change is one transaction, and transactions that write run one after
another: SQLite locks the file, and on PostgreSQL each takes the same advisory lock. So two labelers can't lease the same unit,
and a process that is killed leaves either the whole change or nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from reinforcepp.config.labeling import MAX_ANSWERS, Task
from reinforcepp.data.feedback import schema
from reinforcepp.data.feedback.votes import Skip, Vote, reordered
from reinforcepp.errors import ConfigError, DataError, first_line
from reinforcepp.types import Conversation

SQLITE_BUSY_SECONDS = 30.0
"""How long a transaction waits for the lock of the file."""
ADVISORY_LOCK = 0x1ABE1
"""Number of the lock that writing transactions take on PostgreSQL."""
MAX_TOPIC_CHARACTERS = 200
TEMPLATE_COLUMNS = ("chat_template_kwargs", "tools")
MIGRATIONS = Path(__file__).parent / "migrations"
WRITES = {"reinforcepp_writes": True}
LabelerKind = Literal["human", "judge"]


@dataclass(frozen=True)
class Answer:
    """A response to a prompt.

    Attributes:
        text: The response.
        model: The model that generated it; None if unknown.
        sampling: Sampling parameters by name, such as ``temperature``.
        truncated: Whether it ends at the length limit.
    """

    text: str
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class NewUnit:
    """A unit to add.

    Attributes:
        task: What labelers do.
        prompt: The prompt.
        answers: One to ``MAX_ANSWERS`` different texts.
        topic: Group for statistics.
        columns: Other cells of the prompt's row.
        overlap: How many labelers get the unit.
        priority: Units with lower numbers come first.
        gold: The known vote, if the unit tests labelers.

    Raises:
        DataError: There are too few, too many or equal answers.
    """

    task: Task
    prompt: Conversation
    answers: Sequence[Answer]
    topic: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    overlap: int = 1
    priority: float = 0.0
    gold: Vote | None = None

    def __post_init__(self) -> None:
        """Check the number of answers."""
        texts = {each.text.strip() for each in self.answers}
        least = 1 if self.task in ("rate", "edit") else 2
        most = 2 if self.task in ("pair", "edit") else MAX_ANSWERS
        if not least <= len(self.answers) <= most or len(texts) < len(self.answers):
            raise DataError(
                f"prompt {_text(self.prompt)[:60]!r}: the task {self.task!r} needs {least} to {most} different answers, not "
                f"{len(texts)}."
            )


@dataclass(frozen=True)
class Unit:
    """A unit of work with its prompt and answers, in the order of their positions."""

    id: int
    task: Task
    prompt: Conversation
    answers: tuple[Answer, ...]
    topic: str | None = None
    gold: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The prompt's variables of the chat template, as columns of a data file."""
        return {name: self.columns[name] for name in TEMPLATE_COLUMNS if self.columns.get(name)}


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
        try:
            self.engine = _engine(url)
            with self._errors():
                self._migrate(create)
        except (ModuleNotFoundError, NoSuchModuleError):
            raise ConfigError(
                f"database: {self.name} needs the package psycopg. Install it: pip install 'reinforcepp[postgres]'"
            ) from None

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
        """Add units in one transaction, and return how many are new: one with the same task on the same answers isn't."""
        with self.write() as db:
            return sum(_add_unit(db, each) for each in units)

    def has_units(self) -> bool:
        """Return whether there is any unit."""
        with self.read() as db:
            return db.execute(sa.select(schema.units.c.id).limit(1)).first() is not None

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
                return _id(added)
        if found.kind != kind:
            raise DataError(f"labeler: {name!r} is the name of a {found.kind}. Choose another name.")
        return int(found.id)

    def unjudged(self, judge: str, task: Task = "pair", limit: int | None = None) -> list[Unit]:
        """Return the units without a vote of ``judge``, those with the lowest priority numbers first."""
        a, people, v, u = schema.assignments, schema.labelers, schema.votes, schema.units
        done = (
            sa.select(a.c.unit_id)
            .join(people, people.c.id == a.c.labeler_id)
            .join(v, sa.and_(v.c.assignment_id == a.c.id, v.c.undone.is_(None)))
            .where(people.c.name == clean(judge))
        )
        wanted = sa.select(u.c.id).where(u.c.task == task, u.c.id.not_in(done)).order_by(u.c.priority, u.c.id)
        with self.read() as db:
            return list(units_by_id(db, list(db.execute(wanted.limit(limit)).scalars())).values())

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
            _put_outside_vote(db, labeler, unit_id, vote, seconds, details)

    def add_votes(self, votes: Sequence[tuple[NewUnit, str, Vote, float]]) -> int:
        """Store votes that were made elsewhere, with their units, and return how many units are new.

        Args:
            votes: Unit, name of the person, vote by the positions of its answers, and time in seconds.

        Raises:
            DataError: A name belongs to a judge.
        """
        labelers = {name: self.labeler(name) for name in dict.fromkeys(name for _, name, _, _ in votes)}
        with self.write() as db:
            added = 0
            for unit, name, vote, seconds in votes:
                added += _add_unit(db, unit)
                unit_id, positions = _find_unit(db, unit)
                _put_outside_vote(db, labelers[name], unit_id, reordered(vote, positions), seconds, None)
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


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_SECONDS, "isolation_level": None})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # A vote survives a power failure, too.
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that begins as a reader can't always become a writer, so a writer locks at once.
        writes = connection.get_execution_options().get("reinforcepp_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def clean(text: str) -> str:
    """Return ``text`` without what PostgreSQL can't store: NUL and half of a surrogate pair."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def digest(*parts: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def prompt_digest(prompt: Conversation, columns: Mapping[str, Any]) -> str:
    """Return a hash of a prompt and its variables of the chat template."""
    return digest(prompt, *(columns.get(name) or None for name in TEMPLATE_COLUMNS))


def add_assignment(
    db: Connection,
    unit_id: int,
    labeler_id: int,
    *,
    order: Sequence[int],
    now: float,
    leased_until: float,
    repeat: bool = False,
) -> int:
    """Add an assignment and return its id; its token is random, so that it reveals nothing about the unit."""
    values = {
        "token": secrets.token_hex(16),
        "unit_id": unit_id,
        "labeler_id": labeler_id,
        "repeat": repeat,
        "order": list(order),
        "started": now,
        "leased_until": leased_until,
    }
    return _id(db.execute(schema.assignments.insert().values(values)))


def put_vote(
    db: Connection,
    assignment_id: int,
    vote: Vote,
    *,
    seconds: float,
    now: float,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Store the vote of an assignment; an earlier, different one is undone, and the same one is kept."""
    rows = schema.votes
    current = sa.and_(rows.c.assignment_id == assignment_id, rows.c.undone.is_(None))
    if db.execute(sa.select(rows.c.value).where(current)).scalar() == vote.value():
        return
    db.execute(rows.update().where(current).values(undone=now))
    values = {"value": vote.value(), "skipped": isinstance(vote, Skip), "details": dict(details or {})}
    values |= {"assignment_id": assignment_id, "seconds": seconds, "created": now}
    db.execute(rows.insert().values(values))


def units_by_id(db: Connection, ids: Sequence[int]) -> dict[int, Unit]:
    """Return units by id, in the order of ``ids``."""
    u, p, a, ua = schema.units, schema.prompts, schema.answers, schema.unit_answers
    wanted = (
        sa.select(
            u.c.id,
            u.c.task,
            u.c.gold,
            p.c.prompt,
            p.c.topic,
            p.c.columns,
            a.c.text,
            a.c.model,
            a.c.sampling,
            a.c.truncated,
        )
        .join(p, p.c.id == u.c.prompt_id)
        .join(ua, ua.c.unit_id == u.c.id)
        .join(a, a.c.id == ua.c.answer_id)
        .order_by(u.c.id, ua.c.position)
    )
    rows: dict[int, list[Any]] = {each: [] for each in ids}
    for start in range(0, len(ids), 500):  # SQLite limits the number of parameters.
        for row in db.execute(wanted.where(u.c.id.in_(ids[start : start + 500]))):
            rows[row.id].append(row)
    return {
        unit_id: Unit(
            unit_id,
            parts[0].task,
            parts[0].prompt,
            tuple(Answer(each.text, each.model, each.sampling, each.truncated) for each in parts),
            parts[0].topic,
            parts[0].gold,
            parts[0].columns,
        )
        for unit_id, parts in rows.items()
        if parts
    }


def _add_unit(db: Connection, unit: NewUnit) -> bool:
    p, a, u = schema.prompts, schema.answers, schema.units
    prompt = unit.prompt if isinstance(unit.prompt, str) else [dict(each) for each in unit.prompt]
    columns = json.loads(json.dumps(dict(unit.columns), default=str))
    key = prompt_digest(prompt, columns)
    topic = clean(unit.topic)[:MAX_TOPIC_CHARACTERS] if unit.topic else None
    prompt_id = _find_or_add(db, p, key, prompt=prompt, topic=topic, columns=columns)
    ids = []
    for answer in unit.answers:
        text = clean(answer.text)
        given = {"model": answer.model, "sampling": dict(answer.sampling), "truncated": answer.truncated}
        ids.append(_find_or_add(db, a, digest(text), prompt_id=prompt_id, text=text, **given))
    unit_digest = digest(unit.task, sorted(ids))
    if db.execute(sa.select(u.c.id).where(u.c.digest == unit_digest)).scalar() is not None:
        return False
    values = {
        "digest": unit_digest,
        "prompt_id": prompt_id,
        "task": unit.task,
        "overlap": unit.overlap,
        "priority": unit.priority,
        "gold": unit.gold.value() if unit.gold is not None else None,
        "created": time.time(),
    }
    unit_id = _id(db.execute(u.insert().values(values)))
    positions = [{"unit_id": unit_id, "position": i, "answer_id": each} for i, each in enumerate(ids)]
    db.execute(schema.unit_answers.insert(), positions)
    return True


def _find_unit(db: Connection, unit: NewUnit) -> tuple[int, list[int]]:
    """Return the id of a unit that the database has, and the position there of each of the answers of ``unit``."""
    u, a, ua, p = schema.units, schema.answers, schema.unit_answers, schema.prompts
    prompt = unit.prompt if isinstance(unit.prompt, str) else [dict(each) for each in unit.prompt]
    wanted = sa.and_(p.c.digest == prompt_digest(prompt, unit.columns), a.c.prompt_id == p.c.id)
    keys = [digest(clean(each.text)) for each in unit.answers]
    ids = {
        row.digest: row.id
        for row in db.execute(sa.select(a.c.id, a.c.digest).join(p, wanted).where(a.c.digest.in_(keys)))
    }
    found = digest(unit.task, sorted(ids[key] for key in keys))
    unit_id = db.execute(sa.select(u.c.id).where(u.c.digest == found)).scalar_one()
    places = db.execute(sa.select(ua.c.answer_id, ua.c.position).where(ua.c.unit_id == unit_id))
    by_answer = {row.answer_id: row.position for row in places}
    return unit_id, [by_answer[ids[key]] for key in keys]


def _put_outside_vote(
    db: Connection, labeler: int, unit_id: int, vote: Vote, seconds: float, details: Mapping[str, Any] | None
) -> None:
    """Store a vote that wasn't made on the page."""
    a, now = schema.assignments, time.time()
    found = db.execute(sa.select(a.c.id).where(a.c.unit_id == unit_id, a.c.labeler_id == labeler, ~a.c.repeat)).scalar()
    if found is None:
        found = add_assignment(db, unit_id, labeler, order=(), now=now, leased_until=now)
    put_vote(db, found, vote, seconds=seconds, now=now, details=details)


def _find_or_add(db: Connection, table: sa.Table, key: str, **values: Any) -> int:
    """Return the id of the row with the digest ``key``, of the same prompt if ``values`` names one."""
    condition = table.c.digest == key
    if "prompt_id" in values:
        condition = sa.and_(condition, table.c.prompt_id == values["prompt_id"])
    found = db.execute(sa.select(table.c.id).where(condition)).scalar()
    return int(found) if found is not None else _id(db.execute(table.insert().values(digest=key, **values)))


def _id(result: Any) -> int:
    return int(result.inserted_primary_key[0])


def _text(prompt: Conversation) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
