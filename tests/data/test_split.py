"""The held-out split: by prompt, by hash, never empty unless requested."""

from __future__ import annotations

import random

import pytest

from reinforcepp.data import PromptRow, split_by_prompt
from reinforcepp.errors import ConfigError
from reinforcepp.types import Preference


def pairs_of(number_of_prompts: int, per_prompt: int = 1) -> list[Preference]:
    return [Preference(f"p{i}", f"a{j}", "b") for j in range(per_prompt) for i in range(number_of_prompts)]


def test_no_prompt_is_on_both_sides_in_any_spelling():
    forms = ["caf\u00e9 {}", "cafe\u0301 {}", " caf\u00e9\n {} "]
    rows = [Preference(form.format(i), "a", "b") for form in forms for i in range(40)]
    train, heldout = split_by_prompt(rows, 0.3, seed=1)
    assert len(heldout) == 3 * 12 and len(train) == 3 * 28
    assert {row.prompt.split()[1] for row in train}.isdisjoint(row.prompt.split()[1] for row in heldout)


def test_every_row_is_on_one_side_in_the_given_order():
    rows = pairs_of(20, per_prompt=3)
    train, heldout = split_by_prompt(rows, 0.4, seed=5)
    assert sorted(map(rows.index, train)) == list(map(rows.index, train))
    assert sorted(map(rows.index, heldout)) == list(map(rows.index, heldout))
    assert sorted(map(rows.index, train + heldout)) == list(range(60))


def test_row_order_and_pairs_per_prompt_do_not_matter():
    rows = pairs_of(50, per_prompt=2)
    shuffled = random.Random(0).sample(rows, len(rows))
    expected = {row.prompt for row in split_by_prompt(rows, 0.2, seed=0)[1]}
    assert {row.prompt for row in split_by_prompt(shuffled, 0.2, seed=0)[1]} == expected
    assert {row.prompt for row in split_by_prompt(pairs_of(50), 0.2, seed=0)[1]} == expected


def test_split_depends_on_the_seed_only():
    rows = pairs_of(30)
    heldout = [[row.prompt for row in split_by_prompt(rows, 0.2, seed)[1]] for seed in (0, 0, 1)]
    assert heldout[0] == heldout[1] != heldout[2]
    # Golden values, because another ranking would move prompts between the sides of resumed runs.
    assert heldout[0] == ["p2", "p7", "p10", "p14", "p23", "p27"]


def test_larger_fraction_keeps_held_out_prompts_held_out():
    rows = pairs_of(40)
    small, large = ({row.prompt for row in split_by_prompt(rows, fraction, seed=2)[1]} for fraction in (0.1, 0.5))
    assert small < large


@pytest.mark.parametrize(
    ("number", "fraction", "expected"),
    [(0, 0.5, 0), (1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.0, 0), (10, 0.25, 2), (10, 0.999, 9), (24, 0.1, 2)],
)
def test_number_of_held_out_prompts(number, fraction, expected):
    train, heldout = split_by_prompt(pairs_of(number), fraction, seed=0)
    assert (len(train), len(heldout)) == (number - expected, expected)


def test_any_object_with_a_prompt_can_be_split():
    rows = [PromptRow(f"p{i}", {}) for i in range(10)] + [PromptRow("\ud800", {})]
    train, heldout = split_by_prompt(rows, 0.5, seed=0)
    assert len(train) + len(heldout) == 11
    assert {row.prompt for row in heldout} == {
        row.prompt for row in split_by_prompt([Preference(row.prompt, "a", "b") for row in rows], 0.5, seed=0)[1]
    }


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ConfigError, match="heldout_fraction: "):
        split_by_prompt(pairs_of(4), fraction, seed=0)
