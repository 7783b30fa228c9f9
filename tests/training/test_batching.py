"""No prompt and no row is lost or doubled, whatever divides what."""

from itertools import pairwise

import pytest

from reinforcepp.distributed.ranks import Ranks
from reinforcepp.models.micro_batches import MicroBatchLimit, micro_batches
from reinforcepp.training.batches import optimizer_batches
from reinforcepp.training.passes import rank_passes
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.types import Prompt


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
    lengths = [(i % 5 + 1, 7 * i % 11 + 1) for i in range(rows)]
    chunks = list(optimizer_batches(rows, size, seed=3))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(rows))
    for chunk in chunks:
        micro = list(micro_batches(lengths, chunk, MicroBatchLimit(None, rows=2)))
        assert sorted(i for m in micro for i in m) == sorted(chunk)
        assert all(len(m) <= 2 for m in micro)


LENGTHS = [(i % 5 + 1, 7 * i % 11 + 1) for i in range(40)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "rows"), [(1, None), (24, None), (24, 2), (1000, 7), (10**6, None)])
def test_micro_batches_are_as_large_as_their_limit_allows(tokens, rows, packed):
    limit = MicroBatchLimit(tokens, rows, packed)
    batches = list(micro_batches(LENGTHS, range(40), limit))
    assert sorted(i for batch in batches for i in batch) == list(range(40))

    def allowed(batch: list[int]) -> bool:
        within = limit.tokens_of([LENGTHS[i] for i in batch]) <= tokens and (rows is None or len(batch) <= rows)
        return within or len(batch) == 1

    assert all(allowed(batch) for batch in batches)
    assert not any(allowed([*one, other[0]]) for one, other in pairwise(batches))


def test_padding_is_that_of_prompts_on_the_left_and_responses_on_the_right():
    assert MicroBatchLimit(1).tokens_of([(3, 1), (1, 4)]) == 2 * 7
    assert MicroBatchLimit(1, packed=True).tokens_of([(3, 1), (1, 4)]) == 9


def test_a_batch_without_enough_memory_is_divided():
    assert MicroBatchLimit(1000).halved([(3, 5)] * 10) == MicroBatchLimit(40)
    assert MicroBatchLimit(50).halved([(3, 5)] * 6) == MicroBatchLimit(24)
    assert MicroBatchLimit(None, 8).halved([(3, 5)] * 8) == MicroBatchLimit(None, 4)
    assert MicroBatchLimit(1, 1).halved([(3, 5)]) == MicroBatchLimit(1, 1)


class OneOf:
    """One of several ranks."""

    slice_of = Ranks.slice_of

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


@pytest.mark.parametrize("limit", [MicroBatchLimit(24), MicroBatchLimit(None, 3), MicroBatchLimit(1)])
def test_all_ranks_make_equally_many_passes_over_all_rows(limit):
    rows = list(range(39, 2, -1))
    passes = [rank_passes(LENGTHS, rows, limit, OneOf(index, 4)) for index in range(4)]
    assert len({len(one) for one in passes}) == 1
    assert sorted(row for one in passes for micro, weight in one if weight for row in micro) == sorted(rows)
