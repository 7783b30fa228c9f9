"""A rollout batch and how far the training on it has come: what a checkpoint in the middle of a step holds.

Each rank samples and scores its own prompts. Then all ranks are given the whole batch: which rows are trained on
together, what is logged and whether to stop are decisions on it, so that they are the same on every rank and for any
number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reinforcepp.distributed.ranks import Ranks
from reinforcepp.files import write_json
from reinforcepp.rewards.functions import RewardScores
from reinforcepp.rollout.serialization import as_rows, from_rows
from reinforcepp.training.checkpoint import Checkpoint
from reinforcepp.types import Completion, Prompt, RolloutBatch

TENSORS, REST = "rollout", "rollout.json"
OWN = ("advantages_BT", "returns_BT", "values_BT")


@dataclass
class BatchInUse:
    """A scored rollout batch, its advantages, and what each optimiser step so far told.

    ``returns_BT`` is what a critic learns, ``values_BT`` what it thought at first.
    """

    batch: RolloutBatch
    scores: RewardScores
    advantages_BT: Tensor
    returns_BT: Tensor
    values_BT: Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it to two files; the prompts are left out, because data, seed and step give them again."""
        save_file(
            {name: value.contiguous() for name, value in self._tensors().items()}, folder / f"{TENSORS}.safetensors"
        )
        rows, scores = as_rows(self.batch.completions), asdict(self.scores)
        write_json(folder / REST, {"completions": rows, "scores": scores, "history": self.history})

    def gather(self, ranks: Ranks) -> BatchInUse:
        """This rank's batch and those of the others, one after another."""
        if ranks.count == 1:
            return self
        told = ranks.gather((self.batch.completions, self.scores, self._tensors()))
        width = max(tensors["mask_BT"].shape[1] for _, _, tensors in told)
        joined = {
            name: torch.cat([_widened(tensors[name], width) for _, _, tensors in told]).to(ranks.device)
            for name in told[0][2]
        }
        return _made_of(
            [completion for completions, _, _ in told for completion in completions],
            RewardScores(
                [total for _, scores, _ in told for total in scores.total],
                {
                    name: [score for _, scores, _ in told for score in scores.by_function[name]]
                    for name in self.scores.by_function
                },
                sum(scores.skipped for _, scores, _ in told),
            ),
            joined,
            [],
        )

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU."""
        tensors = {name: getattr(self.batch, name) for name in _tensor_names()}
        own = {name: value for name in OWN if (value := getattr(self, name)) is not None}
        return {name: value.detach().cpu() for name, value in {**tensors, **own}.items()}

    @staticmethod
    def load(saved: Checkpoint, prompts: Sequence[Prompt], device: torch.device) -> BatchInUse | None:
        """What :meth:`save` wrote, if anything; ``prompts`` are those of the step."""
        if not (saved.folder / REST).is_file():
            return None
        rest = json.loads((saved.folder / REST).read_text(encoding="utf-8"))
        tensors = {name: value.to(device) for name, value in saved.tensors(TENSORS).items()}
        completions = from_rows(rest["completions"], prompts)
        return _made_of(completions, RewardScores(**rest["scores"]), tensors, rest["history"])


def _made_of(
    completions: list[Completion], scores: RewardScores, tensors: dict[str, Tensor], history: list[dict[str, float]]
) -> BatchInUse:
    own = {name: tensors.pop(name) for name in OWN if name in tensors}
    return BatchInUse(RolloutBatch(completions=completions, **tensors), scores, history=history, **own)


def _widened(tensor: Tensor, width: int) -> Tensor:
    return nn.functional.pad(tensor, (0, width - tensor.shape[1])) if tensor.ndim == 2 else tensor


def _tensor_names() -> list[str]:
    return [f.name for f in fields(RolloutBatch) if f.name != "completions"]
