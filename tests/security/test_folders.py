"""Attacks through files: links in a shared folder, tampered checkpoints, and model folders of strangers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import ones

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands import cli
from reinforcepp.errors import ReinforceError
from reinforcepp.files import MANIFEST, whole_folder, write_json
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring.completion_log import restore_completions, save_completions
from reinforcepp.monitoring.metric_log import MetricLog, log_event, restore_logs
from reinforcepp.rollout.vllm.compat import node_problem
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


def hang(shared: Path) -> None:
    program = "import sys, time; from pathlib import Path; from reinforcepp.monitoring.watchdog import Watchdog\n"
    program += "with Watchdog(Path(sys.argv[1]), 0.1): time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", program, str(shared)], capture_output=True).returncode == 1


LINKED_FILES: dict[str, Callable[[Path], object]] = {
    "report.txt.partial": lint,
    "run.json.partial": lambda shared: write_json(shared / "run.json", {}),
    "metrics.jsonl.partial": resume,
    "metrics.jsonl": log_a_step,
    "events.jsonl": lambda shared: log_event(shared, "Step 1: skipped update."),
    "stacks.txt": hang,
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
@pytest.mark.parametrize("name", ["model.partial", pytest.param("rollout_weights.partial", marks=pytest.mark.full)])
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


@pytest.mark.attack("L3", "code for torch.compile, in a folder of the temporary folder whose name is predictable")
def test_compiled_code_is_not_read_from_the_temporary_folder(tmp_path, outcome, monkeypatch):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that the test restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    settings = {"output_dir": str(tmp_path / "run"), "rollout": "transformers", "eval_prompts": 0, "max_new_tokens": 4}
    made = {"processing_class": tiny.tokenizer(), "train_dataset": [{"prompt": f"Check host {i}."} for i in range(8)]}
    config = ReinforceConfig(torch_compile=True, **settings)
    ReinforceTrainer(tiny.model(), lambda completions, **_: [0.0] * len(completions), config, **made)
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    private = Path(folder).is_relative_to(tmp_path / "home")
    outcome(
        f"torch loads code from {'the cache of the user' if private else 'torchinductor_USER in the temporary folder'}"
    )
    assert private


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
        taken = f"nothing, {type(error).__name__}"
    outcome(f"{how}: resumes from {taken}")
    assert taken == checkpoint.name_of(1)


# --- L4: a stranger's model folder with pickles, or whose configuration leads elsewhere -----------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of a model, which a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def set_entry(path: Path, name: str, value: object) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | {name: value}))


def pickle_weights(folder: Path, name: str) -> None:
    """Replace the weights of ``folder`` by the same ones in a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def pickled_shards(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    pickle_weights(folder, "shard.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_by_name(folder: Path) -> None:
    pickle_weights(folder, "adapter_model.bin")
    set_entry(folder / "config.json", "transformers_weights", "adapter_model.bin")


def foreign_shards(folder: Path) -> None:
    """Take the weights from a private model of the user."""
    weights, private = folder / "model.safetensors", folder.parent / "private.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), f"../{private.name}")}
    weights.rename(private)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def foreign_index(folder: Path) -> None:
    foreign_shards(folder)
    (folder / "model.safetensors.index.json").rename(folder / "x.safetensors.index.json")
    set_entry(folder / "config.json", "transformers_weights", "x.safetensors.index.json")


FOLDERS: dict[str, Callable[[Path], object]] = {
    "an index of safetensors that names a .bin": pickled_shards,
    "adapter_model.bin, which config.json names as the weights": pickled_by_name,
    "an index that names ../private.safetensors": foreign_shards,
    "another index, which config.json names": foreign_index,
}


@pytest.fixture
def pickles(monkeypatch):
    """The files that torch unpickles."""
    loaded, restore = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, *a, **k: loaded.append(Path(str(file)).name) or restore(file, *a, **k)
    )
    return loaded


def result_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ReinforceError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "loaded"


@pytest.mark.attack("L4", "a model folder with pickled weights, or with the weights of another model")
@pytest.mark.parametrize("how", FOLDERS)
def test_only_safetensors_in_the_folder_are_loaded(folder, how, outcome, pickles):
    FOLDERS[how](folder)
    result = result_of(lambda: load_policy(str(folder)))
    outcome(f"{how}: {result}{' by torch.load' * bool(pickles)}")
    assert result.startswith("refused") and not pickles


@pytest.mark.attack("L4", "a model folder with pickled weights, to be served by vLLM")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_pickled_weights_are_served(folder, name, outcome, monkeypatch, capsys):
    pickle_weights(folder, name)
    commands: list[list[str]] = []
    monkeypatch.setattr("reinforcepp.commands.serve._run", lambda command, *_, **__: commands.append(command) or 0)
    code = cli.main(["serve", str(folder)])
    outcome(f"{name}: " + ("a server with this folder is started" if commands else f"refused with exit code {code}"))
    assert code == 2 and not commands and "never loaded" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.attack("L4", "a model folder with pickled weights, for vLLM in the process")
def test_vllm_unpickles_no_weights(folder, outcome, pickles):
    if problem := node_problem():
        pytest.skip(problem)
    from reinforcepp.rollout.vllm_integration import VllmEngine

    pickle_weights(folder, "pytorch_model.bin")
    engines = []
    try:
        result = result_of(lambda: engines.append(VllmEngine(str(folder), load_tokenizer(str(folder)))))
    finally:
        for engine in engines:
            engine.close()
    outcome(f"{result}{f', unpickled {pickles[0]}' if pickles else ''}")
    assert result.startswith("refused") and not pickles


def pickled_adapter(folder: Path) -> None:
    """Make the repository one of an adapter in a pickle, whose base model is another repository."""
    model = get_peft_model(load_policy(str(folder)), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(folder, save_embedding_layers=False)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    set_entry(folder / "adapter_config.json", "base_model_name_or_path", "someone/base")
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink()


COMMIT = "0123456789" * 4
HUB_REPOSITORIES: dict[str, Callable[[Path], object]] = {
    "an index that names a pickle": pickled_shards,
    "an adapter in a pickle": pickled_adapter,
}


@pytest.mark.attack("L4", "a model on the Hub with pickled weights")
@pytest.mark.parametrize("how", HUB_REPOSITORIES)
def test_no_pickle_of_the_hub_is_loaded(tiny_model, folder, how, tmp_path, outcome, pickles, monkeypatch):
    HUB_REPOSITORIES[how](folder)
    for repository, source in (("someone/base", tiny_model), ("someone/model", folder)):
        cached = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(source, cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    load_policy("someone/base")
    result = result_of(lambda: load_policy("someone/model"))
    outcome(f"{how}: {result}{f', unpickled {pickles[0]}' if pickles else ''}")
    assert result.startswith("refused") and not pickles


def multitask_prompts(folder: Path, adapter: Path) -> None:
    state = {"prompt_embeddings": ones(4, 32), "prefix_task_cols": ones(1, 4, 1), "prefix_task_rows": ones(1, 1, 32)}
    torch.save(state, folder.parent / "foreign.bin")
    settings = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": str(folder.parent / "foreign.bin"),
        "num_virtual_tokens": 4,
        "num_tasks": 1,
        "token_dim": 32,
        "num_transformer_submodules": 1,
        "num_attention_heads": 1,
        "num_layers": 1,
    }
    for name, value in settings.items():
        set_entry(adapter / "adapter_config.json", name, value)


def base_is_itself(folder: Path, adapter: Path) -> None:
    set_entry(adapter / "adapter_config.json", "base_model_name_or_path", str(adapter))


ADAPTERS = {
    "prompts whose configuration names a pickle elsewhere": multitask_prompts,
    "an adapter that is its own base model": base_is_itself,
}


@pytest.fixture
def adapter(folder, tmp_path):
    """A LoRA adapter of the model in ``folder``."""
    model = get_peft_model(load_policy(str(folder)), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    set_entry(tmp_path / "adapter" / "adapter_config.json", "base_model_name_or_path", str(folder))
    return tmp_path / "adapter"


@pytest.mark.attack("L4", "an adapter whose configuration leads elsewhere")
@pytest.mark.parametrize("how", ADAPTERS)
def test_an_adapter_leads_nowhere_else(folder, adapter, how, outcome, pickles):
    ADAPTERS[how](folder, adapter)
    result = result_of(lambda: load_policy(str(adapter)))
    outcome(f"{how}: {result}{f', unpickled {pickles[0]}' if pickles else ''}")
    assert result.startswith("refused") and not pickles


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.mark.attack("L3", "a model folder in which a link leads to a private file, to be exported")
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool.jinja"])
def test_an_export_holds_no_private_file(folder, name, tmp_path, outcome, capsys):
    (tmp_path / "id_ed25519").write_text(KEY)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_ed25519")
    code = cli.main(["export", str(folder), "--output_dir", str(tmp_path / "out")])
    leaked = [
        path.name
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and KEY in path.read_text(errors="replace")
    ]
    shown = capsys.readouterr().err
    outcome(
        f"{name}: exported with the private key in {leaked[0]}" if leaked else f"{name}: refused with exit code {code}"
    )
    assert code == 2 and not leaked and "is a link to" in shown


@pytest.mark.attack("L3", "a run folder in which a link leads to a private file, to be resumed in another folder")
def test_resuming_from_a_run_copies_no_private_file(tmp_path, outcome):
    strange, run = tmp_path / "strange", tmp_path / "run"
    (strange / "completions").mkdir(parents=True)
    run.mkdir()
    (tmp_path / "id_ed25519").write_text(KEY)
    (strange / "completions" / "step-000001.parquet").symlink_to(tmp_path / "id_ed25519")
    restore_completions(strange, run, step=1)
    copied = [path.name for path in run.rglob("*") if path.is_file()]
    outcome(f"private key copied to {copied[0]}" if copied else "not copied")
    assert not copied
