"""Fixtures that several test files share: tiny model folders and a small preference file, each made once."""

from __future__ import annotations

import csv
import gc
import os
from pathlib import Path

import pytest
from browser import chromium, window  # noqa: F401  (fixtures)

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command does: idle threads on a busy machine cost seconds
if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything; the ones about the hub switch this off

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
    "test_parallel_supervised",
    "test_parallel",
    "test_trainings",
    "test_families",
)
"""Files whose tests share an expensive fixture, and so stay in one worker. They start first, so that none is left at the end."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module that has fixtures of its own together; distribute all other tests one by one."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if any(found.scope in ("module", "class") for fixtures in definitions for found in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


# --- the garbage collector ------------------------------------------------------------------------------------------

# torch, transformers and vLLM make a million objects that stay: a collection that looks at them takes half a second, and
# each vLLM engine that starts and ends makes eight, each reward model's training one. So they are frozen. vLLM thaws all.
thaw, thawed = gc.unfreeze, True


def unfreeze() -> None:
    global thawed
    thawed = True
    thaw()


gc.unfreeze = unfreeze


def pytest_runtest_setup() -> None:
    global thawed
    if thawed:
        gc.freeze()
        thawed = False


# --- what tests work on ---------------------------------------------------------------------------------------------


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
    """A reward model that the reward verb has written."""
    from reinforcepp.commands.cli import main

    folder = tmp_path_factory.mktemp("rewards") / "reward_model"
    arguments = ["--model", model_folder, "--data", pairs_csv, "--output_dir", folder, "--num_train_epochs", 1]
    assert main(["reward", *map(str, arguments)]) == 0
    return folder
