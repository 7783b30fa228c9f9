"""Sums over ranks in buckets, and the choice of an engine that ranks share."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from reinforcepp.distributed import ranks as ranks_module
from reinforcepp.distributed.ranks import Ranks, sum_buckets
from reinforcepp.rollout.selection import EngineChoice, agree_on_engine

SHAPES = [(), (3,), (2, 5), (40, 8), (1000,), (7,), (1,)]


class TwoRanks:
    """Two ranks in threads that sum by gloo; ``calls`` counts the sums of each rank."""

    def __init__(self, monkeypatch):
        self._rank, self.calls, self.store = threading.local(), [0, 0], distributed.HashStore()
        monkeypatch.setattr(ranks_module.distributed, "all_reduce", self._all_reduce)

    def _all_reduce(self, tensor):
        self.calls[self._rank.index] += 1
        self._rank.group.allreduce([tensor]).wait()

    def run(self, function):
        def as_rank(index):
            self._rank.index = index
            self._rank.group = distributed.ProcessGroupGloo(self.store, index, 2, timedelta(seconds=20))
            function(index)

        threads = [threading.Thread(target=as_rank, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def gradients(rank):
    generator = torch.Generator().manual_seed(rank)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [*made, made[2].bfloat16(), made[3].bfloat16().t(), made[1].double()]


def test_small_tensors_are_summed_in_few_calls_with_equal_bits(monkeypatch):
    ranks = object.__new__(Ranks)
    ranks.accelerator = SimpleNamespace(device=torch.device("cpu"))
    found = [gradients(0), gradients(1)]
    places = [tensor.data_ptr() for tensor in found[0]]
    two = TwoRanks(monkeypatch)
    two.run(lambda rank: ranks.sum_in_place(found[rank]))
    assert two.calls == [3, 3]  # one per dtype
    alone = [one + other for one, other in zip(gradients(0), gradients(1), strict=True)]
    for rank in range(2):
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(found[rank], alone, strict=True))
    assert places == [tensor.data_ptr() for tensor in found[0]]


def test_buckets_are_bounded_and_keep_the_order():
    tensors = [torch.full((size,), float(size)) for size in (10, 10, 10, 50, 10, 10)]
    buckets = list(sum_buckets(tensors, limit=100))
    assert [[len(tensor) for tensor in bucket] for bucket in buckets] == [[10, 10], [10], [50], [10, 10]]
    assert list(sum_buckets([])) == []
    hundreds = [torch.zeros(64, 16) for _ in range(400)]
    assert len(list(sum_buckets(hundreds))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_use_transformers_if_one_of_them_cannot_use_vllm(rank):
    vllm = EngineChoice("vllm", "vLLM 1.0 supports it", can_fall_back=True)
    transformers = EngineChoice("transformers", "vLLM isn't installed")

    def agreed(*choices):
        return agree_on_engine(choices[rank], SimpleNamespace(count=2, gather=lambda own: list(choices)))

    assert agreed(vllm, vllm) == vllm and agreed(transformers, transformers) == transformers
    chosen = agreed(vllm, transformers)
    assert chosen.name == "transformers" and not chosen.can_fall_back
    assert rank == 1 or chosen.reason == "vLLM can't be used on rank 1 of 2 (vLLM isn't installed)"
