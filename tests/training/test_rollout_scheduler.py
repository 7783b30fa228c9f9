"""The first batch is checked before anything is trained on it; transformers replaces an engine that ``auto`` chose."""

from dataclasses import replace

import pytest
from rollout.contract import drawn, prepared_model, prepared_tokenizer, prompts_of

from reinforcepp.errors import RolloutError
from reinforcepp.rollout.checked_engine import CheckedEngine
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.training.rollout_scheduler import RolloutScheduler
from reinforcepp.types import Sampling


class Faulty(TransformersEngine):
    """An engine whose log-probabilities are wrong from the call number ``first`` on."""

    name, shares_trainer_forward, first, calls, closed = "faulty", False, 0, 0, False

    def generate(self, prompts, sampling):
        self.calls += 1
        shift = 0.5 if self.calls > self.first else 0.0
        completions = super().generate(prompts, sampling)
        return [replace(c, logprobs=tuple(x - shift for x in c.logprobs)) for c in completions]

    def close(self):
        self.closed = True


def scheduler(engine, fallback=None):
    return RolloutScheduler(None, CheckedEngine(engine, engine.tokenizer, fallback), engine.model, None, None)


def test_a_wrong_first_batch_stops_the_run_and_names_the_family():
    model, tokenizer = prepared_model("llama"), prepared_tokenizer()
    prompts = prompts_of(tokenizer)
    run = scheduler(Faulty(model, tokenizer))
    with pytest.raises(RolloutError, match=r"faulty engine .*family llama.*Use rollout='transformers'"):
        run.generate(prompts, Sampling(6))
    later = Faulty(model, tokenizer)
    later.first = 1
    run = scheduler(later)
    assert run.generate([], Sampling(6)) == []
    later.calls = 0
    for _ in range(2):  # only the first batch with completions is checked
        assert len(run.generate(prompts, Sampling(6))) == len(prompts)


def test_auto_falls_back_to_transformers_before_the_first_update(caplog):
    model, tokenizer = prepared_model("llama"), prepared_tokenizer()
    prompts, faulty, own = prompts_of(tokenizer), Faulty(model, tokenizer), TransformersEngine(model, tokenizer)
    run = scheduler(faulty, lambda: own)
    completions = run.generate(prompts, Sampling(6, seed=1))
    assert run.checked.engine is own and faulty.closed
    assert drawn(completions) == drawn(own.generate(prompts, Sampling(6, seed=1)))
    assert "Completions come from transformers: The faulty engine" in caplog.text
