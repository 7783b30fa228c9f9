"""The folder from which vLLM starts with a live model: its name is part of the key of vLLM's compiled code."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from rollout.contract import prepared_tokenizer
from transformers import AutoConfig, AutoTokenizer

from reinforcepp.rollout.vllm.model_folder import model_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "reinforcepp"))
    return tmp_path / "reinforcepp" / "vllm_models"


def folder_of(config, tokenizer):
    with model_folder(config, tokenizer) as folder:
        assert AutoConfig.from_pretrained(folder).to_dict()["hidden_size"] == config.hidden_size
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
        return Path(folder)


def test_equal_models_get_the_same_folder_and_others_another_one(cache):
    config, tokenizer = tiny.model("qwen2").config, prepared_tokenizer()
    folder = folder_of(config, tokenizer)
    written = folder.stat().st_ino
    assert folder == folder_of(tiny.model("qwen2").config, prepared_tokenizer())
    assert folder.stat().st_ino == written
    assert folder_of(tiny.model("qwen2", rope_theta=5000.0).config, tokenizer) != folder
    tokenizer.add_tokens(["<new>"])
    assert folder_of(config, tokenizer) != folder
    assert len(list(cache.iterdir())) == 3  # and no temporary ones


def test_the_last_call_of_the_tokenizer_does_not_change_the_folder(cache):
    config, tokenizer = tiny.model("qwen2").config, prepared_tokenizer()
    folder = folder_of(config, tokenizer)
    tokenizer(["one", "two three"], padding=True, truncation=True, max_length=3)
    backend = tokenizer.backend_tokenizer
    padding, truncation = backend.padding, backend.truncation
    assert padding is not None and truncation is not None
    assert folder_of(config, tokenizer) == folder
    assert (backend.padding, backend.truncation) == (padding, truncation)


def test_only_the_user_can_read_and_write_it(cache):
    folder = folder_of(tiny.model("qwen2").config, prepared_tokenizer())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, folder)] == [0o700, 0o700]


def add_file(folder, tmp_path):
    (folder / "extra.json").write_text("{}")


def change_file(folder, tmp_path):
    (folder / "config.json").write_text("{}")


def replace_file_by_link(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "config.json")


def replace_folder_by_link(folder, tmp_path):
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("plant", [add_file, change_file, replace_file_by_link, replace_folder_by_link])
def test_changed_files_are_replaced(cache, tmp_path, plant):
    config, tokenizer = tiny.model("qwen2").config, prepared_tokenizer()
    folder = folder_of(config, tokenizer)
    names = sorted(path.name for path in folder.iterdir())
    plant(folder, tmp_path)
    assert folder_of(config, tokenizer) == folder
    assert not folder.is_symlink() and not (folder / "config.json").is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_can_write_to_is_not_used(cache, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    folder = folder_of(tiny.model("qwen2").config, prepared_tokenizer())
    assert cache not in folder.parents and not folder.exists()
    assert not list(cache.iterdir())


def test_without_a_cache_the_folder_is_temporary(cache):
    cache.parent.write_text("not a folder")
    folder = folder_of(tiny.model("qwen2").config, prepared_tokenizer())
    assert not folder.exists()


def test_starts_at_the_same_time_agree(cache):
    config = tiny.model("qwen2").config
    tokenizers = [prepared_tokenizer() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda tokenizer: folder_of(config, tokenizer), tokenizers))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders)
