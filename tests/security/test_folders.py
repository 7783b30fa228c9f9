"""Attacks through files: links in a shared folder, tampered checkpoints, and model folders of strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from safetensors.torch import save_file
from torch import ones

from reinforcepp.commands import cli
from reinforcepp.files import MANIFEST, whole_folder, write_json
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring.completion_log import save_completions
from reinforcepp.monitoring.metric_log import MetricLog, log_event, restore_logs
from reinforcepp.rollout.vllm.server_transfer import FileTransfer
from reinforcepp.training import checkpoint

# --- L3: another user places a link where a run will write ----------------------------------------------------------


def lint(shared: Path) -> None:
    data = shared / "data.csv"
    data.write_text("prompt,chosen,rejected\nHow?,So.,No.\n")
    cli.main(["lint", str(data), "--output", str(shared / "report.txt")])


def resume(shared: Path) -> None:
    saved = shared / "checkpoint"
    saved.mkdir()
    for name in ("metrics.jsonl", "timings.jsonl"):
        (saved / name).write_text("{}\n")
    restore_logs(saved, shared)


def log_a_step(shared: Path) -> None:
    log = MetricLog()
    try:
        log.open(shared)
        log.write({"loss": 1.0})
    finally:
        log.close()


LINKED_FILES: dict[str, Callable[[Path], object]] = {
    "report.txt.partial": lint,
    "run.json.partial": lambda shared: write_json(shared / "run.json", {}),
    "metrics.jsonl.partial": resume,
    "metrics.jsonl": log_a_step,
    "events.jsonl": lambda shared: log_event(shared, "Step 1: skipped update."),
    "step-000001.parquet.partial": lambda shared: save_completions(shared / "step-000001.parquet", {"prompt": ["a"]}),
}


@pytest.mark.attack("L3", "in a shared folder, a link to a victim's file under a name that a run will write")
@pytest.mark.parametrize("name", LINKED_FILES)
def test_no_write_follows_a_planted_link(tmp_path, name, outcome):
    victim, shared = tmp_path / "authorized_keys", tmp_path / "shared"
    victim.write_text("ssh-ed25519 AAAA victim")
    shared.mkdir()
    (shared / name).symlink_to(victim)
    try:
        LINKED_FILES[name](shared)
        ended = "written elsewhere"
    except OSError as error:
        ended = f"refused ({error.strerror})"
    found = victim.read_bytes()
    kept = found == b"ssh-ed25519 AAAA victim"
    outcome(f"victim's file kept, {ended}" if kept else f"victim's file overwritten: {found[:40]!r}")
    assert kept


def save_a_model(shared: Path) -> None:
    folder = tiny.save(shared / "tiny")
    save_model(load_policy(str(folder)), load_tokenizer(str(folder)), shared)


def send_weights(shared: Path) -> None:
    transfer = FileTransfer(shared)
    transfer.path.unlink(missing_ok=True)
    transfer.path.symlink_to(shared.parent / "home")  # after the start, when the run has emptied its folder
    transfer.prepare(load_policy(str(tiny.save(shared / "tiny"))))


LINKED_FOLDERS: dict[str, Callable[[Path], object]] = {
    "model.partial": save_a_model,
    "rollout_weights.partial": send_weights,
}


@pytest.mark.attack("L3", "in a shared folder, a link to a victim's folder under a name that a run will write")
@pytest.mark.parametrize("name", LINKED_FOLDERS)
def test_no_folder_is_written_through_a_planted_link(tmp_path, name, outcome):
    home, shared = tmp_path / "home", tmp_path / "shared"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    shared.mkdir()
    (shared / name).symlink_to(home)
    with suppress(OSError):
        LINKED_FOLDERS[name](shared)
    found = sorted(path.name for path in home.iterdir())
    outcome("victim's folder unchanged" if found == ["thesis.tex"] else f"victim's folder now holds {found[:3]}")
    assert found == ["thesis.tex"]


# --- L5: a checkpoint whose manifest proves nothing -----------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_weights(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    save_file({"weight": ones(2)}, folder / "model.safetensors")
    edit(folder, change)


def add_a_file(folder: Path) -> None:
    save_file({"weight": ones(2)}, folder / "reference.safetensors")


def name_twice(folder: Path) -> None:
    """Two entries for the weights: Python reads the last one, other readers the first one."""
    text = (folder / MANIFEST).read_text()
    forged = '"model.safetensors": {"bytes": 0, "sha256": ""},'
    (folder / MANIFEST).write_text(text.replace('"model.safetensors":', f'{forged}\n"model.safetensors":', 1))


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit(folder, lambda files: files.pop("model.safetensors"))


TAMPERED: dict[str, Callable[[Path], object]] = {
    "an empty manifest": lambda folder: replace_weights(folder, dict.clear),
    "a manifest without the weights": lambda folder: replace_weights(
        folder, lambda files: files.pop("model.safetensors")
    ),
    "a reference policy that the manifest doesn't name": add_a_file,
    "a manifest that names the weights twice": name_twice,
    "neither weights nor their entry": lose_the_weights,
    "a manifest of 100,000 nested lists": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
}


@pytest.mark.attack("L5", "a tampered checkpoint with a manifest that hides it")
@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_checkpoint_is_damaged(tmp_path, how, outcome):
    for step in (1, 2):
        with whole_folder(tmp_path / "checkpoints" / checkpoint.name_of(step)) as folder:
            save_file({"weight": 0 * ones(2)}, folder / "model.safetensors")
            write_json(folder / "state.json", {"step": step})
    TAMPERED[how](tmp_path / "checkpoints" / checkpoint.name_of(2))
    try:
        found = checkpoint.latest(tmp_path)
        taken = "none" if found is None else found.folder.name
    except RecursionError as error:
        taken = f"{type(error).__name__}: {error}"
    outcome(f"{how}: resumes from {taken}")
    assert taken == checkpoint.name_of(1)
