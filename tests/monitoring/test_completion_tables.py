"""Tables of completions have TRL's columns, on the terminal and in trackers."""

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.completion_tables import completion_panel, completion_table
from reinforcepp.rewards.functions import RewardScores
from reinforcepp.runtime.terminal import Console
from reinforcepp.types import Completion, EpisodeTurn, Prompt

ASKED = ({"role": "user", "content": "Is [red]it[/red] up?"},)


def table(**settings):
    prompts = [Prompt("Is it up?", (1,), 0, messages=ASKED), Prompt("Why?", (1,), 1)]
    rows = [Completion(prompts[i], (5, 6), (0.0, 0.0), f"a\x1b[31m{i}{j}", "stop") for i in (0, 1) for j in (0, 1)]
    scores = RewardScores([1.0] * 4, {"f": [1.0, None, 2.0, 3.0]}, extra={"parsed": ["w", "x", "y", "z"]})
    mask_BT = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 0.0]])
    advantages_BT = torch.tensor([[1.0, 3.0], [0.0, 0.0], [-1.0, -1.0], [5.0, 9.0]])
    return completion_table(SimpleNamespace(completions=rows, mask_BT=mask_BT), scores, advantages_BT, 3, **settings)


def test_the_columns_are_those_of_trl():
    found = table()
    assert list(found) == ["step", "prompt", "completion", "f", "parsed", "advantage"]
    assert found["prompt"][0] == list(ASKED) and found["prompt"][2] == "Why?"
    assert found["completion"][1] == [{"role": "assistant", "content": "a\x1b[31m01"}]
    assert found["f"] == [1.0, None, 2.0, 3.0] and found["advantage"] == [2.0, 0.0, -1.0, 5.0]
    unique = table(unique_prompts=True)
    assert unique["parsed"] == ["w", "y"] and unique["step"] == [3, 3]


def test_the_terminal_shows_some_rows_as_plain_text():
    console = Console(width=100, record=True)
    console.print(completion_panel(table(), 2))
    text = console.export_text()
    assert "Step 3" in text and "\x1b" not in text and "[red]it[/red]" in text and "\ufffd[31m00" in text
    assert "\ufffd[31m10" in text and "[31m01" not in text


def test_an_episode_is_its_conversation_as_text():
    said = {"role": "assistant", "content": "[b]\x1b[31m"}, {"role": "tool", "name": "f", "content": "7"}
    spans = [(0, 2, True, 0.5), (2, 5, False, None), (5, 6, True, None), (6, 6, False, None)]
    turns = tuple(EpisodeTurn((said[i % 2],), *span) for i, span in enumerate(spans))
    prompt = Prompt("Why?", (1,), 0)
    rows = [
        Completion(prompt, (5,) * 6, (0.0,) * 6, "[b]", "stop", turns=turns),
        Completion(prompt, (5,), (0.0,), "a", "stop"),
    ]
    batch = SimpleNamespace(completions=rows, mask_BT=torch.ones(2, 6))
    columns = completion_table(batch, RewardScores([1.0] * 2, {}), torch.ones(2, 6), 3)
    assert columns["completion"] == [
        "Assistant (2 tokens, reward +0.50): [b]\x1b[31m\nTool (f) (3 tokens, masked): 7\n"
        "Assistant (1 token): [b]\x1b[31m\nTool (f) (never seen by the policy): 7",
        "a",
    ]
    console = Console(width=160, record=True)
    console.print(completion_panel(columns, 2))
    text = console.export_text()
    assert "Assistant (2 tokens, reward +0.50): [b]" in text and "\x1b" not in text


class Tracker:
    """Stands for a tracker of Accelerate."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_table(self, table_name, columns=None, data=None, dataframe=None, step=None):
        self.calls.append((self.name, table_name, dataframe.shape, step))

    def log(self, values, step=None):
        self.calls.append((self.name, *((name, value.dataframe.shape) for name, value in values.items()), step))


def test_trackers_get_the_table(monkeypatch):
    """The calls have the signatures of wandb 0.31, trackio 0.43 and mlflow 3.17."""
    calls = []
    trackio = SimpleNamespace(Table=lambda dataframe: SimpleNamespace(dataframe=dataframe))

    def log_table(data, artifact_file, run_id=None):
        calls.append(("mlflow", artifact_file, data.shape, run_id))

    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_table=log_table))
    names = ("wandb", "trackio", "mlflow", "tensorboard")
    ranks = SimpleNamespace(is_main=True, accelerator=SimpleNamespace(trackers=[Tracker(n, calls) for n in names]))
    Ranks.track_table(ranks, "completions", table(), 3)
    assert calls == [
        ("wandb", "completions", (4, 6), 3),
        ("trackio", ("completions", (4, 6)), 3),
        ("mlflow", "completions.json", (4, 6), "r1"),
    ]


def test_a_training_prints_tables_if_asked(tmp_path, capfd):
    def zero(completions):
        return [0.0] * len(completions)

    settings = {"max_steps": 1, "batch_size": 2, "max_new_tokens": 4, "rollout": "transformers", "report_to": "none"}
    for number in (None, 1):
        folder = str(tmp_path / str(number))
        args = ReinforceConfig(output_dir=folder, num_completions_to_print=number, **settings)
        policy, rows = tiny.model(vocab_size=330), [{"prompt": list(ASKED)}] * 2
        ReinforceTrainer(policy, zero, args, rows, processing_class=tiny.chat_tokenizer()).train()
        assert ("advantage" in capfd.readouterr().err) is (number is not None)
    with pytest.raises(ConfigError, match="num_completions_to_print: needs log_completions"):
        ReinforceConfig(num_completions_to_print=1, log_completions=False)
