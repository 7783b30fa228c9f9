"""The course of the learning rate, by hand and against the one of transformers."""

import pytest
import torch
from transformers import get_scheduler

from reinforcepp.training.learner import share_of_peak


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0, 0.25, 0.5, 0.75, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
    ],
)
def test_by_hand(kind, expected):
    found = [share_of_peak(step, kind=kind, warmup=4, steps=8) for step in range(10)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3, 12])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_as_in_transformers(kind, theirs, warmup):
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    (peak,) = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=11).lr_lambdas
    for step in range(12):
        assert share_of_peak(step, kind=kind, warmup=warmup, steps=11) == pytest.approx(peak(step), abs=1e-12)
