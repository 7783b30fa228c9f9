"""Streamed data gives the same rows, split, metrics and trained weights as data in memory."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc
from safetensors.torch import load_file

from reinforcepp.commands import cli
from reinforcepp.config import ReinforceConfig
from reinforcepp.data import DiskRows, load_preferences, load_prompts, readers, tables
from reinforcepp.data.streaming import RowStore
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import tokenizer_for
from reinforcepp.models.tokenization import LazyPrompts
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.training.setup import encode

ROWS = [
    {
        "prompt": f"How do I {verb} the {thing}?",
        "chosen": f"Run {verb} {thing} once.",
        "rejected": "No.",
        "level": i % 3,
    }
    for i, (verb, thing) in enumerate(
        (v, t) for v in ("check", "start", "stop", "trace") for t in ("host", "link", "port")
    )
]
BAD = [
    {"prompt": " ", "chosen": "a", "rejected": "b", "level": 0},
    {"prompt": "same?", "chosen": "x", "rejected": " x", "level": 0},
    ROWS[3] | {"level": 9},  # again
    {"prompt": ROWS[5]["prompt"], "chosen": ROWS[5]["rejected"], "rejected": ROWS[5]["chosen"], "level": 0},
    {"prompt": "Größe?\n5 €", "chosen": "ü 𝄞 \u2028", "rejected": "b\r\nc", "level": 1},
    {"prompt": None, "chosen": "a", "rejected": "b", "level": 0},
]


def write(path, rows):
    """Write ``rows`` in the format of the file extension."""
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Read even small files in many chunks."""
    for module in (readers, tables):
        monkeypatch.setattr(module, "CHUNK_BYTES", 97)
        monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(tables, "DECODED_ROWS", 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
@pytest.mark.parametrize(("fraction", "seed"), [(0.0, 0), (0.3, 1), (0.5, 2)])
@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_streamed_rows_equal_rows_in_memory(tmp_path, name, fraction, seed, load):
    path = write(tmp_path / name, ROWS + BAD)
    other = write(tmp_path / f"b{path.suffix}", [*ROWS[:4], ROWS[0] | {"prompt": "Another?"}])
    for source in (str(path), f"{path}?weight=1.5,{other}?weight=0.4"):
        shares = []
        whole = load(source, heldout_fraction=fraction, seed=seed)
        streamed = load(source, heldout_fraction=fraction, seed=seed, streaming=True, on_progress=shares.append)
        for ours, theirs in zip(streamed[1:], whole[1:], strict=True):
            assert isinstance(ours, DiskRows)
            assert [_plain(row) for row in ours] == [_plain(row) for row in theirs]
        ours, theirs = streamed[0], whole[0]
        assert (ours.source, ours.sha256, ours.notes) == (theirs.source, theirs.sha256, theirs.notes)
        assert sorted(map(str, ours.skipped)) == sorted(map(str, theirs.skipped))
        assert getattr(ours, "contradictions", ()) == getattr(theirs, "contradictions", ())
        assert ours.summary().split(";")[0] == theirs.summary().split(";")[0]
        assert shares[-1] == 1 and all(0 <= a <= b for a, b in pairwise(shares)) and len(set(shares)) > 3


def _plain(row):
    return {name: value for name, value in vars(row).items() if name != "weight"}


def test_summary_reports_contradictions(tmp_path):
    data = load_preferences(write(tmp_path / "a.jsonl", ROWS + BAD), heldout_fraction=0, seed=0, streaming=True)[0]
    assert data.contradictions == ((6, 16),)
    assert "kept 1 contradiction (rows 6 and 16)" in data.summary()
    assert "1 duplicate (row 15)" in data.summary()


def test_streamed_prompts_keep_and_rename_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    _, train, _ = load_prompts(path, heldout_fraction=0, seed=0, renamed={"grade": "level"}, streaming=True)
    assert train[4].columns == {"chosen": ROWS[4]["chosen"], "rejected": "No.", "grade": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "no column 'chosen'"),
        ([ROWS[0]], "1 usable pair.*at least 2"),
        ([ROWS[0], BAD[0]], "1 usable pair.*1 empty prompt .row 2."),
    ],
)
def test_too_few_pairs_are_an_error(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_preferences(write(tmp_path / "a.jsonl", rows), heldout_fraction=0, seed=0, streaming=True)


def test_no_usable_prompt_and_invalid_fraction(tmp_path):
    with pytest.raises(DataError, match=r"no usable prompt .*1 row"):
        load_prompts(write(tmp_path / "a.jsonl", BAD[:1]), heldout_fraction=0, seed=0, streaming=True)
    with pytest.raises(ConfigError, match="heldout_fraction: 2"):
        load_prompts(write(tmp_path / "a.jsonl", ROWS), heldout_fraction=2, seed=0, streaming=True)


def test_error_late_in_the_file_names_its_row(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:13: byte 0xff"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)
    path.write_bytes(path.read_bytes().replace(b"\xff", b"x") + b"{oops}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:14, character 2"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)


def test_values_without_json_form_cannot_be_streamed(tmp_path):
    import datetime

    rows = [{"prompt": f"{i}?", "when": datetime.date(2026, 1, 1)} for i in range(3)]
    path = write(tmp_path / "a.parquet", rows)
    assert load_prompts(path, heldout_fraction=0, seed=0)[1][0].columns["when"] == datetime.date(2026, 1, 1)
    with pytest.raises(DataError, match=r"a\.parquet:1: Object of type date .*omit streaming=True"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)


def test_full_disk_is_an_error_that_names_tmpdir(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    store = RowStore()
    store._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        store.append(["x"], "a.csv:1")


# --- parts ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(), st.integers() | st.none()), max_size=20), st.data())
def test_row_store_round_trip(rows, data):
    store = RowStore()
    for row in rows:
        store.append(list(row), "a.csv")
    digest = store.finish()
    assert [store.read(i) for i in range(len(store))] == [list(row) for row in rows]
    indices = data.draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=30)) if rows else []
    some = DiskRows(store, np.array(indices, np.int64), tuple, digest)
    assert list(some) == [rows[i] for i in indices] and len(some) == len(indices)
    assert list(some[1:5]) == [rows[i] for i in indices[1:5]]
    removed = data.draw(st.sets(st.integers(0, max(0, len(indices) - 1)))) if indices else set()
    assert list(some.without(sorted(removed))) == [rows[p] for i, p in enumerate(indices) if i not in removed]
    spread = list(some.spread(3))
    assert len(spread) == min(3, len(indices)) and (not indices or spread[0] == rows[indices[0]])


def test_digest_identifies_rows_and_their_order():
    def digest(indices, *rows):
        store = RowStore()
        for row in rows:
            store.append([row], "a.csv")
        return DiskRows(store, np.array(indices), tuple, store.finish()).digest

    assert digest([0, 1], "a", "b") == digest([0, 1], "a", "b")
    assert (
        len({digest([0, 1], "a", "b"), digest([1, 0], "a", "b"), digest([0, 1], "a", "c"), digest([0], "a", "b")}) == 4
    )


def test_digests_of_streamed_rows_are_golden(tmp_path):
    """Fingerprints of runs contain these digests, so a change would keep existing runs from resuming."""
    rows = [{"prompt": f"Größe {i % 7}?", "chosen": f"a{i}", "rejected": "b", "n": [i, None]} for i in range(20)]
    source = f"{write(tmp_path / 'a.jsonl', rows)}?weight=1.5"
    digests = [
        [part.digest[:16] for part in load(source, heldout_fraction=0.3, seed=1, streaming=True)[1:]]
        for load in (load_prompts, load_preferences)
    ]
    assert digests == [["757a99c44f61cf33", "ac9fa9c625552edc"], ["492277356ed75262", "c3af7fde0e8d44b0"]]


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=12),
    st.integers(1, 40),
)
def test_chunks_join_to_the_text(lines, size):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", size)
        path = Path(folder, "a.txt")
        raw = "\n".join(lines).encode()
        path.write_bytes(raw)
        expected = readers.decode(path, raw, save_as="save it")
        chunks = list(readers.text_chunks(path, readers.ReadProgress(), save_as="save it"))
        assert "".join(text for _, text in chunks) == expected
        for (first, text), (following, _) in pairwise(chunks):
            assert following == first + text.count("\n")


def test_crlf_across_two_chunks_is_one_line_break(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\r\rc\n\nd")
    chunks = list(readers.text_chunks(path, readers.ReadProgress(), save_as="save it"))
    assert chunks[0] == (1, "a\n") and "".join(text for _, text in chunks) == "a\nb\n\nc\n\nd"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_parquet_and_arrow_rows_are_numbered_by_position(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert [row.row for row in load_prompts(path, heldout_fraction=0, seed=0)[1]] == list(range(1, 13))


# --- trainings ------------------------------------------------------------------------------------------------------


def test_lazy_prompts_equal_eagerly_tokenized_prompts(tmp_path):
    tokenizer = with_chat_template(tokenizer_for(tiny.model().config, tiny.tokenizer()), ReinforceConfig())
    path = write(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"prompt": "long " * 200}])
    rows, disk_rows = (
        load_prompts(path, heldout_fraction=0, seed=0, streaming=streaming)[1] for streaming in (False, True)
    )
    for action in ("cut", "drop"):
        config = ReinforceConfig(long_prompts=action)
        eager, lazy = (encode(tokenizer, each, "training", config, 128) for each in (rows, disk_rows))
        assert isinstance(lazy, LazyPrompts) and len(lazy) == len(eager) == (13 if action == "cut" else 12)
        assert list(lazy) == list(eager) and lazy[2:4] == eager[2:4] and lazy[-1] == eager[-1]
        for step in (0, 1, 4, 3, 9):
            assert PromptBatches(lazy, 5, 7).at(step) == PromptBatches(eager, 5, 7).at(step)
    with pytest.raises(IndexError):
        lazy[12]


def run(command, folder, data, *more):
    arguments = [command, "--data", data, "--output_dir", folder, "--heldout_fraction", 0.2, "--batch_size", 4, *more]
    assert cli.main(list(map(str, arguments))) == 0
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_streamed_trainings_end_with_the_same_weights(tmp_path, model_folder, capsys):
    path = write(tmp_path / "a.jsonl", [*ROWS, *BAD, ROWS[0] | {"prompt": "Too long? " * 30}])
    reward = ["--model", model_folder, "--num_train_epochs", 1, "--max_length", 90]
    first = run("reward", tmp_path / "rm", path, *reward)
    err = capsys.readouterr().err
    assert "longer than 90 tokens" in err and "19" in err
    assert same(first, run("reward", tmp_path / "rm2", path, *reward, "--streaming"))
    cards = [json.loads((tmp_path / name / "reward_model.json").read_text()) for name in ("rm", "rm2")]
    for card in cards:
        card.pop("settings")
    assert cards[0] == cards[1]
    policy = ["--model", model_folder, "--reward_model", tmp_path / "rm", "--max_new_tokens", 6, "--max_steps", 3]
    policy += ["--rollout", "transformers", "--save_every", 1, "--keep_last", 1]
    trained = run("train", tmp_path / "policy", path, *policy)
    assert same(trained, run("train", tmp_path / "policy2", path, *policy, "--streaming"))
    assert "100/100" in capsys.readouterr().err
    for folder in ("policy", "policy2"):
        run("train", tmp_path / folder, path, *policy, "--resume", *(["--streaming"] if folder == "policy2" else []))


def test_resume_detects_changed_data(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.setattr("reinforcepp.training.policy_run.DIGEST_PROMPTS", 1)
    path = write(tmp_path / "a.jsonl", ROWS)
    arguments = ["--model", model_folder, "--rewards", "rule:length?max=20", "--max_new_tokens", 4, "--streaming"]
    arguments += ["--rollout", "transformers", "--save_every", 1, "--max_steps", 2, "--eval_prompts", 0]
    arguments += ["--keep_last", 1]
    run("train", tmp_path / "run", path, *arguments)
    write(path, [*ROWS[:-1], ROWS[-1] | {"chosen": "Changed."}])
    wanted = ["train", "--data", path, "--output_dir", tmp_path / "run", "--heldout_fraction", 0.2, "--batch_size", 4]
    assert cli.main(list(map(str, [*wanted, *arguments, "--resume"]))) == 2
    assert "data" in capsys.readouterr().err


def test_reward_metrics_of_streamed_pairs_use_a_sample(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("reinforcepp.training.supervised_setup.MAX_MEASURED_ROWS", 2)
    run("reward", tmp_path / "rm", write(tmp_path / "a.jsonl", ROWS), "--model", model_folder, "--streaming")
    assert "2 of 10 rows" in capsys.readouterr().err
    card = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert card["train_pairs"] == 10 and card["heldout_pairs"] == 2


def test_dry_run_of_streamed_data(tmp_path, model_folder, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert cli.main(["reward", "--model", str(model_folder), "--data", str(path), "--streaming", "--dry_run"]) == 0
    assert "How do I check the host?" in capsys.readouterr().out
