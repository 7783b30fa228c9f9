"""The folder of a run: refused if it isn't free, writable or roomy; nobody else's files are ever removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.errors import ConfigError
from reinforcepp.run_folder import check_output, check_resume, clear, describe_run


def refusal(folder: Path, **settings) -> str:
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        check_output(str(folder), **({"overwrite": False} | settings))
    assert contents(folder) == before
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")} if folder.is_dir() else {}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def finished(tmp_path) -> Path:
    """What a finished training leaves."""
    names = ("run.json", "metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json")
    return fill(tmp_path / "run", *names)


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """What an interrupted training leaves."""
    return fill(tmp_path / "run", "run.json", "metrics.jsonl", "checkpoints/step-000003/state.json")


def test_a_new_or_empty_folder_is_free_and_not_made_yet(tmp_path):
    new = tmp_path / "a" / "b"
    assert check_output(str(new), overwrite=False) == new
    assert not new.parent.exists()
    assert check_output(str(tmp_path), overwrite=False) == tmp_path
    assert check_output(str(tmp_path), overwrite=True) == tmp_path


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/runs/a", overwrite=False) == tmp_path / "runs" / "a"


# --- another run ------------------------------------------------------------------------------------------------------


def test_a_finished_run_needs_overwrite(finished):
    message = refusal(finished)
    assert str(finished) in message
    assert "--overwrite" in message
    assert "--resume" not in message
    assert check_output(str(finished), overwrite=True) == finished


def test_an_interrupted_run_may_be_resumed_or_overwritten(interrupted):
    message = refusal(interrupted)
    assert "--overwrite" in message
    assert "--resume" in message
    assert check_output(str(interrupted), overwrite=True) == interrupted
    assert check_output(str(interrupted), overwrite=False, resume=True) == interrupted


@pytest.mark.parametrize("left", ["checkpoints/step-000003.partial/state.json", "checkpoints/step-000003/x"])
def test_half_a_checkpoint_is_none(finished, left):
    fill(finished, left)
    assert "no checkpoint to resume from" in refusal(finished, resume=True)
    assert "--resume" not in refusal(finished)


def test_there_must_be_something_to_resume(tmp_path):
    message = refusal(tmp_path / "new", resume=True)
    assert "no checkpoint" in message
    assert "without --resume" in message


@pytest.mark.parametrize(
    "names",
    [
        ("reward_model.json", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("run.json", "run.json.partial", "metrics.jsonl"),
        ("reward_model/reward_model.json", "policy/run.json", "result.json", "comparison.json", "training_curve.png"),
        ("reward_model/reward_model.json",),  # a demo that was interrupted early
    ],
)
def test_what_runs_write_may_be_overwritten(tmp_path, names):
    folder = fill(tmp_path / "run", *names)
    assert "already holds a run" in refusal(folder)
    assert check_output(str(folder), overwrite=True) == folder


def test_clear_removes_it_all(finished, tmp_path):
    outside = fill(tmp_path / "elsewhere", "kept")
    fill(finished, "checkpoints/step-000001/state.json")
    (finished / "policy").symlink_to(outside)
    clear(finished)
    assert list(finished.iterdir()) == []
    assert (outside / "kept").is_file()
    clear(tmp_path / "none")


# --- files that no run wrote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_stop_it_even_with_overwrite(finished, overwrite):
    fill(finished, "thesis.tex")
    message = refusal(finished, overwrite=overwrite)
    assert "thesis.tex" in message
    assert "another folder" in message
    assert "--overwrite" not in message


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_from_elsewhere_is_foreign_though_its_file_names_are_ours(tmp_path, overwrite):
    folder = fill(tmp_path / "gpt2", "config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")
    assert "config.json" in refusal(folder, overwrite=overwrite)


def test_many_foreign_files_are_counted(tmp_path):
    fill(tmp_path / "home", *"abcdefg")
    assert "a, b, c, d and 3 more" in refusal(tmp_path / "home", overwrite=True)


# --- not writable, no room --------------------------------------------------------------------------------------------


def test_a_file_in_the_way(tmp_path):
    fill(tmp_path, "taken")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        message = refusal(folder, overwrite=True)
        assert str(folder) in message
        assert f"{tmp_path / 'taken'} is a file" in message


def test_no_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    message = refusal(tmp_path / "a" / "b")
    assert "no permission" in message
    assert str(tmp_path) in message
    assert "another output_dir" in message


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 2**20, 5 * 2**20)
    )
    message = refusal(tmp_path / "a" / "b", needed_bytes=3 * 2**30)
    assert "5 MiB free" in message
    assert "3 GiB" in message
    assert "free some space" in message
    assert check_output(str(tmp_path / "a"), overwrite=False, needed_bytes=5 * 2**20)


# --- notes on a run, and going on with it -----------------------------------------------------------------------------


def test_a_run_notes_its_settings(tmp_path):
    describe_run(tmp_path / "a", {"seed": 1}, {"num_steps": 3})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == {"settings": {"seed": 1}, "num_steps": 3}


def test_the_same_settings_may_go_on_also_longer(tmp_path):
    begun = TrainConfig(learning_rate=3e-5, clip_high=0.27)
    describe_run(tmp_path, as_dict(begun), {})
    more = {"resume": True, "max_steps": 9, "output_dir": "moved", "save_every": 5}
    check_resume(tmp_path, as_dict(TrainConfig(learning_rate=3e-5, clip_high=0.27, **more)))


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [("learning_rate", 2e-5, "1e-05"), ("model", "other", "builtin:tiny"), ("batch_size", 16, "8"), ("seed", 1, "42")],
)
def test_other_settings_may_not(tmp_path, name, value, was):
    describe_run(tmp_path, as_dict(TrainConfig()), {})
    with pytest.raises(ConfigError) as caught:
        check_resume(tmp_path, as_dict(TrainConfig(resume=True, **{name: value})))
    for word in (str(tmp_path), f"{name} {was}, not {value}", "--overwrite"):
        assert word in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_without_its_notes_a_run_can_not_be_resumed(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json is missing or damaged.*--overwrite"):
        check_resume(tmp_path, as_dict(TrainConfig()))
