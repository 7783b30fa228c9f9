"""The training loop on tiny models: rewards improve, and settings that only divide the work change no result."""

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from trl.trainer.callbacks import SyncRefModelCallback

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.errors import ConfigError, DataError, TrainingDiverged
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.monitoring import read_metrics
from reinforcepp.training.policy_update import rollout_batch, with_rewards
from reinforcepp.types import Completion

PROMPTS = [{"prompt": f"How do I check host {i}?", "topic": str(i)} for i in range(11)]
ROWS = Dataset.from_list(PROMPTS)
TIMINGS = ("time/", "step_time")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def spread(prompts, completions, completion_ids, **_):
    """A reward that differs from row to row."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def trainer(base, folder, reward=spread, train=PROMPTS, evaluation=None, judge=None, **settings):
    defaults = {
        "max_new_tokens": 6,
        "max_prompt_length": 40,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "seed": 5,
        "rollout": "transformers",
    }
    args = ReinforceConfig(output_dir=str(folder), **(defaults | settings))
    return ReinforceTrainer(base, reward, args, train, evaluation, judge=judge)


def weights(trained):
    return {name: value.clone() for name, value in trained.policy.state_dict().items()}


def assert_equal_weights(one, other, tolerance=0.0):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def without_timings(metrics):
    return [{k: v for k, v in m.items() if not k.startswith(TIMINGS)} for m in metrics]


# --- the reference policy ---------------------------------------------------------------------------------------------


def test_the_reference_follows_the_policy_as_in_trl(base, tmp_path):
    """Two optimizer steps per training step, so the third one is the first with an update; TRL's callback is the oracle."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 5, "ref_model_mixup_alpha": 0.25, "max_steps": 5}
    batches = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "save_every": 1, "keep_last": 9}
    run = trainer(base, tmp_path / "run", **settings, **batches)
    run.train()
    theirs = load_policy(base, torch.float32)
    for step in (3, 5):
        policy = load_policy(str(tmp_path / f"run/checkpoints/step-{step:06d}"), torch.float32)
        SyncRefModelCallback._sync_target_model(policy, theirs, 0.25)
    assert_equal_weights(dict(run.ref_model.named_parameters()), dict(theirs.named_parameters()), 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"), [({"use_peft": True}, "adapter disabled"), ({"kl_coef": 0}, "kl_coef 0")]
)
def test_a_reference_that_cannot_follow_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReinforceConfig(sync_ref_model=True, **settings)


# --- learning -------------------------------------------------------------------------------------------------------


def likes_early_tokens(prompts, completions, completion_ids, **_):
    return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.01},
        {"kl_coef": 0.01, "estimator": "reinforce_plus_plus_baseline", "num_generations": 4, "batch_size": 8},
        {
            "kl_coef": 0.01,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "batch_size": 16,
        },
        {"kl_coef": 0.01, "mixed_precision": "bf16"},
        {"kl_coef": 0.01, "estimator": "rloo", "num_generations": 4, "batch_size": 8},
        {"kl_coef": 0.01, "estimator": "grpo", "num_generations": 4, "batch_size": 8},
        {"kl_coef": 0.01, "estimator": "ppo", "critic_learning_rate": 1e-2},
    ],
    ids=["plain", "baseline", "several-optimizer-steps", "bf16", "rloo", "grpo", "ppo"],
)
def test_training_improves_held_out_rewards(base, tmp_path, settings):
    held_out = [{"prompt": f"Why does router {i} drop packets?"} for i in range(20)]
    run = trainer(
        base,
        tmp_path / "run",
        likes_early_tokens,
        evaluation=held_out,
        max_steps=15,
        **({"batch_size": 32, "learning_rate": 4e-3, "train": PROMPTS * 3} | settings),
    )
    run.train()
    before, after = run.evaluations["before"], run.evaluations["after"]
    assert before.kl == pytest.approx(0, abs=1e-5)
    assert after.reward > before.reward + 0.15
    assert after.kl > 0.001


@pytest.mark.parametrize(
    "settings",
    [{}, {"estimator": "reinforce_plus_plus_baseline", "num_generations": 2}],
    ids=["k1-in-the-reward", "k2-in-the-loss"],
)
def test_a_higher_kl_coefficient_lowers_the_kl(base, tmp_path, settings):
    kls = []
    for kl_coef in (0.0, 0.5):
        settings |= {"max_steps": 10, "batch_size": 11, "learning_rate": 4e-3, "kl_coef": kl_coef}
        kls.append(tiny.train(trainer(base, tmp_path / str(kl_coef), likes_early_tokens, **settings))[-1]["kl"])
    assert kls[1] < 0.7 * kls[0]


# --- what only divides the work changes nothing ----------------------------------------------------------------------


def test_micro_batches_change_nothing(base, tmp_path):
    one = trainer(base, tmp_path / "1", micro_batch_size=8)
    four = trainer(base, tmp_path / "4", micro_batch_size=2)
    one_log, four_log = tiny.train(one), tiny.train(four)
    key_bias = [name for name in weights(one) if name.endswith("c_attn.bias")]  # no gradient but rounding reaches it
    assert_equal_weights(*({k: v for k, v in weights(run).items() if k not in key_bias} for run in (one, four)), 1e-5)
    moments = [
        [s["exp_avg"] for s in run.update.policy.backend.state_dict(masters=False)["state"].values()]
        for run in (one, four)
    ]
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for a, b in zip(one_log, four_log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["learning_rate"] == b["learning_rate"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_more_padding_changes_nothing(tmp_path):
    """A pad token of its own and EOS as pad token give the same weights."""
    base = str(tiny.save(tmp_path / "base", vocab_size=640))
    tokenizer = load_tokenizer(base)
    other = load_tokenizer(base)
    other.add_special_tokens({"pad_token": "<pad>"})
    runs = []
    for name, chosen in (("eos", tokenizer), ("own", other)):
        args = ReinforceConfig(
            output_dir=str(tmp_path / name),
            max_new_tokens=6,
            max_prompt_length=40,
            batch_size=8,
            learning_rate=1e-3,
            rollout="transformers",
        )
        run = ReinforceTrainer(base, spread, args, PROMPTS, processing_class=chosen)
        run.train()
        runs.append(weights(run))
    assert_equal_weights(runs[0], runs[1], 1e-6)


def test_every_prompt_is_used_once_per_epoch(base, tmp_path):
    seen = []

    def record(prompts, completions, topic):
        seen.append(list(topic))
        return [0.0] * len(prompts)

    log = tiny.train(trainer(base, tmp_path / "run", record, num_train_epochs=2))
    assert [len(batch) for batch in seen] == [8, 3, 8, 3]
    assert sorted(t for batch in seen[:2] for t in batch) == sorted(str(i) for i in range(11))
    assert [m["epoch"] for m in log] == [0.5, 1.0, 1.5, 2.0]


def test_the_schedule_steps_once_per_optimizer_step(base, tmp_path):
    settings = {"lr_scheduler_type": "linear", "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    run = trainer(base, tmp_path / "run", train=PROMPTS[:8], **settings)
    log = tiny.train(run)
    assert run.update.policy.scheduler.last_epoch == 8  # 4 batches of 8 rows, 4 rows per optimizer step
    assert run.update.policy.scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert [m["learning_rate"] for m in log] == pytest.approx([1e-3 * (1 - (2 * i + 0.5) / 8) for i in range(4)])


def test_skipping_the_scoring_pass_on_policy_changes_nothing(base, tmp_path):
    """On policy the engine's log-probabilities stand for the trainer's: same weights, same figures."""
    short, long = (trainer(base, tmp_path / name, temperature=0.8) for name in ("short", "long"))
    assert short.update.on_policy
    long.update.on_policy = False
    short_log, long_log = tiny.train(short), tiny.train(long)
    key_bias = [name for name in weights(short) if name.endswith("c_attn.bias")]
    assert_equal_weights(*({k: v for k, v in weights(run).items() if k not in key_bias} for run in (short, long)), 5e-5)
    for a, b in zip(without_timings(short_log), without_timings(long_log), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2, "gradient_accumulation_steps": 1},
        {"num_iterations": 2},
        {"top_p": 0.9},
        {"top_k": 5},
    ],
    ids=str,
)
def test_the_scoring_pass_is_only_skipped_if_the_ratio_is_one(base, tmp_path, changes):
    assert not trainer(base, tmp_path / "run", **changes).update.on_policy


@pytest.mark.parametrize("changes", [{"num_iterations": 2}, {"estimator": "ppo"}], ids=str)
def test_rows_without_padding_change_nothing(base, tmp_path, changes):
    settings = changes | {"max_steps": 2, "max_tokens_per_micro_batch": 60}
    padded = trainer(base, tmp_path / "padded", padding_free="off", **settings)
    packed = trainer(base, tmp_path / "packed", **settings)
    assert packed.update.passes.packed and not padded.update.passes.packed
    logs = tiny.train(padded), tiny.train(packed)
    key_bias = [name for name in weights(padded) if name.endswith("c_attn.bias")]
    parts = ({k: v for k, v in weights(run).items() if k not in key_bias} for run in (padded, packed))
    assert_equal_weights(*parts, 1e-5)
    for one, other in zip(*map(without_timings, logs), strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-3)


def test_out_of_memory_halves_the_micro_batch_with_the_same_result(base, tmp_path, capsys):
    enough, little = (
        trainer(base, tmp_path / name, micro_batch_size=size, padding_free="off") for name, size in (("a", 2), ("b", 4))
    )
    passes = []

    def run_out(module, arguments, named):
        """In the second micro-batch, when the first has left gradients behind."""
        if torch.is_grad_enabled() and len(named["input_ids"]) > 2:
            passes.append(1)
            if len(passes) > 1:
                raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

    little.policy.register_forward_pre_hook(run_out, with_kwargs=True)
    enough.train()
    little.train()
    assert_equal_weights(weights(enough), weights(little))
    assert "size 4; training continues with micro_batch_size 2" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_halves_the_tokens_of_training_and_scoring(base, tmp_path, capsys):
    """Every pass over more than two rows runs out of memory, also those of the reference."""
    enough, little = (trainer(base, tmp_path / name, max_steps=1, padding_free="off") for name in ("a", "b"))

    def run_out(module, arguments, named):
        if len(named["input_ids"]) > 2 and (torch.is_grad_enabled() or module is little.ref_model):
            raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

    enough.train()
    for model in (little.policy, little.ref_model):
        model.register_forward_pre_hook(run_out, with_kwargs=True)
    little.train()
    assert little.update.passes.limit.tokens < 200 and little.update.passes.scoring_limit.tokens < 200
    key_bias = [name for name in weights(enough) if name.endswith("c_attn.bias")]
    assert_equal_weights(
        *({k: v for k, v in weights(run).items() if k not in key_bias} for run in (enough, little)), 1e-5
    )
    assert "Memory ran out with max_tokens_per_micro_batch" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_with_one_completion_raises_with_a_fix(base, tmp_path):
    run = trainer(base, tmp_path / "run")

    def run_out(module, arguments, named):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("tried to allocate 1.5 GiB")

    run.policy.register_forward_pre_hook(run_out, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"pass of \d+ tokens \(completions: 1\)\. Lower max_new_tokens"):
        run.train()


def test_the_critic_learns_the_returns(base, tmp_path):
    """With a reward that is always 1, and no KL, every token's value is 1."""

    def always_one(prompts, completions, **_):
        return [1.0] * len(prompts)

    settings = {"estimator": "ppo", "max_steps": 25, "kl_coef": 0.0, "critic_learning_rate": 3e-3, "value_clip": None}
    log = tiny.train(trainer(base, tmp_path / "run", always_one, gae_lambda=1.0, **settings))
    assert log[0]["critic/loss"] == pytest.approx(0.5, abs=1e-3)  # the first values are 0
    assert log[-1]["critic/loss"] < 0.05


# --- mistakes known from other libraries -----------------------------------------------------------------------------


def test_dropout_in_the_configuration_still_gives_ratio_one(tmp_path):
    folder = tiny.save(tmp_path / "base", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    log = tiny.train(trainer(str(folder), tmp_path / "run", max_steps=2))
    for m in log:
        assert m["sampling/logprob_gap_max"] < 1e-4 and abs(m["approx_kl"]) < 1e-6 and m["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_the_temperature_is_in_the_trainers_log_probabilities(base, tmp_path, temperature):
    log = tiny.train(trainer(base, tmp_path / "run", max_steps=1, temperature=temperature))
    assert log[0]["sampling/logprob_gap_max"] < 1e-4


def test_the_reward_reaches_the_last_sampled_token_and_its_eos(base, tmp_path):
    """A completion that ended counts its EOS although the pad token is the same."""
    run = trainer(base, tmp_path / "run", micro_batch_size=2, gradient_accumulation_steps=1)
    prompt = run.prompts[0]
    completions = [
        Completion(prompt, (5, 0), (-1.0, -1.0), "", "stop"),
        Completion(prompt, (5, 6, 7, 8), (-1.0,) * 4, "", "length"),
    ]
    batch = rollout_batch(*with_rewards(completions, run.rewards, run.update), run.rewards, run.update, run.reference)
    assert batch.mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.old_logprobs_BT[0, 2:] == 0).all() and (batch.old_logprobs_BT[0, :2] < 0).all()


def test_the_reference_stays_where_it_was(base, tmp_path):
    run = trainer(base, tmp_path / "run")
    before = {name: value.clone() for name, value in run.reference.state_dict().items()}
    run.train()
    assert_equal_weights(before, dict(run.reference.state_dict()))
    changed = [name for name, value in weights(run).items() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)


def test_rewards_are_clipped_before_centering(base, tmp_path):
    def extreme(prompts, completions, completion_ids, **_):
        return [30.0 if i % 2 else 20.0 for i in range(len(prompts))]

    log = tiny.train(trainer(base, tmp_path / "run", extreme, max_steps=1, reward_clip=10.0, kl_coef=0.0))
    assert log[0]["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert log[0]["reward"] == pytest.approx(25)


def test_evaluations_during_training(base, tmp_path):
    held_out = [{"prompt": "Why does the router drop packets?"}]
    run = trainer(base, tmp_path / "run", evaluation=held_out, max_steps=5, eval_every=2)
    plain = trainer(base, tmp_path / "plain", evaluation=held_out, max_steps=5)
    run.train()
    plain.train()
    assert list(run.evaluations) == ["before", "step 2", "step 4", "after"]
    assert list(json.loads((tmp_path / "run" / "evaluation.json").read_text())) == list(run.evaluations)
    assert_equal_weights(weights(run), weights(plain))


def test_evaluate_uses_all_prompts_and_training_reports_how_many(base, tmp_path, capsys):
    held_out = [{"prompt": f"Why does router {i} drop packets?"} for i in range(5)]
    run = trainer(base, tmp_path / "run", evaluation=held_out, max_steps=1, eval_prompts=2)
    assert "use 2 of 5 held-out prompts" in " ".join(capsys.readouterr().err.split())
    run.train()
    assert len(run.evaluations["after"].completions) == 2
    assert run.evaluate()["eval_samples"] == 5
    off = trainer(base, tmp_path / "off", evaluation=held_out, eval_prompts=0)
    assert off.evaluate()["eval_samples"] == 5
    with pytest.raises(ConfigError, match="eval_dataset: no rows"):
        trainer(base, tmp_path / "none").evaluate()


def test_several_datasets_for_evaluation_are_evaluated_together(base, tmp_path):
    parts = DatasetDict(easy=ROWS.select(range(2)), hard=ROWS.select(range(3)))
    assert trainer(base, tmp_path / "run", train=ROWS, evaluation=parts).evaluate()["eval_samples"] == 5


def test_the_judge_scores_held_out_completions_only(base, tmp_path):
    held_out = [{"prompt": "Why does the router drop packets?"}, {"prompt": "Where is the cable?"}]
    seen = []

    def judge(prompts, completions, **_):
        seen.extend(prompts)
        return [float(i) for i in range(len(prompts))]

    judged = trainer(base, tmp_path / "judged", evaluation=held_out, max_steps=3, judge=judge)
    plain = trainer(base, tmp_path / "plain", evaluation=held_out, max_steps=3)
    judged.train()
    plain.train()
    assert seen == 2 * [row["prompt"] for row in held_out]
    figures = json.loads((tmp_path / "judged" / "evaluation.json").read_text())["after"]
    assert figures["judge"] == 0.5 and figures["judge_error"] == pytest.approx(0.5)
    assert "judge" not in json.loads((tmp_path / "plain" / "evaluation.json").read_text())["after"]
    assert_equal_weights(weights(judged), weights(plain))


# --- records --------------------------------------------------------------------------------------------------------


def test_the_log_has_the_keys_that_users_of_trl_know(base, tmp_path):
    folder = tmp_path / "run"
    trainer(base, folder, max_steps=2).train()
    lines = read_metrics(folder)
    expected = {
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "num_tokens",
        "step_time",
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "rewards/spread/mean",
    }
    assert len(lines) == 2 and expected <= set(lines[0])
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"] > 0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[1]["kl"] > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_saved_model_equals_the_trained_one(base, tmp_path, precision):
    run = trainer(base, tmp_path / "run", mixed_precision=precision)
    run.train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert_equal_weights(weights(run), dict(load_policy(str(tmp_path / "run"), dtype).state_dict()))
    assert load_tokenizer(str(tmp_path / "run")).chat_template == run.tokenizer.chat_template


@pytest.mark.parametrize("kind", [{}, {"mixed_precision": "bf16"}, {"estimator": "ppo"}], ids=["plain", "bf16", "ppo"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(base, tmp_path, kind):
    settings = {"max_steps": 5, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    settings |= kind
    whole = trainer(base, tmp_path / "whole", **settings)
    whole_log = tiny.train(whole)

    class PowerCut(BaseException):
        pass

    calls = []

    def failing(prompts, completions, completion_ids, **_):
        calls.append(1)
        if len(calls) == 4:
            raise PowerCut
        return spread(prompts, completions, completion_ids)

    failing.__name__ = "spread"
    with pytest.raises(PowerCut):
        trainer(base, tmp_path / "cut", failing, save_every=2, **settings).train()
    resumed = trainer(base, tmp_path / "cut", save_every=2, resume=True, **settings)
    log = tiny.train(resumed)
    assert without_timings(log) == without_timings(whole_log)
    assert_equal_weights(weights(whole), weights(resumed))


def test_a_model_and_a_plain_tokenizer_in_memory_will_do(tmp_path):
    args = ReinforceConfig(str(tmp_path / "run"), max_new_tokens=4, max_prompt_length=40, rollout="transformers")
    run = ReinforceTrainer(tiny.model(), spread, args, PROMPTS, processing_class=tiny.tokenizer())
    assert len(tiny.train(run)) == 2
    with pytest.raises(ConfigError, match="processing_class"):
        ReinforceTrainer(tiny.model(), spread, replace(args, output_dir=str(tmp_path / "other")), PROMPTS)


def test_the_given_tokenizer_stays_as_it_is(base, tmp_path):
    given = tiny.tokenizer()
    before = dict(vars(given)), given.backend_tokenizer.to_str()
    roles = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    args = ReinforceConfig(
        str(tmp_path / "run"), max_prompt_length=40, max_new_tokens=4, system_prompt="Be brief.", chat_template=roles
    )
    run = ReinforceTrainer(base, spread, args, PROMPTS, processing_class=given)
    assert "Be brief." in run.tokenizer.chat_template
    assert run.tokenizer.pad_token is not None
    assert (dict(vars(given)), given.backend_tokenizer.to_str()) == before


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": []}, DataError, "train_dataset: no rows"),
        ({"train": [{"question": "x"}]}, DataError, "train_dataset:0: no text"),
        (
            {"train": DatasetDict(train=ROWS, test=ROWS)},
            ConfigError,
            r"train_dataset: DatasetDict with train, test .*\['train'\]",
        ),
        ({"train": "prompts.csv"}, ConfigError, "train_dataset: 'prompts.csv' isn't a dataset"),
        ({"evaluation": 3}, ConfigError, "eval_dataset: 3 isn't a dataset"),
        ({"reward": []}, ConfigError, "reward_funcs: empty"),
        ({"max_new_tokens": 400, "max_length": 600}, ConfigError, "context of 256"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(base, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        trainer(base, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(base, tmp_path):
    run = trainer(base, tmp_path / "run", max_skipped_updates=0)
    before = weights(run)

    def poison(module, inputs, output):
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: gradient * float("nan"))

    run.policy.register_forward_hook(poison)
    with pytest.raises(TrainingDiverged, match="Step 1: the gradient of the policy is nan"):
        run.train()
    assert_equal_weights(before, weights(run))


def test_sampling_that_biases_the_ratio_is_told(base, tmp_path, capsys):
    trainer(base, tmp_path / "run", top_p=0.9)
    assert "biased" in capsys.readouterr().err
