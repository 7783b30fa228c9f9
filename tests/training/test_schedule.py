"""The learning rate: schedule and warmup by hand and against transformers, the default, and what a resumed run uses."""

import pytest
import tiny
import torch
from transformers import get_scheduler

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.learning_rates import DEFAULT_LEARNING_RATES, default_learning_rate
from reinforcepp.training.schedule import share_of_peak, with_learning_rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
    ],
)
def test_by_hand(kind, expected):
    found = [share_of_peak(step, kind=kind, warmup=4, steps=8) for step in range(10)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3, 12])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_as_in_transformers_after_the_warmup(kind, theirs, warmup):
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    (peak,) = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=11).lr_lambdas
    for step in range(warmup, 12):
        assert share_of_peak(step, kind=kind, warmup=warmup, steps=11) == pytest.approx(peak(step), abs=1e-12)


@pytest.mark.parametrize("config", [RewardModelConfig, SftConfig, ReinforceConfig])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_ratio": 0.1}, 1),
        ({"warmup_ratio": 0.25}, 3),
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_ratio": 0.5, "warmup_steps": 2}, 2),
    ],
)
def test_warmup_steps(config, settings, expected):
    assert config(**settings).warmup_of(9) == expected


def test_no_step_of_a_training_has_a_learning_rate_of_0():
    for kind in ("constant", "linear", "cosine"):
        for warmup in (0, 1, 5, 9):
            assert all(share_of_peak(step, kind=kind, warmup=warmup, steps=9) > 0 for step in range(9))


# --- the default ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", DEFAULT_LEARNING_RATES)
def test_larger_models_have_a_lower_default_and_lora_a_higher_one(training):
    sizes = (1_000_000, 80_000_000, 500_000_000, 7_000_000_000)
    full, lora = ([default_learning_rate(training, size, lora=lora) for size in sizes] for lora in (False, True))
    assert full == sorted(full, reverse=True)
    assert all(low < high for low, high in zip(full, lora, strict=True))


@pytest.mark.parametrize("config", [RewardModelConfig, SftConfig, ReinforceConfig])
def test_the_default_is_printed_and_a_given_rate_is_kept(config, capsys):
    model = tiny.model().config
    found = with_learning_rate(config(), model)
    assert found.learning_rate == default_learning_rate(config.TRAINING, 10**5, lora=False)
    assert f"Learning rate {found.learning_rate:g}: the default for full training" in capsys.readouterr().err
    assert with_learning_rate(config(use_peft=True), model).learning_rate > found.learning_rate
    capsys.readouterr()
    given = config(learning_rate=3e-4)
    assert with_learning_rate(given, model) is given and not capsys.readouterr().err


def test_a_resumed_run_keeps_the_rate_of_its_start():
    assert with_learning_rate(SftConfig(), tiny.model().config, {"learning_rate": 0.5}).learning_rate == 0.5
