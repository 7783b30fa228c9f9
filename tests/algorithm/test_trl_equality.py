"""Advantages, losses and gradients equal those of TRL's own trainers on the same completions.

Both sides run their real code: TRL's ``_generate_and_score_completions`` and ``_compute_loss``, and this project's ``score``,
``with_advantages`` and ``PolicyUpdate``. Only the sampled tokens are given, and for off-policy losses the old log-probabilities.
"""

import random

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.training.policy_update import rollout_batch, with_advantages, with_rewards
from reinforcepp.types import Completion

PROMPTS, GENERATIONS, MAX_TOKENS = ["How do I check host 1?", "ping", "Why is the DNS slow today?"], 3, 7
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
LENGTHS = [1, 5, 7, 2, 7, 3, 4, 6, 7]
EOS = 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base"), "llama"))


def sampled_tokens():
    """Return fixed completions of different lengths; those of MAX_TOKENS tokens are truncated, the others end in EOS."""
    rng = random.Random(3)
    rows = [[rng.randrange(1, 320) for _ in range(n)] for n in LENGTHS]
    return [row if n == MAX_TOKENS else [*row[:-1], EOS] for row, n in zip(rows, LENGTHS, strict=True)]


def by_tokens(prompts, completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def by_length(prompts, completions, completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def only_some(prompts, completions, completion_ids, **_):
    return [None if len(ids) == 1 else ids[0] % 5 for ids in completion_ids]


def leave_reference(model):
    """Move the policy away from its reference, so that the KL isn't 0."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def noise():
    torch.manual_seed(5)
    return 0.4 * torch.randn(len(LENGTHS), MAX_TOKENS)


class Ours:
    """An update of this project, up to the gradients."""

    def __init__(self, base, folder, old, reward=by_tokens, weights=None, **settings):
        defaults = {
            "max_new_tokens": MAX_TOKENS,
            "max_prompt_length": 64,
            "learning_rate": 1e-3,
            "rollout": "transformers",
        }
        sizes = {"batch_size": len(PROMPTS), "num_generations": GENERATIONS, "micro_batch_size": 4}
        if old is not None:
            sizes |= {"num_iterations": 2}
        args = ReinforceConfig(output_dir=str(folder / "ours"), **(defaults | sizes | settings))
        self.trainer = trainer = ReinforceTrainer(base, reward, args, ROWS, reward_weights=weights)
        leave_reference(trainer.policy)
        update, kl_coef = trainer.update, args.kl_coef
        completions = [
            Completion(prompt, tuple(ids), (-1.0,) * len(ids), "", "stop" if ids[-1] == EOS else "length")
            for prompt, ids in zip(
                [prompt for prompt in trainer.prompts for _ in range(GENERATIONS)], sampled_tokens(), strict=True
            )
        ]
        if update.on_policy:  # log-probabilities of the engine, which shares the policy
            with torch.no_grad():
                logprobs = update.logprobs(trainer.policy, completions, range(len(completions)), MAX_TOKENS)[0]
            completions = [
                Completion(c.prompt, c.ids, tuple(row[: len(c.ids)].tolist()), c.text, c.finish_reason)
                for c, row in zip(completions, logprobs, strict=True)
            ]
        kept, scores = with_rewards(completions, trainer.rewards, update)
        rollout = rollout_batch(kept, scores, trainer.rewards, update, trainer.reference)
        self.batch = with_advantages(rollout, scores, update, kl_coef)
        if old is not None:
            rollout.old_logprobs_BT.add_(old * rollout.mask_BT)
        self.advantages = self.batch.advantages_BT
        self.stats = update._accumulate(self.batch, range(len(completions)), kl_coef).combine(update.ranks)
        self.loss = self.stats["loss"]
        self.gradients = [p.grad for p in trainer.policy.parameters()]


CLASSES = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def trainer_of_trl(base, folder, kind, reward=by_tokens, **settings):
    trainer_class, config_class = CLASSES[kind]
    args = config_class(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(LENGTHS),
        gradient_accumulation_steps=1,
        num_generations=GENERATIONS,
        max_completion_length=MAX_TOKENS,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **settings,
    )
    return trainer_class(base, reward, args, Dataset.from_list(ROWS))


class Trl:
    """The same update by a trainer of TRL."""

    def __init__(self, base, folder, ours, old, kind, reward=by_tokens, **settings):
        self.trainer = trainer = trainer_of_trl(base, folder, kind, reward, **settings)
        leave_reference(trainer.model)
        prompts = [list(c.prompt.ids) for c in ours.batch.rollout.completions]
        trainer._tokenize_prompts = lambda texts: (prompts, None, {})
        tokens = sampled_tokens()
        generated = {"grpo": (tokens, None), "rloo": tokens}[kind]
        trainer._generate_single_turn = lambda *_: generated
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer._generate_and_score_completions([row for row in ROWS for _ in range(GENERATIONS)])
        if old is not None:
            old_logprobs = ours.batch.rollout.old_logprobs_BT * ours.batch.rollout.mask_BT
            inputs["old_per_token_logps"], inputs["old_logps"] = old_logprobs, old_logprobs.sum(1)
        self.advantages = inputs["advantages"]
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        self.loss = loss.item()
        self.gradients = [p.grad for p in trainer.model.parameters()]
        self.metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_equal(ours, trl):
    first = ours.advantages[:, 0]
    torch.testing.assert_close(
        torch.where(ours.batch.rollout.mask_BT[:, 0] > 0, trl.advantages, 0.0), first, atol=1e-5, rtol=0
    )
    assert ours.loss == pytest.approx(trl.loss, abs=1e-5)
    assert_equal_gradients(ours, trl)
    for name, value in trl.metrics.items():
        if name.startswith("clip_ratio/"):
            assert ours.stats[name] == pytest.approx(value, abs=1e-6), name


def assert_equal_gradients(ours, trl, factor=1.0):
    assert any(g.abs().max() > 1e-3 for g in trl.gradients)
    for mine, other in zip(ours.gradients, trl.gradients, strict=True):
        torch.testing.assert_close(factor * mine, other, atol=1e-5, rtol=1e-4)


POLICIES = {"on-policy": None, "off-policy": noise()}


SEQUENCES = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize("old", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "bnpo"},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"loss_type": "sapo"},
        {"loss_type": "grpo"} | SEQUENCES,
        {"loss_type": "luspo"} | SEQUENCES,
        {"delta": 1.4},
        {"scale_rewards": "batch"},
        {"scale_rewards": False},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "grpo"},
        {"entropy_coef": 0.3},
        {"top_entropy_quantile": 0.4, "entropy_coef": 0.3},
        {"off_policy_mask_threshold": 0.05},
        {"use_bias_correction_kl": True},
        {"use_bias_correction_kl": False},
        {"use_bias_correction_kl": True, "loss_type": "grpo"} | SEQUENCES,
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
)
def test_grpo_equals_trl(base, tmp_path, settings, old):
    of_trl = {
        "temperature": 0.9,
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "beta": 0.2 if "use_bias_correction_kl" in settings else 0.0,
    }
    of_trl |= settings
    names = {"epsilon": "clip_low", "epsilon_high": "clip_high", "delta": "dual_clip", "beta": "kl_coef"}
    ours = Ours(base, tmp_path, old, estimator="grpo", **{names.get(k, k): v for k, v in of_trl.items()})
    assert_equal(ours, Trl(base, tmp_path, ours, old, "grpo", **of_trl))


@pytest.mark.parametrize("settings", [{}, {"scale_rewards": "batch"}], ids=["group", "batch"])
def test_normalize_then_sum_equals_trl(base, tmp_path, settings):
    both = {"multi_objective_aggregation": "normalize_then_sum"} | settings
    rewards = [by_tokens, by_length, only_some]
    ours = Ours(base, tmp_path, None, rewards, [1.0, 0.5, 2.0], estimator="grpo", kl_coef=0.0, **both)
    assert_equal(
        ours, Trl(base, tmp_path, ours, None, "grpo", rewards, beta=0.0, reward_weights=[1.0, 0.5, 2.0], **both)
    )


def test_k2_has_the_gradient_of_trls_default_kl_on_policy(base, tmp_path):
    """The gradient of ratio · k3 is d · dlogp at ratio 1, which is that of k2; the losses differ."""
    ours = Ours(base, tmp_path, None, estimator="grpo", kl_coef=0.2)
    trl = Trl(base, tmp_path, ours, None, "grpo", beta=0.2)
    assert_equal_gradients(ours, trl)
    assert ours.loss != pytest.approx(trl.loss, abs=1e-4)


def test_the_default_loss_of_rloo_is_trls_divided_by_the_mean_length(base, tmp_path):
    ours = Ours(base, tmp_path, None, estimator="rloo", kl_coef=0.1)
    trl = Trl(base, tmp_path, ours, None, "rloo", beta=0.1)
    mean_length = sum(LENGTHS) / len(LENGTHS)
    assert_equal_gradients(ours, trl, factor=mean_length)


@pytest.mark.parametrize("old", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("settings", [{}, {"normalize_advantages": True, "mask_truncated_completions": True}], ids=str)
def test_rloo_equals_trl(base, tmp_path, settings, old):
    ours = Ours(base, tmp_path, old, estimator="rloo", loss_type="rloo", kl_coef=0.1, **settings)
    trl = Trl(base, tmp_path, ours, old, "rloo", beta=0.1, **settings)
    if settings:  # TRL's loss counts -1 · A of masked completions, which has no gradient
        trl.loss += trl.advantages[[n == MAX_TOKENS for n in LENGTHS]].sum().item() / len(LENGTHS)
    assert_equal(ours, trl)


STEP = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1e3, "max_steps": 2}


@pytest.mark.parametrize(("kind", "loss_type", "beta"), [("grpo", "dapo", 0.0), ("rloo", "rloo", 0.1)])
def test_two_training_steps_give_trls_weights(base, tmp_path, kind, loss_type, beta):
    """Each trainer runs as a user calls it; TRL's gets the completions that ours sampled."""
    sizes = {"batch_size": len(PROMPTS), "num_generations": GENERATIONS, "micro_batch_size": 4}
    args = ReinforceConfig(
        output_dir=str(tmp_path / "ours"),
        estimator=kind,
        loss_type=loss_type,
        kl_coef=beta,
        max_new_tokens=MAX_TOKENS,
        rollout="transformers",
        **sizes,
        **STEP,
    )
    ours = ReinforceTrainer(base, by_tokens, args, ROWS)
    sampled, generate = [], ours.engine.generate

    def recorded(prompts, sampling):
        sampled.append(generate(prompts, sampling))
        return sampled[-1]

    ours.engine.generate = recorded
    ours.train()

    trl = trainer_of_trl(base, tmp_path, kind, beta=beta, lr_scheduler_type="constant", save_strategy="no", **STEP)
    steps = iter(sampled)

    def given_ids(texts):
        rows = next(steps)
        by_text = {text: [c for c in rows if c.prompt.text == text] for text in PROMPTS}
        trl.completions = [by_text[text].pop() for text in texts]
        return [list(c.prompt.ids) for c in trl.completions], None, {}

    def given_completions(*_):
        tokens = [list(c.ids) for c in trl.completions]
        return (tokens, None) if kind == "grpo" else tokens

    trl._tokenize_prompts, trl._generate_single_turn = given_ids, given_completions
    trl.train()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    other = trl.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-5)
    assert any((value - before[name]).abs().max() > 1e-4 for name, value in other.items())


@pytest.mark.parametrize("kind", ["grpo", "reinforce_plus_plus"])
def test_a_step_without_complete_completions_changes_nothing(base, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"mask_truncated_completions": True, "max_new_tokens": 1, "num_generations": 2, "max_steps": 1}
    args = ReinforceConfig(output_dir=str(tmp_path / "run"), estimator=kind, rollout="transformers", **settings)
    trainer = ReinforceTrainer(model, by_tokens, args, ROWS, processing_class=tiny.tokenizer())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 1 and log["loss"] == 0 and log["grad_norm"] == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_kl_and_its_limit_no_step_runs_the_reference_policy(base, tmp_path, monkeypatch):
    settings = {"kl_coef": 0.0, "kl_limit": None, "max_new_tokens": 3, "max_steps": 1, "num_generations": 2}
    args = ReinforceConfig(output_dir=str(tmp_path / "run"), estimator="grpo", rollout="transformers", **settings)
    trainer = ReinforceTrainer(base, by_tokens, args, ROWS)

    def forbidden(*_, **__):
        raise AssertionError("the reference policy ran")

    trainer.reference.forward = forbidden
    trainer.train()
    log = trainer.state.log_history[0]
    assert "kl" not in log and log["grad_norm"] > 0
