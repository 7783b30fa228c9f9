"""The training curve as an image."""

import pytest

from reinforcepp.monitoring.curve import _smooth, draw_curve

STEPS = [{"step": i, "reward": 0.1 * i, "kl": 0.01 * i, "completions/mean_length": 20.0 + i} for i in range(1, 6)]


def test_it_is_a_png(tmp_path):
    draw_curve(STEPS, tmp_path / "curve.png", "A run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_steps_without_a_reward_are_skipped(tmp_path):
    draw_curve(STEPS, tmp_path / "all.png", "A run")
    draw_curve([*STEPS, {"step": 6, "skipped_updates": 1.0}], tmp_path / "skipped.png", "A run")
    assert (tmp_path / "skipped.png").read_bytes() == (tmp_path / "all.png").read_bytes()


def test_the_smoothed_line_is_an_exponential_moving_average():
    assert _smooth([1.0, 2.0, 4.0]) == pytest.approx([1.0, 1.3, 2.11])
