"""Rewards in a whole training: what is not scored changes nothing, each function is logged, failures stop the run."""

import json
from functools import partial

import pytest
import tiny
import torch
import trl.rewards

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli
from reinforcepp.errors import ConfigError, RewardError, TrainingDiverged
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions
from reinforcepp.training.policy_update import rollout_batch, with_rewards
from reinforcepp.types import Completion

PROMPTS = [{"prompt": f"How do I check host {i}?", "graded": i % 3 > 0} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def spread(prompts, completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def some(prompts, completions, completion_ids, graded, **_):
    """A third of the prompts isn't scored, and where there are several samples, one of the rest."""
    whole = spread(prompts, completions, completion_ids)
    return [score if marked else None for score, marked in zip(whole, graded, strict=True)]


def trainer(base, folder, rewards=spread, prompts=PROMPTS, evaluation=None, weights=None, judge=None, **settings):
    defaults = {"max_new_tokens": 6, "max_prompt_length": 40, "batch_size": 8, "seed": 5, "rollout": "transformers"}
    args = ReinforceConfig(output_dir=str(folder), **(defaults | {"learning_rate": 1e-3, "max_steps": 1} | settings))
    return ReinforceTrainer(base, rewards, args, prompts, evaluation, judge=judge, reward_weights=weights)


def log(folder):
    return [{k: v for k, v in m.items() if not k.startswith(("time/", "step_time"))} for m in read_metrics(folder)]


class Fewer:
    """An engine that returns only the completions that ``wanted`` accepts."""

    def __init__(self, engine, wanted):
        self.engine, self.wanted = engine, wanted

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, prompts, sampling):
        return [c for c in self.engine.generate(prompts, sampling) if self.wanted(c)]


def first_letter(prompts, completions, log_extra, log_metric, trainer_state, topic):
    letters = [messages[0]["content"].strip()[:1] for messages in completions]
    log_extra("letter", letters)
    log_metric("mean_code", sum(letter.isascii() for letter in letters) / len(letters))
    SEEN.append((trainer_state.global_step, [messages[-1]["content"] for messages in prompts], topic))
    return [float(ord(letter or " ") % 5) for letter in letters]


SEEN = []


def test_functions_of_trl_score_conversations(base, tmp_path):
    """TRL's own functions run unchanged; metrics and columns that a function logs are in the files of the run."""
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the link up?"}]
    rows = [{"prompt": ask, "topic": f"{i}"} for i in range(4)]
    functions = [
        partial(first_letter),
        trl.rewards.think_format_reward,
        trl.rewards.get_soft_overlong_punishment(6, 4),
        trl.rewards.get_repetition_penalty_reward(1, -1.0),
    ]
    policy = tiny.model(vocab_size=330)
    settings = {"max_new_tokens": 6, "batch_size": 4, "max_steps": 2, "rollout": "transformers"}
    args = ReinforceConfig(output_dir=str(tmp_path), **settings)
    ReinforceTrainer(policy, functions, args, rows, rows[:2], tiny.chat_tokenizer()).train()
    names = ["first_letter", "think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward"]
    for metrics in log(tmp_path):
        assert all(f"rewards/{name}/mean" in metrics for name in names) and 0 <= metrics["mean_code"] <= 1
    found = read_completions(tmp_path / "completions")
    assert all(row["completion"].strip()[:1] == row["extra/letter"] for row in found) and len(found) == 8
    (evaluated, *_) = read_completions(tmp_path / "evaluations" / "after.parquet")
    assert evaluated["completion"].strip()[:1] == evaluated["extra/letter"]
    training = [questions for _, questions, topic in SEEN if len(questions) == 4]
    assert training == [["Is the link up?"] * 4] * 2 and all(len(topic) == len(asked) for _, asked, topic in SEEN)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "reinforce_plus_plus_baseline", "num_generations": 3},
        {"estimator": "grpo", "num_generations": 3},
        {"estimator": "rloo", "num_generations": 3},
        {"estimator": "ppo"},
        {"gradient_accumulation_steps": 1, "micro_batch_size": 2, "num_iterations": 2},
        {"normalize_over": "sequences", "reward_clip": 0.5, "kl_coef": 0.0},
    ],
    ids=["plain", "baseline", "grpo", "rloo", "ppo", "several-updates", "sequences"],
)
def test_a_batch_is_used_as_if_what_is_not_scored_had_never_been_there(base, tmp_path, settings):
    """Golden: an engine that never returns these rows gives bit-identical weights and metrics."""

    def wanted(completion: Completion) -> bool:
        return completion.prompt.columns["graded"] and completion.ids[0] % 5 > 0

    def some_samples(completions, completion_ids, graded):
        return [
            sum(ids) % 7 / 7 if marked and ids[0] % 5 > 0 else None
            for ids, marked in zip(completion_ids, graded, strict=True)
        ]

    some_samples.__name__ = "spread"
    whole = trainer(base, tmp_path / "none", some_samples, max_steps=2, **settings)
    fewer = trainer(base, tmp_path / "never", max_steps=2, **settings)
    alone = set()

    def also_alone(completion: Completion) -> bool:
        return wanted(completion) and (completion.prompt.key, completion.ids) not in alone

    fewer.engine = Fewer(fewer.engine, also_alone)
    if fewer.config.estimator_spec.grouped:
        generate = fewer.engine.engine.generate

        def noted(prompts, sampling):
            completions = generate(prompts, sampling)
            left = [c for c in completions if wanted(c)]
            keys = [c.prompt.key for c in left]
            alone.update((c.prompt.key, c.ids) for c in left if keys.count(c.prompt.key) == 1)
            return completions

        fewer.engine.engine.generate = noted
    whole.train()
    fewer.train()
    metrics = log(tmp_path / "none")
    ratios = [m.pop("completions/left_out_ratio") for m in metrics]
    assert all(0 < share < 1 for share in ratios)
    assert metrics == log(tmp_path / "never")
    for name, value in fewer.policy.state_dict().items():
        assert torch.equal(whole.policy.state_dict()[name], value), name
    rows = [read_completions(tmp_path / name / "completions") for name in ("none", "never")]
    assert rows[0] == rows[1] and all(row["reward"] is not None for row in rows[0])


def test_what_was_scored_by_all_tells_of_nothing_left_out(base, tmp_path):
    trainer(base, tmp_path / "run").train()
    assert "completions/left_out_ratio" not in log(tmp_path / "run")[0]


def test_a_step_that_nothing_scores_is_left_out_and_several_stop_the_run(base, tmp_path):
    def never(completions):
        return [None] * len(completions)

    run = trainer(base, tmp_path / "run", never, max_steps=4, max_skipped_updates=2)
    before = {name: value.clone() for name, value in run.policy.state_dict().items()}
    with pytest.raises(
        TrainingDiverged, match=r"no completion of the batch was scored by a reward\. The 2 updates before"
    ):
        run.train()
    assert all(torch.equal(run.policy.state_dict()[name], value) for name, value in before.items())
    assert [m.get("skipped_updates") for m in log(tmp_path / "run")] == [1.0, 1.0]


def test_a_step_stopped_in_the_middle_goes_on_with_the_same_rows(base, tmp_path):
    """The unfinished batch that a checkpoint holds lacks rows, so counting can't identify its prompts."""
    settings = {"gradient_accumulation_steps": 1, "micro_batch_size": 2, "max_steps": 3}
    trainer(base, tmp_path / "whole", some, **settings).train()
    run = trainer(base, tmp_path / "run", some, **settings)
    safe_point = run.guard.heartbeat.safe_point

    def stop():
        if run.run.state.step == 1 and run.run.batch is not None and len(run.run.batch.history) == 1:
            run.guard.heartbeat.stop.number = 2
        safe_point()

    run.guard.heartbeat.safe_point = stop
    with pytest.raises(KeyboardInterrupt):
        run.train()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any("+" in name for name in saved), "it must have been stopped within a step"
    trainer(base, tmp_path / "run", some, resume=True, **settings).train()
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert read_completions(tmp_path / "run" / "completions") == read_completions(tmp_path / "whole" / "completions")


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_held_out_answers_that_are_not_scored_have_no_part_in_the_figures(base, tmp_path):
    run = trainer(base, tmp_path / "run", some, evaluation=PROMPTS, judge="2*rule:regex?pattern=.")
    run.train()
    assert set(run.evaluations["after"].judgements) <= {0, 2}
    after = run.evaluations["after"]
    known = [reward for reward in after.rewards if reward is not None]
    assert 0 < len(known) < len(after.rewards) == 8
    assert after.reward == pytest.approx(sum(known) / len(known))
    rows = read_completions(tmp_path / "run" / "evaluations" / "after.parquet")
    assert [row["reward"] for row in rows] == after.rewards


def test_held_out_answers_of_which_none_is_scored_stop_the_run(base, tmp_path):
    evaluation = [{"prompt": "Why?", "graded": False}]
    with pytest.raises(RewardError, match=r"rewards: no held-out completion has a score.*eval_prompts 0"):
        trainer(base, tmp_path / "run", some, evaluation=evaluation).train()


# --- metrics per function --------------------------------------------------------------------------------------------------


def test_every_function_is_logged_by_itself_and_the_sum_with_its_weights(base, tmp_path):
    rewards = [spread, some, "0.5*rule:length?min=3&max=4", "rule:length?max=1&name=short"]
    trainer(base, tmp_path / "run", rewards, weights=[1, -2, 3, 0], truncation_penalty=0.25).train()
    (metrics,), rows = log(tmp_path / "run"), read_completions(tmp_path / "run" / "completions")
    for name in ("spread", "some", "length", "short"):
        scored = [row[f"reward/{name}"] for row in rows if row[f"reward/{name}"] is not None]
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(sum(scored) / len(scored))
    assert len([row for row in rows if row["reward/some"] is None]) == 3
    assert {row["finish_reason"] for row in rows} >= {"length"}
    for row in rows:
        expected = row["reward/spread"] - 2 * (row["reward/some"] or 0) + 1.5 * row["reward/length"]
        assert row["reward"] == pytest.approx(expected - 0.25 * (row["finish_reason"] == "length"))
    described = json.loads((tmp_path / "run" / "run.json").read_text())["rewards"]
    assert [(part["name"], part["weight"]) for part in described] == [
        ("spread", 1),
        ("some", -2),
        ("length", 1.5),
        ("short", 0),
    ]


def test_the_sum_is_clipped_with_the_penalty_in_it(base, tmp_path):
    run = trainer(base, tmp_path / "run", "rule:regex?pattern=.", weights=[3], truncation_penalty=1.5, reward_clip=2.0)
    completions = run.engine.generate(run.prompts, run.rollouts.sampling(0))
    kept, scores = with_rewards(completions, run.rewards, run.update)
    batch = rollout_batch(kept, scores, run.rewards, run.update, run.reference)
    expected = [3 - 1.5 * (c.finish_reason == "length") for c in completions]
    assert scores.total == expected and batch.rewards_B.tolist() == [min(2.0, value) for value in expected]
    assert 1.5 in expected


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_function_that_fails_stops_the_run_with_a_checkpoint(base, tmp_path):
    calls = []

    def shaky(prompts, completions, completion_ids):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the grader is gone")
        return spread(prompts, completions, completion_ids)

    with pytest.raises(
        RewardError, match=r"shaky: failed .*gone\. Saved the run after step 2 of 4\. Resume it with resume=True"
    ):
        trainer(base, tmp_path / "run", shaky, max_steps=4).train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    trainer(base, tmp_path / "run", shaky, max_steps=4, resume=True).train()
    calls = [0] * 9
    trainer(base, tmp_path / "whole", shaky, max_steps=4).train()
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_other_weights_are_noticed_by_a_run_that_is_resumed(base, tmp_path):
    trainer(base, tmp_path / "run", weights=[2], save_every=1).train()
    trainer(base, tmp_path / "run", weights=[2], resume=True)
    with pytest.raises(ConfigError, match=r"reward_model was 2\*spread and is 3\*spread"):
        trainer(base, tmp_path / "run", weights=[3], resume=True)


# --- by the command ---------------------------------------------------------------------------------------------------


def test_the_command_takes_all_of_them(base, tmp_path, monkeypatch, reward_folder, pairs_csv, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "async def polite(completions):\n    return ['please' in c for c in completions]\n"
    )
    flags = ["--model", base, "--data", str(pairs_csv), "--rollout", "transformers", "--max_prompt_length", "64"]
    flags += ["--max_new_tokens", "8", "--max_steps", "1", "--eval_prompts", "0", "--output_dir", "out"]
    rewards = ["--rewards", f"0.5*{reward_folder}", "mine.py:polite", "-1*rule:repetition?n=1"]
    assert cli.main(["train", *flags, *rewards, "--reward_normalize"]) == 0
    (metrics,) = log(tmp_path / "out")
    total = (
        0.5 * metrics["rewards/reward_model/mean"] + metrics["rewards/polite/mean"] - metrics["rewards/repetition/mean"]
    )
    assert metrics["reward"] == pytest.approx(total, abs=1e-5)
    assert cli.main(["report", "out"]) == 0 and cli.main(["doctor", "out", "--fail_on", "never"]) == 0
    capsys.readouterr()
    assert cli.main(["train", *flags, "--overwrite", "--save_every", "1", *rewards]) == 0
    assert cli.main(["train", *flags, "--resume", *rewards]) == 0
    capsys.readouterr()
    assert cli.main(["train", *flags, "--resume", *rewards[:-1]]) == 2
    assert "rewards was [" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("async def polite(completions):\n    return [1] * len(completions)\n")
    assert cli.main(["train", *flags, "--resume", *rewards]) == 2
    assert "reward_model was " in capsys.readouterr().err
    assert cli.main(["train", *flags, "--overwrite", "--rewards", "mine.py:rude"]) == 2
    assert "mine.py: has no function 'rude'" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def f(completions):\n    return 1 / 0\n")
    assert cli.main(["train", *flags, "--overwrite", "--rewards", "broken.py:f"]) == 2
    err = capsys.readouterr().err
    assert "error: Reward function f: failed" in err and "broken.py, line 2" in err and "Traceback" not in err
