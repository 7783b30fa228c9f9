"""Fuzzing: every input must give a correct result or a named error of this package.

python benchmarks/fuzz.py [--cases 1500]

Hypothesis generates the bytes of CSV, JSON, JSONL, Parquet and YAML files (valid, damaged and noise), values of settings, and
return values of reward functions. For a valid data file, each row must be read back unchanged or reported as skipped. Reading
must not create files. The outcome is written to benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from results import write_result

from reinforcepp.commands import cli
from reinforcepp.commands.table import COMMANDS
from reinforcepp.data import normalize, read_preferences, read_prompts
from reinforcepp.errors import ReinforceError
from reinforcepp.files import write_json
from reinforcepp.rewards.functions import score_with
from reinforcepp.types import Completion, Prompt

COLUMNS = ("prompt", "chosen", "rejected")
HANG_SECONDS = 20.0
"""A longer case counts as a hang."""

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
cells = st.one_of(
    st.sampled_from(["", " ", "Is host 1 up?", "ping it", '"', "a,b", "a\nb", "a\r\nb", "𝄞", "\u2028"]), words
)
rows = st.lists(st.tuples(cells, cells, cells), max_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1500, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="result file instead of benchmarks/results/fuzz.json")
    arguments = parser.parse_args()
    kinds = {kind: run_cases(kind, arguments.cases, arguments.seed) for kind in KINDS}
    totals = {key: sum(found[key] for found in kinds.values()) for key in ("cases", "results", "named_errors", "hangs")}
    failures = [failure for found in kinds.values() for failure in found.pop("failures")]
    result = totals | {"tracebacks": len(failures), "kinds": kinds, "failures": failures[:20]}
    print(json.dumps({key: value for key, value in result.items() if key != "failures"}, indent=2))
    if arguments.output:
        write_json(Path(arguments.output), result)
    else:
        write_result("fuzz", result)


def run_cases(kind: str, cases: int, start: int) -> dict[str, Any]:
    """Return the outcomes of ``cases`` generated inputs."""
    strategy, check = KINDS[kind]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: Any) -> None:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                outcomes[check(value, Path(folder))] += 1
            except Exception:
                failures.append(f"{kind} {value!r:.400}\n{traceback.format_exc()}")
        outcomes["hangs"] += time.monotonic() - begin > HANG_SECONDS

    one()
    count = outcomes["results"] + outcomes["named_errors"] + len(failures)
    return {
        "cases": count,
        **{key: outcomes[key] for key in ("results", "named_errors", "hangs")},
        "failures": failures,
    }


# --- data files -------------------------------------------------------------------------------------------------------


def read_file(name: str, contents: bytes, folder: Path) -> str:
    """Read a file with both readers; return the outcome and check that no other file appears in the folder."""
    path = folder / name
    path.write_bytes(contents)
    outcome = "named_errors"
    for read in (read_preferences, read_prompts):
        with contextlib.suppress(ReinforceError):
            read(path)
            outcome = "results"
    assert [each.name for each in folder.iterdir()] == [name]
    return outcome


def check_noise(contents: bytes, folder: Path) -> str:
    return read_file("noise.csv", contents, folder)


def as_csv(table: list[tuple[str, ...]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *table])
    return text.getvalue().encode()


def check_valid(file: tuple[str, list[tuple[str, str, str]]], folder: Path) -> str:
    """Check that every row of a valid file is used with its texts, or reported as skipped."""
    name, table = file
    path = folder / name
    path.write_bytes(WRITERS[path.suffix](table))
    try:
        data = read_preferences(path)
    except ReinforceError:
        assert len(usable(table)) < 2
        return "named_errors"
    assert [tuple(map(normalize, (p.prompt, p.chosen, p.rejected))) for p in data.pairs] == usable(table)
    # The reader skips blank lines of a CSV file without reporting them; a row of empty cells is written as ",," and reported.
    blank = sum(not any(cell.strip() for cell in row) for row in table)
    assert len(data.pairs) + len(data.skipped) in (len(table), len(table) - blank)
    return "results"


def usable(table: list[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """Return the expected pairs, by the simplest possible code."""
    seen: list[tuple[str, ...]] = []
    for row in table:
        texts = tuple(normalize(cell) for cell in row)
        if all(texts) and texts[1] != texts[2] and texts not in seen:
            seen.append(texts)
    return seen


@st.composite
def damaged_csv(draw: Any) -> bytes:
    """Return a valid file in which some bytes are replaced, removed or inserted."""
    contents = bytearray(as_csv(draw(rows)))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(contents) - 1)))
        contents[position : position + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(contents)


def as_jsonl(table: list[tuple[Any, ...]]) -> bytes:
    return "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in table).encode()


def as_json(table: list[tuple[Any, ...]]) -> bytes:
    return json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in table], ensure_ascii=False, indent=1).encode()


def as_parquet(table: list[tuple[Any, ...]]) -> bytes:
    sink = io.BytesIO()
    columns = {name: [row[i] for row in table] for i, name in enumerate(COLUMNS)}
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[tuple[Any, ...]]], bytes]] = {
    ".csv": as_csv,
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".parquet": as_parquet,
}
others = st.sampled_from(["data.jsonl", "data.json", "data.parquet"])


def as_turns(texts: tuple[str, str, str], kept: int) -> tuple[Any, ...]:
    """Return a pair as conversations, with the prompt in its column or in the answers."""
    prompt, chosen, rejected = (
        [{"role": "user", "content": texts[0]}],
        *([{"role": "assistant", "content": answer}] for answer in texts[1:]),
    )
    return (prompt, chosen, rejected) if kept else (None, prompt + chosen, prompt + rejected)


@st.composite
def damaged_others(draw: Any) -> tuple[str, bytes]:
    """Return JSONL, JSON or Parquet of texts or conversations, truncated or with some bytes changed."""
    name, table, turns = draw(others), draw(rows), draw(st.sampled_from([None, 0, 1]))
    contents = bytearray(
        WRITERS[Path(name).suffix]([as_turns(row, turns) if turns is not None else row for row in table])
    )
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(contents) - 1)))
        if draw(st.integers(0, 3)) == 0:
            del contents[position:]
        else:
            contents[position : position + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return name, bytes(contents)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, cells),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(["role", "content", "from", "value"]), words), inner, max_size=3),
        st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["system", "user", "assistant", "gpt", "tool"]), "content": inner}
            ),
            max_size=4,
        ),
    ),
    max_leaves=8,
)
answers = st.one_of(cells, st.sampled_from(["yes", "no"]).map(lambda text: [{"role": "assistant", "content": text}]))
shapes = st.fixed_dictionaries(
    {name: st.one_of(answers, anything) for name in COLUMNS},
    optional={"reward_model": anything, "messages": anything, "response_chosen": anything},
).flatmap(
    lambda row: st.sets(st.sampled_from(sorted(row)), max_size=1).map(
        lambda removed: {k: row[k] for k in row if k not in removed}
    )
)


def check_shapes(table: list[dict[str, Any]], folder: Path) -> str:
    """Check objects of any shape under recognized column names."""
    return read_file("data.jsonl", "".join(json.dumps(row) + "\n" for row in table).encode(), folder)


# --- settings ---------------------------------------------------------------------------------------------------------

NAMES = sorted({field.name for command in COMMANDS.values() for field in fields(command.config)})
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), words, st.lists(st.integers(), max_size=2), st.dates()
)
mappings = st.dictionaries(st.one_of(st.sampled_from(NAMES), words, st.integers()), values, max_size=5)
yaml_files = st.one_of(
    mappings.map(lambda mapping: yaml.safe_dump(mapping, allow_unicode=True).encode()),
    st.binary(max_size=60),
    words.map(str.encode),
    st.lists(
        st.sampled_from([*NAMES, ":", "- ", "\n", "  ", "{", "}", "*a", "&a ", "!!python/object:os.system ", "1"])
    ).map(lambda parts: "".join(parts).encode()),
)


def check_yaml(file: tuple[str, bytes], folder: Path) -> str:
    command, contents = file
    (folder / "settings.yaml").write_bytes(contents)
    return outcome_of(lambda: cli.parse(command, ["--config", str(folder / "settings.yaml")]))


def check_flags(case: tuple[str, list[tuple[str, Any]]], folder: Path) -> str:
    command, chosen = case
    return outcome_of(lambda: cli.parse(command, [f"--{name}={value}" for name, value in chosen]))


def check_settings(case: tuple[str, dict[str, Any]], folder: Path) -> str:
    """Check settings from Python: any value of the right type."""
    command, given_values = case
    chosen = {
        name: value for name, value in given_values.items() if name in COMMANDS[command].config.__dataclass_fields__
    }
    return outcome_of(lambda: COMMANDS[command].config(**chosen))


def outcome_of(make: Callable[[], Any]) -> str:
    """Return the outcome: a configuration, a named error, or the command line's error for a value of another type."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make()
    except ReinforceError:
        return "named_errors"
    except SystemExit as stop:
        assert stop.code in (0, 2)
        return "named_errors"
    return "results"


typed: dict[Any, st.SearchStrategy[Any]] = {
    int: st.one_of(st.integers(-3, 300), st.integers()),
    float: st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0])),
    str: words,
    bool: st.booleans(),
}


@st.composite
def settings_from_python(draw: Any) -> tuple[str, dict[str, Any]]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    named = draw(
        st.lists(st.sampled_from([field.name for field in fields(COMMANDS[command].config)]), max_size=4, unique=True)
    )
    hints = get_type_hints(COMMANDS[command].config)
    return command, {name: draw(values_of(hints[name])) for name in named}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a setting's type."""
    if get_origin(hint) is Literal:
        return st.one_of(st.sampled_from(get_args(hint)), words)
    if hint in typed:
        return typed[hint]
    return st.one_of([st.none() if part is type(None) else values_of(part) for part in get_args(hint)])


# --- rewards ----------------------------------------------------------------------------------------------------------

scores = st.one_of(st.floats(), st.integers(), st.none(), words, st.booleans(), st.lists(st.floats(), max_size=2))
returned = st.one_of(
    st.lists(scores, max_size=5),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.lists(st.floats(width=32), max_size=5).map(np.array),
    st.lists(st.floats(width=32), max_size=5).map(torch.tensor),
    scores,
)


def check_reward(value: Any, folder: Path) -> str:
    """Check that scores are used unchanged or rejected as a whole."""
    prompt = Prompt("Is it up?", (1, 2), 0)
    completions = [Completion(prompt, (3,), (-1.0,), text, "stop") for text in "abc"]
    try:
        found = score_with([lambda prompts, completions, **_: value], completions)
    except ReinforceError:
        return "named_errors"
    assert found.total == [None if score is None else float(score) for score in value]
    assert len(found.total) == 3 and all(np.isfinite(found.known))
    return "results"


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], str]]] = {
    "csv": (rows.map(lambda table: ("valid.csv", table)), check_valid),
    "damaged csv": (damaged_csv(), lambda contents, folder: read_file("damaged.csv", contents, folder)),
    "noise": (
        st.one_of(
            st.binary(max_size=200),
            st.binary(max_size=200).map(lambda noise: b"prompt,chosen,rejected\n" + noise),
            words.map(lambda text: f"prompt,chosen,rejected\na,b,c\nd,e,f\n{text}".encode()),
        ),
        check_noise,
    ),
    "json and parquet": (st.tuples(others, rows), check_valid),
    "damaged json and parquet": (damaged_others(), lambda file, folder: read_file(*file, folder)),
    "json of any shape": (st.lists(shapes, max_size=3), check_shapes),
    "yaml": (
        st.one_of(
            st.tuples(st.sampled_from(sorted(COMMANDS)), yaml_files),
            settings_from_python().map(lambda case: (case[0], yaml.safe_dump(case[1], allow_unicode=True).encode())),
        ),
        check_yaml,
    ),
    "flags": (
        st.tuples(st.sampled_from(sorted(COMMANDS)), st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=4)),
        check_flags,
    ),
    "settings": (settings_from_python(), check_settings),
    "rewards": (returned, check_reward),
}


if __name__ == "__main__":
    main()
