"""Do 1, 2 and 3 processes train alike? The same run under each engine, on CPUs with gloo, against one process.

python benchmarks/equality.py [--small]

With --small, DDP and FSDP2 on two processes are compared with DDP on one. Each scenario is a training of five steps
in float32. Every second batch holds a single prompt, so that the other processes have no row, and the others don't
divide by three. A scenario that goes on starts after two steps from what two processes saved: two under FSDP2 and
under ZeRO 3 from a checkpoint of DDP, three under DDP from one of FSDP2 and under ZeRO 2 from one of ZeRO 3, the
others from one of their own kind. All are compared with one process that knows of no launcher and was never stopped.

``max_advantage_gap`` is to what one process makes of the very same batch; ``max_advantage_gap_of_run`` is to the other
run's, whose log-probabilities are rounded otherwise, because other rows went through the model beside them.
Written to benchmarks/results/equality.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
import time
from math import inf
from pathlib import Path
from typing import Any

import torch
from results import write_result
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcepp import ReinforceConfig, ReinforceTrainer  # loaded here, once, for all the forks
from reinforcepp.files import write_json
from reinforcepp.models.loading import load_tokenizer, weights_hash
from reinforcepp.models.saving import save_model
from reinforcepp.training.batches import UpdateBatch, batch_advantages

PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(5)]
HELD_OUT = [{"prompt": f"Why does router {i} drop packets?"} for i in range(2)]
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 12,
    "num_generations": 2,
    "max_prompt_length": 40,
    "batch_size": 4,
    "max_steps": 5,
    "learning_rate": 1e-4,
    "seed": 5,
    "rollout": "transformers",
    "eval_prompts": 2,
    "eval_every": 2,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "one step per batch": {"micro_batch_size": 1, "save_every": 2, "keep_last": 9},
    "several steps per batch": {
        "estimator": "reinforce_plus_plus_baseline",
        "num_generations": 3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    },
    "critic": {
        "estimator": "ppo",
        "micro_batch_size": 2,
        "critic_learning_rate": 1e-4,
        "save_every": 2,
        "keep_last": 9,
    },
    "ahead of time": {"staleness": 1, "micro_batch_size": 2, "num_iterations": 2, "save_every": 2, "keep_last": 9},
    "episodes": {
        "estimator": "reinforce_plus_plus_baseline",
        "max_new_tokens": 70,
        "micro_batch_size": 2,
        "max_turns": 3,
    },
    "not scored": {"micro_batch_size": 2, "max_skipped_updates": 9, "eval_prompts": 0},
}
ORIGIN = {"goes on": "one step per batch", "critic goes on": "critic", "ahead goes on": "ahead of time"}
GAPS = ("max_advantage_gap", "max_advantage_gap_of_run", "max_weight_gap", "max_metric_gap")
EPISODES = "episodes"
SEEN = "seen.json"
SOURCE = {("FSDP2", 2): "DDP:2", ("ZeRO 3", 2): "DDP:2", ("DDP", 3): "FSDP2:2", ("ZeRO 2", 3): "ZeRO 3:2"}
BACKENDS: dict[str, dict[str, str]] = {  # what `accelerate launch` sets for each
    "DDP": {},
    "FSDP2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "ZeRO 2": {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    },
    "ZeRO 3": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
SMALL = {2: ["DDP", "FSDP2"], 1: ["DDP"]}
if importlib.util.find_spec("deepspeed") is None:
    BACKENDS = {name: said for name, said in BACKENDS.items() if "ZeRO" not in name}
else:
    importlib.import_module("deepspeed.runtime.zero.utils")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # it loads the compiler, as every start would
LAUNCHES = {processes: list(BACKENDS) for processes in (2, 1, 3)}  # two leave checkpoints for the others to resume
REFERENCE = "DDP:1"


def spread(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs from row to row."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def fussy(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """One that leaves some rows out, and once says what no update can be made from."""
    scores: list[float | None] = [None if sum(ids) % 3 == 0 else sum(ids) % 7 / 7 for ids in completion_ids]
    return [float("nan") if sum(ids) % 11 == 0 else s for s, ids in zip(scores, completion_ids, strict=True)]


def make_model(folder: Path) -> str:
    """A model with random weights wide enough for choices that aren't near-ties, and with the built-in tokenizer."""
    tokenizer = load_tokenizer("builtin:tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    save_model(model, tokenizer, folder)
    ends = [tokenizer.eos_token_id, *range(0, len(tokenizer), 3)]  # for episodes, a message ends after a few tokens
    model.generation_config.eos_token_id = ends
    save_model(model, tokenizer, folder.with_name(EPISODES))
    return str(folder)


class Counting:
    """An environment that ends with the row's number of turns, and rewards a message by its length."""

    def reset(self, row: dict[str, Any]) -> None:
        """Begin with the row's own prompt."""
        self.left = len(row["prompt"]) % 2 + 2

    def step(self, message: dict[str, str]) -> tuple[str, float, bool]:
        """Answer with the length of the message."""
        self.left -= 1
        return f"No, {len(message['content'])}.", len(message["content"]) % 5 / 5, self.left == 0


# --- in each process ------------------------------------------------------------------------------------------------


def work(model: str, folder: Path, processes: int, backends: list[str]) -> None:
    """All scenarios under each backend; the main process leaves what it saw in ``folder``."""
    for backend in backends:
        if backend != "DDP":
            launched_as(backend)
        own = folder / f"{backend}:{processes}"
        for name, settings in SCENARIOS.items():
            train(model, own / name, settings)
        if (backend, processes) == ("DDP", 2):
            continue
        source = folder / SOURCE.get((backend, processes), f"{backend}:2")
        for name, origin in ORIGIN.items():
            checkpoint = source / origin / "checkpoints" / "step-000002"
            train(model, own / name, SCENARIOS[origin] | {"resume": str(checkpoint)})


def leave_some_out(guard: Any) -> None:
    """Every third update, when its gradients are there."""
    check, calls = guard.check_update, itertools.count()

    def refuse(*found: Any) -> None:
        check(*found)
        if next(calls) % 3 == 1:
            from reinforcepp.errors import UnusableUpdate

            raise UnusableUpdate("it was told to be left out")

    guard.check_update = refuse


def launched_as(backend: str) -> None:
    """From now on; a process that is alone also lacks what torchrun sets."""
    from accelerate.state import AcceleratorState

    os.environ.update(BACKENDS[backend])
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place})
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model: str, folder: Path, settings: dict[str, Any]) -> None:
    """One training; its advantages go to a file beside its model."""
    args = ReinforceConfig(output_dir=str(folder), **(SETTINGS | settings))
    reward = fussy if folder.name == "not scored" else spread
    environment = Counting if folder.name == EPISODES else None
    if environment is not None:
        model = str(Path(model).with_name(EPISODES))
    trainer = ReinforceTrainer(model, reward, args, PROMPTS, HELD_OUT, environment=environment)
    assert trainer.ranks.sharded == (folder.parent.name[:3] != "DDP")
    assert trainer.ranks.uses_deepspeed == (folder.parent.name[:4] == "ZeRO")
    run, on_policy, seen = trainer.update.run, trainer.update.on_policy, []

    def recorded(used: UpdateBatch, step: int, kl_coef: float) -> dict[str, float]:
        """Compare the advantages with those that one rank computes from the whole batch."""
        whole_BT, _ = batch_advantages(used.rollout, args, kl_coef, on_policy=on_policy, values_BT=used.values_BT)
        answers = [c.ids for c in used.rollout.completions]
        rows = zip(used.advantages_BT.tolist(), answers, strict=True)
        gap = float((used.advantages_BT - whole_BT).abs().max())
        seen.append({"ids": answers, "advantages": [row[: len(ids)] for row, ids in rows], "gap": gap})
        return run(used, step, kl_coef)

    trainer.update.run = recorded  # type: ignore[method-assign]
    if folder.name == "not scored":
        leave_some_out(trainer.update.guardrails)
    trainer.train()
    hashes = trainer.ranks.gather(weights_hash(trainer.policy))
    assert len(set(hashes)) == 1, "the processes hold different weights"
    if trainer.ranks.is_main:
        (folder / SEEN).write_text(json.dumps(seen))


# --- beside them ----------------------------------------------------------------------------------------------------


def launch(processes: int, model: str, folder: Path, backends: list[str]) -> None:
    """Run :func:`work` in so many processes, forks that needn't load anything again; one is told of no others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = folder / f"log-{processes}-{rank}"
        started.append(
            context.Process(
                target=placed, args=(log, place if processes > 1 else {}, model, folder, processes, backends)
            )
        )
        started[-1].start()
    end = time.monotonic() + 600
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    if any(process.exitcode for process in started):
        told = "\n".join((folder / f"log-{processes}-{rank}").read_text()[-10000:] for rank in range(processes))
        raise SystemExit(f"{processes} processes failed:\n{told}")


def placed(log: Path, place: dict[str, Any], *arguments: Any) -> None:
    """:func:`work` with what a launcher would set, printing to ``log``."""
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in place.items()})
    work(*arguments)


def compared(folder: Path, reference: Path) -> dict[str, Any]:
    """Largest differences between a training and the one that it should equal, over the steps that it has made."""
    own, other = (json.loads((path / SEEN).read_text()) for path in (folder, reference))
    steps, pairs = len(own), list(zip(own, other[-len(own) :], strict=True))
    if any(one["ids"] != two["ids"] for one, two in pairs):
        return {"steps": steps, "same_samples": False}
    run_gaps = [
        abs(a - b)
        for one, two in pairs
        for rows in zip(one["advantages"], two["advantages"], strict=True)
        for a, b in zip(*rows, strict=True)
    ]
    one, two = (load_file(path / "model.safetensors") for path in (folder, reference))
    return {
        "steps": steps,
        "same_samples": True,
        "max_advantage_gap": max(step["gap"] for step in own),
        "max_advantage_gap_of_run": max(run_gaps),
        "max_weight_gap": max(float((one[name] - two[name]).abs().max()) for name in two),
        "max_metric_gap": max(metric_gaps(folder, reference)),
    }


def metric_gaps(folder: Path, reference: Path) -> list[float]:
    """Differences of what two trainings logged, steps and held-out figures; infinite where one lacks a figure."""
    rows = []
    for path in (folder, reference):
        held_out = path / "evaluation.json"
        evaluations = json.loads(held_out.read_text()) if held_out.is_file() else {}
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows.append([*map(json.loads, lines), *evaluations.values()])
    gaps = []
    for one, two in zip(*rows, strict=True):
        gaps += [abs(one.get(name, inf) - two.get(name, inf)) for name in one.keys() | two.keys()]
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write there instead of benchmarks/results/equality.json")
    parser.add_argument("--small", action="store_true", help="DDP and FSDP2 on two processes only")
    arguments = parser.parse_args()
    launches = SMALL if arguments.small else LAUNCHES
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder / "model")
        gc.freeze()  # DeepSpeed collects garbage whenever it begins, and what is here so far is none
        for processes, backends in launches.items():
            print(f"{processes} processes", flush=True)
            launch(processes, model, folder, backends)
        rows = [
            row(folder, name, number) for name in BACKENDS for number in sorted(launches) if name in launches[number]
        ]
    result = {"learning_rate": SETTINGS["learning_rate"], "steps": SETTINGS["max_steps"], "rows": rows}
    if arguments.output:
        write_json(Path(arguments.output), result)
    else:
        write_result("equality", result)


def row(folder: Path, backend: str, processes: int) -> dict[str, Any]:
    """What became of one number of processes, and the largest gaps over its scenarios."""
    own = folder / f"{backend}:{processes}"
    scenarios = {
        name: compared(own / name, folder / REFERENCE / ORIGIN.get(name, name))
        for name in (*SCENARIOS, *ORIGIN)
        if (own / name).is_dir()
    }
    largest = {gap: max(found.get(gap, inf) for found in scenarios.values()) for gap in GAPS}
    return {"backend": backend, "processes": processes, **largest, "scenarios": scenarios}


if __name__ == "__main__":
    main()
