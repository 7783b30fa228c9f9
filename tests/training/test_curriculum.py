"""The curriculum by success rate: weights, draws, and runs that are stopped, ahead of training, or on several ranks."""

import os
import signal
from collections import Counter

import numpy as np
import pytest
import tiny

import scripts
from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.rewards.functions import Dropped, RewardScores
from reinforcepp.training.curriculum import CurriculumBatches, drawn
from reinforcepp.types import Completion, Prompt

ROWS = [{"prompt": f"How do I check host {i}?", "number": i} for i in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def batches(size=4, batch=2, **options):
    return CurriculumBatches([Prompt(f"{i}", (1,), 10 * i) for i in range(size)], batch, 3, **options)


def results(*pairs, dropped=()):
    completions = [Completion(Prompt(f"{key}", (1,), key), (5,), (-1.0,), "a", "stop") for key, _ in pairs]
    return completions, RewardScores([reward for _, reward in pairs], {}, dropped=list(dropped))


# --- weights and draws ------------------------------------------------------------------------------------------------


def test_weights_are_the_variance_of_success():
    """By hand, with one success and one failure as prior: prompt 0 succeeds 3 of 4 times: p = 4/6, prompt 1 never of 2: 1/4.

    Then prompt 0 fails twice: 1.5 successes, 0.5 + 2 failures, so p = 2.5/6. Prompts 2 and 3 weren't used: p = 1/2.
    """
    chosen = batches()
    metrics = chosen.observe(0, *results((0, 1), (0, 1), (0, 0.5), (0, 0.4), (10, 0), (10, 0)))
    assert chosen.weights() == pytest.approx([4 / 6 * 2 / 6, 1 / 4 * 3 / 4, 1 / 4, 1 / 4])
    assert metrics == {
        "curriculum/success_rate": 0.5,
        "curriculum/seen_prompts": 2,
        "curriculum/never_solved": 1,
        "curriculum/always_solved": 0,
    }
    metrics = chosen.observe(1, *results((0, 0), (0, None), dropped=[Dropped(0, 0.0, 3), Dropped(20, 1.0, 3)]))
    assert chosen.weights() == pytest.approx([2.5 / 6 * 3.5 / 6, 3 / 16, 2 / 3 * 1 / 3, 1 / 4])
    assert metrics["curriculum/always_solved"] == 1 and metrics["curriculum/success_rate"] == pytest.approx(1 / 3)


def test_draws_are_in_proportion_to_the_weights_and_without_replacement():
    """The first of two draws from weights 1, 2, 5 is each in 1/8, 2/8, 5/8 of the cases; 0 is drawn in the second, too."""
    weights = np.array([1.0, 2.0, 5.0])
    pairs = [drawn(weights, 2, np.random.default_rng([7, i])) for i in range(4000)]
    assert all(len(set(pair)) == 2 for pair in pairs)
    first = Counter(pair[0] for pair in pairs)
    assert [first[i] / 4000 for i in range(3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.035)
    zero = sum(0 in pair for pair in pairs) / 4000
    assert zero == pytest.approx(1 / 8 + 2 / 8 * 1 / 6 + 5 / 8 * 1 / 3, abs=0.035)
    assert sorted(drawn(weights, 3, np.random.default_rng(1))) == [0, 1, 2]


def test_a_step_is_chosen_when_it_is_first_asked_for_and_its_choice_is_part_of_the_state():
    one = batches(30, 4, refills=1)
    first, ahead = one.at(0), one.at(1)
    assert one.at(0, 4) == one.with_refills(0)[4:] and len({p.key for p in one.with_refills(0)}) == 8
    one.observe(0, *results(*[(prompt.key, 0.0) for prompt in first for _ in range(9)]))
    assert one.at(1) == ahead
    other = batches(30, 4, refills=1)
    other.load(one.state())
    assert other.at(1) == ahead and other.state() == one.state()
    assert [other.at(step) for step in (2, 3)] == [one.at(step) for step in (2, 3)]
    assert batches(30, 4).at(2) != one.at(2)


# --- in a training ----------------------------------------------------------------------------------------------------


def odd(completion_ids, number, **_):
    """Some prompts are always solved, some never, the others now and then."""
    return [float(n % 3) if n % 3 < 2 else float(sum(ids) % 2) for ids, n in zip(completion_ids, number, strict=True)]


def trainer(base, folder, rows=ROWS, **settings):
    usual = {"num_generations": 2, "batch_size": 4, "max_new_tokens": 4, "max_prompt_length": 40, "max_steps": 4}
    usual |= {"curriculum": True, "learning_rate": 1e-3, "rollout": "transformers", "mixed_precision": "no"}
    usual |= {"save_every": 1, "keep_last": 9}
    return ReinforceTrainer(base, odd, ReinforceConfig(output_dir=str(folder), **(usual | settings)), rows)


SEVERAL = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_iterations": 2}


@pytest.mark.parametrize(
    "settings",
    [SEVERAL, SEVERAL | {"staleness": 1}, SEVERAL | {"dynamic_sampling": True, "max_num_gen_batches": 2}],
    ids=["in-a-step", "ahead", "with-refills"],
)
def test_a_stopped_run_chooses_the_same_prompts(base, tmp_path, settings):
    trainer(base, tmp_path / "whole", **settings).train()
    run, seen = trainer(base, tmp_path / "run", **settings), []
    safe_point = run.guard.heartbeat.safe_point

    def stop():
        seen.append(1)
        if run.run.state.step == 1 and run.run.batch is not None and len(run.run.batch.history) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        safe_point()

    run.guard.heartbeat.safe_point = stop
    with pytest.raises(Interrupted):
        run.train()
    assert (tmp_path / "run" / "checkpoints" / "step-000001+2" / "curriculum.json").is_file()
    trainer(base, tmp_path / "run", resume=True, **settings).train()
    for name in ("model.safetensors", "metrics.jsonl", "completions/step-000004.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["curriculum/seen_prompts"] > 4 and metrics[-1]["curriculum/never_solved"] > 0


SCRIPT = """
import sys
from training.test_curriculum import trainer

trainer(sys.argv[1], sys.argv[2]).train()
"""


@pytest.mark.full
def test_ranks_choose_the_same_prompts(base, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for ranks in (1, 2):
        search = os.pathsep.join([str(scripts.ROOT / "tests"), str(scripts.SOURCE)])
        done = scripts.forked(ranks, tmp_path / "script.py", base, tmp_path / f"{ranks}", PYTHONPATH=search)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / f"{ranks}") for ranks in (1, 2))
    names = [name for name in one[-1] if "time" not in name]
    assert all(b[name] == pytest.approx(a[name], abs=1e-4) for a, b in zip(one, two, strict=True) for name in names)


def test_what_can_not_work_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="curriculum and interleave_probs"):
        ReinforceConfig(curriculum=True, interleave_probs=(1.0, 2.0))
    with pytest.raises(ConfigError, match="curriculum: draws prompts at random, but train_dataset is a stream"):
        trainer(base, tmp_path / "run", iter(ROWS))
