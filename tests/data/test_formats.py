"""The same rows out of every format, with their types and numbers; and what each damaged file is told."""

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
from reinforcepp.data import PromptRow, load_preferences, load_prompts, read_preferences, read_prompts
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
    # Where a row begins: below the header and after the cell of two lines, or by its line or place alone.
    numbers = [2, 4, 5, 6, 7, 8] if name.endswith(("csv", "tsv")) else [1, 2, 3, 4, 5, 6]
    data, train, heldout = load_preferences(path, heldout_fraction=0.4, seed=1)
    assert data.pairs == (
        Preference("How do I see my routes?", "ip route,\nthen read it", "Reboot.", numbers[0]),
        Preference("Is it up?", 'Run "ping"', "No.", numbers[1]),
        Preference("Größe?\t5 €", "ü 𝄞", "b", numbers[4]),
    )
    assert [(each.row, each.reason, each.duplicate_of) for each in data.skipped] == [
        (numbers[2], "empty chosen", None),
        (numbers[3], "duplicate", numbers[1]),
        (numbers[5], "with chosen equal to rejected", None),
    ]
    assert (len(train), [pair.prompt for pair in heldout]) == (2, ["How do I see my routes?"])
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.notes == () and data.summary().startswith(f"{name}: 3 usable pairs; left out 3 rows")
    prompts = read_prompts(path)
    assert [row.prompt for row in prompts.prompts] == ["How do I see my routes?", "Is it up?", "Größe?\t5 €", "same?"]
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


def test_blank_lines_count_as_lines_and_a_missing_key_is_an_empty_cell(write):
    path = write("data.jsonl", '\n{"prompt": "a", "x": 1}\n  \n{"x": 2}\n{"prompt": null}\n{"prompt": "b"}')
    data = read_prompts(path)
    assert [(row.prompt, row.row) for row in data.prompts] == [("a", 2), ("b", 6)]
    assert data.summary() == "data.jsonl: 2 prompts; left out 2 rows: 2 empty prompt (rows 4, 5)"


def test_categories_of_parquet_are_texts(write):
    sink = io.BytesIO()
    column = pyarrow.array(["why?", "how?", "why?"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), sink)
    assert [row.prompt for row in read_prompts(write("data.parquet", sink.getvalue())).prompts] == ["why?", "how?"]


# --- several files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(write, tmp_path, monkeypatch):
    """Three files in ``part``, a row of the third a repetition."""
    monkeypatch.chdir(tmp_path)
    write("part/a.jsonl", as_lines([("p1", "g", "b"), ("p2", "g", "b")]))
    write("part/b.jsonl", as_lines([("p3", "", "b"), ("p4", "g", "b")]))
    write("part/c.jsonl", as_lines([("p1", "g", "b"), ("p5", "g", "b")]))
    return Path("part")


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("part/a.jsonl,part/b.jsonl, part/c.jsonl", "a.jsonl and 2 more files"),
        ("part/*.jsonl", "a.jsonl and 2 more files"),
        ("part/[ab].jsonl,part/c.jsonl", "a.jsonl and 2 more files"),
        ("part", "part"),
        ("part/", "part"),
    ],
)
def test_several_files_are_one_set_whose_rows_are_named_with_their_file(three, source, called):
    data, train, heldout = load_preferences(source, heldout_fraction=0.25, seed=0)
    assert [(pair.prompt, pair.row) for pair in data.pairs] == [
        ("p1", "a.jsonl:1"),
        ("p2", "a.jsonl:2"),
        ("p4", "b.jsonl:2"),
        ("p5", "c.jsonl:2"),
    ]
    assert data.summary() == (
        f"{called}: 4 usable pairs; left out 2 rows: 1 empty chosen (row b.jsonl:1), 1 duplicate (row c.jsonl:1)"
    )
    assert str(data.skipped[1]) == "row c.jsonl:1: duplicate of row a.jsonl:1"
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(three.iterdir()))
    assert data.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert len(train) == 3 and len(heldout) == 1
    prompts, train_prompts, _ = load_prompts(source, heldout_fraction=0.25, seed=0)
    assert {row.prompt for row in train_prompts} - {pair.prompt for pair in train} <= {"p3"}
    assert prompts.sha256 == data.sha256


def test_files_of_several_formats_go_together(three, write):
    write("more.csv", as_csv([("p6", "g", "b")]))
    data = read_prompts("part/a.jsonl,more.csv")
    assert [row.row for row in data.prompts] == ["a.jsonl:1", "a.jsonl:2", "more.csv:2"]


def test_what_datasets_writes_about_its_files_is_no_data(write, tmp_path):
    write("part/a.parquet", as_parquet(ROWS))
    write("part/dataset_infos.json", "{}")
    assert len(read_prompts(tmp_path / "part").prompts) == 4


def test_a_file_is_taken_by_its_whole_name_first(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a,b[1]*.csv", "prompt\nwhole\n")
    write("b1.csv", "prompt\npart\n")
    assert [row.prompt for row in read_prompts("a,b[1]*.csv").prompts] == ["whole"]


def test_sources_that_name_no_files(three, write):
    assert "no file has such a name; check the pattern" in refusal("part/*.csv")
    assert "is named twice" in refusal("part/a.jsonl,part/*.jsonl")
    assert "part/d.jsonl: there is no such file" in refusal("part/a.jsonl,part/d.jsonl")
    assert "names no data file" in refusal("")
    assert "names no data file" in refusal(" , ")
    write("empty/readme.md", "x")
    assert "folder without data in it" in refusal("empty")
    write("part/more.csv", "prompt\nx\n")
    text = refusal("part")
    assert "several formats (.csv, .jsonl)" in text and "'part/*.csv'" in text
    assert "c.jsonl, row 2, character 2" in refusal(write("part/c.jsonl", '{"prompt": "x"}\n{') and "part/*.jsonl")


def test_what_a_run_starts_from_is_not_written_over_under_any_name(three):
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


def test_a_folder_that_datasets_saved(saved):
    data = read_prompts(saved / "one")
    assert data.prompts[1] == PromptRow("p1", {"n": 1, "l": [{"a": 1}]}, 2)
    assert data.summary() == "one: 3 prompts"
    assert [row.prompt for row in read_prompts(saved / "sharded").prompts] == ["p0", "p1", "p2"]
    assert "holds several data sets, test, train; name one of them" in refusal(saved / "parts")
    assert len(read_prompts(saved / "parts" / "train").prompts) == 3


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_damaged_list_of_files(saved, state):
    (saved / "one" / "state.json").write_text(state)
    assert "state.json" in refusal(saved / "one")


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "character 15: this isn't valid JSON (expecting ',' delimiter)"),
        ("{'prompt': 'a'}", "character 2: this isn't valid JSON"),
        ('{"prompt": "a\tb"}', "invalid control character"),
        ('  {"prompt": "a"} {}', "character 19: text follows"),
        ('["a"]', "there is a list where an object is expected"),
        ('"a"', "there is a text where"),
        ("12", "there is a number where"),
        ("null", "there is null where"),
        ('{"prompt": "a", "x": NaN}', "NaN is no JSON value; write null"),
        ('{"prompt": "a", "x": [-Infinity]}', "-Infinity is no JSON value"),
        ('{"prompt": "a", "x": -1e999}', "the number -1e999 is too large"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "a number of 5,000 digits is too large"),
        ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' occurs twice"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": 3}', "'prompt' holds 3, where text or a list of messages is expected"),
        ('{"prompt": true}', "'prompt' holds True, where"),
        ('{"prompt": {"a": 1}}', "'prompt' holds {'a': 1}, where"),
        ('{"prompt": ["a"]}', "'prompt' holds ['a'], where"),
        ('{"prompt": [{"role": "user"}, "a"]}', "where text or a list"),
    ],
)
def test_a_line_of_json_that_cannot_be_read(write, line, said):
    path = write("data.jsonl", '{"prompt": "first"}\n\n' + line + '\n{"prompt": "last"}\n')
    text = refusal(path)
    assert text.startswith(f"{path}, row 3") and said in text and len(text) < 400


def test_pairs_of_surrogates_are_characters(write):
    assert read_prompts(write("data.jsonl", '{"prompt": "\\ud83d\\ude00"}')).prompts[0].prompt == "😀"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"prompt": "a"},\n {"prompt":}]', ", row 2, line 2, character 12: this isn't valid JSON (expecting value)"),
        ('[{"prompt": "a"}', ", row 1, character 17: this isn't valid JSON (a comma or the end"),
        ('[{"prompt": "a"} {"prompt": "b"}]', ", row 1, character 18"),
        ('[{"prompt": "a"},]', "a comma before the end of the list"),
        ('[{"prompt": "a"}] x', "character 19: this isn't valid JSON (text after the end"),
        ('[{"prompt": "a"}, 3]', ", row 2: there is a number"),
        ('[{"prompt": "a"}, {"prompt": "b", "x": NaN}]', ", row 2: NaN is no JSON value"),
        ('{"data": [{"prompt": "a"}]}', "has no column 'prompt', only 'data'"),
        ('{\n"prompt": "a"\n}', ", row 1, character 2"),
        ("[]", "the file is empty"),
        (" \n", "the file is empty"),
        ("", "the file is empty"),
    ],
)
def test_a_list_of_json_that_cannot_be_read(write, content, said):
    assert said in refusal(write("data.json", content))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', "row 2: byte 0xe9 isn't valid UTF-8"),
        (b'{"prompt": "a"}\n\0', "row 2: there is a NUL byte"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16, not UTF-8"),
    ],
)
def test_bytes_that_are_no_text(write, name, content, said):
    text = refusal(write(name, content))
    assert said in text and "CSV" not in text


def parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"prompt\nx\n", b"ARROW1\0\0", as_parquet(ROWS)[:-20], as_arrow(ROWS)[:300]]
)
def test_a_file_that_is_no_parquet(write, name, content):
    kind = "Parquet" if name == "data.parquet" else "Arrow"
    assert f"{name}: this is no {kind} file, or a damaged one (" in refusal(write(name, content))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "there is no row in it"),
        (pyarrow.table({}), "there is no row in it"),
        (pyarrow.table({"prompt": ["a", None, "b"], "x": [1, 2, 3]}).rename_columns(["x", "x"]), "two columns 'x'"),
        (pyarrow.table({"prompt": [1.5, 2.0]}), "row 1: 'prompt' holds 1.5, where text"),
        (pyarrow.table({"prompt": [None, b"a"]}), "row 2: 'prompt' holds b'a', where text"),
        (pyarrow.table({"question_": ["a"]}), "the file has no column 'prompt', only 'question_'"),
    ],
)
def test_a_table_that_cannot_be_used(write, table, said):
    assert said in refusal(write("data.parquet", parquet(table)))


def test_text_of_parquet_that_is_not_utf8(write):
    content = parquet(pyarrow.table({"prompt": ["caf_"]}, schema=pyarrow.schema({"prompt": pyarrow.string()})))
    assert content.count(b"caf_") > 0
    assert "damaged one" in refusal(write("data.parquet", content.replace(b"caf_", b"caf\xe9")))


def test_a_column_that_nothing_can_hold(write):
    far = pyarrow.array([2**62], pyarrow.timestamp("s"))
    text = refusal(
        write(
            "data.parquet",
            parquet(pyarrow.table({"prompt": ["a"], "when": far.cast(pyarrow.int64()).cast(pyarrow.timestamp("us"))})),
        )
    )
    assert "the column 'when' (timestamp[us]) can't be read" in text


def test_a_missing_column_suggests_the_nearest_and_the_flag(write):
    text = refusal(write("data.jsonl", '{"promt": "a"}'))
    assert "no column 'prompt', only 'promt'" in text and "--prompt_column. Did you mean 'promt'?" in text
    assert "no column 'rejected'" in refusal(write("data.jsonl", '{"prompt": "a", "chosen": "b"}'), read_preferences)


def test_separators_of_tsv_are_told(write):
    text = refusal(write("data.tsv", "prompt,chosen,rejected\na,b,c\n"), read_preferences)
    assert "row 1: cells are separated by commas; save the file with tabs" in text
    assert "row 2: 4 cells where the header has 3; an unquoted tab" in refusal(
        write("data.tsv", "prompt\tchosen\trejected\na\tb\tc\td\n"), read_preferences
    )


# --- what is loaded -----------------------------------------------------------------------------------------------------


def test_text_files_and_help_load_neither_pyarrow_nor_pandas(write):
    path = write("data.jsonl", as_lines(ROWS))
    for code in (
        f"from reinforcepp.data import read_prompts; read_prompts({str(path)!r})",
        "from reinforcepp.commands import cli; cli.main(['lint', '--help'])",
    ):
        code = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n"
        code += "print(sorted({'pyarrow', 'pandas', 'torch', 'datasets'} & set(sys.modules)), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr == "[]\n"


# --- the whole job --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_reward_model_and_policy_are_the_same_as_from_csv(
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
    told = " ".join(capsys.readouterr().err.split())
    assert f"{name}: 8 prompts" in told and "8 prompts; prompts are what 'good' and 'bad' begin with" in told
