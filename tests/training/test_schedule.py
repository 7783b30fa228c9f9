"""The learning rate: schedule and warmup by hand and against transformers, the default, and what a resumed run uses."""

import re
from typing import get_args

import pytest
import tiny
import torch
from transformers import get_scheduler

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.learning_rates import DEFAULT_LEARNING_RATES, default_learning_rate
from reinforcepp.config.shared import Scheduler
from reinforcepp.errors import ConfigError
from reinforcepp.training.schedule import schedule_factor, with_learning_rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
    ],
)
def test_by_hand(kind, expected):
    found = schedule_factor(kind, warmup=4, steps=8)
    assert [found(step) for step in range(10)] == pytest.approx(expected, abs=1e-12)


SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "polynomial": {"power": 2.0, "lr_end": 0.01},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 4, "warmup_type": "cosine"},
}


@pytest.mark.parametrize("warmup", [0, 3, 11, 12])
@pytest.mark.parametrize("kind", get_args(Scheduler))
def test_as_in_transformers_after_the_warmup(kind, warmup):
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.5)
    (theirs,) = get_scheduler(name, optimizer, warmup, 11, SCHEDULES[kind]).lr_lambdas
    ours = schedule_factor(kind, warmup=warmup, steps=11, peak=0.5, arguments=SCHEDULES[kind])
    rates = [ours(step) for step in range(11)]
    assert rates[warmup:] == pytest.approx([theirs(step) for step in range(warmup, 11)], abs=1e-12)
    assert all(rate > 0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_rate"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "linear can't use {'power': 2}"),
    ],
)
def test_arguments_that_a_schedule_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_learning_rate(SftConfig(**settings), tiny.model().config)


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
