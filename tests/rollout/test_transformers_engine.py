import pytest
import torch
from rollout.contract import EngineContract, drawn, generate_plainly, prepared_model, prepared_tokenizer, prompts_of

from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Sampling


class TestTransformersEngine(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model, tokenizer):
        return TransformersEngine(model, tokenizer)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_batch_size_changes_nothing(batch_size):
    """Twenty-one rows of seven prompts: some batches are left over and some part a prompt from its samples."""
    model, tokenizer = prepared_model(), prepared_tokenizer()
    prompts, sampling = prompts_of(tokenizer), Sampling(8, num_samples=3, seed=1)
    at_once = TransformersEngine(model, tokenizer).generate(prompts, sampling)
    in_parts = TransformersEngine(model, tokenizer, batch_size).generate(prompts, sampling)
    assert [c.ids for c in in_parts] == [c.ids for c in at_once]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_families_with_rotary_positions_are_padded_rightly(family):
    model, tokenizer = prepared_model(family, tied=False), prepared_tokenizer()
    for completion in TransformersEngine(model, tokenizer).generate(prompts_of(tokenizer), Sampling(16, temperature=0)):
        assert completion.ids == generate_plainly(model, completion.prompt, 16)


def test_the_trainers_model_is_used_as_it_is_and_left_as_it_was():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    engine = TransformersEngine(model, tokenizer)
    prompts = prompts_of(tokenizer)
    before = drawn(engine.generate(prompts, Sampling(8, temperature=0)))
    model.train()
    assert drawn(engine.generate(prompts, Sampling(8, temperature=0))) == before
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.load_weights(model)
    assert drawn(engine.generate(prompts, Sampling(8, temperature=0))) != before


def test_a_prompt_is_run_once_for_all_its_samples(monkeypatch):
    model, tokenizer = prepared_model(), prepared_tokenizer()
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(tuple(k["input_ids"].shape)) or forward(**k))
    prompts = prompts_of(tokenizer)[:2]
    TransformersEngine(model, tokenizer).generate(prompts, Sampling(2, num_samples=16))
    assert seen[0][0] == 2
    assert [columns for _, columns in seen][1:] == [1]
