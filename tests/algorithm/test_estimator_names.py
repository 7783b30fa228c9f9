"""docs/estimators.md: every number of this project comes from its functions, those of other projects from their formulas."""

import re
from statistics import mean, pstdev, stdev
from types import SimpleNamespace

import pytest
import torch
import yaml

from reinforcepp.algorithm.advantages import compute_advantages
from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.config import ReinforceConfig
from reinforcepp.training.builder import sampling_gap
from scripts import ROOT

PAGE = (ROOT / "docs/estimators.md").read_text(encoding="utf-8")
REWARDS, LENGTHS = [1.0, 0.0, 1.0, 1.0], [3, 1, 2, 2]
GROUP_MEANS = [0.5, 0.5, 1.0, 1.0]
CENTERED = [reward - group for reward, group in zip(REWARDS, GROUP_MEANS, strict=True)]
GROUP_STD = [stdev([1, 0]), stdev([1, 0]), 0.0, 0.0]


def table(heading):
    """Return the cells of the first table after a heading, by row and column."""
    rows = re.search(rf"^#+ {heading}$.*?\n\n(\|.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL).group(1).splitlines()
    header, _, *body = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {cells[0]: dict(zip(header[1:], cells[1:], strict=True)) for cells in body}


def numbers(cell):
    return None if cell == "none" else [float(number) for number in cell.split(", ")]


def over_tokens(values, deviation):
    """(x - mean) / deviation, each value as often as its completion has tokens."""
    tokens = [value for value, length in zip(values, LENGTHS, strict=True) for _ in range(length)]
    return [(value - mean(tokens)) / deviation(tokens) for value in values]


def divided(values, divisors, epsilon):
    return [value / (divisor + epsilon) for value, divisor in zip(values, divisors, strict=True)]


LEAVE_ONE_OUT = [2 * value for value in CENTERED]
OTHERS = {
    "reinforce_plus_plus": (
        over_tokens(REWARDS, pstdev),
        over_tokens(REWARDS, stdev),
        [value / (stdev(LEAVE_ONE_OUT) + 1e-4) for value in LEAVE_ONE_OUT],
    ),
    "reinforce_plus_plus_baseline": (over_tokens(CENTERED, pstdev), over_tokens(CENTERED, stdev), None),
    "rloo": (LEAVE_ONE_OUT,) * 3,
    "grpo": tuple(divided(CENTERED, GROUP_STD, epsilon) for epsilon in (1e-9, 1e-6, 1e-4)),
    "dr_grpo": (CENTERED,) * 3,
    "flash_reinforce": ([reward - mean(REWARDS) for reward in REWARDS], None, None),
}


@pytest.mark.parametrize(("name", "cells"), table("One batch, four projects").items())
def test_the_advantages_of_one_batch(name, cells):
    scale = {"estimator": "grpo", "scale": "none"} if name == "dr_grpo" else {"estimator": name}
    mask = torch.tensor([[1.0] * length + [0.0] * (3 - length) for length in LENGTHS])
    groups = torch.tensor([0, 0, 1, 1])
    ours, _ = compute_advantages(torch.tensor(REWARDS), None, mask, kl_coef=0.0, group_ids_B=groups, **scale)
    expected = {"here": ours[:, 0].tolist(), **dict(zip(("OpenRLHF", "verl", "TRL"), OTHERS[name], strict=True))}
    for project, values in expected.items():
        assert numbers(cells[project]) == (None if values is None else pytest.approx(values, abs=6e-5)), project


def test_every_estimator_is_on_the_page():
    named = table("Advantages by name")
    assert {name.split("`")[0] for name in named} == set(ESTIMATORS)
    assert set(table("One batch, four projects")) - {"dr_grpo"} == set(ESTIMATORS) - {"ppo"}


def test_the_settings_of_flash_reinforce():
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL).group(1))
    config = ReinforceConfig(**settings)
    assert sampling_gap(config, SimpleNamespace(shares_trainer_forward=True)) == ("binary_kl", False)
    assert config.updates_per_step == 1 and config.importance_max_kl == 0.003


def other_returns(gamma, *, resets):
    """Return the returns of OpenRLHF, or of verl, which resets at masked tokens, for the mask [1, 0, 1] and a reward of 1."""
    running, returns = 0.0, []
    for reward, sampled in ((1.0, 1), (0.0, 0), (0.0, 1)):
        running = reward + gamma * running
        returns.append(running)
        running *= sampled if resets else 1
    return [returns[2], returns[0]]


@pytest.mark.parametrize(("gamma", "cells"), table("Returns across masked tokens").items())
def test_returns_across_masked_tokens(gamma, cells):
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    _, returns = compute_advantages(torch.tensor([1.0]), None, mask, kl_coef=0.0, gamma=float(gamma))
    assert numbers(cells["here"]) == returns[mask.bool()].tolist()
    assert numbers(cells["OpenRLHF"]) == other_returns(float(gamma), resets=False)
    assert numbers(cells["verl"]) == other_returns(float(gamma), resets=True)


@pytest.mark.parametrize(("per", "cells"), table("Turns and discounts").items())
def test_the_returns_of_two_turns(per, cells):
    mask, turns = torch.tensor([[1.0, 1, 0, 1, 1]]), torch.tensor([[0.0, 2, 0, 0, 0]])
    arguments = {"kl_coef": 0.0, "gamma": 0.5, "discount_per": per, "turn_rewards_BT": turns}
    _, returns = compute_advantages(torch.tensor([3.0]), None, mask, **arguments)
    assert numbers(cells["returns of the four tokens"]) == returns[mask.bool()].tolist()
