"""Each guardrail alone, then in a training that triggers it."""

import json
import math

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, TrainingDiverged, UnusableUpdate
from reinforcepp.training.guardrails import PATIENCE_STEPS, Guardrails, RollBack
from reinforcepp.training.learner import Learner

PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(8)]
FINE = {"step": 1, "kl": 0.1, "entropy": 2.0, "completions/mean_length": 20.0, "completions/distinct_ratio": 1.0}


def guard(**settings):
    said = []
    return Guardrails(ReinforceConfig(**settings), said.append), said


# --- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "log_ratio", "norms", "named"),
    [
        (math.nan, 0.0, {"policy": 1.0}, "the loss is nan"),
        (0.1, 0.0, {"policy": math.inf}, "the gradient of the policy is inf"),
        (0.1, 0.0, {"policy": 1.0, "critic": math.nan}, "the gradient of the critic is nan"),
        (0.1, 9.3, {"policy": 1.0}, r"e\^9\.3, over ratio_limit 10000"),
        (0.1, math.nan, {"policy": 1.0}, "ratio"),
    ],
)
def test_an_unusable_update_raises(loss, log_ratio, norms, named):
    rules, _ = guard()
    with pytest.raises(UnusableUpdate, match=named):
        rules.check_update(loss, log_ratio, norms)
    rules.check_update(0.1, 9.2, {"policy": 1.0})  # ln 10000 = 9.21


def test_the_ratio_rule_can_be_switched_off():
    guard(ratio_limit=0)[0].check_update(0.1, 50.0, {"policy": 1.0})


def test_several_in_a_row_stop_the_run():
    rules, said = guard(max_skipped_updates=2)
    fault = UnusableUpdate("the loss is nan")
    rules.skip(fault, 1)
    rules.skip(fault, 2)
    rules.update_made()
    rules.skip(fault, 4)
    rules.skip(fault, 5)
    with pytest.raises(TrainingDiverged, match=r"Step 6: the loss is nan\. The 2 updates before"):
        rules.skip(fault, 6)
    assert len(said) == 4 and "1 of 2 allowed in a row" in said[0]


def test_kl_over_the_limit_stops_or_rolls_back():
    rules, _ = guard()
    rules.check_step(FINE | {"kl": 4.99})
    with pytest.raises(TrainingDiverged, match=r"Step 1: KL .* 5\.01 nats/token, over kl_limit 5"):
        rules.check_step(FINE | {"kl": 5.01})
    guard(kl_limit=None)[0].check_step(FINE | {"kl": 1e9})
    rules, _ = guard(kl_action="rollback", kl_limit=1.0)
    for _ in range(3):
        with pytest.raises(RollBack):
            rules.check_step(FINE | {"kl": 2.0})
    with pytest.raises(TrainingDiverged, match="after 3 rollbacks"):
        rules.check_step(FINE | {"kl": 2.0})


@pytest.mark.parametrize(
    ("name", "low", "enough", "said"),
    [
        ("completions/mean_length", 1.9, 2.1, "length"),
        ("entropy", 0.019, 0.021, "entropy"),
        ("completions/distinct_ratio", 0.09, 0.11, "distinct"),
    ],
)
def test_collapse(name, low, enough, said):
    rules, _ = guard()
    rules.check_step(FINE)
    for _ in range(PATIENCE_STEPS - 1):
        rules.check_step(FINE | {name: low})
    rules.check_step(FINE | {name: enough})  # it came back
    for _ in range(PATIENCE_STEPS - 1):
        rules.check_step(FINE | {name: low})
    with pytest.raises(TrainingDiverged, match=f"{said}.* has been below"):
        rules.check_step(FINE | {name: low})


@pytest.mark.parametrize("setting", ["collapse_length", "collapse_entropy", "collapse_distinct"])
def test_collapse_rules_can_be_switched_off(setting):
    rules, _ = guard(**{setting: 0})
    name = next(key for key, (_, share) in rules.shares.items() if share == 0)
    rules.check_step(FINE)
    for _ in range(2 * PATIENCE_STEPS):
        rules.check_step(FINE | {name: 0.0})


def test_the_state_of_the_rules_survives_a_checkpoint():
    rules, _ = guard()
    rules.check_step(FINE)
    for _ in range(PATIENCE_STEPS - 1):
        rules.check_step(FINE | {"entropy": 0.0})
    again, _ = guard()
    again.load(json.loads(json.dumps(rules.as_dict())))
    with pytest.raises(TrainingDiverged, match="entropy"):
        again.check_step(FINE | {"entropy": 0.0})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kl_target": 0.0}, "kl_target must be greater than 0"),
        ({"kl_target": 0.1, "kl_horizon": -1.0}, "kl_horizon must be greater than 0"),
        ({"kl_target": 0.1, "kl_coef": 0.0}, "kl_target.*kl_coef is 0"),
        ({"kl_limit": 0.0}, "kl_limit must be greater than 0"),
        ({"ratio_limit": 1.1}, "ratio_limit: 1.1"),
        ({"collapse_entropy": 1.0}, "collapse_entropy must be at least 0 and less than 1"),
        ({"max_skipped_updates": -1}, "max_skipped_updates must be at least 0"),
    ],
)
def test_invalid_settings_raise(settings, named):
    with pytest.raises(ConfigError, match=named):
        ReinforceConfig(**settings)


# --- in a training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def trainer(base, folder, reward, **settings):
    defaults = {"max_new_tokens": 6, "max_prompt_length": 40, "batch_size": 8, "learning_rate": 1e-3, "seed": 5}
    args = ReinforceConfig(output_dir=str(folder), **(defaults | {"rollout": "transformers"} | settings))
    return ReinforceTrainer(base, reward, args, PROMPTS)


def fine(prompts, completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


class BadAt:
    """A reward function that gives NaN in some of its calls."""

    __name__ = "fine"

    def __init__(self, *calls):
        self.calls, self.seen = calls, 0

    def __call__(self, prompts, completions, completion_ids, **_):
        self.seen += 1
        scores = fine(prompts, completions, completion_ids)
        return [math.nan, *scores[1:]] if self.seen in self.calls else scores


def weights(run):
    return {name: value.clone() for name, value in run.policy.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_reward_that_is_not_finite_costs_one_update(base, tmp_path, capsys):
    run = trainer(base, tmp_path / "run", BadAt(2), max_steps=4)
    log = tiny.train(run)
    assert [m["skipped_updates"] for m in log] == [0, 1, 0, 0]
    assert "reward" not in log[1] and "reward" in log[2]
    assert "returned nan" in capsys.readouterr().err
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert len(events) == 1 and events[0].startswith("Step 2: skipped update (Reward function fine: returned nan")


def test_too_many_stop_the_run_with_the_last_good_weights(base, tmp_path):
    whole = trainer(base, tmp_path / "whole", fine, max_steps=2, lr_scheduler_type="constant")
    whole.train()
    run = trainer(base, tmp_path / "run", BadAt(3, 4), max_steps=9, max_skipped_updates=1, save_every=2)
    with pytest.raises(
        TrainingDiverged, match=r"Step 4.*fix the reward function\. The last good state is .*step-000002"
    ):
        run.train()
    assert equal(weights(run), weights(whole))
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(log) == 3, "what led to the stop stays to be read"


def poisoned(run, *passes):
    """Some backward passes give NaN gradients."""
    seen = []

    def hook(module, inputs, output):
        if output.logits.requires_grad:
            seen.append(1)
            if len(seen) in passes:
                output.logits.register_hook(lambda gradient: gradient * float("nan"))

    run.policy.register_forward_hook(hook)


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone(base, tmp_path):
    run = trainer(base, tmp_path / "run", fine, max_steps=3)
    poisoned(run, 2)
    seen = []
    step = run.update.policy.step
    run.update.policy.step = lambda norm: (seen.append(norm), step(norm))[1]
    log = tiny.train(run)
    assert [m["skipped_updates"] for m in log] == [0, 1, 0]
    assert len(seen) == 2 and all(map(math.isfinite, seen))
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    moments = run.update.policy.backend.state_dict(masters=False)["state"].values()
    assert all(torch.isfinite(m["exp_avg"]).all() and float(m["step"]) == 2 for m in moments)


def test_only_the_unusable_one_of_several_updates_is_skipped(base, tmp_path):
    run = trainer(base, tmp_path / "run", fine, max_steps=2, micro_batch_size=4, gradient_accumulation_steps=1)
    poisoned(run, 2)
    log = tiny.train(run)
    assert [m["skipped_updates"] for m in log] == [1, 0]
    assert math.isfinite(log[0]["loss"]) and log[0]["grad_norm"] > 0


def test_ratios_that_explode_are_not_trained_on(base, tmp_path):
    settings = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1.0, "ratio_limit": 1.5}
    with pytest.raises(TrainingDiverged, match="over ratio_limit"):
        trainer(base, tmp_path / "run", fine, max_steps=20, kl_limit=None, max_skipped_updates=0, **settings).train()


def test_kl_over_the_limit_stops_a_training(base, tmp_path):
    run = trainer(base, tmp_path / "run", fine, max_steps=20, learning_rate=0.05, kl_limit=0.5, kl_coef=0.0)
    with pytest.raises(TrainingDiverged, match="over kl_limit"):
        run.train()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def tripping(run, error, *steps):
    """The rules find fault after these steps, the first time round."""
    left = list(steps)

    def check(metrics):
        if left and metrics["step"] == left[0]:
            left.pop(0)
            run.update.guardrails.state.rollbacks += isinstance(error, RollBack)
            raise error

    run.update.guardrails.check_step = check


def test_a_rollback_halves_the_learning_rate(base, tmp_path):
    settings = {"max_steps": 6, "kl_action": "rollback", "save_every": 2, "lr_scheduler_type": "constant"}
    run = trainer(base, tmp_path / "run", fine, **settings)
    tripping(run, RollBack("The KL is too large"), 2, 4, 4)
    log = tiny.train(run)
    assert [m["step"] for m in log] == list(range(1, 7))
    # back to the start at half the rate, then twice to step 2, whose checkpoint was saved at half the rate
    assert [m["learning_rate"] for m in log] == pytest.approx([5e-4, 5e-4, 1.25e-4, 1.25e-4, 1.25e-4, 1.25e-4])
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event.partition(": ")[2][:21] for event in events] == [f"rolled back to step {n}" for n in (0, 2, 2)]


def test_a_stop_leaves_the_weights_of_the_last_checkpoint(base, tmp_path):
    settings = {"max_steps": 6, "save_every": 2, "lr_scheduler_type": "constant"}
    whole = trainer(base, tmp_path / "whole", fine, **(settings | {"max_steps": 2}))
    whole.train()
    run = trainer(base, tmp_path / "run", fine, **settings)
    tripping(run, TrainingDiverged("It has collapsed."), 4)
    with pytest.raises(TrainingDiverged, match=r"It has collapsed\. The last good state is .*step-000002"):
        run.train()
    assert equal(weights(run), weights(whole))


@pytest.mark.parametrize(
    "kind",
    [{}, {"estimator": "reinforce_plus_plus_baseline", "num_generations": 2}],
    ids=["in-the-reward", "in-the-loss"],
)
def test_advantages_use_the_current_kl_coefficient(base, tmp_path, kind):
    runs = [trainer(base, tmp_path / str(c), fine, kl_coef=c, max_steps=3, **kind) for c in (0.1, 0.5, 0.2)]
    runs[2].run.state.kl_coef = 0.5
    for run in runs:
        run.train()
    assert equal(weights(runs[1]), weights(runs[2]))
    assert not equal(weights(runs[0]), weights(runs[1]))


def test_the_coefficient_follows_the_kl(base, tmp_path):
    settings = {"max_steps": 8, "learning_rate": 5e-3, "kl_target": 1e-4, "kl_horizon": 40.0, "kl_coef": 0.1}
    log = tiny.train(trainer(base, tmp_path / "run", fine, **settings))
    coefs = [m["kl_coef"] for m in log]
    assert coefs[0] == 0.1 and coefs[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 40))  # the first KL is 0
    assert log[-1]["kl"] > 1.2e-4 and coefs[-1] == pytest.approx(coefs[-2] * (1 + 0.2 * 8 / 40), rel=1e-6)


class Waits(TorchDispatchMode):
    """Counts the values that the CPU reads from tensors: on a GPU, it would wait for each."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in WAITING
        return function(*arguments, **(options or {}))


WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}


def test_an_optimizer_step_waits_for_few_values_however_many_weights_there_are():
    counts = []
    for layers in (1, 4):
        model = tiny.model(n_layer=layers)
        learner = Learner(model, Ranks(), ReinforceConfig(mixed_precision="no"), learning_rate=1e-3, steps=2)
        learner.backward(learner.model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.square().mean())
        with Waits() as waits:
            learner.step(learner.clip())
        counts.append(waits.count)
    assert counts == [2, 2]  # the norm, and whether a weight changed


class NoWaits(TorchFunctionMode):
    """Raises if the CPU reads a value, or indexes a tensor with a list: on a GPU, it would wait."""

    active = True

    def __torch_function__(self, function, types, arguments=(), options=None):
        if not self.active:
            return function(*arguments, **(options or {}))
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            assert not isinstance(arguments[1], list), "a list as an index"
        assert function not in READS, f"{function.__name__} reads a value"
        return function(*arguments, **(options or {}))


READS = {getattr(torch.Tensor, n) for n in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero")}


def test_the_loss_of_a_micro_batch_waits_for_no_value(base, tmp_path, monkeypatch):
    run = trainer(base, tmp_path / "run", fine, max_steps=1, top_entropy_quantile=0.5, entropy_coef=0.01)
    loss, forward, modes = run.update._policy_loss, run.update.logprobs, []

    def without_waiting(*arguments, **options):
        with NoWaits() as mode:
            modes.append(mode)
            return loss(*arguments, **options)

    def with_waiting(*arguments, **options):  # transformers checks whether rows are padded
        for mode in modes:
            mode.active = False
        result = forward(*arguments, **options)
        for mode in modes:
            mode.active = True
        return result

    monkeypatch.setattr(run.update, "_policy_loss", without_waiting)
    monkeypatch.setattr(run.update, "logprobs", with_waiting)
    run.train()
    assert modes


def test_unchanged_weights_stop_the_run(base, tmp_path):
    run = trainer(base, tmp_path / "run", fine)
    run.update.policy.backend.step = lambda: None
    with pytest.raises(TrainingDiverged, match="changed no weight"):
        run.train()
