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


LONG = (
    "test_trainings",
    "test_parallel",
    "test_families",
    "test_tutorials",
    "test_partition",
    "test_ray_pool",
    "test_vllm_remote",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, or at the end one process would work alone."""
    items.sort(key=lambda item: item.path.stem not in LONG)


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
