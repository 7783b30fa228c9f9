"""A rollout batch and how far the training on it has come: what a checkpoint in the middle of a step holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from reinforcepp.checkpoint import Checkpoint
from reinforcepp.files import write_json
from reinforcepp.rewards import RewardScores
from reinforcepp.types import Completion, Prompt, RolloutBatch

TENSORS, REST = "rollout", "rollout.json"


@dataclass
class BatchInUse:
    """A scored rollout batch, what the critic thought of it at first, and what each optimiser step so far told."""

    batch: RolloutBatch
    scores: RewardScores
    values_BT: torch.Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it to two files; the prompts are left out, because data, seed and step give them again."""
        tensors = {name: getattr(self.batch, name) for name in _tensor_names()}
        if self.values_BT is not None:
            tensors["values_BT"] = self.values_BT
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            folder / f"{TENSORS}.safetensors",
        )
        completions = [
            {"prompt": c.prompt.key, "ids": c.ids, "logprobs": c.logprobs, "text": c.text, "finish": c.finish_reason}
            for c in self.batch.completions
        ]
        scores = asdict(self.scores)
        write_json(folder / REST, {"completions": completions, "scores": scores, "history": self.history})

    @staticmethod
    def load(saved: Checkpoint, prompts: Sequence[Prompt], device: torch.device) -> BatchInUse | None:
        """What :meth:`save` wrote, if anything; ``prompts`` are those of the step."""
        if not (saved.folder / REST).is_file():
            return None
        rest = json.loads((saved.folder / REST).read_text(encoding="utf-8"))
        tensors = {name: value.to(device) for name, value in saved.tensors(TENSORS).items()}
        values_BT = tensors.pop("values_BT", None)
        by_key = {prompt.key: prompt for prompt in prompts}
        completions = [
            Completion(by_key[c["prompt"]], tuple(c["ids"]), tuple(c["logprobs"]), c["text"], c["finish"])
            for c in rest["completions"]
        ]
        batch = RolloutBatch(completions=completions, **tensors)
        return BatchInUse(batch, RewardScores(**rest["scores"]), values_BT, rest["history"])


def _tensor_names() -> list[str]:
    return [f.name for f in fields(RolloutBatch) if f.name != "completions"]
