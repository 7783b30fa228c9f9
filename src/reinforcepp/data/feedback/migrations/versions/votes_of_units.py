"""Keep the number of votes with each unit, so that the queue doesn't count them for every page, and index leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COUNT_VOTES = """
    UPDATE units SET votes = (
    SELECT count(*) FROM assignments
    JOIN votes ON votes.assignment_id = assignments.id AND votes.undone IS NULL AND NOT votes.skipped
    JOIN labelers ON labelers.id = assignments.labeler_id AND labelers.kind = 'human'
    WHERE assignments.unit_id = units.id AND NOT assignments.repeat
    )
"""


def upgrade() -> None:
    """Add the column and fill it."""
    op.add_column("units", sa.Column("votes", sa.Integer(), server_default="0", nullable=False))
    op.execute(COUNT_VOTES)
    op.create_index("ix_assignments_leased_until", "assignments", ["leased_until"])
