"""L1: files of a few hundred bytes that fill the memory or hang a command, and values that break an error message.

Each attack runs ``reinforcepp lint`` in a process with limited memory and time.
"""

from __future__ import annotations

import bz2
import json
import os
import subprocess
import sys
import time

import pyarrow
import pytest
from pyarrow import ipc, parquet

from scripts import SOURCE

MEMORY_BYTES = 3 << 30
SECONDS = 20
SLOW = ("b.parquet", "a.jsonl.bz2")
MIB = 1 << 20
PROGRAM = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
from reinforcepp.commands.cli import main
try:
    code = main()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print("peak", next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), flush=True)
sys.exit(code)
"""


class Attacked:
    """What ``reinforcepp lint *words`` did: exit code, messages and peak memory in MiB."""

    def __init__(self, *words: object) -> None:
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, "lint", *map(str, words)]
        start = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.code, self.error, self.peak = None, "", None
            self.text = f"still running after {SECONDS} s"
            return
        self.code, self.error = done.returncode, done.stderr
        self.peak = int(done.stdout.rpartition("peak ")[2] or 0)
        last = self.error.strip().splitlines()[-1:] or ["no error"]
        seconds = time.monotonic() - start
        shown = last[0] if len(last[0]) < 150 else f"{last[0][:70]} ... {last[0][-30:]}"
        self.text = f"exit code {self.code}, {self.peak} MiB, {seconds:.0f} s, {len(self.error):,} characters: {shown}"

    @property
    def refused(self) -> bool:
        """Whether the command ended with one sentence."""
        return self.code == 2 and self.error.count("\n") == 1 and len(self.error) < 1000


def parquet_of_a_shared_value(path):
    """Write 300 rows whose value of 1 MiB is stored once."""
    prompts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), pyarrow.array(["a" * MIB]))
    parquet.write_table(pyarrow.table({"prompt": prompts}), path, compression="zstd", store_schema=False)


def parquet_of_a_compressed_value(path):
    table = pyarrow.table({"prompt": ["a" * (300 * MIB)]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def parquet_of_empty_rows(path):
    parquet.write_table(pyarrow.table({"prompt": pyarrow.nulls(20_000_000, pyarrow.string())}), path)


def arrow_of_a_compressed_value(path):
    table = pyarrow.table({"prompt": ["a" * (300 * MIB)]})
    with ipc.new_file(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)


def arrow_of_runs(path):
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([100_000_000], pyarrow.int64()), pyarrow.array(["a"]))
    with ipc.new_stream(path, pyarrow.schema([("prompt", runs.type)])) as file:
        file.write_table(pyarrow.table({"prompt": runs}))


def lines_in_bzip2(path):
    path.write_bytes(bz2.compress(b'{"prompt": "' + b"a" * MIB + b'"}\n', 9) * 300)


def short_rows_in_zstd(path):
    path.write_bytes(pyarrow.compress(b"prompt,chosen,rejected\n" + b"a,b,c\n" * (20 * MIB), "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        pytest.param(
            name, write, marks=[pytest.mark.attack("L1", attack), *([pytest.mark.full] if name in SLOW else [])]
        )
        for name, write, attack in [
            ("a.parquet", parquet_of_a_shared_value, "a Parquet file of 303 bytes with 300 MiB of text"),
            ("b.parquet", parquet_of_a_compressed_value, "a Parquet file of 10 KiB with a cell of 300 MiB"),
            ("c.parquet", parquet_of_empty_rows, "a Parquet file of 38 KiB with 20 million rows"),
            ("a.arrow", arrow_of_a_compressed_value, "an Arrow file of 10 KiB with a cell of 300 MiB"),
            ("b.arrow", arrow_of_runs, "an Arrow file of 504 bytes with 100 million rows"),
            ("a.jsonl.bz2", lines_in_bzip2, "a bzip2 file of 21 KiB with 300 MiB of text"),
            ("a.csv.zst", short_rows_in_zstd, "a Zstandard file of 11 KiB with 20 million rows"),
        ]
    ],
)
def test_a_small_file_does_not_fill_the_memory(tmp_path, name, write, outcome):
    write(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    assert size < 100_000
    attacked = Attacked(tmp_path / name)
    outcome(f"{size:,} bytes: {attacked.text}")
    assert attacked.refused and "times its size" in attacked.error and "If you trust the file" in attacked.error
    assert attacked.peak < 1024


def laughs(setting):
    """Return a YAML text in which nine aliases stand for a value of nine to the power of nine texts."""
    lists, last = ["&a [x,x,x,x,x,x,x,x,x]"], "a"
    for name in "bcdefghi":
        lists.append(f"&{name} [{','.join([f'*{last}'] * 9)}]")
        last = name
    return f"{setting}: [{', '.join(lists)}]\n"


def merges():
    """Return a YAML text in which each mapping merges the one before it nine times."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    return "a: &a {x: 1}\n" + "".join(f"{new}: &{new} {{<<: [{f'*{old},' * 9}]}}\n" for old, new in pairs)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=pytest.mark.attack("L1", attack), id=attack)
        for text, attack in [
            (laughs("data"), "a YAML file of 298 bytes with 9^9 values through aliases"),
            (merges(), "a YAML file of 400 bytes with 9^8 merged mappings"),
            (f"data: {'[' * 5000}", "a YAML file with 5,000 nested lists"),
            (f"seed: {'1' * 5000}", "a YAML file with a number of 5,000 digits"),
            (f"learning_rate: 1{':1' * 5000}.5", "a YAML file with a number in base 60 of 5,000 digits"),
            ("data: 2001-99-99", "a YAML file with an impossible date"),
            (f"data: {'a' * 2_000_000}", "a YAML file with a text of 2 MB"),
        ]
    ],
)
def test_a_configuration_is_refused_with_one_sentence(tmp_path, text, outcome):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    attacked = Attacked("--config", path)
    outcome(attacked.text)
    assert attacked.refused and "not valid YAML" in attacked.error


DEEP = "[" * 100_000
OBJECTS = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}


@pytest.mark.attack("L1", "JSON text with 100,000 nested lists in a cell of a CSV file")
def test_deep_json_in_a_cell_is_a_bad_row(tmp_path, outcome):
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,chosen,rejected,tools\np,a,b,"{DEEP}"\nq,a,b,\nr,a,b,\n')
    attacked = Attacked(path)
    outcome(attacked.text)
    assert attacked.code == 0 and not attacked.error


@pytest.mark.attack("L1", "tool calls with 100,000 nested lists in a message")
def test_deep_json_in_a_message_is_a_bad_row(tmp_path, outcome):
    message = {"role": "assistant", "content": "", "tool_calls": DEEP}
    bad = OBJECTS | {"prompt": [*OBJECTS["prompt"], message, *OBJECTS["prompt"]]}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (bad, OBJECTS)))
    attacked = Attacked(path)
    outcome(attacked.text)
    assert attacked.code == 1 and not attacked.error


@pytest.mark.attack("L1", "a margin of 400 digits")
def test_a_huge_margin_is_a_bad_row(tmp_path, outcome):
    path = tmp_path / "a.jsonl"
    rows = [OBJECTS | {"margin": 10**400}, OBJECTS]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    attacked = Attacked(path)
    outcome(attacked.text)
    assert attacked.code == 1 and not attacked.error
