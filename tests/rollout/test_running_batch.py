"""Rows that enter a running batch get the completions that they get alone."""

import math
from dataclasses import replace

import pytest
import torch
from rollout.contract import END_IDS, prepared_model, prepared_tokenizer, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

from reinforcepp.models import packed_attention, tokenization
from reinforcepp.rollout.batch_rows import BatchRow
from reinforcepp.rollout.decoding import LADDER
from reinforcepp.rollout.running_batch import RunningBatch
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Prompt, Sampling

UNREFILLED = replace(LADDER[0], refills=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_completions_equal_those_of_a_batch_that_is_not_refilled(family, penalty):
    """Gemma 2 alternates attention over all tokens with a sliding window, here shorter than most sequences."""
    model, tokenizer = (
        prepared_model(family, **{"sliding_window": 12} if family == "gemma2" else {}),
        prepared_tokenizer(),
    )
    prompts, sampling = prompts_of(tokenizer)[:5], Sampling(24, 0.9, num_samples=3, seed=1, repetition_penalty=penalty)
    expected = TransformersEngine(model, tokenizer, decoding=UNREFILLED).generate(prompts, sampling)
    completions = TransformersEngine(model, tokenizer, 4).generate(prompts, sampling)
    assert len({len(c.ids) for c in expected}) > 3
    assert [c.prompt.key for c in completions] == [key for key in range(5) for _ in range(3)]
    assert [c.ids for c in completions] == [c.ids for c in expected]
    for completion, other in zip(completions, expected, strict=True):
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def geometric_rows(sampling: Sampling, prompts: list[Prompt]) -> list[BatchRow]:
    """Return rows whose lengths are uneven."""
    generator = torch.Generator().manual_seed(0)
    rows = [BatchRow.start(prompt, sample, sampling) for prompt in prompts for sample in range(sampling.num_samples)]
    for row in rows:
        row.limit = min(sampling.max_new_tokens, int(torch.empty(1).geometric_(0.08, generator=generator)))
    return rows


def decoded(model, rows, size, sampling, decoding=LADDER[0], read_interval=1):
    """Decode ``rows``; return the rows of each forward pass."""
    (queue,) = decoding.queues(rows)
    batch = RunningBatch(model, queue, size, sampling, decoding, frozenset(), 0, read_interval)
    return [len(batch.rows) for _ in batch.decode()]


def test_uneven_completions_cost_what_their_tokens_cost():
    model, sampling = prepared_model(), Sampling(60, num_samples=6)
    prompts = prompts_of(prepared_tokenizer())
    rows, others = geometric_rows(sampling, prompts), geometric_rows(sampling, prompts)
    steps, unrefilled = decoded(model, rows, 8, sampling), decoded(model, others, 8, sampling, UNREFILLED)
    tokens = sum(len(row.ids) for row in rows)
    assert [len(row.ids) for row in rows] == [row.limit for row in rows]
    assert max(steps) == 8 and tokens <= sum(steps) < 1.25 * tokens
    assert len(steps) < 0.75 * len(unrefilled)
    assert len(steps) < 1.5 * math.ceil(tokens / 8)


def test_each_prompt_is_run_once_although_its_samples_enter_at_different_steps(monkeypatch):
    model, sampling = prepared_model(), Sampling(20, num_samples=5)
    shapes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: shapes.append(tuple(k["input_ids"].shape)) or forward(**k))
    prompts = prompts_of(prepared_tokenizer())
    decoded(model, geometric_rows(sampling, prompts), 4, sampling)
    assert sum(rows for rows, columns in shapes if columns > 1) == len(prompts)
    assert max(rows for rows, columns in shapes if columns == 1) == 4


def test_heads_that_share_keys_get_copies_for_the_prompts_only(monkeypatch):
    AttentionInterface.register("sdpa", sdpa_attention.sdpa_attention_forward)  # as in a new process
    packed_attention.extend_sdpa.cache_clear()
    copied, repeat = [], sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, groups: copied.append(x) or repeat(x, groups))
    prompts, sampling = prompts_of(prepared_tokenizer())[:3], Sampling(6)
    decoded(prepared_model("llama"), [BatchRow.start(prompt, 0, sampling) for prompt in prompts], 3, sampling)
    assert len(copied) == 2 * 2  # keys and values of two layers


def test_a_finished_row_of_full_context_runs_on_without_leaving_the_context():
    """Its positions would otherwise exceed GPT-2's position embeddings."""
    model, tokenizer = prepared_model(), prepared_tokenizer()
    sampling = Sampling(8, seed=3)
    full = Prompt("", tuple(tokenization.encode(tokenizer, "ping status route " * 99)[:248]), 0)
    rows = [BatchRow.start(prompt, 0, sampling) for prompt in [*prompts_of(tokenizer), full]]
    for row in rows[:-1]:
        row.limit = 3
    decoded(model, rows, 5, sampling, read_interval=8)
    assert [len(row.ids) for row in rows] == [3] * 7 + [8]


class Reads(TorchDispatchMode):
    """Counts operations that make the CPU wait for a GPU."""

    WAITING = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.is_nonzero",
        "aten.equal",
        "aten.item",
        "aten.masked_select",
    )

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self.add() or tolist(tensor))

    def add(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).startswith(self.WAITING)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("interval", [3, 8])
def test_tokens_are_read_only_at_the_interval(monkeypatch, interval):
    """No other operation of a step waits for the device. Results don't change."""
    model, sampling = prepared_model(), Sampling(24, seed=1, repetition_penalty=1.3)
    prompts = prompts_of(prepared_tokenizer())
    read_each, read_rarely = ([BatchRow.start(prompt, 0, sampling) for prompt in prompts] for _ in range(2))
    end_ids = frozenset(END_IDS)
    for _ in RunningBatch(model, read_each, 7, sampling, LADDER[0], end_ids, 0).decode():
        pass
    with Reads(monkeypatch) as reads:
        steps = sum(1 for _ in RunningBatch(model, read_rarely, 7, sampling, LADDER[0], end_ids, 0, interval).decode())
    for row, other in zip(read_rarely, read_each, strict=True):
        assert row.ids == other.ids and row.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({len(row.ids) for row in read_each}) > 2
    assert reads.count < steps
