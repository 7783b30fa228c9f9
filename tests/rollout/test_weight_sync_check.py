"""The check detects every known failure of a weight update: with real vLLM, tied and untied, in three families."""

import pytest
import torch
from rollout.contract import prepared_model, prepared_tokenizer

from reinforcepp.errors import RolloutError
from reinforcepp.rollout import weight_transfer
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.rollout.vllm import memory
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm_integration import VllmEngine
from reinforcepp.rollout.weight_sync_check import check_sync, probe_prompts

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())

SHAPES = [
    ("gpt2", True, torch.float32),
    ("llama", False, torch.bfloat16),
    ("qwen2", False, torch.float32),
]
MORE = [
    ("gpt2", False, torch.float32),
    ("llama", True, torch.float32),
    ("qwen2", True, torch.bfloat16),
]


class Bench:
    """An engine, and models of the same shape with other weights."""

    def __init__(self, family: str, tied: bool, dtype: torch.dtype) -> None:
        self.family, self.tied, self.dtype = family, tied, dtype
        self.tokenizer = prepared_tokenizer()
        self.seed = 0
        self.engine = VllmEngine(self.trainer(), self.tokenizer)

    def trainer(self, seed: int = 0):
        return prepared_model(self.family, tied=self.tied, seed=seed).to(self.dtype)

    def next_trainer(self):
        """Return a model with other weights, after the engine has filled its cache with the current ones."""
        check_sync(self.engine, self.trainer(self.seed), self.tokenizer)
        self.seed += 1
        return self.trainer(self.seed)

    def check(self, trainer):
        return check_sync(self.engine, trainer, self.tokenizer)


@pytest.fixture(
    scope="module",
    params=[*SHAPES, *(pytest.param(shape, marks=pytest.mark.full) for shape in MORE)],
    ids=lambda s: f"{s[0]}-{'tied' if s[1] else 'untied'}-{str(s[2])[6:]}",
)
def bench(request):
    bench = Bench(*request.param)
    yield bench
    bench.engine.close()


@needs_vllm
def test_three_updates_are_in_sync(bench):
    for _ in range(3):
        trainer = bench.next_trainer()
        bench.engine.load_weights(trainer)
        report = bench.check(trainer)
        assert report.agreement == 1
        assert report.tokens >= 16
        assert report.logprob_gap_max < (1e-4 if bench.dtype == torch.float32 else 0.2)


@needs_vllm
@pytest.mark.parametrize("sabotage", ["update skipped", "prefix cache kept", "output layer omitted"])
def test_a_failed_update_is_detected(bench, sabotage, monkeypatch):
    trainer = bench.next_trainer()
    with monkeypatch.context() as patch:
        if sabotage == "prefix cache kept":
            patch.setattr(bench.engine._llm, "reset_prefix_cache", lambda: True)
        if sabotage == "output layer omitted":
            whole, layer = weight_transfer.full_weights, ("wte", "embed_tokens") if bench.tied else "lm_head"
            kept = lambda name: not name.removesuffix(".weight").endswith(layer)  # noqa: E731
            patch.setattr(weight_transfer, "full_weights", lambda m: ((n, w) for n, w in whole(m) if kept(n)))
        if sabotage != "update skipped":
            bench.engine.load_weights(trainer)
        with pytest.raises(RolloutError, match=r"out of sync.*agree on \d+%.*differ by up to [\d.]+ nats"):
            bench.check(trainer)
    bench.engine.load_weights(trainer)
    bench.check(trainer)


@needs_vllm
def test_a_skipped_update_of_one_percent_is_detected_in_float32(bench):
    if bench.dtype != torch.float32:
        pytest.skip("in bfloat16 1% is rounding error")
    trainer = bench.next_trainer()
    bench.engine.load_weights(trainer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(RolloutError, match="out of sync"):
        bench.check(trainer)
    bench.engine.load_weights(trainer)
    bench.check(trainer)
    bench.engine.load_weights(bench.trainer(bench.seed))


def test_the_transformers_engine_is_in_sync_with_its_model():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    model.train()
    report = check_sync(TransformersEngine(model, tokenizer), model, tokenizer)
    assert report.logprob_gap_max < 1e-5
    assert model.training


def test_nan_weights_are_detected():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    engine = TransformersEngine(prepared_model(), tokenizer)
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(float("nan"))
    with pytest.raises(RolloutError, match="out of sync"):
        check_sync(engine, model, tokenizer)


def test_probes_fill_a_cache_block_and_fit_the_context():
    model, tokenizer = prepared_model(), prepared_tokenizer()
    assert all(len(prompt.ids) > 2 * memory.CPU_BLOCK for prompt in probe_prompts(model, tokenizer))
    small = prepared_model(n_positions=40)
    assert all(len(prompt.ids) == 24 for prompt in probe_prompts(small, tokenizer))
