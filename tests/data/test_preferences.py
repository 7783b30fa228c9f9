"""Preference and prompt files: which rows are kept, which are skipped, and the error for each kind of broken file."""

# ruff: noqa: RUF001

from __future__ import annotations

import csv
import hashlib
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from reinforcepp.data import (
    PreferenceData,
    PromptRow,
    Row,
    Skipped,
    contradictions_in,
    filter_rows,
    load_preferences,
    load_prompts,
    read_preferences,
    read_prompts,
    resolve_data,
    text_digest,
)
from reinforcepp.data.columns import ColumnLayout
from reinforcepp.data.readers import CHUNK_ROWS
from reinforcepp.data.sources import find_parts
from reinforcepp.errors import ConfigError, DataError, ReinforceError
from reinforcepp.types import Preference

HEADER = "prompt,chosen,rejected\n"
TWO_PAIRS = "p1,good,bad\np2,right,wrong\n"


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def message(path: str | Path, read=read_preferences, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **columns)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# Kept rows


def test_pairs_keep_file_order_row_numbers_and_the_hash_of_the_file(write):
    path = write(HEADER + TWO_PAIRS)
    data = read_preferences(path)
    assert data == PreferenceData(
        source=str(path),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        rows=(Preference("p1", "good", "bad", 2), Preference("p2", "right", "wrong", 3)),
        skipped=(),
    )
    assert data.summary() == "data.csv: 2 usable pairs"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_make_no_difference(write, line_end, mark):
    text = HEADER + '"two\nlines", good ,bad\n\np2,right,"wr,""o""ng"\n'
    data = read_preferences(write(mark + text.replace("\n", line_end).encode()))
    assert data.pairs == (Preference("two\nlines", " good ", "bad", 2), Preference("p2", "right", 'wr,"o"ng', 5))


def test_named_columns_are_found_among_other_columns(write):
    path = write("id, question,better,worse,\n1,p1,good,bad,\n2,p2,right,wrong,\n", "DATA.CSV")
    data = read_preferences(path, prompt_column="question", chosen_column="better", rejected_column="worse")
    assert [pair.prompt for pair in data.pairs] == ["p1", "p2"]


def test_text_is_kept_as_written_but_compared_normalized(write):
    data = read_preferences(write(HEADER + "cafe\u0301,a  b,c\np2,right,wrong\n"))
    assert data.pairs[0] == Preference("cafe\u0301", "a  b", "c", 2)


def test_cells_above_the_default_csv_limit_are_read_and_the_limit_is_restored(write):
    before = csv.field_size_limit()
    assert len(read_preferences(write(HEADER + f"p0,{'x' * 200_000},b\n" + TWO_PAIRS)).pairs[0].chosen) == 200_000
    assert csv.field_size_limit() == before


# Skipped rows


def test_unusable_rows_are_skipped_and_reported(write):
    path = write(
        HEADER
        + "p1,good,bad\n"  # 2
        + " ,good,bad\n"  # 3
        + "p1, \u00a0,bad\n"  # 4
        + "p1,good,\n"  # 5
        + "p1,same  thing,same thing\n"  # 6
        + '"p2\n",caf\u00e9,bad\n'  # 7 and 8
        + "p2,cafe\u0301,bad\n"  # 9
        + "p1,good , bad\n"  # 10
    )
    data = read_preferences(path)
    assert [pair.row for pair in data.pairs] == [2, 7]
    assert data.skipped == (
        Skipped(3, "empty prompt"),
        Skipped(4, "empty chosen"),
        Skipped(5, "empty rejected"),
        Skipped(6, "with chosen equal to rejected"),
        Skipped(9, "duplicate", duplicate_of=7),
        Skipped(10, "duplicate", duplicate_of=2),
    )
    assert str(data.skipped[0]) == "row 3: empty prompt"
    assert str(data.skipped[-1]) == "row 10: duplicate of row 2"
    assert data.summary() == (
        "data.csv: 2 usable pairs; skipped 6 rows: 1 empty prompt (row 3), 1 empty chosen (row 4), "
        "1 empty rejected (row 5), 1 with chosen equal to rejected (row 6), 2 duplicates (rows 9, 10)"
    )


def test_summary_names_the_first_few_rows_and_the_columns_of_the_file(write):
    path = write("prompt,better,rejected\n" + TWO_PAIRS + "p,,x\n" * 7)
    summary = read_preferences(path, chosen_column="better").summary()
    assert summary == "data.csv: 2 usable pairs; skipped 7 rows: 7 empty better (rows 4, 5, 6, 7, 8, ...)"


def test_contradictory_pairs_are_kept_and_reported(write):
    data = read_preferences(write(HEADER + "p1,a,b\np1, b,a \np2,a,b\np3,b,a\n"))
    assert len(data.pairs) == 4
    assert data.contradictions == ((2, 3),)
    assert data.summary() == "data.csv: 4 usable pairs; kept 1 contradiction (rows 2 and 3)"


def test_error_for_too_few_pairs_explains_skipped_rows(write):
    text = message(write(HEADER + "p1,good,bad\np1,good,bad\np3,,bad\n"))
    assert "1 usable pair" in text and "at least 2" in text
    assert "1 duplicate (row 3), 1 empty chosen (row 4)" in text
    assert "Correct those rows" in text
    assert "Add more rows" in message(write(HEADER + "p1,good,bad\n"))


# Unreadable files


def test_missing_file_suggests_the_nearest_name_in_its_folder(write, tmp_path):
    write(HEADER, "feedback.csv")
    text = message(tmp_path / "fedback.csv")
    assert "no such file" in text and "Did you mean 'feedback.csv'?" in text
    assert re.search("folder .*nowhere' not found", message(tmp_path / "nowhere" / "feedback.csv"))


@pytest.mark.parametrize("name", ["a" * 5000 + ".csv", "a\0b.csv", "", "data.csv/"])
def test_impossible_paths_are_data_errors(name, tmp_path):
    message(str(tmp_path / "no" / name) if name else name)
    message(str(tmp_path / name))


@pytest.mark.parametrize("name", ["data.xlsx", "data.xlsx.gz", "data.parquet.gz", "data"])
def test_unsupported_formats_list_the_supported_ones(write, name):
    text = message(write(HEADER + TWO_PAIRS, name))
    assert "CSV, TSV, JSON, JSONL and Parquet" in text and "Convert it" in text


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n  \r\n"])
def test_empty_file(write, content):
    assert "is empty" in message(write(content))


def test_file_with_only_a_header(write):
    assert "no row below the header" in message(write(HEADER + "\n\n"))


def test_invalid_utf8_names_row_byte_and_conversion(write):
    text = message(write(HEADER.encode() + b'"two\r\nlines",good,bad\ncaf\xe9,good,bad\n'))
    assert "data.csv:4: byte 0xe9" in text
    assert "iconv -f cp1252 -t utf-8" in text and "'CSV UTF-8'" in text


def test_utf16(write):
    text = message(write((HEADER + TWO_PAIRS).encode("utf-16")))
    assert "UTF-16" in text and "iconv -f utf-16 -t utf-8" in text


def test_nul_bytes(write):
    text = message(write(HEADER + "p1,good,bad\np2,ri\0ght,wrong\n"))
    assert "data.csv:3: NUL byte" in text and "tr -d" in text


def test_missing_column_lists_present_columns_and_the_flag(write):
    path = write("prompt,Chosen,worse\n" + TWO_PAIRS)
    text = message(path)
    assert "data.csv:1: the header has no column 'chosen', only 'prompt', 'Chosen', 'worse'" in text
    assert "chosen_column. Did you mean 'Chosen'?" in text
    assert "name it with rejected_column" in message(path, chosen_column="Chosen")
    assert "name it with prompt_column" in message(path, prompt_column="question")


def test_file_without_header_is_quoted_briefly(write):
    assert len(message(write(",".join(f"{i}{'x' * 500}" for i in range(50)) + "\n"))) < 1000


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_recognized(write, separator, name):
    data = read_preferences(
        write((HEADER + TWO_PAIRS + "p3,good,bad\n").replace(",", separator).replace("p3", "p3, or not"))
    )
    assert len(data.pairs) == 3 and data.notes == (f"cells separated by {name}",)
    assert data.pairs[2].prompt == "p3, or not"


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ('sep=,\r\nprompt,chosen,rejected\r\n"a ""b""",good,bad\r\np2,good,bad\r\n', ()),
        ('sep=;\nprompt;chosen;rejected\n"a ""b""";good;bad\np2;good;bad\n', ("cells separated by semicolons",)),
        ('prompt, chosen, rejected\n"a ""b""", "good", "bad"\n"p2", "good", "bad"\n', ()),
        ('prompt,chosen,rejected\n"a \\"b\\"",good,bad\np2,good,bad\n', ("quotes escaped by backslashes",)),
        ('prompt|chosen|rejected\n"a ""b"""|good|bad\np2|good|bad\n', ("cells separated by vertical bars",)),
    ],
)
def test_dialects_of_csv(write, content, notes):
    data = read_preferences(write(content))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in data.pairs] == [
        ('a "b"', "good", "bad"),
        ("p2", "good", "bad"),
    ]
    assert data.notes == notes


def test_row_numbers_count_the_line_that_names_the_separator(write):
    assert "data.csv:4: 2 cells" in message(write("sep=;\nprompt;chosen;rejected\na;b;c\nd;e\n"))


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("It’s “good” – really…", "cp1252", "cp1252"),
        ("天空是什么颜色的？天空是蓝色的。水在几度沸腾？", "gb18030", "gb18030"),
        ("Какого цвета небо? Небо голубого цвета, когда светит солнце.", "cp1251", "cp1251"),
        ("What is UTF-16?", "utf-16-le", "utf-16le"),
    ],
)
def test_advice_names_the_likely_encoding(write, text, encoding, name):
    assert f"iconv -f {name} -t utf-8" in message(write((HEADER + f"{text},good,bad\n").encode(encoding)))


def test_repeated_column_names(write):
    text = message(write("\nprompt,chosen,rejected, chosen\n" + "a,b,c,d\n" * 2))
    assert "data.csv:2: the header has column 'chosen' more than once" in text


def test_rows_of_the_wrong_width(write):
    more = message(write(HEADER + '"two\nlines",good,bad\np2,yes, really,no\n'))
    assert "data.csv:4: 4 cells, but the header has 3" in more and "double quotes" in more
    fewer = message(write(HEADER + "p1,good,bad\np2,good\n"))
    assert "data.csv:3: 2 cells, but the header has 3" in fewer and "line break" in fewer


def test_unclosed_quote_names_the_row_where_it_opens(write):
    text = message(write(HEADER + TWO_PAIRS + 'p3,"good,bad\np4,good,bad\n'))
    assert "data.csv:4: a cell's opening double quote is never closed" in text


def test_text_after_a_closing_quote(write):
    text = message(write(HEADER + 'p1,good,bad\np2,"say "hi" now",bad\n'))
    assert "data.csv:3: text follows the closing double quote" in text and '("")' in text


def test_overlong_cell(write, monkeypatch):
    monkeypatch.setattr("reinforcepp.data.readers._MAX_CELL_CHARACTERS", 50)
    before = csv.field_size_limit()
    text = message(write(HEADER + "p1,good,bad\n" + f"p2,{'x' * 60},bad\n"))
    assert "data.csv:3: a cell is longer than 50 characters" in text and "shorten" in text
    assert csv.field_size_limit() == before


def test_an_unfinished_pass_leaves_the_limit_of_cells_alone(write):
    before = csv.field_size_limit()
    (part,) = find_parts(write(HEADER + "".join(f"p{i},good,bad\n" for i in range(2 * CHUNK_ROWS))))
    chunks = part.chunks()
    next(chunks)
    assert csv.field_size_limit() == before


def test_two_settings_cannot_name_one_column(write):
    with pytest.raises(ConfigError, match=r"prompt_column and rejected_column .*'prompt'"):
        read_preferences(write(HEADER + TWO_PAIRS), rejected_column="prompt")


# Prompts


def test_prompts_are_distinct_and_keep_their_other_columns(write):
    path = write("id,prompt,answer\n1, why ,x\n2,how,\n3,why,y\n4,,z\n")
    data = read_prompts(path)
    assert data.prompts == (
        PromptRow(" why ", {"id": "1", "answer": "x"}, 2),
        PromptRow("how", {"id": "2", "answer": ""}, 3),
    )
    assert data.skipped == (Skipped(4, "duplicate", duplicate_of=2), Skipped(5, "empty prompt"))
    assert data.summary() == "data.csv: 2 prompts; skipped 2 rows: 1 duplicate (row 4), 1 empty prompt (row 5)"
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_prompts_need_one_column_and_one_usable_row(write):
    path = write("q\nwhy\n")
    assert [row.prompt for row in read_prompts(path, prompt_column="q").prompts] == ["why"]
    assert read_prompts(path, prompt_column="q").summary() == "data.csv: 1 prompt"
    assert "no column 'prompt', only 'q'" in message(path, read_prompts)
    text = message(write("prompt,id\n,1\n"), read_prompts)
    assert "no usable prompt" in text and "1 empty prompt (row 2)" in text and "prompt_column" in text


# Sources


@pytest.fixture
def builtin(write, monkeypatch):
    """Replace the built-in data by two files that are already split."""
    train, heldout = write(HEADER + TWO_PAIRS, "train.csv"), write(HEADER + "p3,a,b\np4,a,b\n", "heldout.csv")
    monkeypatch.setattr("reinforcepp.data.builtin.data_paths", lambda: (train, heldout))
    return train, heldout


def test_path_resolves_to_itself(write):
    path = write(HEADER)
    assert resolve_data(path) == resolve_data(str(path)) == (path, None)


def test_built_in_data_is_already_split(builtin):
    assert resolve_data("builtin:network") == builtin
    data, train, heldout = load_preferences("builtin:network", heldout_fraction=0.9, seed=7)
    assert [pair.prompt for pair in train] == ["p1", "p2"]
    assert [pair.prompt for pair in heldout] == ["p3", "p4"]
    assert data.pairs == (*train, *heldout)
    assert data.summary() == "builtin:network: 4 usable pairs"
    prompts, train_prompts, heldout_prompts = load_prompts("builtin:network", heldout_fraction=0, seed=0)
    assert [row.prompt for row in (*train_prompts, *heldout_prompts)] == ["p1", "p2", "p3", "p4"]
    assert prompts.sha256 == data.sha256
    assert len(heldout_prompts) == 2


def test_hash_of_built_in_data_covers_both_files(builtin):
    before = load_preferences("builtin:network", heldout_fraction=0, seed=0)[0].sha256
    for path in builtin:
        path.write_bytes(path.read_bytes() + b"\n")
        after = load_preferences("builtin:network", heldout_fraction=0, seed=0)[0].sha256
        assert after != before
        before = after


def test_unknown_built_in_data_suggests_the_known():
    for load in (load_preferences, load_prompts):
        with pytest.raises(DataError, match=r"'builtin:netwrk' not found.*Did you mean 'builtin:network'\?"):
            load("builtin:netwrk", heldout_fraction=0.1, seed=0)


def test_pairs_and_prompts_are_split_the_same_way(write):
    path = write("q,chosen,rejected\n" + "".join(f"p{i // 2},a{i},b{i}\n" for i in range(40)))
    data, train, heldout = load_preferences(path, heldout_fraction=0.25, seed=3, prompt_column="q")
    assert len(data.pairs) == 40 and len(train) == 30 and len(heldout) == 10
    _, train_prompts, heldout_prompts = load_prompts(path, heldout_fraction=0.25, seed=3, prompt_column="q")
    assert {pair.prompt for pair in train} == {row.prompt for row in train_prompts}
    assert {pair.prompt for pair in heldout} == {row.prompt for row in heldout_prompts}


# Arbitrary bytes


def test_arbitrary_bytes_give_a_result_or_a_data_error(write):
    rng = random.Random(20)
    pieces = [b'"', b'""', b",", b"\n", b"\r", b"\r\n", b"a", b" ", b"\xc3\xa9", b"\xe9", b"\\", b";", b"\t", b"'"]
    valid = (HEADER + TWO_PAIRS + 'p3,"a, ""b""",c\n').encode()
    outcomes = {"result": 0, "error": 0}
    for case in range(600):
        if case % 3 == 0:
            content = rng.randbytes(rng.randrange(200))
        elif case % 3 == 1:
            content = HEADER.encode() + b"".join(rng.choices(pieces, k=rng.randrange(40)))
        else:
            changed = bytearray(valid)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(changed))
                changed[at : at + rng.randrange(3)] = rng.choice([*pieces, rng.randbytes(1)])
            content = bytes(changed)
        path = write(content)
        for read in (read_preferences, read_prompts):
            try:
                assert read(path).summary()
                outcomes["result"] += 1
            except ReinforceError as error:
                assert isinstance(error, DataError)
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                outcomes["error"] += 1
    assert min(outcomes.values()) > 50


# --- memory -------------------------------------------------------------------------------------------------------------


def test_comparing_rows_keeps_no_copies_of_their_texts():
    texts = [(f"{i}", f"a{'  word' * 5000}", f"b{'  word' * 5000}") for i in range(50)]
    rows = [Row(i, {}, each, ColumnLayout("prompt", None)) for i, each in enumerate(texts)]
    pairs = [Preference(*each) for each in texts]
    tracemalloc.start()
    try:
        kept, skipped = filter_rows(rows, ("prompt", "chosen", "rejected"))
        contradictions = contradictions_in(pairs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(kept), skipped, contradictions) == (50, (), ())
    assert peak < sum(len(text) for each in texts for text in each) / 4


def test_digest_of_texts_depends_on_their_borders():
    assert len({text_digest(*texts) for texts in (("ab",), ("a", "b"), ("b", "a"), ("a", "", "b"), ("1:a",))}) == 5
