"""Tests that every rollout engine must pass. A suite inherits ``EngineContract`` and provides the engine.

The engine runs a tiny GPT-2 in float32 whose pad token is its EOS, so plain ``transformers`` is the reference throughout.
"""

import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reinforcepp.errors import RolloutError
from reinforcepp.models import tokenization as tokens
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.types import Completion, Prompt, Sampling

END_IDS = [0, 7, 31, 32, 33, 90, 200, 201]  # many, so that random weights sample an end token about every 40 tokens
TEXTS = [
    "How do I check the IP address?",
    "ping",
    "Why can't this host resolve names? Look at resolvectl status, then at the gateway, then at the route to it.",
    "Run dig.",
    "trace the route to the server of my Linux machine, and read the inet line of each interface of each host.",
    "restart",
    "status and route",
]


def prepared_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer like ``load_tokenizer`` does: pad is EOS, and it has a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = QUESTION_ANSWER_TEMPLATE
    return tokenizer


def prepared_model(family: str = "gpt2", **changes) -> PreTrainedModel:
    model = tiny.model(family, **changes)
    model.generation_config.eos_token_id = END_IDS
    return model


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts=TEXTS) -> list[Prompt]:
    return [Prompt(text, tuple(tokens.encode(tokenizer, text)), key) for key, text in enumerate(texts)]


def drawn(completions: list[Completion]) -> dict[int, list[tuple[int, ...]]]:
    """Return the sampled ids by prompt key."""
    by_key: dict[int, list[tuple[int, ...]]] = {}
    for completion in completions:
        by_key.setdefault(completion.prompt.key, []).append(completion.ids)
    return by_key


def generate_plainly(model: PreTrainedModel, prompt: Prompt, max_new_tokens: int, **settings) -> tuple[int, ...]:
    """Return the greedy completion of one prompt by the library's ``generate``, unpadded and alone."""
    ids = torch.tensor([prompt.ids])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def first_token_probabilities(model: PreTrainedModel, prompt: Prompt, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1]
    return (logits.double() / temperature).softmax(-1)


def chi_square(counts: Counter, probabilities: torch.Tensor, bins: int = 10) -> float:
    """Return Pearson's statistic of the counts over ``bins`` groups of tokens of about equal probability."""
    order = probabilities.argsort(descending=True)
    group = (probabilities[order].cumsum(0) * bins).ceil().clamp(1, bins).long() - 1
    total = sum(counts.values())
    statistic = 0.0
    for b in range(bins):
        members = order[group == b]
        expected = total * float(probabilities[members].sum())
        statistic += (sum(counts[int(t)] for t in members) - expected) ** 2 / expected
    return statistic


class EngineContract:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> PreTrainedModel:
        return prepared_model()

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls) -> PreTrainedTokenizerBase:
        return prepared_tokenizer()

    @pytest.fixture
    def engine(self) -> RolloutEngine:
        """Return an engine with ``model``'s weights; it can stay alive between tests."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def prompts(cls, tokenizer) -> list[Prompt]:
        return prompts_of(tokenizer)

    # --- tokens and log-probabilities against plain transformers ---

    def test_greedy_tokens_equal_those_of_generate(self, engine, model, prompts):
        for completion in engine.generate(prompts, Sampling(24, temperature=0)):
            assert completion.ids == generate_plainly(model, completion.prompt, 24)

    def test_closing_a_stream_early_leaves_the_engine_unchanged(self, engine, prompts):
        sampling = Sampling(12, seed=3)
        expected = engine.generate(prompts, sampling)
        with closing(engine.stream(prompts[0], sampling)) as growing:
            assert len(next(growing).ids) == 1
        growing = list(engine.stream(prompts[1], sampling))
        assert len(growing) == len(expected[1].ids) and growing[-1].ids == expected[1].ids
        assert [c.ids for c in engine.generate(prompts, sampling)] == [c.ids for c in expected]

    def test_a_stream_ends_with_the_completion_of_generate(self, engine, prompts):
        sampling = Sampling(12, seed=4)
        (expected,) = engine.generate(prompts[:1], sampling)
        growing = list(engine.stream(prompts[0], sampling))
        assert len(growing) == len(expected.ids) > 1 and growing[-1].ids == expected.ids
        assert growing[-1].finish_reason == expected.finish_reason
        for shorter, longer in pairwise(growing):
            assert longer.ids[: len(shorter.ids)] == shorter.ids

    def test_greedy_tokens_with_repetition_penalty_equal_those_of_generate(self, engine, model, prompts):
        for completion in engine.generate(prompts, Sampling(24, temperature=0, repetition_penalty=1.5)):
            assert completion.ids == generate_plainly(model, completion.prompt, 24, repetition_penalty=1.5)

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
    def test_logprobs_equal_those_of_the_model(self, engine, model, prompts, temperature):
        completions = engine.generate(prompts, Sampling(16, temperature=temperature, num_samples=2))
        with torch.no_grad():
            expected, _, mask = response_logprobs(
                model,
                [c.prompt.ids for c in completions],
                [c.ids for c in completions],
                pad_id=0,
                temperature=temperature or 1.0,
            )
        for i, completion in enumerate(completions):
            assert len(completion.logprobs) == len(completion.ids)
            reference = expected[i][mask[i].bool()]
            torch.testing.assert_close(torch.tensor(completion.logprobs), reference, rtol=0, atol=1e-4)

    # --- the end of a completion ---

    def test_eos_is_in_the_ids_only_if_it_was_sampled(self, engine, tokenizer, prompts):
        completions = engine.generate(prompts, Sampling(20, num_samples=8, seed=1))
        reasons = Counter(c.finish_reason for c in completions)
        assert set(reasons) == {"stop", "length"}, reasons
        for c in completions:
            assert not set(END_IDS) & set(c.ids[:-1])
            if c.finish_reason == "stop":
                assert c.ids[-1] in END_IDS
                assert 1 <= len(c.ids) <= 20
            else:
                assert c.ids[-1] not in END_IDS
                assert len(c.ids) == 20
            spoken = c.ids[:-1] if c.finish_reason == "stop" else c.ids
            assert c.text == tokenizer.decode(spoken, skip_special_tokens=True).removeprefix(" ")
        assert {c.ids[-1] for c in completions if c.finish_reason == "stop"} - {0}, (
            "no end token other than EOS was sampled"
        )

    def test_a_completion_can_have_one_token(self, engine, prompts):
        for c in engine.generate(prompts, Sampling(1)):
            assert len(c.ids) == len(c.logprobs) == 1

    # --- random numbers belong to the request ---

    def test_results_do_not_depend_on_the_batch(self, engine, prompts):
        sampling = Sampling(12, num_samples=2, seed=5)
        together = drawn(engine.generate(prompts, sampling))
        assert drawn(engine.generate(prompts, sampling)) == together
        assert drawn(engine.generate(prompts[::-1], sampling)) == together
        assert drawn(engine.generate(prompts[3:5], sampling)) == {k: together[k] for k in (3, 4)}
        assert drawn(engine.generate(prompts[2:3], sampling)) == {2: together[2]}

    def test_penalized_results_do_not_depend_on_the_batch(self, engine, prompts):
        """Padding must not count as seen tokens."""
        sampling = Sampling(20, num_samples=2, seed=6, repetition_penalty=1.8)
        together = engine.generate(prompts, sampling)
        alone = [c for prompt in prompts for c in engine.generate([prompt], sampling)]
        assert drawn(alone) == drawn(together)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)

    def test_a_smaller_sample_count_is_a_prefix(self, engine, prompts):
        three = drawn(engine.generate(prompts[:2], Sampling(8, num_samples=3, seed=2)))
        two = drawn(engine.generate(prompts[:2], Sampling(8, num_samples=2, seed=2)))
        assert two == {key: ids[:2] for key, ids in three.items()}

    def test_samples_prompts_and_seeds_differ(self, engine, prompts):
        samples = drawn(engine.generate(prompts[:1], Sampling(12, num_samples=6, seed=3)))[0]
        assert len(set(samples)) == 6
        other_seed = drawn(engine.generate(prompts[:1], Sampling(12, num_samples=6, seed=4)))[0]
        assert not set(samples) & set(other_seed)
        other_key = drawn(engine.generate([replace(prompts[0], key=99)], Sampling(12, num_samples=6, seed=3)))[99]
        assert not set(samples) & set(other_key)

    def test_global_random_state_is_unchanged(self, engine, prompts):
        torch.manual_seed(11)
        np.random.seed(11)
        random.seed(11)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        engine.generate(prompts, Sampling(6, num_samples=2))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()

    # --- shape of a batch ---

    def test_samples_follow_the_order_of_the_prompts(self, engine, prompts):
        completions = engine.generate(prompts, Sampling(4, num_samples=3))
        assert [c.prompt.key for c in completions] == [p.key for p in prompts for _ in range(3)]

    def test_no_prompts_give_no_completions(self, engine):
        assert engine.generate([], Sampling(4)) == []

    def test_a_prompt_can_fill_the_context(self, engine, tokenizer):
        ids = tuple(tokens.encode(tokenizer, " ".join(TEXTS) * 3)[:252])
        assert len(ids) == 252
        [completion] = engine.generate([Prompt("long", ids, 0)], Sampling(4, seed=8))
        assert len(completion.ids) == 4 or completion.finish_reason == "stop"

    def test_a_prompt_beyond_the_context_is_refused(self, engine, prompts):
        long = Prompt("a long prompt", (5,) * 253, 7)
        with pytest.raises(RolloutError, match=r"253 tokens.*256.*max_prompt_length.*a long prompt"):
            engine.generate([*prompts, long], Sampling(4))

    def test_an_empty_prompt_is_refused(self, engine, prompts):
        with pytest.raises(RolloutError, match="empty"):
            engine.generate([*prompts, Prompt("", (), 7)], Sampling(4))

    # --- distribution ---

    def test_sampling_follows_the_distribution(self, engine, model, prompts):
        """99.99% of correct samples score below 34 (9 degrees of freedom); another temperature must score above."""
        for temperature in (1.0, 0.6):
            sampling = Sampling(1, temperature=temperature, num_samples=2000, seed=0)
            counts = Counter(c.ids[0] for c in engine.generate(prompts[:1], sampling))
            assert chi_square(counts, first_token_probabilities(model, prompts[0], temperature)) < 34
            for wrong in (temperature * 1.4, temperature / 1.4):
                assert chi_square(counts, first_token_probabilities(model, prompts[0], wrong)) > 34

    def test_top_k_1_is_greedy(self, engine, prompts):
        greedy = drawn(engine.generate(prompts, Sampling(16, temperature=0)))
        assert drawn(engine.generate(prompts, Sampling(16, top_k=1, seed=3))) == greedy

    @pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 40, "top_p": 0.5}], ids=str)
    def test_filters_apply_and_logprobs_include_them(self, engine, model, prompts, filters):
        probabilities = first_token_probabilities(model, prompts[0], 0.9)
        ordered, order = probabilities.sort(descending=True)
        ordered, order = ordered[: filters.get("top_k")], order[: filters.get("top_k")]
        ordered = ordered / ordered.sum()
        kept = int((ordered.cumsum(0) - ordered < filters.get("top_p", 1.0)).sum())
        allowed = dict(zip(order[:kept].tolist(), (ordered[:kept] / ordered[:kept].sum()).log().tolist(), strict=True))

        completions = engine.generate(prompts[:1], Sampling(1, temperature=0.9, num_samples=400, seed=9, **filters))
        assert {c.ids[0] for c in completions} <= set(allowed)
        assert len({c.ids[0] for c in completions}) > len(allowed) / 3
        for c in completions:
            assert c.logprobs[0] == pytest.approx(allowed[c.ids[0]], abs=1e-4)

    # --- weights ---

    def test_load_weights_takes_effect_and_can_be_undone(self, engine, model, prompts):
        sampling = Sampling(12, temperature=0)
        before = drawn(engine.generate(prompts, sampling))
        other = prepared_model(seed=1)
        kept = prepared_model()  # the engine can share the model object, so the original weights are restored from here
        engine.load_weights(other)
        for completion in engine.generate(prompts, sampling):
            assert completion.ids == generate_plainly(other, completion.prompt, 12)
        engine.load_weights(kept)
        assert drawn(engine.generate(prompts, sampling)) == before
