"""Sampling tokens at given uniform numbers."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

from reinforcepp import ReinforceConfig
from reinforcepp.config.sampling import TRANSFORMERS
from reinforcepp.errors import ConfigError
from reinforcepp.rollout.sampling import BLOCK, draw, filter_logits, uniforms
from reinforcepp.rollout.vllm.compat import sampling_settings
from reinforcepp.training.setup import check_sampling
from reinforcepp.types import Prompt, Sampling


def naive_index(logits, number):
    """Sum probabilities token by token until they exceed the number."""
    total = 0.0
    for token, p in enumerate(logits.double().softmax(-1).tolist()):
        total += p
        if number < total:
            return token
    raise AssertionError("rounding")


@pytest.mark.parametrize("size", [3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_it_inverts_the_cumulative_distribution(size):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(200, size, generator=generator)
    numbers = torch.rand(200, generator=generator, dtype=torch.float64) * 0.99
    ids, logprobs = draw(logits, numbers)
    expected = [naive_index(row, u) for row, u in zip(logits, numbers.tolist(), strict=True)]
    assert (
        sum(a != b for a, b in zip(ids.tolist(), expected, strict=True)) <= 1
    )  # at a boundary rounding can select either token
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(200), ids], atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("allowed", [[0], [700], [3, 4], [BLOCK - 1, BLOCK], [5, 699]])
def test_a_filtered_token_is_never_drawn(number, allowed):
    logits = torch.full((1, 701), float("-inf"))
    logits[0, allowed] = torch.tensor([0.3, -20.0])[: len(allowed)]
    ids, logprobs = draw(logits, torch.tensor([number], dtype=torch.float64))
    assert ids.item() in allowed and torch.isfinite(logprobs).all()


def test_without_numbers_it_returns_the_likeliest_token():
    logits = torch.randn(5, 300).bfloat16()
    ids, logprobs = draw(logits, None)
    assert torch.equal(ids, logits.argmax(-1)) and logprobs.dtype == torch.float32


def test_numbers_drawn_one_by_one_equal_those_drawn_at_once():
    """vLLM draws them one by one."""
    generator = torch.Generator().manual_seed(7)
    single = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in range(40)]
    assert uniforms(7, 40).tolist() == single


# --- filters ----------------------------------------------------------------------------------------------------------

EXTRA = {"typical_p": 0.8, "epsilon_cutoff": 1e-3, "eta_cutoff": 2e-3, "suppress_tokens": [3, 200]}
FILTERS = [
    {},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.6, "temperature": 1.5, **EXTRA},
    *({name: value} for name, value in EXTRA.items()),
]


@pytest.mark.parametrize("settings", FILTERS, ids=lambda settings: "-".join(settings) or "none")
def test_the_distribution_is_that_of_generate_in_transformers(settings):
    model = tiny.model(vocab_size=320)
    logits = 2 * torch.randn(40, 320, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(320, (40, 12), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    theirs = GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    expected = model._get_logits_processor(theirs, input_ids_seq_length=12, device="cpu")(ids, logits).softmax(-1)
    extra = {name: value for name, value in settings.items() if name in TRANSFORMERS}
    rest = {name: value for name, value in settings.items() if name not in extra}
    found = filter_logits(logits, seen, Sampling(1, extra=extra, **rest)).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    plain = logits.softmax(-1)
    assert bool(settings) == (not torch.allclose(found, plain, atol=1e-4))


def test_generation_kwargs_replace_settings_and_reach_the_engine():
    """The keys of TRL's test, which have no effect without beams, and one of each engine."""
    neutral = {"do_sample": True, "length_penalty": -0.1}
    assert ReinforceConfig(generation_kwargs=neutral).learns_as_sampled
    config = ReinforceConfig(top_k=3, generation_kwargs={**neutral, "top_k": 50, "presence_penalty": 0.5})
    assert config.top_k == 50 and config.engine_arguments == {"presence_penalty": 0.5}
    assert not config.learns_as_sampled and config.sampling_filters == {"top_k": 50, "presence_penalty": 0.5}
    sampling = Sampling(4, min_p=0.25, extra=config.engine_arguments)
    sent = sampling_settings(sampling, Prompt("", (1,), 0), 0, frozenset())
    assert sent["min_p"] == 0.25 and sent["presence_penalty"] == 0.5
    assert not ReinforceConfig(min_p=0.1).learns_as_sampled
    assert not ReinforceConfig(repetition_penalty=1.1).learns_as_sampled
    assert ReinforceConfig(min_p=0, repetition_penalty=1).learns_as_sampled


@pytest.mark.parametrize(
    ("given", "engine", "message"),
    [
        ({"top_k": -2}, "vllm", "top_k must be at least 0"),
        ({"temperature": 0.5}, "vllm", "Set temperature, which training applies, too"),
        ({"num_return_sequences": 2}, "vllm", "Set num_generations"),
        ({"num_beams": 4}, "vllm", "num_beams 4 isn't supported"),
        ({"typical": 0.5}, "vllm", "Did you mean 'typical_p'"),
        ({"typical_p": 0.5}, "servers", "typical_p is an argument of transformers, but the rollouts come from servers"),
        ({"presence_penalty": 0.5}, "transformers", "presence_penalty is an argument of vllm"),
        ({"presence_penalty": 0.5}, "ray", "Remove it, or set rollout to vllm"),
        ({"typical_p": 2.0}, "transformers", "typical_p"),
        ("[1]", "vllm", "isn't a JSON object"),
    ],
)
def test_generation_kwargs_that_an_engine_cannot_use_are_refused(given, engine, message):
    with pytest.raises(ConfigError, match=message):
        check_sampling(ReinforceConfig(generation_kwargs=given), engine)
