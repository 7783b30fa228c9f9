"""The check of the first batch detects an engine whose log-probabilities aren't the model's."""

from dataclasses import replace

import pytest
import torch
from rollout.contract import prepared_model, prepared_tokenizer, prompts_of

from reinforcepp.errors import RolloutError
from reinforcepp.rollout.self_check import PASSES, SHARE_OF_STEP, check_samples, choose_rows, compare_samples
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Completion, Prompt, Sampling

SAMPLINGS = [
    Sampling(12, num_samples=4),
    Sampling(12, temperature=0.7, top_p=0.8, num_samples=4),
    Sampling(12, top_k=5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling(12, temperature=0), Sampling(12, repetition_penalty=1.5)])
def test_own_samples_pass(sampling, dtype):
    model, tokenizer = prepared_model("llama").to(dtype), prepared_tokenizer()
    model.train()
    engine = TransformersEngine(model, tokenizer)
    completions = engine.generate(prompts_of(tokenizer), sampling)
    check_samples(engine, model, completions, sampling)
    assert model.training
    report = compare_samples(model, completions, sampling)
    assert report.exact and report.gap_max < (1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("fault", ["another model", "padding is attended", "another temperature", "nan"])
def test_faults_are_detected_and_name_the_family(fault, monkeypatch):
    model, tokenizer = prepared_model("llama"), prepared_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    if fault == "another model":
        engine.model = prepared_model("llama", seed=1)
    if fault == "padding is attended":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **k: forward(**k | {"attention_mask": None}))
    sampling = Sampling(12, seed=1)
    completions = engine.generate(prompts_of(tokenizer), sampling)
    if fault == "another temperature":
        sampling = replace(sampling, temperature=0.8)
    if fault == "nan":
        completions = [replace(c, logprobs=(float("nan"), *c.logprobs[1:])) for c in completions]
    with pytest.raises(RolloutError, match=r"transformers engine .*family llama.*differ by up to"):
        check_samples(engine, model, completions, sampling)


def test_a_few_short_rows_with_different_prompts_are_compared():
    """Two percent of a step's token passes, the shortest prompt first, because it has the most padding."""
    lengths = [30 + i % 20 for i in range(64)]
    completions = [
        Completion(Prompt("", (5,) * length, i), (6,) * 100, (0.0,) * 100, "", "length")
        for i, length in enumerate(lengths)
    ]
    rows = choose_rows(completions)
    assert [len(c.prompt.ids) for c in rows] == [30, 31, 32, 33]
    compared = sum(len(c.prompt.ids) + len(c.ids) for c in rows)
    assert compared <= SHARE_OF_STEP * PASSES * sum(length + 100 for length in lengths)
    assert len(choose_rows(completions[:1])) == 1 and choose_rows([]) == []
