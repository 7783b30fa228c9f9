"""Checkpoints of a training run: whole or absent, no pickle, and enough to go on as if nothing had happened.

The order of the prompts and every sampled token derive from (seed, step) alone, so weights, optimiser, schedule and the
number of finished steps decide the future; a checkpoint holds just these.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reinforcepp.errors import ModelError
from reinforcepp.learner import Learner
from reinforcepp.models import write_json

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Position:
    """How far a run has come: finished steps, and the length in bytes of its metric log at that point."""

    step: int
    metrics_bytes: int


def save(run: Path, position: Position, learners: Mapping[str, Learner]) -> Path:
    """Write a checkpoint under a temporary name, flush it, rename it, then drop the ones before it."""
    final = run / FOLDER / f"step-{position.step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state: dict[str, Any] = {"step": position.step, "metrics_bytes": position.metrics_bytes}
    for name, learner in learners.items():
        model, optimizer, scheduler = learner.state()
        save_file({k: v.detach().cpu().clone() for k, v in model.items()}, partial / f"{name}.safetensors")
        tensors, groups = _split(optimizer)
        save_file(tensors, partial / f"{name}_optimizer.safetensors")
        state[name] = {"optimizer_groups": groups, "scheduler": scheduler}
    write_json(partial / "state.json", state)
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(final.parent)
    for older in final.parent.iterdir():
        if older != final:
            shutil.rmtree(older)
    return final


def load(run: Path, learners: Mapping[str, Learner]) -> Position:
    """Restore the last whole checkpoint of ``run`` into the given learners."""
    whole = sorted(p for p in (run / FOLDER).glob("step-*") if p.suffix != ".partial")
    if not whole:
        raise ModelError(f"{run / FOLDER} holds no whole checkpoint: start again with --overwrite.")
    folder = whole[-1]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, learner in learners.items():
        optimizer = _join(load_file(folder / f"{name}_optimizer.safetensors"), state[name]["optimizer_groups"])
        learner.load_state(load_file(folder / f"{name}.safetensors"), optimizer, state[name]["scheduler"])
    return Position(state["step"], state["metrics_bytes"])


def _split(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Optimiser state as flat tensors named ``index/name`` beside plain numbers."""
    tensors = {
        f"{index}/{name}": torch.as_tensor(value).detach().cpu().clone()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def _join(tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
