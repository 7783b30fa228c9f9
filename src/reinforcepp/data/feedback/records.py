"""Prompts, answers, units and votes, and how one transaction reads and writes them."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from reinforcepp.config.labeling import MAX_ANSWERS, Task
from reinforcepp.data.feedback import schema
from reinforcepp.data.feedback.votes import Skip, Vote
from reinforcepp.errors import DataError
from reinforcepp.types import Conversation

MAX_TOPIC_CHARACTERS, MAX_MODEL_CHARACTERS = 200, 500
CHUNK_UNITS = 300
"""Units per statement: SQLite limits the number of parameters."""
TEMPLATE_COLUMNS = ("chat_template_kwargs", "tools")


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
    return new_id(db.execute(schema.assignments.insert().values(values)))


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
    count_votes(db, assignment_id)


def count_votes(db: Connection, assignment_id: int) -> None:
    """Store how many votes the unit of an assignment has: those of people, neither skipped, nor undone, nor repeats."""
    a, v, people, u = schema.assignments, schema.votes, schema.labelers, schema.units
    number = (
        sa.select(sa.func.count())
        .select_from(a)
        .join(v, sa.and_(v.c.assignment_id == a.c.id, v.c.undone.is_(None), ~v.c.skipped))
        .join(people, sa.and_(people.c.id == a.c.labeler_id, people.c.kind == "human"))
        .where(a.c.unit_id == u.c.id, ~a.c.repeat)
    )
    voted = sa.select(a.c.unit_id).where(a.c.id == assignment_id).scalar_subquery()
    db.execute(u.update().where(u.c.id == voted).values(votes=number.scalar_subquery()))


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


def add_units(db: Connection, units: Sequence[NewUnit], *, update: bool = False) -> int:
    """Add units and return how many are new: one with the same task on the same answers isn't.

    With ``update``, one that isn't new gets the priority and the overlap of the given one, unless one of both is a gold unit.
    """
    chunks = range(0, len(units), CHUNK_UNITS)
    return sum(_add_chunk(db, units[start : start + CHUNK_UNITS], update) for start in chunks)


def _add_chunk(db: Connection, units: Sequence[NewUnit], update: bool) -> int:
    p, a, u = schema.prompts, schema.answers, schema.units
    prompts = [_prompt_values(each) for each in units]
    prompt_ids, _ = _add_missing(db, p, p.c.digest, prompts)
    answers = [
        [_answer_values(answer, prompt_ids[prompt["digest"],]) for answer in unit.answers]
        for unit, prompt in zip(units, prompts, strict=True)
    ]
    answer_ids, _ = _add_missing(db, a, a.c.prompt_id, [each for own in answers for each in own])
    parts = [[answer_ids[each["prompt_id"], each["digest"]] for each in own] for own in answers]
    rows = [_unit_values(*each) for each in zip(units, (own[0]["prompt_id"] for own in answers), parts, strict=True)]
    unit_ids, new = _add_missing(db, u, u.c.digest, rows)
    keys = [(row["prompt_id"], row["digest"]) for row in rows]
    if new:
        first = {key: own for key, own in zip(reversed(keys), reversed(parts), strict=True) if key in new}
        places = [(unit_ids[key], i, each) for key, own in first.items() for i, each in enumerate(own)]
        values = [{"unit_id": unit_id, "position": i, "answer_id": each} for unit_id, i, each in places]
        db.execute(schema.unit_answers.insert(), values)
    if update:
        known = zip(keys, rows, strict=True)
        changes = [
            {"unit": unit_ids[key], "first": row["priority"], "number": row["overlap"]}
            for key, row in known
            if key not in new and row["gold"] is None
        ]
        change = u.update().where(u.c.id == sa.bindparam("unit"), u.c.gold.is_(None))
        change = change.values(priority=sa.bindparam("first"), overlap=sa.bindparam("number"))
        if changes:
            db.execute(change, changes)
    return len(new)


def _prompt_values(unit: NewUnit) -> dict[str, Any]:
    prompt = unit.prompt if isinstance(unit.prompt, str) else [dict(each) for each in unit.prompt]
    columns = json.loads(json.dumps(dict(unit.columns), default=str))
    topic = clean(unit.topic)[:MAX_TOPIC_CHARACTERS] if unit.topic else None
    return {"digest": prompt_digest(prompt, columns), "prompt": prompt, "topic": topic, "columns": columns}


def _answer_values(answer: Answer, prompt_id: int) -> dict[str, Any]:
    text = clean(answer.text)
    model = clean(answer.model)[:MAX_MODEL_CHARACTERS] if answer.model else None
    made = {"model": model, "sampling": dict(answer.sampling), "truncated": answer.truncated}
    return {"digest": digest(text), "prompt_id": prompt_id, "text": text, **made}


def _unit_values(unit: NewUnit, prompt_id: int, answer_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "digest": digest(unit.task, sorted(answer_ids)),
        "prompt_id": prompt_id,
        "task": unit.task,
        "overlap": unit.overlap,
        "priority": unit.priority,
        "gold": unit.gold.value() if unit.gold is not None else None,
        "created": time.time(),
    }


def _add_missing(
    db: Connection, table: sa.Table, within: sa.Column[Any], rows: Sequence[dict[str, Any]]
) -> tuple[dict[tuple[Any, ...], int], set[tuple[Any, ...]]]:
    """Add the rows that a table doesn't have, and return the ids of all by prompt and digest, and the keys of the new ones.

    ``within`` is the column by which rows are found.
    """
    names = [name for name in ("prompt_id", "digest") if name in table.c]

    def known() -> dict[tuple[Any, ...], int]:
        query = sa.select(table.c.id, *(table.c[name] for name in names))
        found = db.execute(query.where(within.in_({row[within.name] for row in rows})))
        return {tuple(row)[1:]: row.id for row in found}

    ids = known()
    missing: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        if key not in ids:
            missing.setdefault(key, row)
    if missing:
        db.execute(table.insert(), list(missing.values()))
        ids = known()
    return ids, set(missing)


def find_unit(db: Connection, unit: NewUnit) -> tuple[int, list[int]]:
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


def put_outside_vote(
    db: Connection, labeler: int, unit_id: int, vote: Vote, seconds: float, details: Mapping[str, Any] | None
) -> None:
    """Store a vote that wasn't made on the page."""
    a, now = schema.assignments, time.time()
    found = db.execute(sa.select(a.c.id).where(a.c.unit_id == unit_id, a.c.labeler_id == labeler, ~a.c.repeat)).scalar()
    if found is None:
        found = add_assignment(db, unit_id, labeler, order=(), now=now, leased_until=now)
    put_vote(db, found, vote, seconds=seconds, now=now, details=details)


def new_id(result: Any) -> int:
    """Return the id of the row that a statement inserted."""
    return int(result.inserted_primary_key[0])


def _text(prompt: Conversation) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
