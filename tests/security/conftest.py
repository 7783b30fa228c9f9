"""Attacks as tests: each does what an attacker would do and records what happened.

``@pytest.mark.attack(id, attack)`` names the weakness and the attack. benchmarks/security.py also runs the tests on an older
tree, where they fail, so they use only commands, files, HTTP and functions that were there before.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def outcome(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return the function that records what happened. A test calls it before its assertions."""
    marker = request.node.get_closest_marker("attack")
    assert marker is not None and len(marker.args) == 2, "mark the test with @pytest.mark.attack(id, attack)"
    for name, value in zip(("id", "attack"), marker.args, strict=True):
        record_property(name, value)
    return lambda text: record_property("outcome", text)
