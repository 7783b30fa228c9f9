"""The tables of the feedback database, the same for SQLite and PostgreSQL.

    prompts      what was asked: a text or messages, its topic, and the other cells of its row
    answers      the responses to a prompt, with the model and the sampling parameters that made them
    units        one piece of work: a task on one to five answers to a prompt (unit_answers, by position). Its column votes
                 counts the votes of people, neither skipped, nor undone, nor repeats
    labelers     people and judges
    assignments  a unit that a labeler has: until ``leased_until`` if there is no vote yet, forever after it
    votes        what a labeler decided; an undone vote keeps its row
    settings     JSON by name

Times are seconds since 1970. A change of a table needs a migration in ``migrations/versions``.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

settings = Table(
    "settings",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("value", JSON, nullable=False),
)

prompts = Table(
    "prompts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String(32), nullable=False, unique=True),
    Column("prompt", JSON, nullable=False),
    Column("topic", String(200)),
    Column("columns", JSON, nullable=False),
)

answers = Table(
    "answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False),
    Column("digest", String(32), nullable=False),
    Column("text", Text, nullable=False),
    Column("model", String(500)),
    Column("sampling", JSON, nullable=False),
    Column("truncated", Boolean, nullable=False),
    UniqueConstraint("prompt_id", "digest"),
)

units = Table(
    "units",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String(32), nullable=False, unique=True),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False),
    Column("task", String(20), nullable=False),
    Column("overlap", Integer, nullable=False),
    Column("votes", Integer, nullable=False, server_default="0"),
    Column("priority", Double, nullable=False),
    Column("gold", JSON(none_as_null=True)),
    Column("created", Double, nullable=False),
    Index("ix_units_priority", "priority", "id"),
)

unit_answers = Table(
    "unit_answers",
    metadata,
    Column("unit_id", ForeignKey("units.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("answer_id", ForeignKey("answers.id"), nullable=False),
)

labelers = Table(
    "labelers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("kind", String(20), nullable=False),
    Column("created", Double, nullable=False),
)

assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token", String(32), nullable=False, unique=True),
    Column("unit_id", ForeignKey("units.id"), nullable=False),
    Column("labeler_id", ForeignKey("labelers.id"), nullable=False),
    Column("repeat", Boolean, nullable=False),
    Column("order", JSON, nullable=False),
    Column("started", Double, nullable=False),
    Column("leased_until", Double, nullable=False),
    UniqueConstraint("unit_id", "labeler_id", "repeat"),
    Index("ix_assignments_labeler_id", "labeler_id"),
    Index("ix_assignments_leased_until", "leased_until"),
)

votes = Table(
    "votes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("value", JSON, nullable=False),
    Column("skipped", Boolean, nullable=False),
    Column("details", JSON, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("created", Double, nullable=False),
    Column("undone", Double),
    # The database itself refuses a second vote that counts.
    Index(
        "uq_votes_assignment_id",
        "assignment_id",
        unique=True,
        sqlite_where=text("undone IS NULL"),
        postgresql_where=text("undone IS NULL"),
    ),
    Index("ix_votes_assignment_id_all", "assignment_id"),
)
