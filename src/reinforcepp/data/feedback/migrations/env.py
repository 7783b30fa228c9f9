"""Run the migrations on the connection that :class:`~reinforcepp.data.feedback.store.Store` passes to Alembic."""

from __future__ import annotations

from alembic import context

from reinforcepp.data.feedback.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)  # A batch copies a table, because SQLite can't change its columns.
with context.begin_transaction():
    context.run_migrations()
