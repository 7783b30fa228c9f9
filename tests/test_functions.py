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
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import UnionType

import datasets
import numpy as np
import pytest
import torch
import transformers
from made_runs import make_run

import reinforcepp
from reinforcepp import ReinforceConfig, compare, export, generate, lint, plan, report, sft
from reinforcepp.commands import cli
from reinforcepp.config import (
    CompareConfig,
    ExportConfig,
    GenerateConfig,
    LintConfig,
    PlanConfig,
    ReportConfig,
    SftConfig,
    TrainConfig,
)
from reinforcepp.errors import ConfigError, DataError, ModelError
from reinforcepp.models.loading import load_policy, load_tokenizer, weights_hash
from reinforcepp.models.lora import with_adapter
from reinforcepp.planner.command import make_plan
from scripts import ROOT

SETTINGS = {
    "generate": (GenerateConfig, {"prompt", "prompts_file"}),
    "compare": (CompareConfig, {"output_dir", "overwrite"}),
    "lint": (LintConfig, {"fail_on"}),
    "plan": (PlanConfig, {field.name for field in fields(TrainConfig)} - {"model", "judge"} | {"format"}),
    "report": (ReportConfig, set()),
    "export": (ExportConfig, set()),
}
"""Functions with the class of their settings, and the settings that are the command's alone."""
OTHERS = {"verbose", "prompts", "processing_class", "reward_funcs", "args"}
"""Arguments that aren't settings."""
OWN_DEFAULT = {"output", "judge"}
"""Settings with another default: a function writes no file unless asked, and plans no judge."""
EXAMPLES_OF = [*SETTINGS, "sft"]
"""Functions with an example; those of trainings take the settings as one object."""
OUTPUTS = {"compare": ["compare.html"], "sft": ["tuned"], "report": ["report.html"], "export": ["exported"]}
"""Files that the examples write."""


TYPES = {
    "Dataset": datasets.Dataset,
    "PreTrainedModel": transformers.PreTrainedModel,
    "PreTrainedTokenizerBase": transformers.PreTrainedTokenizerBase,
}
"""Types that the modules import for type checkers only."""


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
    known = vars(inspect.getmodule(function)) | TYPES
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
                assert f"{argument}: {described[argument]}." in inspect.getdoc(function)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """vLLM takes ten seconds to start and prints; tests/rollout has its tests."""
    monkeypatch.setattr("reinforcepp.rollout.vllm.compat.vllm_status", lambda *_: (False, "vLLM isn't installed"))


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory):
    """Load what functions load, because libraries print and set variables when they are imported."""
    import_module("reinforcepp.training.supervised_loop")
    export("builtin:tiny", tmp_path_factory.mktemp("models") / "exported")


# --- documentation ----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## .*?: `(\w+)`\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
DOCSTRINGS = {name: inspect.getdoc(getattr(reinforcepp, name)) for name in EXAMPLES_OF}


def test_every_function_has_an_example():
    assert set(EXAMPLES) == set(EXAMPLES_OF)
    assert all(
        re.search(rf"^from reinforcepp import .*\b{name}$", text, re.MULTILINE) for name, text in EXAMPLES.items()
    )
    assert all(f"[`{name}`](#" in PAGE for name in EXAMPLES_OF)


@pytest.mark.parametrize("name", EXAMPLES_OF)
def test_the_example_of_the_page_runs(name, unchanged):
    make_run(Path("runs/train"))
    with unchanged(printing=True, writes=OUTPUTS.get(name, ())):
        exec(EXAMPLES[name], {})


@pytest.mark.parametrize("name", EXAMPLES_OF)
def test_the_example_of_the_docstring_runs(name, unchanged):
    example = doctest.DocTestParser().get_doctest(DOCSTRINGS[name], {}, name, None, None)
    assert example.examples
    make_run(Path("runs/train"))
    with unchanged(printing=name == "sft", writes=set(OUTPUTS.get(name, ())) - {"report.html", "compare.html"}):
        assert doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example).failed == 0


# --- side effects -----------------------------------------------------------------------------------------------------


def surroundings() -> dict[str, object]:
    """Return everything of the process that a function must leave as it is."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("reinforcepp", "transformers", "trl"))]
    return {
        "folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "environment": {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"},  # DeepSpeed sets it once
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
    def check(printing: bool = False, writes=()):
        capfd.readouterr()
        before = surroundings()
        yield
        after = surroundings()
        before["files"] = sorted([*before["files"], *writes])
        assert [key for key in before if before[key] != after[key]] == []
        assert printing or capfd.readouterr() == ("", "")

    return check


def everywhere(function):
    """Return the results of ``function`` here, in another thread, within a running event loop, and again in that thread."""

    async def in_a_loop():
        return function()

    with ThreadPoolExecutor(1) as threads:
        calls = (function, lambda: asyncio.run(in_a_loop()), function)
        # The loop has a thread of its own, because the tests in a browser leave a loop in this one.
        return [function(), *(threads.submit(call).result() for call in calls)]


def untouched(model) -> list[object]:
    """Return everything of a loaded model that a function must leave as it is."""
    modes = [(name, module.training, type(module).forward) for name, module in model.named_modules()]
    weights = [(name, w.dtype, w.device, w.requires_grad, w.data_ptr()) for name, w in model.named_parameters()]
    return [modes, weights, model.config.to_dict(), model.generation_config.to_dict(), weights_hash(model)]


# --- generate ---------------------------------------------------------------------------------------------------------

SIZES = {"max_new_tokens": 6}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is DNS?"}]


def test_generate_of_a_name_and_of_a_loaded_model(model_folder, unchanged):
    model, tokenizer = load_policy(str(model_folder)), load_tokenizer(str(model_folder))
    prompts = ["What is DNS?", "Why?"]
    with unchanged():
        by_name = generate(model_folder, prompts, **SIZES, num_samples=2)
    model.train()
    model.transformer.h[0].eval()  # as a frozen part
    tokenizer.padding_side, before = "right", untouched(model)
    with unchanged():
        loaded, *again = everywhere(
            lambda: generate(model, prompts, processing_class=tokenizer, num_samples=2, **SIZES)
        )
    assert untouched(model) == before and tokenizer.padding_side == "right"
    assert loaded == by_name and again == [loaded] * 3
    assert [each.prompt.text for each in loaded] == ["What is DNS?"] * 2 + ["Why?"] * 2
    assert generate(model, prompts, num_samples=2, **SIZES) == loaded  # the tokenizer of the model's folder


def test_generate_takes_every_form_of_prompts(model_folder, tmp_path):
    rows = [{"prompt": "Why?"}, {"prompt": CHAT}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = [rows, iter(["Why?", CHAT]), datasets.Dataset.from_list([{"prompt": "Why?"}]), tmp_path / "prompts.jsonl"]
    first, *others = [generate(model_folder, form, **SIZES) for form in [*forms, "Why?"]]
    assert [response.prompt.conversation for response in first] == ["Why?", tuple(CHAT)]
    for responses in others:
        assert len(responses) in (1, 2)
        assert [response.ids for response in responses] == [response.ids for response in first[: len(responses)]]
    (chat,) = generate(model_folder, CHAT, **SIZES)
    assert chat.prompt.messages == tuple(CHAT)
    assert chat.record()["completion"] == [{"role": "assistant", "content": chat.text}]
    assert generate(model_folder, []) == []


def test_generate_scores_with_a_function_or_a_reward_model(model_folder, reward_folder, tmp_path):
    def odd(completions, level, **_):
        return [None if n else float(len(text)) for text, n in zip(completions, level, strict=True)]

    rows = [{"prompt": "Why?", "level": 0}, {"prompt": "How?", "level": 1}]
    every = generate(model_folder, rows, num_samples=3, reward_model=odd, temperature=1, **SIZES)
    best = generate(model_folder, rows, best_of=3, reward_model=odd, temperature=1, **SIZES)
    assert [each.reward for each in every] == [*(float(len(each.text)) for each in every[:3]), None, None, None]
    assert best == [max(every[:3], key=lambda each: each.reward), every[3]]
    by_folder = generate(model_folder, rows, reward_model=reward_folder, output=tmp_path / "a.jsonl", **SIZES)
    loaded = reinforcepp.load_reward_model(reward_folder)
    assert by_folder == generate(model_folder, rows, reward_model=loaded, **SIZES)
    assert list(map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())) == [
        each.record() for each in by_folder
    ]
    assert by_folder[0].record()["reward"] == by_folder[0].reward


def test_generate_warns_about_truncated_prompts(model_folder):
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer than 16 tokens"):
        generate(model_folder, "why " * 50, max_prompt_length=16, **SIZES)


@pytest.mark.parametrize(
    ("model", "prompts", "settings", "error", "message"),
    [
        (None, "Why?", {}, ConfigError, "model: NoneType isn't a model. Give a name, a folder, or a loaded"),
        ("./none", "Why?", {}, ModelError, "./none: model folder not found"),
        ("builtin:tiny", 3, {}, ConfigError, "prompts: 3 isn't a dataset"),
        ("builtin:tiny", ["Why?", ""], {}, DataError, "prompts:1: no text in the column 'prompt'"),
        ("builtin:tiny", ["Why?", 3], {}, DataError, "prompts:1: no text in the column 'prompt'"),
        ("builtin:tiny", "Why?", {"temperature": -1}, ConfigError, "temperature must be at least 0"),
        ("builtin:tiny", "Why?", {"best_of": 3}, ConfigError, "best_of needs a reward model"),
        ("builtin:tiny", "Why?", {"reward_model": "./none"}, ModelError, "reward model folder not found"),
        ("builtin:tiny", "Why?", {"max_new_tokens": 10**6}, ConfigError, "leaves no room for a prompt"),
    ],
)
def test_generate_names_the_wrong_argument(model, prompts, settings, error, message):
    with pytest.raises(error, match=message):
        generate(model, prompts, **settings)


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


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_plan_is_that_of_the_command(unchanged, reward_folder):
    args = ReinforceConfig(batch_size=4, max_new_tokens=32, estimator="ppo", use_peft=True)
    with unchanged():
        first, *again = everywhere(lambda: plan("builtin:tiny", reward_folder, args, device="h100", gpus=2))
    settings = {field.name: getattr(args, field.name) for field in fields(args)}
    of_command = make_plan(PlanConfig(**settings, reward_model=str(reward_folder), judge="none", device="h100", gpus=2))
    for estimate in (first, *again):
        assert (estimate.phases, estimate.seconds) == (of_command.phases, of_command.seconds)
        assert str(estimate) == "\n".join(line.rstrip() for line in str(of_command).splitlines())
    assert first.peak_memory == max(sum(parts.values()) for parts in first.phases.values())
    assert first.seconds_per_step == sum(first.seconds.values()) and first.fits
    assert "policy" in first.table and first.table.strip() in str(first)


def test_plan_counts_the_rewards_of_a_trainer(reward_folder):
    def short(completions, **columns):
        return [0.0] * len(completions)

    alone, with_function, with_model = (
        plan("builtin:tiny", rewards, device="h100") for rewards in (None, short, [short, str(reward_folder)])
    )
    assert alone.peak_memory == with_function.peak_memory < with_model.peak_memory
    assert "Memory and time of short aren't included." in with_function.notes
    assert alone.job.reward.parameters == 0 < with_model.job.reward.parameters


def test_a_plan_that_does_not_fit_names_settings_as_python_has_them():
    args = ReinforceConfig(batch_size=64, num_generations=8, estimator="grpo", max_new_tokens=200, micro_batch_size=64)
    estimate = plan("builtin:tiny", None, args, device="h100", gpu_memory=2.0)
    assert not estimate.fits
    assert re.search(r"It fits with micro_batch_size=\d+", str(estimate))


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_returns_the_page_that_the_command_writes(tmp_path, unchanged, reward_folder):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    with unchanged():
        page, *again = everywhere(lambda: report(runs[0]))
        both, of_model = report([str(run) for run in runs]), report(reward_folder)
    assert again == [page] * 3
    assert cli.main(["report", str(runs[0])]) == 0
    assert page.save(tmp_path / "page.html").read_bytes() == (runs[0] / "report.html").read_bytes()
    assert list(both.verdicts) == ["one", "two"] and both.verdicts["one"] == page.verdicts["one"]
    assert next(iter(of_model.verdicts.values())).startswith("Inconclusive")
    assert page._repr_html_().count("<") == 2  # one frame, which holds the page as an attribute


def test_report_writes_only_over_a_report(tmp_path):
    run, taken = make_run(tmp_path / "run"), tmp_path / "notes.html"
    taken.write_text("notes")
    for write in (lambda: report(run, taken), lambda: report(run).save(taken)):
        with pytest.raises(ConfigError, match=r"isn't a report\. Choose another output"):
            write()
    assert report(run, tmp_path / "page.html").html == (tmp_path / "page.html").read_text()
    assert taken.read_text() == "notes"


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("adapter", [False, True])
def test_export_of_a_loaded_model(dtype, wanted, adapter, model_folder, tmp_path, unchanged):
    model, tokenizer = load_policy(str(model_folder)), load_tokenizer(str(model_folder))
    if adapter:
        model = with_adapter(model, SftConfig(use_peft=True), seed=0)
        torch.nn.init.normal_(
            dict(model.named_parameters())["base_model.model.transformer.h.0.attn.c_attn.lora_B.default.weight"]
        )
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    before = untouched(model)
    with unchanged():
        folders = everywhere(
            lambda: export(
                model, tmp_path / str(len(list(tmp_path.iterdir()))), processing_class=tokenizer, dtype=dtype
            )
        )
    assert untouched(model) == before
    exported = transformers.AutoModelForCausalLM.from_pretrained(folders[-1])
    assert exported.dtype == wanted
    with torch.no_grad():
        assert torch.allclose(
            exported.float()(ids).logits, model.eval()(ids).logits, atol=1e-4 if dtype == "auto" else 0.1
        )
    assert transformers.AutoTokenizer.from_pretrained(folders[0]).eos_token == tokenizer.eos_token
    assert "No record of its training was found" in (folders[0] / "README.md").read_text()
    with pytest.raises(ConfigError, match="isn't empty"):
        export(model, folders[0])


def test_export_of_an_adapter_alone(model_folder, tmp_path):
    model = with_adapter(load_policy(str(model_folder)), SftConfig(use_peft=True), seed=0)
    folder = export(model, tmp_path / "adapter", merge=False)
    assert {path.suffix for path in folder.glob("*model*")} == {".safetensors"}
    assert (folder / "adapter_config.json").is_file()
    assert generate(folder, "Why?", **SIZES)[0].ids == generate(model, "Why?", **SIZES)[0].ids


def test_export_of_a_folder_is_that_of_the_command(model_folder, tmp_path, unchanged):
    with unchanged():
        folder = export(model_folder, tmp_path / "ours")
    assert cli.main(["export", str(model_folder), "--output_dir", str(tmp_path / "theirs")]) == 0
    for path in folder.iterdir():
        assert path.name == "README.md" or path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes()
    with pytest.raises(ModelError, match="model folder not found"):
        export("./none", tmp_path / "none")


# --- sft --------------------------------------------------------------------------------------------------------------


def test_sft_of_a_loaded_model_and_rows_is_that_of_files(model_folder, tmp_path, unchanged):
    rows = [{"prompt": f"What is word {i}?", "completion": f"good {i}"} for i in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    settings = {"num_train_epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    model = load_policy(str(model_folder))
    with unchanged(printing=True):
        args = SftConfig(output_dir=str(tmp_path / "ours"), **settings)
        result = sft(args, model, datasets.Dataset.from_list(rows[:4]), rows[4:], load_tokenizer(str(model_folder)))
    by_file = SftConfig(
        model=str(model_folder),
        data=str(tmp_path / "train.jsonl"),
        output_dir=str(tmp_path / "files"),
        heldout_fraction=0.0,
        **settings,
    )
    assert weights_hash(sft(by_file).model) == weights_hash(result.model) == weights_hash(model)
    assert result.model is model and not model.training and result.after.rows == 2
    assert result.after.loss < result.before.loss and result.metrics["eval_loss"] == result.after.loss
    assert weights_hash(load_policy(str(tmp_path / "ours"))) == weights_hash(model)
    assert generate(result.model, "What is word 1?", processing_class=result.tokenizer, **SIZES)
    finished = sft(replace(args, resume=True), model_folder, rows[:4], rows[4:])
    assert weights_hash(finished.model) == weights_hash(model) and finished.metrics == result.metrics


def test_sft_names_the_wrong_argument(tmp_path):
    with pytest.raises(ConfigError, match="eval_dataset: only supported with train_dataset"):
        sft(eval_dataset=[{"text": "x"}])
    with pytest.raises(DataError, match="train_dataset: no rows"):
        sft(train_dataset=[])


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_of_names_files_and_loaded_models(model_folder, reward_folder, tmp_path, unchanged):
    rows = [{"prompt": f"What is word {i}?", "level": i} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = load_policy(str(model_folder))
    torch.nn.init.normal_(other.lm_head.weight, generator=torch.Generator().manual_seed(3))
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(str(model_folder)).save_pretrained(tmp_path / "other")
    settings = {"max_new_tokens": 5, "bootstrap_samples": 100}
    by_name = compare(
        model_folder,
        tmp_path / "other",
        tmp_path / "prompts.jsonl",
        judge=reward_folder,
        heldout_fraction=0,
        **settings,
    )
    model, other = load_policy(str(model_folder)).train(), load_policy(str(tmp_path / "other"))
    before = untouched(model)
    with unchanged():
        result, *again = everywhere(lambda: compare(model, other, rows, judge=reward_folder, **settings))
    assert untouched(model) == before
    assert result.pairs == by_name.pairs and result.outcome == by_name.outcome and result.kl == by_name.kl
    assert again == [result] * 3 and len(result.pairs) == 8
    assert result.win_rate.low <= result.win_rate.value <= result.win_rate.high and result.kl["B"] > 0
    assert "<html" in result.save(tmp_path / "page.html").read_text()

    def level(completions, level, **_):
        return [float(n) for n in level]

    assert compare(model, other, rows, judge=level, **settings).winner is None
    with pytest.raises(ConfigError, match="judge: missing, and data has no built-in judge"):
        compare(model, other, rows)
