"""The folder of a run: refused if it isn't free, writable or roomy; nobody else's files are ever removed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reinforcepp import run_dir
from reinforcepp.config import TrainConfig, as_dict
from reinforcepp.errors import ConfigError
from reinforcepp.locks import RUN_LOCK, file_lock
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.run_dir import (
    check_output,
    check_unchanged,
    claim_output,
    clear,
    describe_run,
    noted_settings,
    set_run_aside,
)
from scripts import SOURCE


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


def test_all_files_of_a_tokenizer_belong_to_the_run(finished):
    fill(finished, "spiece.model", "vocab.txt", "additional_chat_templates/tool_use.jinja")
    assert check_output(str(finished), overwrite=True) == finished


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/runs/a", overwrite=False) == tmp_path / "runs" / "a"


# --- another process --------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path):
    """A folder, and the process that holds its lock."""
    code = (
        "import sys, time; from reinforcepp.run_dir import claim_output; "
        "lock = claim_output(sys.argv[1], overwrite=False); print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)}) as process:
        assert process.stdout.readline() == b"locked\n"
        yield tmp_path / "run", process
        process.kill()


def test_a_folder_that_another_process_writes_is_refused_until_that_process_is_dead(busy):
    folder, process = busy
    holder = f"is being written by another process (process {process.pid} on {socket.gethostname()})"
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        assert holder in refusal(folder, **settings)
    with pytest.raises(ConfigError, match=f"process {process.pid}"):
        claim_output(str(folder), overwrite=True)
    process.kill()
    process.wait()
    assert (folder / RUN_LOCK).is_file()
    with claim_output(str(folder), overwrite=False):
        fill(folder, "run.json")
        clear(folder)
        assert [path.name for path in folder.iterdir()] == [RUN_LOCK]
        assert str(os.getpid()) in (folder / RUN_LOCK).read_text()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("left", ["", "123456789 elsewhere\n", "no process"])
def test_a_lock_file_that_no_process_holds_is_removed(tmp_path, left):
    (tmp_path / RUN_LOCK).write_text(left)
    assert check_output(str(tmp_path), overwrite=False) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_appeared_after_the_check_is_not_deleted(finished, tmp_path):
    before = contents(finished)
    with pytest.raises(ConfigError, match="already holds a run"):
        claim_output(str(finished), overwrite=False)
    assert contents(finished) == before
    claim_output(str(finished), overwrite=True).release()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path, capsys):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "out.jsonl.lock").symlink_to(tmp_path / "victim")
    with file_lock(tmp_path / "out.jsonl"):
        pass
    assert (tmp_path / "victim").read_text() == "kept"
    assert "can't be locked" in capsys.readouterr().err


def test_a_lock_leaves_no_new_folder(tmp_path):
    with claim_output(str(tmp_path / "a" / "b"), overwrite=False):
        pass
    with file_lock(tmp_path / "answers.jsonl"), pytest.raises(ConfigError, match=r"^output: .*answers.jsonl is being"):
        file_lock(tmp_path / "answers.jsonl").acquire()
    assert list(tmp_path.iterdir()) == []


# --- another run ------------------------------------------------------------------------------------------------------


def test_a_finished_run_needs_overwrite(finished):
    message = refusal(finished)
    assert str(finished) in message
    assert "overwrite=True" in message
    assert "resume=True" not in message
    assert check_output(str(finished), overwrite=True) == finished


def test_an_interrupted_run_may_be_resumed_or_overwritten(interrupted):
    message = refusal(interrupted)
    assert "overwrite=True" in message
    assert "resume=True" in message
    assert check_output(str(interrupted), overwrite=True) == interrupted
    assert check_output(str(interrupted), overwrite=False, resume=True) == interrupted


@pytest.mark.parametrize("left", ["checkpoints/step-000003.partial/state.json", "checkpoints/step-000003/x"])
def test_half_a_checkpoint_is_none(finished, left):
    fill(finished, left)
    assert "resume=True" not in refusal(finished)


def test_a_run_that_was_killed_before_its_first_checkpoint_may_be_resumed(finished):
    assert check_output(str(finished), overwrite=False, resume=True) == finished
    (finished / "run.json").unlink()
    assert "no checkpoint to resume from" in refusal(finished, resume=True)


def test_a_checkpoint_of_another_run_goes_on_in_a_free_folder(interrupted, tmp_path):
    path = str(interrupted / "checkpoints" / "step-000003")
    assert check_output(str(interrupted), overwrite=False, resume=path) == interrupted
    assert check_output(str(tmp_path / "free"), overwrite=False, resume=path) == tmp_path / "free"
    other = fill(tmp_path / "other", "run.json")
    assert "already holds a run" in refusal(other, resume=path)


def test_there_must_be_something_to_resume(tmp_path):
    message = refusal(tmp_path / "new", resume=True)
    assert "no checkpoint" in message
    assert "without resume=True" in message


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
    assert "overwrite=True" not in message


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
    assert "output_dir" in message
    assert check_output(str(tmp_path / "a"), overwrite=False, needed_bytes=5 * 2**20)


# --- notes on a run, and going on with it -----------------------------------------------------------------------------


def test_a_run_notes_its_settings(tmp_path):
    describe_run(tmp_path / "a", {"seed": 1}, {"num_steps": 3})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]
    noted = json.loads((tmp_path / "a" / "run.json").read_text())
    assert noted == {"settings": {"seed": 1}, "date": run_dir.today().isoformat(), "num_steps": 3}


def test_the_same_settings_may_go_on_wherever_the_run_is(tmp_path):
    begun = as_dict(TrainConfig(learning_rate=3e-5, clip_high=0.27))
    more = {"resume": True, "output_dir": "moved", "save_every": 5, "keep_last": 7}
    check_unchanged(begun, as_dict(TrainConfig(learning_rate=3e-5, clip_high=0.27, **more)))


def test_all_other_settings_are_named_with_the_way_to_allow_them():
    began, now = (
        as_dict(TrainConfig(learning_rate=1e-5)),
        as_dict(TrainConfig(learning_rate=2e-5, batch_size=16, max_steps=9)),
    )
    with pytest.raises(ConfigError) as caught:
        check_unchanged(began, now)
    for words in (
        "learning_rate was 1e-05 and is 2e-05",
        "batch_size was 8 and is 16",
        "max_steps was 0 and is 9",
        "allow_changes='learning_rate,batch_size,max_steps'",
        "overwrite=True",
    ):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"settings \(batch_size was 8 and is 16\)"):
        check_unchanged(began, now, ["learning_rate", "max_steps"])
    check_unchanged(began, now, ["learning_rate", "max_steps", "batch_size"])


def test_a_learning_rate_that_is_not_given_is_that_of_the_start():
    began = as_dict(TrainConfig(learning_rate=1e-5))
    check_unchanged(began, as_dict(TrainConfig()))
    with pytest.raises(ConfigError, match="learning_rate was 1e-05 and is 2e-05"):
        check_unchanged(began, as_dict(TrainConfig(learning_rate=2e-5)))


def test_a_setting_that_the_run_did_not_know_yet_does_not_stop_it():
    began = as_dict(TrainConfig())
    del began["kl_target"]
    check_unchanged(began, as_dict(TrainConfig(kl_target=0.1)))


@pytest.fixture
def stored():
    """Settings as version 0.1.0 stored them."""
    settings = as_dict(TrainConfig(micro_batch_size=4))
    return {"mini_batch_size" if name == "micro_batch_size" else name: value for name, value in settings.items()}


def test_settings_stored_under_an_old_name_are_compared_with_the_current_one(stored):
    check_unchanged(stored, as_dict(TrainConfig(micro_batch_size=4)))
    now = TrainConfig(micro_batch_size=2, resume=True, allow_changes="mini_batch_size")
    with pytest.raises(ConfigError, match=r"micro_batch_size was 4 and is 2"):
        check_unchanged(stored, as_dict(now))
    check_unchanged(stored, as_dict(now), now.allowed_changes)


def test_stored_settings_are_read_under_their_current_names(tmp_path, stored):
    (tmp_path / "run.json").write_text(json.dumps({"settings": stored}))
    assert noted_settings(tmp_path)["micro_batch_size"] == 4
    assert read_run(tmp_path).settings["micro_batch_size"] == 4


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_without_its_notes_a_run_can_not_be_resumed(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: .*missing or damaged.*overwrite=True"):
        noted_settings(tmp_path)


# --- earlier runs are set aside ---------------------------------------------------------------------------------------


def test_a_run_is_set_aside_with_all_its_files_and_nothing_else(finished):
    fill(finished, "notes.txt", "checkpoints/step-000001/state.json", "model-00001-of-00002.safetensors", "run.lock")
    before = contents(finished)
    assert set_run_aside(finished) == finished / "earlier_runs" / "1"
    assert {path.name for path in finished.iterdir()} == {"earlier_runs", "notes.txt", "run.lock"}
    moved = finished / "earlier_runs" / "1"
    kept = {str(finished / Path(path).relative_to(moved)) for path in contents(moved)}
    assert kept == {path for path in before if Path(path).name not in ("notes.txt", "run.lock")}
    assert set_run_aside(finished) is None
    assert check_output(str(finished.parent / "run"), overwrite=False, set_aside=True) == finished
    clear(finished)
    assert (finished / "earlier_runs" / "1" / "run.json").is_file()


@pytest.mark.parametrize("killed_at", range(6))
def test_no_file_is_lost_if_setting_aside_is_killed(finished, monkeypatch, killed_at):
    calls, rename = [], Path.rename

    def killed(path, target):
        calls.append(path)
        if len(calls) == killed_at + 1:
            raise KeyboardInterrupt
        return rename(path, target)

    texts = sorted(contents(finished).values())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            set_run_aside(finished)
    assert sorted(text for text in contents(finished).values() if text) == texts
    assert (finished / "run.json").is_file() == (killed_at < 5), "the mark goes last"
    assert set_run_aside(finished) == finished / "earlier_runs" / "1"
    assert sorted(contents(finished / "earlier_runs" / "1").values()) == texts


def test_the_rest_of_a_killed_move_is_not_mixed_with_a_later_run(finished):
    fill(finished, "earlier_runs/1.partial/metrics.jsonl")
    assert set_run_aside(finished) == finished / "earlier_runs" / "2"
    assert [path.name for path in (finished / "earlier_runs" / "1").iterdir()] == ["metrics.jsonl"]
