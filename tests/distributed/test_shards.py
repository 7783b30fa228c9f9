"""Files of several processes' parts: read as a whole and as other parts; what can't be written is the system's own error.

Real processes write and read them in tests/distributed/test_parallel.py.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from reinforcepp.distributed.shards import read_shards, write_shards
from reinforcepp.errors import ModelError
from reinforcepp.training.checkpoint import Checkpoint, load_optimizer

TENSORS = {"0/exp_avg": torch.arange(12.0).view(4, 3), "0/step": torch.tensor(7.0), "1/master": torch.ones(5)}


def whole(name, shape):
    return None


def test_saved_shards_are_loaded_unchanged(tmp_path):
    write_shards(TENSORS, tmp_path / "shards")
    found = read_shards(tmp_path / "shards", whole)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def test_shards_are_plain_safetensors_files(tmp_path):
    write_shards(TENSORS, tmp_path / "shards")
    (file,) = (tmp_path / "shards").iterdir()
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == TENSORS.keys()


def test_shards_are_assembled_into_full_tensors(tmp_path):
    parts = {"a": ("0/exp_avg", TENSORS["0/exp_avg"][:1], [0, 0]), "b": ("0/exp_avg", TENSORS["0/exp_avg"][1:], [1, 0])}
    for file, (name, part, offsets) in parts.items():
        told = {CUSTOM_METADATA_KEY: json.dumps({name: {SAVED_OFFSETS_KEY: offsets}})}
        save_file({name: part.clone()}, tmp_path / f"{file}.safetensors", told)
    assert torch.equal(read_shards(tmp_path, whole)["0/exp_avg"], TENSORS["0/exp_avg"])


def test_an_optimizer_loads_from_shards_and_from_one_file(tmp_path):
    write_shards(TENSORS, tmp_path / "one" / "policy_optimizer")
    (tmp_path / "other").mkdir()
    save_file(TENSORS, tmp_path / "other" / "policy_optimizer.safetensors")
    for folder in ("one", "other"):
        state = load_optimizer(Checkpoint(tmp_path / folder), "policy", [{"lr": 0.5}])
        assert state["param_groups"] == [{"lr": 0.5}] and state["state"].keys() == {0, 1}
        assert torch.equal(state["state"][0]["exp_avg"], TENSORS["0/exp_avg"])
        assert torch.equal(state["state"][1]["master"], TENSORS["1/master"])


def test_a_failing_write_raises_the_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_shards(TENSORS, tmp_path / "file" / "shards")


def test_the_error_names_a_damaged_shard(tmp_path):
    write_shards(TENSORS, tmp_path / "policy_optimizer")
    (file,) = (tmp_path / "policy_optimizer").iterdir()
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"policy_optimizer.* can't be read as safetensors"):
        load_optimizer(Checkpoint(tmp_path), "policy", [])
