"""The public functions: their arguments are the settings, and they leave everything else unchanged."""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import itertools
import json
import logging
import os
import random
import re
import textwrap
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from types import UnionType

import datasets
import numpy as np
import pytest
import torch
import transformers

import reinforcepp
from reinforcepp import lint
from reinforcepp.config import LintConfig
from reinforcepp.errors import ConfigError
from scripts import ROOT

SETTINGS = {
    "lint": (LintConfig, {"fail_on"}),
}
"""Functions with the class of their settings, and the settings that are the command's alone."""
OTHERS = {"verbose"}
"""Arguments that aren't settings."""
OWN_DEFAULT = {"output"}
"""Settings with another default, because a function writes no file unless asked."""


# --- signatures -------------------------------------------------------------------------------------------------------


def members(hint: object) -> set[object]:
    """Return the types of a union, without constraints."""
    if typing.get_origin(hint) is typing.Annotated:
        return members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return {each for member in typing.get_args(hint) for each in members(member)}
    return {hint}


def descriptions(settings: type) -> dict[str, str]:
    """Return the text under each field of a class of settings and of its bases."""
    found = {}
    for part in reversed(settings.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = text.value.value
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_arguments_are_the_settings(name):
    """Names, types and defaults are those of the settings, and so are descriptions, unless an argument takes more types."""
    settings, of_command = SETTINGS[name]
    function = getattr(reinforcepp, name)
    known = vars(inspect.getmodule(function)) | {"Dataset": datasets.Dataset} | vars(transformers)
    parameters = inspect.signature(function, eval_str=True, globals=known).parameters
    by_name = {field.name: field for field in fields(settings)}
    assert set(parameters) - OTHERS == set(by_name) - of_command
    hints, described = typing.get_type_hints(settings, include_extras=True), descriptions(settings)
    for argument in parameters.keys() - OTHERS:
        accepted, wanted = members(parameters[argument].annotation), members(hints[argument])
        if wanted == {tuple[str, ...]}:
            accepted, wanted = accepted - {typing.Sequence[str]}, set()
        assert wanted <= accepted, argument
        if argument not in OWN_DEFAULT:
            assert parameters[argument].default in (by_name[argument].default, inspect.Parameter.empty), argument
            if not accepted - wanted:
                assert f"{argument}: {described[argument]}.\n" in inspect.getdoc(function)


# --- documentation ----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## .*?: `(\w+)`\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
DOCSTRINGS = {name: inspect.getdoc(getattr(reinforcepp, name)) for name in SETTINGS}


def test_every_function_has_an_example():
    assert list(EXAMPLES) == list(SETTINGS)
    assert all(f"from reinforcepp import {name}\n" in text for name, text in EXAMPLES.items())
    assert all(f"[`{name}`](#" in PAGE for name in SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_example_of_the_page_runs(name, unchanged):
    with unchanged(printing=True):
        exec(EXAMPLES[name], {})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_example_of_the_docstring_runs(name, unchanged):
    example = doctest.DocTestParser().get_doctest(DOCSTRINGS[name], {}, name, None, None)
    assert example.examples
    with unchanged():
        assert doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example).failed == 0


# --- side effects -----------------------------------------------------------------------------------------------------


def surroundings() -> dict[str, object]:
    """Return everything of the process that a function must leave as it is."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("reinforcepp", "transformers", "trl"))]
    return {
        "folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "logging": [(each.level, list(each.handlers), each.disabled) for each in loggers],
        "verbosity": transformers.utils.logging.get_verbosity(),
        "bars": [transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()],
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def unchanged(tmp_path, monkeypatch, capfd):
    """``with unchanged():`` checks that a block prints nothing, writes no file, and changes no state of the process."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    @contextmanager
    def check(printing: bool = False):
        capfd.readouterr()
        before = surroundings()
        yield
        after = surroundings()
        assert [key for key in before if before[key] != after[key]] == []
        assert printing or capfd.readouterr() == ("", "")

    return check


def everywhere(function):
    """Return the results of ``function`` twice in a row, within a running event loop, and in another thread."""

    async def in_a_loop():
        return function()

    with ThreadPoolExecutor(1) as threads:
        return [function(), function(), asyncio.run(in_a_loop()), threads.submit(function).result()]


# --- lint -------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"What is word {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
ROWS[4] = {"prompt": [{"role": "user", "content": "Hi."}], "chosen": "Hello.", "rejected": "Hello."}


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_lint_of_rows_is_that_of_a_file(kind, tmp_path, unchanged):
    rows = [*ROWS[:4], *ROWS[5:]] if kind is not list else ROWS  # an Arrow column has one type
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with unchanged():
        given, *again = everywhere(lambda: lint(kind(rows)))
    assert again == [given] * 3
    of_file = lint(path)
    assert given.rows == tuple(row - 1 for row in of_file.rows)
    assert [(each.rule, each.severity) for each in given] == [(each.rule, each.severity) for each in of_file]
    assert len(given) == len(of_file) and given.worst == of_file.worst == ("error" if kind is list else "warning")
    assert given.counts == of_file.counts


def test_lint_writes_the_files_that_it_is_asked_for(tmp_path, unchanged):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with unchanged():
        report = lint(path, fix=tmp_path / "fixed.jsonl", output=tmp_path / "page.html", format="html")
    assert [(change.row, change.action) for change in report.changes] == [(5, "dropped")]
    assert lint(tmp_path / "fixed.jsonl").worst != "error"
    assert "<html" in (tmp_path / "page.html").read_text()


def test_lint_names_settings_as_python_has_them():
    with pytest.raises(ConfigError, match=r"^fix: data is data, not a single"):
        lint(ROWS, fix="fixed.jsonl")
    (finding,) = [
        each for each in lint([{"question": row["prompt"]} for row in ROWS[5:]]) if each.rule == "prompts-only"
    ]
    assert finding.fix == "If it has answers, name their columns with chosen_column and rejected_column"


def test_lint_prints_progress_only_if_asked(capsys, monkeypatch):
    monkeypatch.setattr("reinforcepp.commands.lint.rules.PROGRESS_ROWS", 1)
    for verbose in (False, True):
        lint(ROWS, verbose=verbose)
        assert ("searching near-duplicates" in capsys.readouterr().err) is verbose
