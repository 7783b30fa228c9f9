"""The keys of log_history are those of TRL's trainers."""

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from trl.trainer.utils import nanstd

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.step_metrics import completion_metrics, reward_metrics
from reinforcepp.rewards.functions import BatchLog, RewardScores
from reinforcepp.types import Completion, Prompt

ROWS = [{"prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(8)]
NO_MEANING = {
    "eval_loss",  # an evaluation computes no loss
    "eval_clip_ratio/low_mean",  # nor a policy ratio
    "eval_clip_ratio/low_min",
    "eval_clip_ratio/high_mean",
    "eval_clip_ratio/high_max",
    "eval_clip_ratio/region_mean",
    "eval_frac_reward_zero_std",  # one completion per held-out prompt
    "eval_num_tokens",  # tokens of the training, which its entries have
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}
"""Keys of TRL that this package doesn't log."""


def odd(completions, log_metric, **_):
    log_metric("share", 0.5)
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def even(completions, **_):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama", vocab_size=330).save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    return str(folder)


def keys(trainer):
    return {key for entry in trainer.state.log_history for key in entry}


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_the_keys_are_those_of_trl(algorithm, base, tmp_path):
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 4, "num_generations": 2, "beta": 0.1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"per_device_eval_batch_size": 4, "max_steps": 1, "logging_steps": 1, "eval_strategy": "steps"}
    args = getattr(trl, f"{algorithm}Config")(output_dir=str(tmp_path / "trl"), eval_steps=1, **settings)
    data = Dataset.from_list(ROWS)
    theirs = getattr(trl, f"{algorithm}Trainer")(base, [odd, even], args, data, data.select(range(2)))
    theirs.train()
    args = ReinforceConfig(
        output_dir=str(tmp_path / "ours"),
        estimator=algorithm.lower(),
        batch_size=4,
        num_generations=2,
        max_steps=1,
        max_new_tokens=4,
        rollout="transformers",
    )
    ours = ReinforceTrainer(base, [odd, even], args, ROWS, ROWS[:2])
    ours.train()
    missing = keys(theirs) - keys(ours) - {"total_flos"}
    assert missing == NO_MEANING


def test_values_are_those_of_trl():
    scores = RewardScores([1.0, 2.0, 6.0], {"f": [1.0, None, 3.0], "g": [None] * 3}, metrics={"share": 0.5})
    total, of_f = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, float("nan"), 3.0])
    expected = {"reward": 3.0, "reward_std": nanstd(total).item(), "share": 0.5}
    assert reward_metrics(scores) == pytest.approx(
        expected | {"rewards/f/mean": 2.0, "rewards/f/std": nanstd(of_f).item()}
    )
    prompt = Prompt("a", (1,), 0)
    rows = [Completion(prompt, (5,) * n, (0.0,) * n, "a", "length" if n == 9 else "stop") for n in (2, 4, 9)]
    names = [f"completions/{kind}{part}_length" for part in ("", "_terminated") for kind in ("mean", "min", "max")]
    found = completion_metrics(rows)
    assert [found[name] for name in names] == [5, 2, 9, 3, 2, 4]
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert completion_metrics(rows[2:])["completions/mean_terminated_length"] == 0


@pytest.mark.parametrize("name", ["loss", "step", "reward"])
def test_functions_cant_log_the_trainers_metrics(name):
    with pytest.raises(ConfigError, match="the trainer logs a metric of this name"):
        BatchLog(1).log_metric(name, 1.0)
