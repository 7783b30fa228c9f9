"""The training loop with vLLM: in sync after each update, with importance correction, and stopped if out of sync."""

from dataclasses import replace

import pytest
import tiny
import torch

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.errors import RolloutError
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.training.optimizer_step import OptimizerStep
from reinforcepp.training.policy_update import rollout_batch, with_advantages, with_rewards

pytestmark = pytest.mark.skipif(bool(node_problem()), reason=node_problem())
PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model a third of whose tokens end a completion."""
    folder, model = tiny.save(tmp_path_factory.mktemp("base")), tiny.model()
    model.generation_config.eos_token_id = [0, *range(20, 320, 3)]
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trainer(base, tmp_path):
    def likes_early_tokens(prompts, completions, completion_ids, **_):
        return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]

    args = ReinforceConfig(
        output_dir=str(tmp_path / "run"),
        rollout="vllm",
        max_new_tokens=8,
        max_prompt_length=40,
        batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
        temperature=0.8,
        eval_prompts=0,
    )
    built = ReinforceTrainer(base, likes_early_tokens, args, PROMPTS)
    yield built
    built.engine.close()


def test_every_step_samples_from_the_current_weights(trainer):
    log = tiny.train(trainer)
    assert len(log) == 4 and log[-1]["kl"] > 0.001
    for metrics in log:
        assert metrics["sampling/logprob_gap_max"] < 1e-3 and metrics["sampling/kl"] < 1e-5


def test_tokens_are_weighted_by_the_ratio_to_the_engine(trainer):
    """If an engine overstates its log-probabilities by ln 1.25, its tokens get weight 0.8."""
    completions = trainer.engine.generate(trainer.prompts, trainer.rollouts.sampling(0))
    kept, scores = with_rewards(completions, trainer.rewards, trainer.update)
    rollout = rollout_batch(kept, scores, trainer.rewards, trainer.update, trainer.reference)
    work = with_advantages(rollout, scores, trainer.update, trainer.config.kl_coef)
    batch = work.rollout
    assert trainer.update.correction == "tis" and not trainer.update.on_policy
    rows = list(range(8))
    step = OptimizerStep.of(batch, rows, trainer.config.kl_coef, trainer.config)
    work.advantages_BT = work.advantages_BT.abs()  # the token mean of normalised advantages would be 0
    exact, _ = trainer.update._policy_loss(work, rows, step, new=True)
    batch.rollout_logprobs_BT.add_(torch.log(torch.tensor(1.25)) * batch.mask_BT)
    corrected, _ = trainer.update._policy_loss(work, rows, step, new=True)
    assert corrected.item() == pytest.approx(0.8 * exact.item(), rel=1e-3) and exact.item() < -0.1


def test_both_engines_sample_the_same_completions(trainer):
    """They sample alike from the same seeds, so equal weights give equal completions."""
    transformers = TransformersEngine(trainer.policy, trainer.tokenizer)
    sampling = trainer.rollouts.sampling(3)
    pairs = zip(
        transformers.generate(trainer.prompts, sampling),
        trainer.engine.generate(trainer.prompts, sampling),
        strict=True,
    )
    assert all(a.ids == b.ids for a, b in pairs)


class Echo:
    """Answers once with the length of the message."""

    def reset(self, row):
        self.left = 2

    def step(self, message):
        self.left -= 1
        return f"Only {len(message['content'])}?", 1.0, not self.left


def test_both_engines_run_the_same_episodes(trainer):
    """The budget of tokens, which shrinks with every turn, is a limit per prompt in both engines."""
    transformers = TransformersEngine(trainer.policy, trainer.tokenizer)
    runner = EpisodeRunner("Echo", Echo, trainer.tokenizer, max_turns=5, timeout=20, max_prompt_length=40)
    sampling = replace(trainer.rollouts.sampling(3), max_new_tokens=24)
    one, other = (runner.run(trainer.prompts, sampling, engine.generate) for engine in (transformers, trainer.engine))
    assert [episode.ids for episode in one] == [episode.ids for episode in other]
    assert max(len(episode.turns) for episode in one) > 2
    assert {episode.finish_reason for episode in one} == {"stop", "length"}


def test_an_update_without_effect_stops_the_run_with_the_metrics(trainer, monkeypatch):
    monkeypatch.setattr(trainer.engine, "load_weights", lambda model: None)
    with pytest.raises(RolloutError, match=r"out of sync.*differ by up to"):
        trainer.train()
