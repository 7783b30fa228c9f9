"""Data settings: options, weights, other columns, Hub datasets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter

import datasets
import pyarrow
import pytest
from huggingface_hub import constants

from reinforcepp.commands import cli
from reinforcepp.config import LintConfig, RewardModelConfig, SftConfig, TrainConfig
from reinforcepp.config.data_spec import DataName, data_names, listed
from reinforcepp.data import DataFiles, GivenRows, load_preferences, load_prompts, read_prompts
from reinforcepp.data.rows import repetitions
from reinforcepp.data.sources import DataPart, _one_split, dataset_digest, fetch, hub_chunks
from reinforcepp.errors import ConfigError, DataError


def write_prompts(path, *prompts, **columns):
    path.write_text("".join(json.dumps({"prompt": prompt} | columns) + "\n" for prompt in prompts))
    return path


def write_pairs(path, number, name=""):
    rows = [{"prompt": f"{name}{i}?", "chosen": "yes", "rejected": "no"} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_with_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert data_names("a.csv, org/name?split=train[:10%]+test&revision=v1&weight=0.5,part-?.csv,2*.csv") == [
        DataName("a.csv"),
        DataName("org/name", 0.5, "train[:10%]+test", "v1", hub=True),
        DataName("part-?.csv"),
        DataName("2*.csv"),
    ]
    assert data_names("hub:squad?subset=plain") == [DataName("squad", subset="plain", hub=True)]
    for local in ("here/name", "./org/name", "org/name.csv", "org/a/b", "name", "*/name", "~/name"):
        assert not data_names(local)[0].hub
    odd = write_prompts(tmp_path / "a,b?weight=3", "x")
    assert data_names("a,b?weight=3") == [DataName("a,b?weight=3")] and listed(odd) == [odd]
    for number in "12":
        write_prompts(tmp_path / f"p{number}.jsonl", number)
    assert [str(path) for path in listed("p?.jsonl?weight=2,org/name")] == ["p1.jsonl", "p2.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.csv?wieght=2",
            "option 'wieght' not found, only weight, split, revision, subset, strength. Did you mean 'weight'?",
        ),
        ("a.csv?weight=", "weight has no value"),
        ("a.csv?weight=0", "greater than 0"),
        ("a.csv?weight=-1", "greater than 0"),
        ("a.csv?weight=nan", "greater than 0"),
        ("a.csv?weight=1001", "at most 1000"),
        ("a.csv?weight=many", "not many"),
        ("a.csv?split=train", "split is an option for Hub datasets"),
        ("a.csv?strength=weight", "strength is an option for a database of reinforcepp label"),
        ("a.db?strength=much", "strength can be margin or weight, not much"),
    ],
)
def test_invalid_options_are_errors(text, message):
    with pytest.raises(ConfigError, match=r"\.$|\?$") as caught:
        data_names(text)
    assert message in str(caught.value)


def test_invalid_option_ends_the_command_in_one_sentence(capsys):
    assert cli.main(["lint", "a.csv?weight=0"]) == 2
    assert capsys.readouterr().err.startswith("error: a.csv?weight=0: ")


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_repeat_or_drop_rows(tmp_path):
    few, many = write_pairs(tmp_path / "few.jsonl", 20, "f"), write_pairs(tmp_path / "many.jsonl", 400, "m")
    source = f"{few}?weight=2.5,{many}?weight=0.1"
    data, train, heldout = load_preferences(source, heldout_fraction=0.25, seed=3)
    plain = load_preferences(f"{few},{many}", heldout_fraction=0.25, seed=3)
    assert len(data.pairs) == 420 and "rows of few.jsonl count 2.5 times" in data.summary()
    assert [p.prompt for p in heldout] == [p.prompt for p in plain[2]]  # once each, and the same
    counted = Counter(pair.prompt for pair in train)
    wanted = {pair.prompt for pair in plain[1]}
    assert set(counted) <= wanted
    in_few = [counted[p] for p in wanted if p.startswith("f")]
    in_many = [counted[p] for p in wanted if p.startswith("m")]
    assert set(in_few) == {2, 3} and set(in_many) == {0, 1}
    assert 2.2 < sum(in_few) / len(in_few) < 2.8 and 0.05 < sum(in_many) / len(in_many) < 0.16
    assert train == load_preferences(source, heldout_fraction=0.25, seed=3)[1]
    assert train != load_preferences(source, heldout_fraction=0.25, seed=4)[1]
    prompts = load_prompts(source, heldout_fraction=0.25, seed=3)[1]
    assert Counter(row.prompt for row in prompts) == counted


def test_revision_and_subset_are_passed_on(monkeypatch):
    calls = []
    rows = datasets.Dataset.from_dict({"prompt": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: calls.append((names, more)) or rows)
    assert fetch(DataName("org/name", split="s", revision="v1", subset="easy", hub=True)) is rows
    assert calls == [(("org/name", "easy"), {"split": "s", "revision": "v1"})]


def test_fractional_weight_keeps_a_share_of_the_rows():
    assert len({tuple(repetitions(0.5, f"{i}", seed) for i in range(20)) for seed in range(5)}) == 5
    assert 900 < sum(repetitions(0.1, f"{i}", 0) for i in range(10_000)) < 1100
    assert {repetitions(3.0, f"{i}", 0) for i in range(100)} == {3}


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_by_other_names(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"ask": "1 + 1?", "good": "2", "bad": "3", "answer": 2, "level": "easy"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"ask": "2 + 2?"}))
    names = ("prompt=ask", "chosen=good", "rejected=bad", "solution=answer")
    config = TrainConfig(data=str(path), columns=names)
    assert config.column_names == {"prompt_column": "ask", "chosen_column": "good", "rejected_column": "bad"}
    _, train, _ = load_prompts(path, heldout_fraction=0, seed=0, **config.column_names, renamed=config.renamed)
    assert train[0].prompt == "1 + 1?"
    assert train[0].columns == {"good": "2", "bad": "3", "solution": 2, "level": "easy"}
    pairs = load_preferences(path, heldout_fraction=0, seed=0, **RewardModelConfig(columns=names).column_names)[1]
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == ("1 + 1?", "2", "3")
    assert LintConfig(columns=names).column_names == config.column_names
    with pytest.raises(DataError, match=r"no column 'anwser'.*'solution'.*mean 'answer'"):
        read_prompts(path, prompt_column="ask", renamed={"solution": "anwser"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ("prompt",)}, "NAME=COLUMN"),
        ({"columns": ("=x",)}, "NAME=COLUMN"),
        ({"columns": ("prompt=",)}, "NAME=COLUMN"),
        ({"columns": ("prompt=a", "prompt=b")}, "prompt.*twice"),
        ({"columns": ("prompt=a",), "prompt_column": "b"}, "prompt_column"),
    ],
)
@pytest.mark.parametrize("kind", [TrainConfig, RewardModelConfig, LintConfig, SftConfig])
def test_invalid_columns_are_errors(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_columns_of_sft():
    names = SftConfig(columns=("text=story",)).column_names
    assert names == {
        **{f"{kind}_column": kind for kind in ("prompt", "completion", "chosen", "messages")},
        "text_column": "story",
    }
    with pytest.raises(ConfigError, match=r"promt.*mean 'prompt'"):
        SftConfig(columns=("promt=x",))


def test_reward_function_receives_renamed_columns(tmp_path, model_folder):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"ask": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(12)))
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, solution, **columns):\n"
        "    assert all(int(p.split()[0]) + 1 == int(s) for p, s in zip(prompts, solution))\n"
        "    return [float(s in c) for s, c in zip(solution, completions)]\n"
    )
    arguments = ["train", "--model", model_folder, "--data", data, "--rewards", f"{tmp_path / 'mine.py'}:right"]
    arguments += ["--columns", "prompt=ask", "solution=answer", "--output_dir", tmp_path / "run", "--max_steps", 1]
    arguments += ["--batch_size", 2, "--max_new_tokens", 4, "--rollout", "transformers", "--eval_prompts", 0]
    assert cli.main(list(map(str, arguments))) == 0


# --- splits and the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """Write a dataset laid out as on the Hub: one file per split."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, number in (("train", 30), ("test", 4)):
        rows = {"question": [f"{split} {i}?" for i in range(number)], "level": list(range(number))}
        datasets.Dataset.from_dict(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_split_of_a_folder_saved_by_datasets(tmp_path, repository):
    datasets.load_dataset(str(repository)).save_to_disk(tmp_path / "saved")
    assert len(read_prompts(f"{tmp_path / 'saved'}?split=test").prompts) == 4
    for source, message in (
        (f"{tmp_path / 'saved'}", "several splits: test, train.*saved.split=test"),
        (f"{tmp_path / 'saved'}?split=dev", "several splits"),
        (f"{tmp_path / 'saved' / 'test'}?split=test", "single dataset.* Omit split"),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(source)


def test_rows_of_a_hub_dataset(repository):
    """``load_dataset`` reads a local folder with the layout of the Hub in the same way."""
    dataset = fetch(DataName(str(repository), split="test", hub=True))
    part = DataPart(repository, dataset=dataset)
    records = part.records()
    assert records.names == ("question", "level")
    assert records.rows[3] == (4, {"question": "test 3?", "level": 3})
    assert part.digest() == dataset_digest(fetch(DataName(str(repository), split="test", hub=True)))
    usual = fetch(DataName(str(repository), hub=True))
    assert len(usual) == 30 and dataset_digest(usual) != part.digest()
    assert len(fetch(DataName(str(repository), split="train[:10%]+test", hub=True))) == 7
    assert [len(chunk.rows) for chunk in hub_chunks(repository, datasets.concatenate_datasets([usual] * 50))] == [
        1000,
        500,
    ]


def test_load_prompts_of_a_hub_dataset(repository, monkeypatch):
    named = {}

    def fetched(name):
        named.update(vars(name))
        return fetch(DataName(str(repository), name.weight, name.split, hub=True))

    monkeypatch.setattr("reinforcepp.data.sources.fetch", fetched)
    data, train, heldout = load_prompts("org/name?split=test&revision=v2&weight=2", heldout_fraction=0.25, seed=0)
    assert (named["name"], named["split"], named["revision"]) == ("org/name", "test", "v2")
    assert (len(train), len(heldout)) == (6, 1)
    assert data.summary().startswith("name?split=test: 4 prompts")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "can't be loaded with split dev: .*dev"),
        ("train[", "can't be loaded"),
        ("train[::2]", "can't be loaded"),
    ],
)
def test_unknown_split_of_a_hub_dataset_is_an_error(repository, split, message):
    with pytest.raises(DataError, match=message) as caught:
        fetch(DataName(str(repository), split=split, hub=True))
    assert "\n" not in str(caught.value)


def test_several_splits_require_a_choice():
    rows = datasets.Dataset.from_dict({"prompt": ["a"]})
    assert _one_split(DataName("org/name"), datasets.DatasetDict(only=rows)) is rows
    with pytest.raises(DataError, match=r"2 splits: 'a', 'b'.*org/name.split=a"):
        _one_split(DataName("org/name"), datasets.DatasetDict(a=rows, b=rows))


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no network"])
def test_unreachable_hub_is_an_error(tmp_path, monkeypatch, capsys, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setattr("reinforcepp.runtime.process.getproxies", dict)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "org/name", "--output_dir", "run", "--rewards", "rule:length?max=9"]) == 2
    err = capsys.readouterr().err
    for part in ("org/name: no such file or folder", "can't be reached", "--repo-type dataset org/name"):
        assert part in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


# --- folders with splits, compressed files, home folder -----------------------------------------------------------------------


def test_only_one_split_of_a_folder_is_used(tmp_path):
    (tmp_path / "data").mkdir()
    write_prompts(tmp_path / "data" / "train-00000-of-00002.jsonl", "a")
    write_prompts(tmp_path / "data" / "train-00001-of-00002.jsonl", "b")
    write_prompts(tmp_path / "data" / "test-00000-of-00001.jsonl", "c")
    for source in (tmp_path, tmp_path / "data"):
        data = read_prompts(source)
        assert [row.prompt for row in data.prompts] == ["a", "b"]
        assert data.notes == ("split 'train'; 1 file of other splits unused",)
        assert [row.prompt for row in read_prompts(f"{source}?split=test").prompts] == ["c"]
        with pytest.raises(DataError, match="split 'validation' not found, only test, train"):
            read_prompts(f"{source}?split=validation")


@pytest.mark.parametrize("names", [("my.jsonl", "my_eval.jsonl"), ("train/x.jsonl", "valid/x.jsonl")])
def test_splits_are_recognized_by_file_or_folder(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_prompts(tmp_path / name, name)
    assert [row.prompt for row in read_prompts(tmp_path).prompts] == [names[0]]


def test_splits_without_training_data_are_an_error(tmp_path):
    for name in ("test.jsonl", "dev.jsonl"):
        write_prompts(tmp_path / name, name)
    with pytest.raises(DataError, match=r"several splits: test, validation\. Name one"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    content = b"prompt,chosen\na,b\n"
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    data = compress[suffix](content) if suffix in compress else pyarrow.Codec("zstd").compress(content, asbytes=True)
    path = tmp_path / f"data.csv{suffix}"
    path.write_bytes(data)
    assert [row.prompt for row in read_prompts(path).prompts] == ["a"]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"data\.csv"):
        read_prompts(path)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_pairs(tmp_path / "a.jsonl", 20)
    assert data_names("~/a.jsonl") == [DataName(str(path))]
    assert len(read_prompts("~/a.jsonl").prompts) == len(read_prompts("~/a.jsonl?weight=2").prompts) == 20
    assert cli.main(["lint", "--data", "~/a.jsonl", "--fix", str(tmp_path / "b.jsonl"), "--fail_on", "never"]) == 0


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]}, "rows from the key 'data'"),
        ({"train": [{"prompt": "a"}, {"prompt": "b"}], "test": [{"prompt": "c"}]}, "rows from the key 'train', not"),
        ({"prompt": ["a", "b"], "n": [1, 2]}, "one list per column"),
        ({"prompt": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}, "one object per column"),
        ({"0": {"prompt": "a", "n": 1}, "1": {"prompt": "b", "n": 2}}, "one object per row number"),
        ({"columns": ["prompt", "n"], "index": [0, 1], "data": [["a", 1], ["b", 2]]}, "a table with columns and data"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_objects_that_hold_rows(tmp_path, content, note, indent):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content, indent=indent))
    data = read_prompts(path)
    assert [row.prompt for row in data.prompts] == ["a", "b"] and note in data.summary()


def test_json_object_that_is_a_row(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "tags": ["x"]}, indent=2))
    assert [row.prompt for row in read_prompts(path).prompts] == ["a"]


# --- rows of a Python program -----------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]


@pytest.mark.parametrize("kind", [list, iter, datasets.Dataset.from_list, lambda rows: tuple(rows)])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_in_memory_are_read_as_a_file_is(kind, streaming, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, PAIRS[3]]))
    same = {"heldout_fraction": 0.3, "seed": 1, "streaming": streaming}
    given = load_preferences(GivenRows.of(kind([*PAIRS, PAIRS[3]]), "train_dataset"), **same)
    for ours, of_file in zip(given[1:], load_preferences(path, **same)[1:], strict=True):
        assert [pair.prompt for pair in ours] == [pair.prompt for pair in of_file]
        assert [pair.row + 1 for pair in ours] == [pair.row for pair in of_file]
    assert given[0].summary() == "train_dataset: 10 usable pairs; skipped 1 row: 1 duplicate (row 10)"
    assert str(given[0].skipped[0]) == "row 10: duplicate of row 3"


def test_a_duplicate_of_the_first_row_is_one_of_row_0():
    data, *_ = load_preferences(GivenRows.of([*PAIRS, PAIRS[0]], "data"), heldout_fraction=0, seed=0)
    assert str(data.skipped[0]) == "row 10: duplicate of row 0"


def test_held_out_rows_can_be_given_apart():
    parts = DataFiles(GivenRows.of(PAIRS[:7], "train_dataset"), GivenRows.of(PAIRS[7:], "eval_dataset"))
    data, train, heldout = load_preferences(parts, heldout_fraction=0.5, seed=0)
    assert (data.source, len(data.rows), len(train), len(heldout)) == ("train_dataset", 10, 7, 3)
    assert data.sha256 != load_preferences(parts._replace(heldout=parts.train), heldout_fraction=0, seed=0)[0].sha256


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_the_digest_of_rows_depends_on_every_cell(kind):
    changed = [*PAIRS[:-1], PAIRS[-1] | {"rejected": "worse"}]
    digests = [GivenRows.of(kind(rows), "data").digest() for rows in (PAIRS, list(PAIRS), changed)]
    assert digests[0] == digests[1] == GivenRows.of(PAIRS, "data").digest() != digests[2]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ("train.csv", ConfigError, "data: 'train.csv' isn't a dataset"),
        (None, ConfigError, "data: None isn't a dataset"),
        (datasets.DatasetDict(test=datasets.Dataset.from_list(PAIRS)), ConfigError, r"as in data=dataset\['test'\]"),
        ([], DataError, "data: no rows"),
        (datasets.Dataset.from_list(PAIRS).select([]), DataError, "data: no rows"),
        ([PAIRS[0], "text"], DataError, "data:1: 'text' isn't a row"),
    ],
)
def test_what_is_not_rows(dataset, error, message):
    with pytest.raises(error, match=message):
        GivenRows.of(dataset, "data")
