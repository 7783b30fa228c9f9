"""Asynchronous rollouts: the weights that sample and score them, their overlap with the update, and checkpoints."""

import json
import math
import signal
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch
from training.test_guardrails import tripping
from training.test_resume import SEVERAL, files, noisy, stopping, trainer

from reinforcepp.algorithm.importance import importance_weights
from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import ConfigError, RolloutError
from reinforcepp.models.loading import load_policy
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.rollout.engine import request_seed
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.training.async_rollouts import AsyncRolloutScheduler
from reinforcepp.training.builder import sampling_gap
from reinforcepp.training.guardrails import RollBack
from reinforcepp.types import Sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def held(model):
    """A model with the weights that ``model`` has now."""
    copied = load_policy(model.config.name_or_path)
    copied.load_state_dict(model.state_dict())
    return copied


class Apart:
    """An engine with weights of its own, as those have that run elsewhere."""

    name, shares_trainer_forward = "apart", False

    def __init__(self, base, tokenizer):
        self.engine = TransformersEngine(load_policy(base), tokenizer)

    def generate(self, prompts, sampling):
        return self.engine.generate(prompts, sampling)

    def load_weights(self, model):
        self.engine.load_weights(model)


def apart(base, folder, **settings):
    run = trainer(base, folder, **settings)
    run.engine = Apart(base, run.tokenizer)
    return run


def before_each(run, told):
    """Call ``told`` with the step before the sampler has a step's prompts answered."""
    sampling = run.rollouts.sampling

    def noted(step):
        told(step)
        return sampling(step)

    run.rollouts.sampling = noted


# --- what is sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("make", [trainer, apart])
def test_a_step_is_sampled_and_scored_by_older_weights(base, tmp_path, staleness, make):
    run = make(base, tmp_path / "run", staleness=staleness, max_steps=5, save_every=0)  # a checkpoint waits for all
    weights, batches = [held(run.policy)], []
    updating = [threading.Event() for _ in range(5)]
    update = run.update.run

    def late(step):  # when the batches of later steps are under way as well
        assert step == 0 or updating[step - 1].wait(60)

    def noted(batch, step, kl_coef):
        updating[step].set()
        told = update(batch, step, kl_coef)
        weights.append(held(run.policy))
        batches.append(batch.rollout)
        return told

    run.update.run = noted
    before_each(run, late)
    log = tiny.train(run)
    assert [m["staleness"] for m in log] == [min(step, staleness) for step in range(5)]
    for step, batch in enumerate(batches):
        sampler = weights[max(0, step - staleness)]
        engine = TransformersEngine(sampler, run.tokenizer)
        expected = engine.generate(run.rollouts.batches.at(step), Sampling(6, seed=request_seed(5, step, 0)))
        assert [c.ids for c in batch.completions] == [c.ids for c in expected]
        asked, said = [c.prompt.ids for c in batch.completions], [c.ids for c in batch.completions]
        with torch.no_grad():
            by_sampler, by_present = (
                response_logprobs(model, asked, said, pad_id=run.tokenizer.pad_token_id, temperature=1.0)
                for model in (sampler, weights[step])
            )
        torch.testing.assert_close(batch.old_logprobs_BT, by_sampler[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.entropy_BT, by_sampler[1] * by_sampler[2], atol=1e-5, rtol=0)
        if step:
            assert float((batch.old_logprobs_BT - by_present[0]).abs().max()) > 1e-4


def test_without_staleness_the_current_weights_sample(base, tmp_path):
    run = trainer(base, tmp_path / "run")
    assert "staleness" not in tiny.train(run)[-1]
    assert not isinstance(run.rollouts, AsyncRolloutScheduler)
    assert not list((tmp_path / "run").rglob("ahead.json"))


def test_copies_share_the_frozen_weights_of_an_adapter(base, tmp_path):
    run = trainer(base, tmp_path / "run", staleness=1, use_peft=True, lora_r=2)
    (held,) = run.rollouts._copies
    pairs = list(zip(run.policy.parameters(), held.parameters(), strict=True))
    assert sum(own is other for own, other in pairs) == sum(not own.requires_grad for own, _ in pairs) > 0
    assert not any(other.requires_grad for own, other in pairs if own is not other)
    before = [other.clone() for _, other in pairs]
    run.train()
    assert any(not torch.equal(one, other) for one, (_, other) in zip(before, pairs, strict=True))


def test_the_difference_between_engine_and_trainer_is_corrected(base, tmp_path):
    def mode(make=trainer, **settings):
        run = make(base, tmp_path / "run", overwrite=True, **settings)
        return run.update.correction, run.update.on_policy

    assert mode() == ("off", True)
    assert mode(staleness=1) == ("tis", False)
    assert mode(staleness=1, importance_correction="icepop") == ("icepop", False)
    assert mode(staleness=1, importance_correction="off") == ("off", False)
    run = apart(base, tmp_path / "apart", staleness=1, max_steps=3)
    seen = []
    update = run.update.run

    def noted(batch, step, kl_coef):
        rollout = batch.rollout
        weights_BT = importance_weights(
            rollout.old_logprobs_BT, rollout.rollout_logprobs_BT, rollout.mask_BT, mode="tis", low=0.5, high=2.0
        )
        seen.append(float((weights_BT - 1)[rollout.mask_BT.bool()].abs().max()))
        return update(batch, step, kl_coef)

    run.update.run = noted
    log = tiny.train(run)
    assert max(seen) < 1e-4  # the same weights, so they differ by rounding alone, however old they are
    assert max(m["sampling/logprob_gap_max"] for m in log) < 1e-4
    assert [m["approx_kl"] > 1e-4 for m in log] == [False, True, True]  # how far the policy has come since


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ("off", True)), ({"staleness": 1}, ("binary_kl", False)), ({"importance_correction": "tis"}, ("tis", True))],
)
def test_flash_reinforce_has_a_trust_region_where_weights_are_corrected(settings, expected):
    config = ReinforceConfig(estimator="flash_reinforce", rollout="transformers", **settings)
    assert sampling_gap(config, SimpleNamespace(shares_trainer_forward=True)) == expected


def test_the_trust_region_compares_the_engine_with_the_current_weights(base, tmp_path):
    """The first batch is on policy. The next ones come from the weights one step before, and all their sequences are dropped."""
    settings = {"estimator": "flash_reinforce", "kl_coef": 0.0, "staleness": 1, "max_steps": 3, "learning_rate": 1e-2}
    run = trainer(base, tmp_path / "run", importance_max_kl=1e-8, micro_batch_size=2, **settings)
    assert (run.update.objective.clip_low, run.update.objective.clip_high) == (1, math.inf)
    log = tiny.train(run)
    assert [m["sampling/trust_region_dropped_ratio"] for m in log] == [0, 1, 1]
    assert [m["grad_norm"] > 0 for m in log] == [True, False, False]
    assert [m["approx_kl"] > 1e-6 for m in log] == [False, True, True]


# --- beside what ----------------------------------------------------------------------------------------------------


def test_the_next_step_is_generated_while_this_one_is_trained_on(base, tmp_path):
    """Each generation but the first waits until the update of the step before is under way, and the update for it."""
    run = apart(base, tmp_path / "run", staleness=1, max_steps=3)
    threads, updating, generating = [], threading.Semaphore(0), threading.Semaphore(0)
    update = run.update.run

    def before(step):
        threads.append(threading.current_thread())
        if step:
            assert updating.acquire(timeout=60), "generation and update don't overlap"
            generating.release()

    def beside(batch, step, kl_coef):
        updating.release()
        if step < 2:
            assert generating.acquire(timeout=60), "generation and update don't overlap"
        return update(batch, step, kl_coef)

    run.update.run = beside
    before_each(run, before)
    run.train()
    assert len(threads) == 3 and threading.main_thread() not in threads


def test_evaluations_use_the_current_weights(base, tmp_path):
    run = apart(base, tmp_path / "run", staleness=2, max_steps=3, eval_every=1)
    run.evaluator.sets = {"": run.prompts[:3]}
    seen = []
    evaluate = run.evaluator.evaluate

    def noted(limit):
        result = evaluate(limit)
        pairs = zip(run.engine.engine.model.parameters(), run.policy.parameters(), strict=True)
        seen.append(all(torch.equal(one, other) for one, other in pairs))
        return result

    run.evaluator.evaluate = noted
    run.train()
    assert seen == [True] * 4


def test_pending_rollouts_are_dropped_after_training(base, tmp_path):
    run = apart(base, tmp_path / "run", staleness=1)
    run.train()
    assert run.rollouts._jobs == {}
    run.evaluator.sets = {"": run.prompts[:2]}
    run.evaluate()
    pairs = zip(run.engine.engine.model.parameters(), run.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_failing_engine_ends_the_training(base, tmp_path):
    run = apart(base, tmp_path / "run", staleness=1)

    def fails(step):
        if step == 2:
            raise RolloutError("All workers are gone.")

    before_each(run, fails)
    with pytest.raises(RolloutError, match="All workers are gone"):
        run.train()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# --- stopped and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ({"staleness": 1}, 1),
        ({"staleness": 1}, 5),
        ({"staleness": 2}, 5),
        ({"staleness": 1} | SEVERAL, 22),
        ({"staleness": 2, "use_peft": True, "lora_r": 2} | SEVERAL, 22),
    ],
    ids=str,
)
def test_what_was_sampled_ahead_outlives_a_stop(base, tmp_path, kind, moment):
    whole = trainer(base, tmp_path / "whole", **kind)
    whole.train()
    run = trainer(base, tmp_path / "run", **kind)
    stopping(run, moment, signal.SIGINT)
    with pytest.raises(Interrupted):
        run.train()
    trainer(base, tmp_path / "run", resume=True, **kind).train()
    if kind.get("use_peft"):
        one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "run"))
        assert one.read_bytes() == other.read_bytes()
    else:
        assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_stop_between_sampling_and_training_keeps_the_batch(base, tmp_path):
    """The batch had been taken, and isn't in use yet."""
    kind = {"staleness": 1}
    trainer(base, tmp_path / "whole", **kind).train()
    run = trainer(base, tmp_path / "run", **kind)
    calls = []

    def interrupted(prompts, completions, completion_ids, **_):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return noisy(prompts, completions, completion_ids)

    interrupted.__name__ = "noisy"
    run.rewards.functions[0] = interrupted
    with pytest.raises(Interrupted):
        run.train()
    told = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "ahead.json").read_text())
    assert {step: of_step["version"] for step, of_step in told.items()} == {"2": 1, "3": 2}
    trainer(base, tmp_path / "run", resume=True, **kind).train()
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_staleness_can_change_on_resume(base, tmp_path):
    for number, (before, after) in enumerate([(1, 0), (0, 1), (1, 2)]):
        folder = tmp_path / str(number)
        run = trainer(base, folder, staleness=before)
        stopping(run, 3)
        with pytest.raises(Interrupted):
            run.train()
        log = tiny.train(trainer(base, folder, staleness=after, resume=True, allow_changes="staleness"))
        assert len(log) == 4 and log[-1].get("staleness", 0) <= after


def test_a_rollback_restores_pending_rollouts(base, tmp_path):
    settings = {"staleness": 1, "kl_action": "rollback", "save_every": 2, "max_steps": 5}
    run = trainer(base, tmp_path / "run", **settings)
    sampled = []
    before_each(run, sampled.append)
    tripping(run, RollBack("The KL is too large"), 3)
    log = tiny.train(run)
    assert [m["step"] for m in log] == [1, 2, 3, 4, 5]
    assert [m["staleness"] for m in log] == [0, 1, 1, 1, 1]
    assert sampled == [0, 1, 2, 3, 3, 4]  # that of step 2 came from the checkpoint


# --- what it can't be combined with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rollout", ["auto", "vllm"])
def test_an_in_process_vllm_engine_is_refused(rollout):
    with pytest.raises(ConfigError, match=r"staleness.*rollout .* can't"):
        ReinforceConfig(staleness=1, rollout=rollout)


def test_negative_staleness_raises():
    with pytest.raises(ConfigError, match="staleness"):
        ReinforceConfig(staleness=-1, rollout="transformers")
