"""Fixtures of all tests of the planner."""

import pytest
import tiny
from planner import traced

from reinforcepp.planner import command


@pytest.fixture(autouse=True)
def shared_traces(monkeypatch):
    """Trace each model once for all tests."""
    monkeypatch.setattr(command, "trained_model", traced.trained_model)
    monkeypatch.setattr(command, "frozen_model", traced.frozen_model)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a model folder that holds only the configuration."""
    monkeypatch.chdir(tmp_path)
    tiny.model("llama", tied=False).config.save_pretrained(tmp_path / "model")
    return tmp_path
