"""Alembic's environment and versions of the feedback database."""
