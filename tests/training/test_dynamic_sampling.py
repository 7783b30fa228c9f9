"""Dynamic sampling: groups of equal rewards are dropped and replaced, on any number of ranks, and a stopped run loses nothing."""

import json
import os
import signal
import textwrap

import pytest
import tiny

import scripts
from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.rewards.functions import Dropped, RewardScores
from reinforcepp.training import step_groups
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.training.step_groups import StepGroups, with_signal
from reinforcepp.types import Completion, Prompt

ROWS = [{"prompt": f"How do I check host {i}?", "number": i} for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def odd(completion_ids, number, **_):
    """The completions of two thirds of the prompts all have the same reward, 0 or 1."""
    return [float(n % 3) if n % 3 < 2 else float(sum(ids) % 5) for ids, n in zip(completion_ids, number, strict=True)]


def trainer(base, folder, reward=odd, rows=ROWS, **settings):
    usual = {"num_generations": 2, "batch_size": 4, "max_new_tokens": 5, "max_prompt_length": 40, "max_steps": 2}
    usual |= {"dynamic_sampling": True, "learning_rate": 1e-3, "rollout": "transformers", "mixed_precision": "no"}
    usual |= {"estimator": "reinforce_plus_plus_baseline", "save_every": 1, "keep_last": 2}
    return ReinforceTrainer(base, reward, ReinforceConfig(output_dir=str(folder), **(usual | settings)), rows)


class OneRank:
    count, index, is_main = 1, 0, True

    def gather(self, item):
        return [item]

    def local_slice(self, items):
        return list(items)


def group(key, *rewards):
    prompt = Prompt(f"{key}?", (1,), key)
    return [Completion(prompt, (5,) * (key + 1), (-1.0,) * (key + 1), "a", "stop") for _ in rewards], list(rewards)


def scored(*groups):
    completions = [c for completions, _ in groups for c in completions]
    total = [reward for _, rewards in groups for reward in rewards]
    return completions, RewardScores(total, {"f": [-reward for reward in total]})


def settings(**given):
    usual = {"dynamic_sampling": True, "num_generations": 2, "max_num_gen_batches": 3}
    return ReinforceConfig(**(usual | given))


# --- which groups -----------------------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_dropped_and_counted():
    batch = scored(group(0, 1, 1), group(1, 0, 1), group(2, 0, 0), group(3, 7, 9))
    kept, scores = with_signal(*batch, settings())
    assert [c.prompt.key for c in kept] == [1, 1, 3, 3] and scores.total == [0, 1, 7, 9]
    assert scores.by_function == {"f": [0, -1, -7, -9]} and scores.skipped == 0
    assert scores.dropped == [Dropped(0, 1, 1)] * 2 + [Dropped(2, 0, 3)] * 2
    clipped, _ = with_signal(*batch, settings(reward_clip=5.0))
    assert [c.prompt.key for c in clipped] == [1, 1]  # 7 and 9 are both 5


def test_rewards_that_are_normalized_one_by_one_can_differ_though_their_sum_does_not():
    completions, _ = scored(group(0, 1, 1))
    scores = RewardScores([1, 1], {"f": [1, 0], "g": [0, 1]})
    each = settings(estimator="grpo", multi_objective_aggregation="normalize_then_sum")
    assert with_signal(completions, scores, each)[0] == completions
    assert with_signal(completions, scores, settings())[0] == []


def test_refills_end_with_enough_groups():
    """2 of 4 groups have signal, so 2 missing ones take 4 prompts; then 3 of 8, so 1 takes 3 prompts, and 1 group is too many."""
    groups = StepGroups(settings(max_num_gen_batches=4), OneRank(), 4)
    groups.add(*scored(group(0, 1, 1), group(1, 0, 1), group(2, 0, 0), group(3, 1, 0)))
    assert (groups.generated, groups.ahead) == (4, 4)
    groups.add(*scored(group(4, 0, 2), group(5, 3, 3), group(6, 3, 3), group(7, 3, 3)))
    assert (groups.generated, groups.ahead) == (8, 3)
    groups.add(*scored(group(8, 0, 0), group(9, 4, 5), group(10, 6, 7)))
    assert (groups.generated, groups.ahead) == (11, 0)
    completions, scores = groups.result()
    assert [c.prompt.key for c in completions] == [1, 1, 3, 3, 4, 4, 9, 9]
    assert scores.total == [0, 1, 1, 0, 0, 2, 4, 5] and scores.by_function["f"] == [-x for x in scores.total]
    assert scores.counts == {"dynamic_sampling/batches": 3.0}
    assert [each.key for each in scores.dropped[::2]] == [0, 2, 5, 6, 7, 8, 10] and scores.dropped[-1].reward == 7


@pytest.mark.parametrize("refill", [[], [group(3, 2, 2)]], ids=["no-prompts-left", "limit"])
def test_a_step_keeps_what_it_has_at_the_limit(refill, monkeypatch):
    warnings = []
    monkeypatch.setattr(step_groups, "warn_once", warnings.append)
    groups = StepGroups(settings(max_num_gen_batches=2), OneRank(), 2)
    groups.add(*scored(group(0, 1, 1), group(1, 0, 1)))
    groups.add(*scored(*refill))
    assert groups.ahead == 0 and [c.prompt.key for c in groups.result()[0]] == [1, 1]
    assert warnings == [step_groups.FEW]


def test_a_step_without_any_signal_keeps_its_first_batch():
    groups = StepGroups(settings(max_num_gen_batches=2), OneRank(), 1)
    first = scored(group(0, 1, 1))
    groups.add(*first)
    groups.add(*scored(group(1, 0, 0)))
    completions, scores = groups.result()
    assert completions == first[0] and scores.total == [1, 1] and [each.key for each in scores.dropped] == [1, 1]


def test_refills_are_other_prompts_and_a_function_of_seed_step_and_number():
    prompts = [Prompt(f"{i}", (1,), i) for i in range(20)]
    batches = PromptBatches(prompts, 4, 7, refills=3)
    for step in (0, 4, 5):
        parts = batches.at(step), batches.at(step, 4, 1), batches.at(step, 5, 7), batches.at(step, 12, 4)
        keys = [prompt.key for part in parts for prompt in part]
        assert [len(part) for part in parts] == [4, 1, 7, 4] and len(set(keys)) == 16
        assert batches.with_refills(step) == [prompt for part in parts for prompt in part]
        assert batches.at(step, 4, 4) != batches.at(step + 1, 4, 4) and batches.at(step, 16, 4) == []
    again, other = (PromptBatches(prompts, 4, seed, refills=3) for seed in (7, 8))
    assert again.at(5, 6, 3) == batches.at(5, 6, 3) != other.at(5, 6, 3)
    assert len(PromptBatches(prompts[:5], 4, 7, refills=3).at(0, 4, 4)) == 1
    assert PromptBatches(prompts, 4, 7).with_refills(0) == batches.at(0)


# --- in a training ----------------------------------------------------------------------------------------------------


def test_every_step_trains_on_as_many_groups_with_signal(base, tmp_path):
    run = trainer(base, tmp_path / "run")
    run.train()
    rows = read_completions(tmp_path / "run" / "completions")
    for step, metrics in enumerate(read_metrics(tmp_path / "run"), 1):
        used = [row for row in rows if row["step"] == step]
        rewards = {row["prompt"]: {r["reward"] for r in used if r["prompt"] == row["prompt"]} for row in used}
        assert len(rewards) == 4 and all(len(each) == 2 for each in rewards.values()) and len(used) == 8
        assert metrics["frac_reward_zero_std"] == 0 and metrics["dynamic_sampling/batches"] > 1
        dropped = metrics["dynamic_sampling/dropped_completions"]
        assert dropped == 2 * metrics["dynamic_sampling/dropped_groups"] >= 2
        assert metrics["dynamic_sampling/dropped_tokens"] <= 5 * dropped
        total = sum(row["reward"] for row in used)
        below, above = total / (8 + dropped), (total + 4 * dropped) / (8 + dropped)
        assert below <= metrics["dynamic_sampling/reward"] <= above


def test_off_by_default(base, tmp_path):
    trainer(base, tmp_path / "run", dynamic_sampling=False, max_steps=1).train()
    (metrics,) = read_metrics(tmp_path / "run")
    assert not [name for name in metrics if "dynamic" in name] and metrics["frac_reward_zero_std"] > 0


def test_a_signal_in_the_middle_of_a_step_with_refills_loses_nothing(base, tmp_path):
    several = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_iterations": 2}
    trainer(base, tmp_path / "whole", **several).train()
    run, seen = trainer(base, tmp_path / "run", **several), []
    safe_point = run.guard.heartbeat.safe_point

    def stop():
        seen.append(1)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        safe_point()

    run.guard.heartbeat.safe_point = stop
    with pytest.raises(Interrupted):
        run.train()
    (batch,) = (tmp_path / "run" / "checkpoints").glob("*+*/rollout.json")
    assert json.loads(batch.read_text())["scores"]["dropped"]
    trainer(base, tmp_path / "run", resume=True, **several).train()
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


SCRIPT = """
import sys
from training.test_dynamic_sampling import trainer

trainer(sys.argv[1], sys.argv[2], micro_batch_size=2, gradient_accumulation_steps=1).train()
"""


@pytest.mark.full
def test_two_ranks_agree_on_refills_and_train_as_one(base, tmp_path):
    """Several optimizer steps per batch, so that the order of the rows counts."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    for ranks in (1, 2):
        search = os.pathsep.join([str(scripts.ROOT / "tests"), str(scripts.SOURCE)])
        done = scripts.forked(ranks, tmp_path / "script.py", base, tmp_path / f"{ranks}", PYTHONPATH=search)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / f"{ranks}") for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        names = [name for name in first if "time" not in name]
        assert first.keys() == second.keys() and all(second[k] == pytest.approx(first[k], abs=1e-4) for k in names)
        assert first["dynamic_sampling/batches"] > 1


# --- what can't work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_generations": 1}, "dynamic_sampling: compares .* num_generations is 1. Set num_generations to 2"),
        ({"staleness": 1, "rollout": "transformers"}, "staleness 1 generates later steps"),
        ({"max_num_gen_batches": 0}, "max_num_gen_batches"),
    ],
)
def test_what_can_not_work_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        settings(**given)


def test_streams_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"dynamic_sampling: .* train_dataset is a stream"):
        trainer(base, tmp_path / "run", rows=iter(ROWS))
