"""Traces of models are shared by all tests of the planner."""

import pytest
from plan import traced

from reinforcepp.plan import command


@pytest.fixture(autouse=True)
def shared_traces(monkeypatch):
    monkeypatch.setattr(command, "trained_model", traced.trained_model)
    monkeypatch.setattr(command, "frozen_model", traced.frozen_model)
