"""Links, weight files and adapters of a model folder: which are accepted. Attacks are in tests/security/test_folders.py."""

import hashlib
import json
import shutil

import pytest
import tiny
from peft import LoraConfig, get_peft_model

from reinforcepp import ReinforceConfig
from reinforcepp.errors import ModelError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer, weights_hash
from reinforcepp.rollout.vllm.compat import load_format


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "original")


@pytest.mark.parametrize(
    "stored",
    [
        lambda path, digest: f"models/original/{path.name}",  # ln -s /models/original/*
        lambda path, digest: f"models/{'step-100' if path.suffix == '.safetensors' else path.stem}{path.suffix}",
        lambda path, digest: f"hub/models--org--name/blobs/{digest}",  # the cache of the Hub
        lambda path, digest: f"dvc/files/md5/{digest[:2]}/{digest[2:32]}",
        lambda path, digest: (
            f".git/annex/objects/Xx/Yy/SHA256E-s12--{digest}{path.suffix}/SHA256E-s12--{digest}{path.suffix}"
        ),
    ],
    ids=["same name", "safetensors", "Hub", "DVC", "git-annex"],
)
def test_links_to_files_of_a_model_are_followed(original, tmp_path, stored):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in original.iterdir():
        target = tmp_path / stored(path, hashlib.sha256(path.read_bytes()).hexdigest())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        (folder / path.name).symlink_to(target)
    assert weights_hash(load_policy(str(folder))) == weights_hash(load_policy(str(original)))
    assert load_tokenizer(str(folder)).vocab_size == 320


def test_links_within_the_folder_and_files_that_nobody_reads(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "model")
    (folder / "template.txt").write_text("{{ messages }}")
    (folder / "chat_template.jinja").symlink_to("template.txt")
    (folder / "data.csv").symlink_to(tmp_path / "pairs_v3.csv")
    (folder / "notes.txt").symlink_to("notes.txt")  # a loop
    assert load_tokenizer(str(folder)).chat_template == "{{ messages }}"


def load_template(folder):
    return with_chat_template(tiny.tokenizer(), ReinforceConfig("run", chat_template=folder))


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "no/such/file", f"cache/{'a1' * 20}.json"])
def test_a_link_to_a_foreign_file_is_refused_before_it_is_read(original, tmp_path, target):
    folder = shutil.copytree(original, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / target)
    for load in (load_config, load_tokenizer, load_policy, load_template):
        with pytest.raises(ModelError, match=r"tokenizer\.json is a link to /.*replace the link with a copy"):
            load(str(folder))


@pytest.mark.parametrize(
    "named", [None, "", "../model.safetensors", "sub/model.safetensors", "/etc/x.safetensors", ["a"], 5]
)
def test_weight_files_outside_the_folder_are_refused(original, tmp_path, named):
    folder = shutil.copytree(original, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names the weight file|no safetensors weights"):
        load_policy(str(folder))


def test_shards_in_the_folder_are_loaded(original, tmp_path):
    model = load_policy(str(original))
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert weights_hash(load_policy(str(tmp_path / "model"))) == weights_hash(model)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "elsewhere"}, "hidden_size": 32}, "XLoraConfig can't be merged"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "PromptTuningConfig can't be merged"),
        ({"megatron_config": {"a": 1}, "megatron_core": "json"}, "LoraConfig can't be merged"),
        ({"peft_type": "UNKNOWN"}, "can't be merged"),
    ],
)
def test_adapters_that_read_other_files_or_import_modules_are_refused(original, tmp_path, entries, problem):
    folder = tmp_path / "adapter"
    get_peft_model(load_policy(str(original)), LoraConfig(target_modules="all-linear")).save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(original)}
    path.write_text(json.dumps(config))
    load_policy(str(folder))
    path.write_text(json.dumps(config | entries))
    with pytest.raises(ModelError, match=problem):
        load_policy(str(folder))


def test_vllm_gets_a_format_without_pickles(original, tmp_path):
    assert load_format(str(original)) == load_format("builtin:tiny") == "safetensors"
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert load_format(str(tmp_path)) == "mistral"
