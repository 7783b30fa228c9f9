"""Completions on the disk: what each row says, that ``datasets`` reads it, and what a resume takes back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pyarrow import parquet

from reinforcepp.config.reward_rules import repeated_share
from reinforcepp.data import load_prompts, read_prompts, read_texts
from reinforcepp.monitoring import completion_log as answers
from reinforcepp.monitoring.step_metrics import rollout_columns, step_metrics
from reinforcepp.rewards.functions import RewardScores
from reinforcepp.types import Completion, Prompt, RolloutBatch


def batch(rewards=(1.0, 3.0, 2.0, 2.0)):
    texts = ["one two", "a b c d a b c d a", "<script>alert(1)</script>", ""]
    prompts = [Prompt("p?", (1, 2), 0), Prompt("q?", (1,), 1)]
    completions = [
        Completion(prompts[i // 2], (5,) * (i + 1), (-1.0,) * (i + 1), text, "length" if i == 3 else "stop")
        for i, text in enumerate(texts)
    ]
    mask_BT = torch.tensor([[float(t <= i) for t in range(4)] for i in range(4)])
    old_BT, ref_BT = -1.0 * mask_BT, -1.5 * mask_BT
    zeros_BT = torch.zeros(4, 4)
    group_ids_B = torch.tensor([c.prompt.key for c in completions])
    return RolloutBatch(completions, mask_BT, old_BT, old_BT, ref_BT, zeros_BT, torch.tensor(rewards), group_ids_B)


def scores(rewards=(1.0, 3.0, 2.0, 2.0)):
    return RewardScores(list(rewards), {"length": [0.5] * 4, "style": [r - 0.5 for r in rewards]})


def test_a_row_has_the_rewards_of_a_completion(tmp_path):
    answers.save_completions(tmp_path / answers.step_file(7), rollout_columns(batch(), scores(), 7))
    rows = answers.read_completions(tmp_path)
    k3 = math.exp(-0.5) + 0.5 - 1  # of log-probabilities -1 under the policy and -1.5 under the reference, each token
    assert rows[1] == {
        "step": 7,
        "prompt": "p?",
        "completion": "a b c d a b c d a",
        "reward": 3.0,
        "reward/length": 0.5,
        "reward/style": 2.5,
        "kl": pytest.approx(k3, abs=1e-6),
        "length": 2,
        "finish_reason": "stop",
        "messages": None,
        "chat_template_kwargs": None,
    }
    assert [row["finish_reason"] for row in rows] == ["stop"] * 3 + ["length"]


def test_datasets_reads_all_steps_as_one_table(tmp_path):
    from datasets import load_dataset

    for step in (1, 2, 10):
        answers.save_completions(
            tmp_path / "run" / "completions" / answers.step_file(step), rollout_columns(batch(), scores(), step)
        )
    data = load_dataset(
        "parquet", data_dir=str(tmp_path / "run" / "completions"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert data["step"] == [1] * 4 + [2] * 4 + [10] * 4
    assert data.column_names[:4] == ["step", "prompt", "completion", "reward"]
    assert answers.saved_steps(tmp_path / "run") == [1, 2, 10]


CALL = {"type": "function", "function": {"name": "ping", "arguments": {"host": "gw", "count": 2, "size": None}}}
MESSAGES = (
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Is the gateway up?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "It needs a ping."},
    {"role": "tool", "content": '{"lost": 0}', "name": "ping", "tool_call_id": "1"},
)
TOOLS = [{"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}]


def conversations():
    """Return completions to a conversation with a tool, to one with only text, and to a prompt that is a text."""
    plain = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "p?"})
    prompts = [
        Prompt("shown", (1,), 0, messages=MESSAGES, chat_template_kwargs={"tools": TOOLS, "enable_thinking": False}),
        Prompt("Be brief.\n\np?", (1,), 1, messages=plain),
        Prompt("p?", (1,), 2),
    ]
    return [Completion(prompt, (5,), (-1.0,), "yes", "stop") for prompt in prompts]


def test_messages_are_saved_exactly(tmp_path):
    answers.save_completions(tmp_path / "a.parquet", answers.columns_of(conversations()))
    rows = answers.read_completions(tmp_path / "a.parquet")
    assert tuple(rows[0]["messages"]) == MESSAGES and rows[2]["messages"] is None
    assert [answers.conversation_of(row) for row in rows] == [list(MESSAGES), rows[1]["messages"], "p?"]
    assert json.loads(rows[0]["chat_template_kwargs"]) == {"tools": TOOLS, "enable_thinking": False}
    assert rows[1]["chat_template_kwargs"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_training_on_completions_encodes_the_prompts_that_were_sampled_from(tmp_path, streaming):
    given = conversations()
    answers.save_completions(tmp_path / "a.parquet", answers.columns_of(given))
    data, *_ = load_prompts(tmp_path / "a.parquet", heldout_fraction=0, seed=0, streaming=streaming)
    assert [row.conversation for row in data.prompts] == [c.prompt.conversation for c in given]
    assert [row.chat_template_kwargs for row in data.prompts] == [c.prompt.chat_template_kwargs for c in given]
    assert [row.conversation for row in read_texts(tmp_path / "a.parquet").rows] == [
        c.prompt.conversation for c in given
    ]


def test_a_copy_by_another_program_has_the_messages_in_a_column(tmp_path):
    given = conversations()[:2]
    answers.save_completions(tmp_path / "a.parquet", answers.columns_of(given))
    copied = parquet.read_table(tmp_path / "a.parquet").replace_schema_metadata(None)
    parquet.write_table(copied, tmp_path / "b.parquet")
    rows = read_prompts(tmp_path / "b.parquet", prompt_column="messages").prompts
    assert [row.messages for row in rows] == [c.prompt.messages for c in given]


@pytest.mark.parametrize("order", ["conversation text", "text conversation", "conversation text tool"])
def test_datasets_reads_files_with_and_without_conversations(tmp_path, order):
    from datasets import load_dataset

    folder = tmp_path / "completions"
    tool, conversation, text = conversations()
    given = [{"conversation": conversation, "text": text, "tool": tool}[name] for name in order.split()]
    fields = answers.message_fields(completion.prompt for completion in given)
    for step, completion in enumerate(given, 1):
        answers.save_completions(folder / answers.step_file(step), answers.columns_of([completion]), fields)
    data = load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    found = dict(zip(data["prompt"], data["messages"], strict=True))
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p?"}]
    if "tool" in order:
        assert [message["content"] for message in found["shown"]] == [message["content"] for message in MESSAGES]
        plain = [
            message | dict.fromkeys(("tool_calls", "reasoning_content", "name", "tool_call_id")) for message in plain
        ]
    assert found["Be brief.\n\np?"] == plain and found["p?"] is None


def test_a_resume_adds_the_messages_to_files_of_older_versions(tmp_path):
    columns = rollout_columns(batch(), scores(), 1)
    old = {name: values for name, values in columns.items() if name not in ("messages", "chat_template_kwargs")}
    answers.save_completions(tmp_path / "completions" / answers.step_file(1), old)
    assert answers.conversation_of(answers.read_completions(tmp_path / "completions")[0]) == "p?"
    answers.restore_completions(tmp_path, tmp_path, 1)
    answers.save_completions(tmp_path / "expected", columns)
    assert (tmp_path / "completions" / answers.step_file(1)).read_bytes() == (tmp_path / "expected").read_bytes()


def test_equal_completions_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        answers.save_completions(tmp_path / name, rollout_columns(batch(), scores(), 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_resume_removes_later_files_and_copies_earlier_ones(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2, 3):
        answers.save_completions(
            run / "completions" / answers.step_file(step), rollout_columns(batch(), scores(), step)
        )
    for when in ("before", "step 1", "step 3", "after"):
        answers.save_completions(answers.evaluation_file(run, when), answers.columns_of(batch().completions))
    other.mkdir()
    answers.restore_completions(run, other, 2)
    assert {path.stem for path in (other / "evaluations").iterdir()} == {"before", "step-000001"}
    assert answers.saved_steps(other) == [1, 2] and answers.saved_steps(run) == [1, 2, 3]
    answers.restore_completions(run, run, 1)
    assert answers.saved_steps(run) == [1]
    assert {path.stem for path in (run / "evaluations").iterdir()} == {"before", "step-000001"}


def test_each_process_has_files_of_its_own():
    assert answers.step_file(3) == "step-000003.parquet"


def test_evaluations_are_filed_by_name(tmp_path):
    names = [answers.evaluation_file(tmp_path, when).name for when in ("before", "step 50", "after")]
    assert names == ["before.parquet", "step-000050.parquet", "after.parquet"]


# --- what the doctor looks at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0.0), ("a b c", 0.0), ("a b c d", 0.0), ("a a a a a a", 2 / 3), ("a b c d a b c d", 1 / 5)],
)
def test_repetition_counts_runs_of_four_words(text, expected):
    assert repeated_share(text, 4) == pytest.approx(expected)


def test_signal_and_saturation_are_measured():
    metrics = step_metrics(batch(), scores(), reward_bounds=(-2.0, 2.0))
    assert metrics["frac_reward_zero_std"] == 0.5  # the second prompt's completions are both worth 2
    assert step_metrics(batch(), scores((2.0,) * 4))["frac_reward_zero_std"] == 1
    assert metrics["reward_top_ratio"] == 0.25 and metrics["reward_clipped_ratio"] == 0.25
    assert metrics["completions/repeated_ratio"] == pytest.approx(2 / 6 / 4)


def test_without_several_completions_to_a_prompt_there_are_no_groups():
    alone = batch()
    alone.group_ids_B[:] = torch.arange(4)
    metrics = step_metrics(alone, scores())
    assert "frac_reward_zero_std" not in metrics and "reward_clipped_ratio" not in metrics
