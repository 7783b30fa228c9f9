"""Fixtures shared by the tests of data files."""

import json

import pytest


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path / name

    return write
