"""The package as a whole: what importing it loads, which way imports point, and its version."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import reinforcepp
from reinforcepp.runtime import process
from scripts import ROOT, benchmark

SOURCE = ROOT / "src" / "reinforcepp"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "matplotlib")

# A room imports only the rooms above it here, and itself.
ROOMS = [
    "runtime",
    "root",  # errors, types, files, locks, run_dir
    "algorithm",
    "config",
    "data",
    "models",
    "rewards",
    "distributed",
    "rollout",
    "environments",
    "monitoring",
    "reports",
    "labeling",
    "training",
    "planner",
    "commands",
    "face",  # __init__ and __main__
]
ROOT_FILES = ["errors", "types", "files", "locks", "run_dir"]

# Engines that these files alone may name.
ONLY_IN = {
    "vllm": {
        "rollout/vllm_integration.py",
        *(
            f"rollout/vllm/{part}.py"
            for part in ("compat", "cpu_patches", "lifecycle", "local_transfer", "nccl", "server", "worker_extension")
        ),
    },
    "accelerate": {"distributed/ranks.py", "distributed/backends.py", "distributed/deepspeed.py"},
    "deepspeed": {"distributed/deepspeed.py"},
    "ray": {"rollout/ray/actor_pool.py"},
}


# --- what importing loads ---------------------------------------------------------------------------------------------


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of the modules that ``python *arguments`` imports; it has to succeed."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return {m.split(".")[0] for m in re.findall(r"^import time:.*\|\s*([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import reinforcepp"),
        ("-c", "import reinforcepp.config"),
        ("-m", "reinforcepp", "--help"),
        ("-m", "reinforcepp", "train", "--help"),
        ("-m", "reinforcepp", "plan", "--help"),
        ("-m", "reinforcepp", "compare", "--help"),
        ("-m", "reinforcepp", "chat", "--help"),
        ("-m", "reinforcepp", "serve", "--help"),
        ("-m", "reinforcepp", "export", "--help"),
        ("-m", "reinforcepp", "push", "--help"),
        ("-m", "reinforcepp", "sft", "--help"),
        ("-m", "reinforcepp", "recipes"),
        ("-m", "reinforcepp", "lint", "builtin:network", "--fail_on", "never"),
    ],
    ids=" ".join,
)
def test_loads_nothing_heavy(arguments):
    loaded = loaded_by(*arguments)
    assert "reinforcepp" in loaded
    assert not loaded & set(HEAVY)


def test_processes_of_commands_import_no_code_of_the_current_folder():
    """The folder can be that of an untrusted model; a vLLM server has PYTHONSAFEPATH instead."""
    starts = re.compile(r"sys\.executable, (?!\"-P\")(?!\"-m\", MODULE, \*flags)")
    assert not [path for path in FILES if starts.search(path.read_text(encoding="utf-8"))]


def test_a_training_loads_what_it_needs():
    """Each of the others takes seconds at every start."""
    loaded = loaded_by("-c", "import reinforcepp.training.reinforce_trainer")
    assert loaded & {*HEAVY, "bitsandbytes", "deepspeed"} == {"torch", "transformers", "accelerate"}


# --- which way imports point ------------------------------------------------------------------------------------------


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements under ``node``, inside functions too, except under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield from statements(ast.Module([other], []))
        else:
            yield from statements(child)


def imports(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of what ``file`` imports; ``from a import b`` counts as ``a.b``, relative names are resolved."""
    package = ["reinforcepp", *Path(file).parent.parts]
    for statement in statements(tree):
        if isinstance(statement, ast.Import):
            yield from ((statement.lineno, alias.name) for alias in statement.names)
            continue
        base = package[: len(package) - statement.level + 1] if statement.level else []
        base += statement.module.split(".") if statement.module else []
        yield from ((statement.lineno, ".".join([*base, alias.name])) for alias in statement.names)


def room_of(module: str) -> str:
    """The room of a dotted module name below ``reinforcepp``."""
    first = module.split(".")[0]
    return first if first in ROOMS else "root" if first in ROOT_FILES else "face"


def dotted(file: str) -> str:
    """The module name below ``reinforcepp`` of a file; the package's own name for its ``__init__``."""
    return ".".join(Path(file).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {dotted(name): name for name in NAMES}


def imported_files(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and module (below ``reinforcepp``) of each file of this package that ``file`` imports."""
    for line, name in imports(ast.parse(source), file):
        top, _, module = name.partition(".")
        if top == "reinforcepp":
            while module not in MODULES:
                module = module.rpartition(".")[0]
            yield line, module


def misplaced(source: str, file: str) -> list[str]:
    """The imports of ``file`` from a room below its own, and its imports of a library that only other files may name."""
    room = room_of(dotted(file))
    found = []
    for line, name in imports(ast.parse(source), file):
        library = name.split(".")[0]
        if file not in ONLY_IN.get(library, {file}):
            found.append(f"{file}:{line} imports {library}, which only {sorted(ONLY_IN[library])} may")
    for line, module in imported_files(source, file):
        if ROOMS.index(room_of(module)) > ROOMS.index(room):
            found.append(f"{file}:{line} imports {module or 'reinforcepp'}, from a room below {room}")
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in graph.get(module, ()):
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def test_every_module_has_a_room():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS) - {"root", "face"}
    assert {path.stem for path in SOURCE.glob("*.py")} == {*ROOT_FILES, "__init__", "__main__"}


@pytest.mark.parametrize("file", NAMES)
def test_imports_point_up_the_table_of_rooms(file):
    assert misplaced((SOURCE / file).read_text(encoding="utf-8"), file) == []


def test_no_files_import_each_other():
    graph = {
        module: {other for _, other in imported_files((SOURCE / file).read_text(encoding="utf-8"), file)}
        for module, file in MODULES.items()
    }
    assert cycles(graph) == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": set()}, []),
        ({"a": {"a"}}, [["a"]]),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
    ],
)
def test_the_check_for_cycles_sees(graph, found):
    assert cycles(graph) == found


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("models/tokenization.py", "from reinforcepp.types import Prompt", 0),
        ("models/tokenization.py", "from reinforcepp.models.loading import resolve", 0),
        ("models/tokenization.py", "from reinforcepp.rewards import card", 1),
        ("models/tokenization.py", "import reinforcepp.rewards.card as m", 1),
        ("models/tokenization.py", "from reinforcepp import ReinforceConfig", 1),
        ("models/tokenization.py", "def f():\n    from reinforcepp.rewards.card import RewardCard", 1),
        ("models/tokenization.py", "if TYPE_CHECKING:\n    from reinforcepp.rewards.card import RewardCard", 0),
        ("errors.py", "from reinforcepp.algorithm import kl", 1),
        ("data/split.py", "from ._table import normalize", 0),
        ("data/split.py", "from ..errors import DataError", 0),
        ("data/split.py", "from ..models.loading import resolve", 1),
        ("models/loading.py", "import vllm", 1),
        ("models/loading.py", "from accelerate.utils import gather", 1),
        ("distributed/ranks.py", "from accelerate import Accelerator", 0),
        ("rollout/vllm_integration.py", "from vllm import LLM", 0),
        ("rollout/engine.py", "def f():\n    import vllm", 1),
    ],
)
def test_the_check_for_rooms_sees(file, source, count):
    assert len(misplaced(source, file)) == count


# --- shape and safety of the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", NAMES)
def test_no_file_is_long(file):
    assert len((SOURCE / file).read_text(encoding="utf-8").splitlines()) <= 600


def unsafe(source: str) -> list[str]:
    """What in ``source`` would run code out of a file that it loads."""
    tree = ast.parse(source)
    unpicklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
    found = [name for _, name in imports(tree, "x.py") if name.split(".")[0] in unpicklers]
    found += [name for _, name in imports(tree, "x.py") if name == "torch.load"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("weights_only") != "True":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", NAMES)
def test_nothing_is_unpickled(file):
    assert unsafe((SOURCE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("from torch import load", 1),
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, map_location='cpu', weights_only=True)", 0),
    ],
)
def test_the_check_for_unpickling_sees(source, count):
    assert len(unsafe(source)) == count


# --- versions ---------------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("versions", "hidden"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0"}, {"torchvision", "torchaudio"}),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, set()),
        ({"torch": "2.13.0", "torchvision": "0.28.0", "torchcodec": "0.17.0"}, set()),
        ({"torch": "2.13.0+cu130", "torchvision": "0.28.0"}, set()),
        ({"torch": "2.13.0+cpu"}, set()),
    ],
)
def test_packages_that_cannot_load_next_to_a_cpu_build_of_torch_are_hidden(versions, hidden, monkeypatch):
    modules = {}
    monkeypatch.setattr(process, "versions_of", lambda names: {n: versions[n] for n in names if n in versions})
    monkeypatch.setattr(process.sys, "modules", modules)
    process.hide_unloadable_packages()
    assert modules == dict.fromkeys(hidden)


def test_the_version_has_one_source():
    if hasattr(reinforcepp, "__version__"):
        assert reinforcepp.__version__ == PROJECT["version"]


def test_the_package_says_it_is_typed():
    assert (SOURCE / "py.typed").is_file()


def test_the_commands_of_result_files_name_no_path_of_the_machine_that_made_them():
    files = list((ROOT / "benchmarks/results").glob("*.json"))
    assert [path.name for path in files if re.search(r'"command": ".* /', path.read_text(encoding="utf-8"))] == []
    assert len(files) > 20


def test_the_tables_of_the_readme_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as end:
        benchmark("tables").main()
    assert end.value.code == 0
