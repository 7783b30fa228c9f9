"""Data that stays on the disk: the same rows, split and figures as in memory, and trainings that don't tell the difference."""

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
from reinforcepp.data import DiskRows, _text, load_preferences, load_prompts
from reinforcepp.data.row_store import Spool
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import tokenizer_for
from reinforcepp.models.tokenization import LazyPrompts
from reinforcepp.training.batches import PromptBatches
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
    """In the format that the name asks for."""
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
def small_pieces(monkeypatch):
    """So that small files come in many pieces."""
    monkeypatch.setattr(_text, "PIECE_BYTES", 97)
    for module in ("_text", "_parquet", "_hub"):
        monkeypatch.setattr(f"reinforcepp.data.{module}.PIECE_ROWS", 3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
@pytest.mark.parametrize(("fraction", "seed"), [(0.0, 0), (0.3, 1), (0.5, 2)])
@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_the_same_as_in_memory(tmp_path, name, fraction, seed, load):
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


def test_contradictions_are_told(tmp_path):
    data = load_preferences(write(tmp_path / "a.jsonl", ROWS + BAD), heldout_fraction=0, seed=0, streaming=True)[0]
    assert data.contradictions == ((6, 16),)
    assert "kept 1 contradiction (rows 6 and 16)" in data.summary()
    assert "1 duplicate (row 15)" in data.summary()


def test_columns_are_renamed_and_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    _, train, _ = load_prompts(path, heldout_fraction=0, seed=0, renamed={"grade": "level"}, streaming=True)
    assert train[4].columns == {"chosen": ROWS[4]["chosen"], "rejected": "No.", "grade": 1}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"question": "a"}], "at least 2 are needed|no column 'chosen'"),
        ([ROWS[0]], "1 usable pair, but at least 2 are needed"),
        ([ROWS[0], BAD[0]], "1 usable pair, .*1 empty prompt .row 2."),
    ],
)
def test_too_little(tmp_path, rows, told):
    with pytest.raises(DataError, match=told):
        load_preferences(write(tmp_path / "a.jsonl", rows), heldout_fraction=0, seed=0, streaming=True)


def test_no_prompt_and_no_share(tmp_path):
    with pytest.raises(DataError, match=r"no usable prompt .left out 1 row"):
        load_prompts(write(tmp_path / "a.jsonl", BAD[:1]), heldout_fraction=0, seed=0, streaming=True)
    with pytest.raises(ConfigError, match="heldout_fraction is 2"):
        load_prompts(write(tmp_path / "a.jsonl", ROWS), heldout_fraction=2, seed=0, streaming=True)


def test_a_fault_far_down_is_told_with_its_row(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="row 13: byte 0xff"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)
    path.write_bytes(path.read_bytes().replace(b"\xff", b"x") + b"{oops}\n")
    with pytest.raises(DataError, match="row 14, character 2"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)


def test_what_json_has_no_form_for(tmp_path):
    import datetime

    rows = [{"prompt": f"{i}?", "when": datetime.date(2026, 1, 1)} for i in range(3)]
    path = write(tmp_path / "a.parquet", rows)
    assert load_prompts(path, heldout_fraction=0, seed=0)[1][0].columns["when"] == datetime.date(2026, 1, 1)
    with pytest.raises(DataError, match=r"row 1: Object of type date .*leave --streaming out"):
        load_prompts(path, heldout_fraction=0, seed=0, streaming=True)


def test_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    spool = Spool()
    spool._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    from reinforcepp.data.row_store import spooled

    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        spooled(spool, ["x"], "a.csv, row 1")


# --- the pieces -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(), st.integers() | st.none()), max_size=20), st.data())
def test_a_spool_gives_back_what_it_was_given(rows, data):
    spool = Spool()
    for row in rows:
        spool.append(list(row))
    digest = spool.close_for_writing()
    assert [spool.read(i) for i in range(len(spool))] == [list(row) for row in rows]
    places = data.draw(st.lists(st.integers(0, max(0, len(rows) - 1)), max_size=30)) if rows else []
    some = DiskRows(spool, np.array(places, np.int64), tuple, digest)
    assert list(some) == [rows[i] for i in places] and len(some) == len(places)
    assert list(some[1:5]) == [rows[i] for i in places[1:5]]
    left_out = data.draw(st.sets(st.integers(0, max(0, len(places) - 1)))) if places else set()
    assert list(some.without(sorted(left_out))) == [rows[p] for i, p in enumerate(places) if i not in left_out]
    spread = list(some.spread(3))
    assert len(spread) == min(3, len(places)) and (not places or spread[0] == rows[places[0]])


def test_a_spool_names_its_contents():
    def digest(places, *rows):
        spool = Spool()
        for row in rows:
            spool.append([row])
        return DiskRows(spool, np.array(places), tuple, spool.close_for_writing()).digest

    assert digest([0, 1], "a", "b") == digest([0, 1], "a", "b")
    assert (
        len({digest([0, 1], "a", "b"), digest([1, 0], "a", "b"), digest([0, 1], "a", "c"), digest([0], "a", "b")}) == 4
    )


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=12),
    st.integers(1, 40),
)
def test_pieces_of_a_text_are_the_text(lines, size):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_text, "PIECE_BYTES", size)
        path = Path(folder, "a.txt")
        raw = "\n".join(lines).encode()
        path.write_bytes(raw)
        expected = _text.decode(path, raw, save_as="")
        pieces = list(_text.text_pieces(path, _text.Reading(), save_as=""))
        assert "".join(text for _, text in pieces) == expected
        for (first, text), (then, _) in pairwise(pieces):
            assert then == first + text.count("\n")


def test_a_line_break_of_two_characters_between_two_pieces_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(_text, "PIECE_BYTES", 2)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\r\rc\n\nd")
    assert next(_text.text_pieces(path, _text.Reading(), save_as="")) == (1, "a\n")
    assert "".join(text for _, text in _text.text_pieces(path, _text.Reading(), save_as="")) == "a\nb\n\nc\n\nd"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_without_lines_are_numbered_by_their_place(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert [row.row for row in load_prompts(path, heldout_fraction=0, seed=0)[1]] == list(range(1, 13))


# --- trainings ------------------------------------------------------------------------------------------------------


def test_prompts_tokenised_when_their_turn_comes(tmp_path):
    tokenizer = with_chat_template(tokenizer_for(tiny.model().config, tiny.tokenizer()), ReinforceConfig())
    path = write(tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"prompt": "long " * 200}])
    rows, spooled = (
        load_prompts(path, heldout_fraction=0, seed=0, streaming=streaming)[1] for streaming in (False, True)
    )
    for action in ("cut", "drop"):
        config = ReinforceConfig(long_prompts=action)
        eager, lazy = (encode(tokenizer, each, "training", config) for each in (rows, spooled))
        assert isinstance(lazy, LazyPrompts) and len(lazy) == len(eager) == (13 if action == "cut" else 12)
        assert list(lazy) == list(eager) and lazy[2:4] == eager[2:4] and lazy[-1] == eager[-1]
        for step in (0, 1, 4, 3, 9):
            assert PromptBatches(lazy, 5, 7).at(step) == PromptBatches(eager, 5, 7).at(step)
    with pytest.raises(IndexError):
        lazy[12]


def run(verb, folder, data, *more):
    arguments = [verb, "--data", data, "--output_dir", folder, "--heldout_fraction", 0.2, "--batch_size", 4, *more]
    assert cli.main(list(map(str, arguments))) == 0
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_trainings_end_with_the_same_weights(tmp_path, model_folder, capsys):
    path = write(tmp_path / "a.jsonl", [*ROWS, *BAD, ROWS[0] | {"prompt": "Too long? " * 30}])
    reward = ["--model", model_folder, "--num_train_epochs", 1, "--max_length", 90]
    first = run("reward", tmp_path / "rm", path, *reward)
    assert "Skipped 1 training pairs longer than 90 tokens (rows 19)" in capsys.readouterr().err
    assert same(first, run("reward", tmp_path / "rm2", path, *reward, "--streaming"))
    cards = [json.loads((tmp_path / name / "reward_model.json").read_text()) for name in ("rm", "rm2")]
    for card in cards:
        card.pop("settings")
    assert cards[0] == cards[1]
    policy = ["--model", model_folder, "--reward_model", tmp_path / "rm", "--max_new_tokens", 6, "--max_steps", 3]
    policy += ["--rollout", "transformers", "--save_every", 1]
    trained = run("train", tmp_path / "policy", path, *policy)
    assert same(trained, run("train", tmp_path / "policy2", path, *policy, "--streaming"))
    told = capsys.readouterr().err
    assert "reading data, % 100/100" in told and "tokenised when their turn comes" in told
    for folder in ("policy", "policy2"):
        run("train", tmp_path / folder, path, *policy, "--resume", *(["--streaming"] if folder == "policy2" else []))


def test_a_resumed_run_knows_its_data_again(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.setattr("reinforcepp.training.policy_run.DIGEST_PROMPTS", 1)
    path = write(tmp_path / "a.jsonl", ROWS)
    arguments = ["--model", model_folder, "--rewards", "rule:length?max=20", "--max_new_tokens", 4, "--streaming"]
    arguments += ["--rollout", "transformers", "--save_every", 1, "--max_steps", 2, "--eval_prompts", 0]
    run("train", tmp_path / "run", path, *arguments)
    write(path, [*ROWS[:-1], ROWS[-1] | {"chosen": "Changed."}])
    wanted = ["train", "--data", path, "--output_dir", tmp_path / "run", "--heldout_fraction", 0.2, "--batch_size", 4]
    assert cli.main(list(map(str, [*wanted, *arguments, "--resume"]))) == 2
    assert "data" in capsys.readouterr().err


def test_figures_of_many_pairs_are_those_of_some(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("reinforcepp.training.supervised_setup.MAX_MEASURED_ROWS", 2)
    run("reward", tmp_path / "rm", write(tmp_path / "a.jsonl", ROWS), "--model", model_folder, "--streaming")
    assert "Figures are those of 2 of 10 rows, evenly spread." in capsys.readouterr().err
    card = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    assert card["train_pairs"] == 10 and card["heldout_pairs"] == 2


def test_a_dry_run_of_streamed_data(tmp_path, model_folder, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert cli.main(["reward", "--model", str(model_folder), "--data", str(path), "--streaming", "--dry_run"]) == 0
    assert "How do I check the host?" in capsys.readouterr().out
