"""Limits of data files: what a file can grow to, how deep values nest, and values of any size in messages."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import ipc, parquet

from reinforcepp.config.files import parse_yaml
from reinforcepp.data import limits, load_prompts, tables
from reinforcepp.data.limits import Growth, parse_json
from reinforcepp.errors import MAX_MESSAGE_CHARACTERS, MAX_SHOWN_CHARACTERS, ConfigError, DataError, shown


def prompts_in(path):
    return [row.prompt for row in load_prompts(str(path), heldout_fraction=0, seed=0)[0].rows]


def test_growth_is_limited_by_the_size_of_the_file(tmp_path):
    small, large = Growth(tmp_path, 1000, "Fix it."), Growth(tmp_path, 1 << 30, "Fix it.")
    small.add(limits.FREE_BYTES)
    with pytest.raises(DataError, match=r"1000 bytes grow to more than 256 MiB .* 268,435 times its size.*Fix it\."):
        small.add(1)
    large.add(limits.MAX_GROWTH << 30)
    with pytest.raises(DataError, match=r"1\.0 GiB grow to more than 500\.0 GiB when the file is read, 500 times"):
        large.add(1)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("opened", [ipc.new_stream, ipc.new_file])
def test_compressed_arrow_files_declare_their_size(tmp_path, monkeypatch, codec, opened):
    texts = [f"{'a' * 1000} {i}?" for i in range(50)]
    table = pyarrow.table({"prompt": texts, "kind": pyarrow.array(["x"] * 50).dictionary_encode()})
    path = tmp_path / "a.arrow"
    with opened(path, table.schema, options=ipc.IpcWriteOptions(compression=codec)) as file:
        file.write_table(table, max_chunksize=20)
    assert prompts_in(path) == texts
    with open(path, "rb") as file:
        declared = tables._declared_bytes(file, 0 if opened is ipc.new_stream else 8)
    assert sum(map(len, texts)) <= declared < 60_000 and path.stat().st_size < 10_000
    monkeypatch.setattr(limits, "FREE_BYTES", 50_000)
    monkeypatch.setattr(limits, "MAX_GROWTH", 1)
    monkeypatch.setattr(tables, "_chunks", None)  # no batch is read
    with pytest.raises(DataError, match="grow to more than 49 KiB"):
        prompts_in(path)


def test_rows_share_the_values_of_a_dictionary(tmp_path):
    column = pyarrow.array(["why?", None, "why?", "how?"]).dictionary_encode()
    table = pyarrow.table({"prompt": pyarrow.array(["a", "b", "c", "d"]), "answer": column})
    path = tmp_path / "a.arrow"
    with ipc.new_stream(path, table.schema) as file:
        file.write_table(table)
    rows = load_prompts(str(path), heldout_fraction=0, seed=0)[0].rows
    answers = [row.columns["answer"] for row in rows]
    assert answers == ["why?", None, "why?", "how?"] and answers[0] is answers[2]


def test_long_rows_of_a_parquet_file_come_in_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_BYTES", 100_000)
    texts = [f"{i} {'a' * 1000}" for i in range(300)]
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "a.parquet")
    chunks = list(tables.read_parquet(tmp_path / "a.parquet"))
    assert [row["prompt"] for chunk in chunks for _, row in chunk.rows] == texts
    assert [number for chunk in chunks for number, _ in chunk.rows] == list(range(1, 301))
    assert max(len(chunk.rows) for chunk in chunks) == 128 and chunks[-1].share == 1


def test_an_honest_compressed_file_is_read(tmp_path):
    lines = [json.dumps({"prompt": f"{i}: " + "the same system prompt " * 200}) for i in range(3000)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 9))
    assert path.stat().st_size * 100 < sum(map(len, lines)), "as small as text gets"
    assert len(prompts_in(path)) == 3000


def test_a_file_with_many_columns_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({str(i): 1 for i in range(limits.MAX_COLUMNS)} | {"prompt": "a"}))
    with pytest.raises(DataError, match=r"10,001 columns, but at most 10,000 can be read"):
        prompts_in(path)


@pytest.mark.parametrize(("depth", "fits"), [(limits.MAX_NESTING - 1, True), (limits.MAX_NESTING + 1, False)])
def test_json_is_limited_in_depth(tmp_path, depth, fits):
    nested = "[" * depth + "]" * depth
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "a", "x": {nested}}}')
    if fits:
        assert parse_json(nested) and prompts_in(path) == ["a"]
        return
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(nested)
    with pytest.raises(DataError, match=r"a\.jsonl:1: lists or objects are nested too deeply"):
        prompts_in(path)


def test_wide_json_is_not_deep():
    assert len(parse_json("[" + "[]," * 1000 + "[]]")) == 1001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "an alias .* contains the alias"),
        ("a: &a [1]\nb: [" + "*a, " * 60_000 + "]", "more than 100,000 values"),
        ("[" * 2000, "nested too deeply"),
        ("a: 0x" + "f" * 2000, "a number of 2,002 characters"),
        ("a: 1" + ":1" * 400 + ".5", "too large"),
        ("a" * 2_000_000, "longer than 1 MiB"),
    ],
)
def test_yaml_is_limited(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_aliases_of_yaml_work():
    shared = "base: &base {a: 1, b: [1, 2]}\nother: {<<: *base, a: 2}\nlist: [*base, *base]\n"
    base = {"a": 1, "b": [1, 2]}
    assert parse_yaml(shared) == {"base": base, "other": base | {"a": 2}, "list": [base, base]}
    assert parse_yaml("") is None and parse_yaml("- 1\n- yes\n") == [1, True]


def test_messages_show_values_of_any_size():
    endless, wide = [], ["x"] * 9
    endless.append(endless)
    for _ in range(9):
        wide = [wide] * 9
    for value in (endless, wide, "a" * 10**6, 10**5000, {str(i): i for i in range(10**5)}, b"a" * 10**6):
        assert len(shown(value)) <= MAX_SHOWN_CHARACTERS
    assert shown(10**5000) == "<a number of 5,001 digits>"
    assert len(shown("a" * 100, 40)) == 40
    for value in ("it's", 12, -1.5, None, True, [1, "a"], {"a": (1, 2)}, {"a"}):
        assert shown(value) == repr(value)


def test_a_message_keeps_its_beginning_and_its_fix():
    message = str(ConfigError(f"data: {'a' * 10**6} not found. Check the path."))
    assert len(message) < MAX_MESSAGE_CHARACTERS + 100
    assert message.startswith("data: aaa") and message.endswith("aaa not found. Check the path.")
    assert str(ConfigError("short")) == "short"
