"""No prompt and no row is lost or doubled, whatever divides what."""

import pytest

from reinforcepp.training.batches import PromptBatches, micro_batches, optimizer_batches
from reinforcepp.types import Completion, Prompt


def prompts(count):
    return [Prompt(str(i), (1,) * (i % 5 + 1), i) for i in range(count)]


@pytest.mark.parametrize(("count", "size"), [(24, 8), (23, 8), (1, 8), (8, 1), (5, 3), (7, 7)])
def test_each_epoch_holds_every_prompt_once(count, size):
    batches = PromptBatches(prompts(count), size, seed=1)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [p.key for step in steps for p in batches.at(step)]
        assert sorted(seen) == list(range(count))


def test_order_differs_by_epoch_and_seed_but_not_by_call():
    one, other = PromptBatches(prompts(20), 20, seed=1), PromptBatches(prompts(20), 20, seed=2)
    order = [p.key for p in one.at(0)]
    assert order == [p.key for p in one.at(0)]
    assert order != [p.key for p in one.at(1)] and order != [p.key for p in other.at(0)]


@pytest.mark.parametrize(("rows", "size"), [(8, 8), (8, 3), (1, 1), (10, 4)])
def test_optimizer_and_micro_batches_partition_the_rows(rows, size):
    completions = [Completion(p, (1,) * (7 * p.key % 11 + 1), (), "", "stop") for p in prompts(rows)]
    chunks = list(optimizer_batches(rows, size, seed=3))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(rows))
    for chunk in chunks:
        micro = list(micro_batches(completions, chunk, 2))
        assert sorted(i for m in micro for i in m) == sorted(chunk)
        assert all(len(m) <= 2 for m in micro)
