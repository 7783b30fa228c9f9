"""Every format gives the same rows with their types and numbers, and each damaged file gives a named error."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pyarrow import ipc

from reinforcepp.commands import cli
from reinforcepp.config import TrainConfig
from reinforcepp.data import (
    PromptRow,
    load_preferences,
    load_prompts,
    read_preferences,
    read_prompt_lines,
    read_prompts,
)
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.types import Preference

NAMES = ("prompt", "chosen", "rejected")
ROWS = [
    (" How do I see my routes? ", "ip route,\nthen read it", "Reboot."),
    ("Is it up?", 'Run "ping"', "No."),
    ("Is it up?", "", "No."),
    ("Is it  up?", 'Run "ping" ', "No."),  # the second row again
    ("Größe?\t5 €", "ü 𝄞 \u2028", "b"),
    ("same?", "x", "x"),
]


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([NAMES, *rows])
    return text.getvalue().encode()


def as_objects(rows):
    return [dict(zip(NAMES, row, strict=True)) for row in rows]


def as_lines(rows, ensure_ascii=True):
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in as_objects(rows)).encode()


def as_parquet(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_objects(rows)), sink)
    return sink.getvalue()


def as_arrow(rows, opened=ipc.new_stream):
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(as_objects(rows))
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


WRITTEN = {
    "data.csv": as_csv,
    "data.tsv": lambda rows: as_csv(rows, "\t"),
    "data.jsonl": as_lines,
    "DATA.NDJSON": lambda rows: b"\xef\xbb\xbf" + as_lines(rows, ensure_ascii=False).replace(b"\n", b"\r\n"),
    "data.json": lambda rows: json.dumps(as_objects(rows), ensure_ascii=False, indent=2).encode(),
    "lines.json": as_lines,
    "data.parquet": as_parquet,
    "data.arrow": as_arrow,
    "footer.arrow": lambda rows: as_arrow(rows, ipc.new_file),
}


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return write


def refusal(source, read=read_prompts, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **settings)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and text.endswith((".", "?"))
    return text


# --- the same rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_same_pairs_prompts_and_split(write, name):
    path = write(name, WRITTEN[name](ROWS))
    # CSV rows are numbered by line, below the header and after the cell of two lines; JSON rows by line or position.
    numbers = [2, 4, 5, 6, 7, 8] if name.endswith(("csv", "tsv")) else [1, 2, 3, 4, 5, 6]
    data, train, heldout = load_preferences(path, heldout_fraction=0.4, seed=1)
    assert data.pairs == (
        Preference(" How do I see my routes? ", "ip route,\nthen read it", "Reboot.", numbers[0]),
        Preference("Is it up?", 'Run "ping"', "No.", numbers[1]),
        Preference("Größe?\t5 €", "ü 𝄞 \u2028", "b", numbers[4]),
    )
    assert [(each.row, each.reason, each.duplicate_of) for each in data.skipped] == [
        (numbers[2], "empty chosen", None),
        (numbers[3], "duplicate", numbers[1]),
        (numbers[5], "with chosen equal to rejected", None),
    ]
    assert (len(train), [pair.prompt for pair in heldout]) == (2, [" How do I see my routes? "])
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.notes == () and data.summary().startswith(f"{name}: 3 usable pairs; skipped 3 rows")
    prompts = read_prompts(path)
    assert [row.prompt for row in prompts.prompts] == [" How do I see my routes? ", "Is it up?", "Größe?\t5 €", "same?"]
    assert [row.row for row in prompts.prompts] == [numbers[i] for i in (0, 1, 4, 5)]


TYPED = {
    "number": 7,
    "share": 0.5,
    "right": True,
    "nothing": None,
    "list": [1, 2],
    "object": {"a": [{"b": " c "}]},
    "text": " kept as it is ",
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_other_columns_keep_their_types(write, kind):
    rows = [{"prompt": "why?", **TYPED}]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    content = {"jsonl": json.dumps(rows[0]), "json": json.dumps(rows), "parquet": sink.getvalue()}[kind]
    (prompt,) = read_prompts(write(f"data.{kind}", content)).prompts
    assert prompt == PromptRow("why?", TYPED, 1)
    assert {name: type(value) for name, value in prompt.columns.items()} == {k: type(v) for k, v in TYPED.items()}


def test_blank_lines_count_and_missing_keys_are_empty_cells(write):
    path = write("data.jsonl", '\n{"prompt": "a", "x": 1}\n  \n{"x": 2}\n{"prompt": null}\n{"prompt": "b"}')
    data = read_prompts(path)
    assert [(row.prompt, row.row) for row in data.prompts] == [("a", 2), ("b", 6)]
    assert data.summary() == "data.jsonl: 2 prompts; skipped 2 rows: 2 empty prompt (rows 4, 5)"


def test_parquet_categories_are_texts(write):
    sink = io.BytesIO()
    column = pyarrow.array(["why?", "how?", "why?"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), sink)
    assert [row.prompt for row in read_prompts(write("data.parquet", sink.getvalue())).prompts] == ["why?", "how?"]


# --- several files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(write, tmp_path, monkeypatch):
    """Write three files to ``part``; a row of the third repeats one of the first."""
    monkeypatch.chdir(tmp_path)
    write("part/a.jsonl", as_lines([("p1", "g", "b"), ("p2", "g", "b")]))
    write("part/b.jsonl", as_lines([("p3", "", "b"), ("p4", "g", "b")]))
    write("part/c.jsonl", as_lines([("p1", "g", "b"), ("p5", "g", "b")]))
    return Path("part")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("part/a.jsonl,part/b.jsonl, part/c.jsonl", "a.jsonl and 2 more files"),
        ("part/*.jsonl", "a.jsonl and 2 more files"),
        ("part/[ab].jsonl,part/c.jsonl", "a.jsonl and 2 more files"),
        ("part", "part"),
        ("part/", "part"),
    ],
)
def test_several_files_form_one_dataset_with_row_numbers_per_file(three, source, name):
    data, train, heldout = load_preferences(source, heldout_fraction=0.25, seed=0)
    assert [(pair.prompt, pair.row) for pair in data.pairs] == [
        ("p1", "a.jsonl:1"),
        ("p2", "a.jsonl:2"),
        ("p4", "b.jsonl:2"),
        ("p5", "c.jsonl:2"),
    ]
    assert data.summary() == (
        f"{name}: 4 usable pairs; skipped 2 rows: 1 empty chosen (row b.jsonl:1), 1 duplicate (row c.jsonl:1)"
    )
    assert str(data.skipped[1]) == "row c.jsonl:1: duplicate of row a.jsonl:1"
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(three.iterdir()))
    assert data.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert len(train) == 3 and len(heldout) == 1
    prompts, train_prompts, _ = load_prompts(source, heldout_fraction=0.25, seed=0)
    assert {row.prompt for row in train_prompts} - {pair.prompt for pair in train} <= {"p3"}
    assert prompts.sha256 == data.sha256


def test_files_of_different_formats_can_be_combined(three, write):
    write("more.csv", as_csv([("p6", "g", "b")]))
    data = read_prompts("part/a.jsonl,more.csv")
    assert [row.row for row in data.prompts] == ["a.jsonl:1", "a.jsonl:2", "more.csv:2"]


def test_metadata_files_of_datasets_are_ignored(write, tmp_path):
    write("part/a.parquet", as_parquet(ROWS))
    write("part/dataset_infos.json", "{}")
    assert len(read_prompts(tmp_path / "part").prompts) == 4


def test_existing_file_name_wins_over_pattern_and_list(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a,b[1]*.csv", "prompt\nwhole\n")
    write("b1.csv", "prompt\npart\n")
    assert [row.prompt for row in read_prompts("a,b[1]*.csv").prompts] == ["whole"]


def test_data_settings_without_files_are_errors(three, write):
    assert "no file matches the pattern" in refusal("part/*.csv")
    assert "is named twice" in refusal("part/a.jsonl,part/*.jsonl")
    assert "part/d.jsonl: no such file" in refusal("part/a.jsonl,part/d.jsonl")
    assert "names no data file" in refusal("")
    assert "names no data file" in refusal(" , ")
    write("empty/readme.md", "x")
    assert "no data file in the folder" in refusal("empty")
    write("part/more.csv", "prompt\nx\n")
    text = refusal("part")
    assert "several formats (.csv, .jsonl)" in text and "'part/*.csv'" in text
    assert "c.jsonl:2, character 2" in refusal(write("part/c.jsonl", '{"prompt": "x"}\n{') and "part/*.jsonl")


def test_output_dir_cannot_contain_the_data(three):
    for data in ("part/a.jsonl,other.csv", "*/a.jsonl", "other.csv,part"):
        with pytest.raises(ConfigError, match="holds the data"):
            TrainConfig(data=data, output_dir="part")


# --- what `datasets` saved ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": f"p{i}", "n": i, "l": [{"a": i}]} for i in range(3)])
    data.save_to_disk(tmp_path / "one")
    data.save_to_disk(tmp_path / "sharded", num_shards=2)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "parts")
    return tmp_path


def test_folder_saved_by_datasets(saved):
    data = read_prompts(saved / "one")
    assert data.prompts[1] == PromptRow("p1", {"n": 1, "l": [{"a": 1}]}, 2)
    assert data.summary() == "one: 3 prompts"
    assert [row.prompt for row in read_prompts(saved / "sharded").prompts] == ["p0", "p1", "p2"]
    assert "several splits: test, train" in refusal(saved / "parts")
    assert len(read_prompts(saved / "parts" / "train").prompts) == 3


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_damaged_state_file(saved, state):
    (saved / "one" / "state.json").write_text(state)
    assert "state.json" in refusal(saved / "one")


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"', "character 15: invalid JSON (expecting ',' delimiter)"),
        ("{'prompt': 'a'}", "character 2: invalid JSON"),
        ('{"prompt": "a\tb"}', "invalid control character"),
        ('  {"prompt": "a"} {}', "character 19: text follows"),
        ('["a"]', "found a list, expected an object"),
        ('"a"', "found a string, expected"),
        ("12", "found a number, expected"),
        ("null", "found null, expected"),
        ('{"prompt": "a", "x": NaN}', "NaN isn't a JSON value"),
        ('{"prompt": "a", "x": [-Infinity]}', "-Infinity isn't a JSON value"),
        ('{"prompt": "a", "x": -1e999}', "the number -1e999 is too large"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "a number of 5,000 digits is too large"),
        ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' occurs twice"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": 3}', "'prompt' holds 3, expected text or a list of messages"),
        ('{"prompt": true}', "'prompt' holds True, expected"),
        ('{"prompt": {"a": 1}}', "'prompt' holds {'a': 1}, expected"),
        ('{"prompt": ["a", "b"]}', "'prompt' holds ['a', 'b'], expected"),
        ('{"prompt": [{"role": "user"}, "a"]}', "expected text or a list"),
    ],
)
def test_invalid_json_line_is_an_error(write, line, problem):
    path = write("data.jsonl", '{"prompt": "first"}\n\n' + line + '\n{"prompt": "last"}\n')
    text = refusal(path)
    assert text.startswith(f"{path}:3") and problem in text and len(text) < 400


def test_surrogate_pairs_are_characters(write):
    assert read_prompts(write("data.jsonl", '{"prompt": "\\ud83d\\ude00"}')).prompts[0].prompt == "😀"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"prompt": "a"},\n {"prompt":}]', ":2, line 2, character 12: invalid JSON (expecting value)"),
        ('[{"prompt": "a"}', ":1, character 17: invalid JSON (a comma or the end"),
        ('[{"prompt": "a"} {"prompt": "b"}]', ":1, character 18"),
        ('[{"prompt": "a"},]', "a comma before the end of the list"),
        ('[{"prompt": "a"}] x', "character 19: invalid JSON (text after the end"),
        ('[{"prompt": "a"}, 3]', ":2: found a number"),
        ('[{"prompt": "a"}, {"prompt": "b", "x": NaN}]', ":2: NaN isn't a JSON value"),
        ('{"rows": 3}', "has no column 'prompt', only 'rows'"),
        ('{\n"prompt": "a"\n', ":1, line 3, character 1: invalid JSON"),
        ('{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}', "text after the end of the object"),
        ('{"a": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "several keys hold rows: 'a', 'test'"),
        ("[]", "the file is empty"),
        (" \n", "the file is empty"),
        ("", "the file is empty"),
    ],
)
def test_invalid_json_list_is_an_error(write, content, problem):
    assert problem in refusal(write("data.json", content))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', ":2: byte 0xe9 isn't valid UTF-8"),
        (b'{"prompt": "a"}\n\0', ":2: NUL byte"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16, not UTF-8"),
    ],
)
def test_invalid_bytes_are_an_error(write, name, content, problem):
    text = refusal(write(name, content))
    assert problem in text and "CSV" not in text


def parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"prompt\nx\n", b"ARROW1\0\0", as_parquet(ROWS)[:-20], as_arrow(ROWS)[:300]]
)
def test_invalid_parquet_or_arrow_is_an_error(write, name, content):
    kind = "Parquet" if name == "data.parquet" else "Arrow"
    assert f"{name}: not a valid {kind} file (" in refusal(write(name, content))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "the file has no row"),
        (pyarrow.table({}), "the file has no row"),
        (
            pyarrow.table({"prompt": ["a", None, "b"], "x": [1, 2, 3]}).rename_columns(["x", "x"]),
            "two columns are called 'x'",
        ),
        (pyarrow.table({"prompt": [1.5, 2.0]}), ":1: 'prompt' holds 1.5, expected text"),
        (pyarrow.table({"prompt": [None, b"a"]}), ":2: 'prompt' holds b'a', expected text"),
        (pyarrow.table({"question_": ["a"]}), "the file has no column 'prompt', only 'question_'"),
    ],
)
def test_unusable_parquet_table_is_an_error(write, table, problem):
    assert problem in refusal(write("data.parquet", parquet(table)))


def test_invalid_utf8_in_parquet_is_an_error(write):
    content = parquet(pyarrow.table({"prompt": ["caf_"]}, schema=pyarrow.schema({"prompt": pyarrow.string()})))
    assert content.count(b"caf_") > 0
    assert "not a valid Parquet file" in refusal(write("data.parquet", content.replace(b"caf_", b"caf\xe9")))


def test_column_that_python_cannot_hold_is_an_error(write):
    far = pyarrow.array([2**62], pyarrow.timestamp("s"))
    text = refusal(
        write(
            "data.parquet",
            parquet(pyarrow.table({"prompt": ["a"], "when": far.cast(pyarrow.int64()).cast(pyarrow.timestamp("us"))})),
        )
    )
    assert "the column 'when' (timestamp[us]) can't be read" in text


def test_missing_column_suggests_the_nearest_and_the_flag(write):
    text = refusal(write("data.jsonl", '{"promt": "a"}'))
    assert "no column 'prompt', only 'promt'" in text and "prompt_column. Did you mean 'promt'?" in text
    assert "no column 'rejected'" in refusal(write("data.jsonl", '{"prompt": "a", "chosen": "b"}'), read_preferences)


def test_other_separator_in_tsv_is_reported(write):
    assert "cells separated by commas" in read_prompts(write("data.tsv", "prompt,chosen,rejected\na,b,c\n")).summary()
    assert "data.tsv:2: 4 cells, but the header has 3" in refusal(
        write("data.tsv", "prompt\tchosen\trejected\na\tb\tc\td\n"), read_preferences
    )


# --- what is loaded -----------------------------------------------------------------------------------------------------


def test_text_files_and_help_load_no_pyarrow_pandas_or_torch(write):
    path = write("data.jsonl", as_lines(ROWS))
    for code in (
        f"from reinforcepp.data import read_prompts; read_prompts({str(path)!r})",
        "from reinforcepp.commands import cli; cli.main(['lint', '--help'])",
    ):
        code = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n"
        code += "print(sorted({'pyarrow', 'pandas', 'torch', 'datasets'} & set(sys.modules)), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr == "[]\n"


# --- trainings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_every_format_trains_the_same_reward_model_and_policy(
    write, tmp_path, model_folder, pairs_csv, reward_folder, name, capsys
):
    with open(pairs_csv, encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    path = write(name, WRITTEN[f"data{Path(name).suffix}"](rows))
    data = ["--data", str(path), "--model", str(model_folder)]
    assert cli.main(["reward", *data, "--output_dir", str(tmp_path / "rm"), "--num_train_epochs", "1"]) == 0
    cards = [json.loads((folder / "reward_model.json").read_text()) for folder in (tmp_path / "rm", reward_folder)]
    assert cards[0]["fingerprint"] == cards[1]["fingerprint"] and cards[0]["figures"] == cards[1]["figures"]
    small = ["--max_steps", "1", "--batch_size", "4", "--max_new_tokens", "4", "--rollout", "transformers"]
    asked = [[{"role": "user", "content": prompt}] for prompt, _, _ in rows]
    turns = [
        {name: [*start, {"role": "assistant", "content": text}] for name, text in (("good", row[1]), ("bad", row[2]))}
        for start, row in zip(asked, rows, strict=True)
    ]
    inside = write("inside.jsonl", "".join(json.dumps(row) + "\n" for row in turns))
    sources = {
        "one": [str(path)],
        "two": [str(inside), "--chosen_column", "good", "--rejected_column", "bad"],
        "three": [str(pairs_csv)],
    }
    for folder, source in sources.items():
        flags = ["--model", str(model_folder), "--reward_model", str(tmp_path / "rm"), "--data", *source]
        assert cli.main(["train", *flags, "--output_dir", str(tmp_path / folder), *small]) == 0
    assert len({(tmp_path / folder / "model.safetensors").read_bytes() for folder in sources}) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"{name}: 8 prompts" in err and "8 prompts; prompts are the shared beginning of 'good' and 'bad'" in err


def test_lines_of_a_prompts_file_end_at_line_feeds_only(tmp_path):
    texts = ["One\u2028prompt?", "Form\x0cfeed", "Next\x85line", "Plain"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n".join([*texts, "", ""]).encode())
    assert read_prompt_lines(str(path)) == texts
