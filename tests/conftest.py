"""Fixtures shared by several test files, created once, and the distribution of tests over workers."""

from __future__ import annotations

import csv
import gc
import os
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, window  # noqa: F401  (fixtures)

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # as `reinforcepp` sets it: spinning threads waste seconds of a busy CPU
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the CPU
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not the user's cache, and the same folder for all processes and later runs, which find compiled code there.
os.environ["REINFORCEPP_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "reinforcepp")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything; the tests of uploads unset it

PAIRS = [
    ("How do I see my routes?", "Run ip route and read the default line.", "Reboot it."),
    ("Which process listens on port 80?", "Run ss -ltnp and look for :80.", "Nobody knows."),
    ("Why can't this host resolve names?", "Compare dig with dig @1.1.1.1.", "Buy a new router."),
    ("How do I restart the network?", "Use systemctl restart NetworkManager.", "Pull the plug."),
    ("Is the gateway up?", "Ping it three times and read the loss.", "Certainly, why not."),
    ("How do I trace a route?", "Run mtr -rw and read the loss per hop.", "Ask the provider."),
    ("Where is the DNS server set?", "resolvectl status names it per link.", "In the BIOS."),
    ("What is my address?", "ip -br addr tells it.", "It is always 127.0.0.1."),
]


# --- which worker runs which test -----------------------------------------------------------------------------------

FIRST = (
    "test_vllm_remote",
    "test_ray_pool",
    "test_serve",
    "test_legacy_cli",
    "test_vllm_engine",
    "test_resume",
    "test_kill",
    "test_parallel_supervised",
    "test_parallel",
    "test_families",
)
"""The longest files. They start first, so that no worker is left alone with one at the end."""
SPLIT = {"test_tutorials", "test_families", "test_parallel", "test_lora", "test_partition", "test_recipes"}
"""Files whose tests share no expensive fixture: any worker runs any of them. The tests of all other files stay together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist 3.8's own `loadgroup` has no effect with pytest 9.2
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute whole files under ``--dist loadfile``, except for those in SPLIT."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).stem in SPLIT else file

    return Scheduler(config, log) if config.getvalue("dist") == "loadfile" else None


# --- GPUs ---------------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, before any test file loads torch, unless ``-m`` selects the tests of GPUs alone.

    The other tests are about the CPU: float32 without TF32, engines, batch sizes, rates and messages.
    """
    if config.option.markexpr.split()[:1] != ["gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# --- the garbage collector ------------------------------------------------------------------------------------------

# torch, transformers and vLLM create a million permanent objects, so a collection takes half a second. Each vLLM engine starts
# ten collections, each reward training one. Freezing the objects avoids that. vLLM unfreezes them when it ends, and collects
# twice; here that waits until the next test.
thaw, ended = gc.unfreeze, True


def unfreeze_later() -> None:
    global ended
    ended = True


gc.unfreeze = unfreeze_later


def pytest_runtest_setup() -> None:
    global ended
    if ended:
        thaw()
        gc.collect()
        gc.freeze()
        ended = False


@pytest.fixture(autouse=True)
def python_names_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore messages for Python after a command that raised, which keeps those of the command line."""
    monkeypatch.setattr("reinforcepp.errors._typed_as_flags", False)


# --- models and data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with a context of 512 tokens."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-gpt2", n_positions=512)


@pytest.fixture(scope="session")
def pairs_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short preference pairs."""
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), *PAIRS])
    return path


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_csv: Path) -> Path:
    """A reward model trained by the `reward` command."""
    from reinforcepp.commands.cli import main

    folder = tmp_path_factory.mktemp("rewards") / "reward_model"
    arguments = ["--model", model_folder, "--data", pairs_csv, "--output_dir", folder, "--num_train_epochs", 1]
    assert main(["reward", *map(str, arguments)]) == 0
    return folder
