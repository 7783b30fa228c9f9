"""Find a trained model, by the folder of its run or its own folder, and the record of its training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reinforcepp.errors import ModelError
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer, meta_model, resolve
from reinforcepp.models.lora import base_model, full_weights, is_4bit, is_adapter_dir
from reinforcepp.monitoring.run_record import RunRecord, read_run
from reinforcepp.run_dir import REWARD_CARD, RUN_FILE
from reinforcepp.training import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A model: its name for ``load_policy``, the record of its training if available, and the step of its weights."""

    name: str
    record: RunRecord | None
    step: int | None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the model is a checkpoint of a training."""
        return Path(self.name).parent.name == checkpoint.FOLDER

    @property
    def is_last(self) -> bool:
        """Whether the model is the result of the whole training, not a checkpoint."""
        record = self.record
        if record is None:
            return False
        ended = "after" in record.evaluations and record.metrics  # by a callback, perhaps before the last step
        return self.step == (record.metrics[-1]["step"] if ended else record.facts.get("num_steps"))


def find_source(name: str) -> Source:
    """Return the model in ``name``: the folder of a model, a run, a checkpoint or a demo, or a Hub name.

    Raises:
        ModelError: If no model is found, or it is a reward model.
    """
    folder = Path(name).expanduser()
    if (folder / REWARD_CARD).is_file():
        raise ModelError(f"{name}: this is a reward model, which can't generate. Give the folder of a policy.")
    if folder.is_dir() and not _holds_model(folder):
        if _holds_model(folder / "policy"):
            folder = folder / "policy"
        elif (saved := checkpoint.latest(folder)) is not None:
            raise ModelError(
                f"{name}: the training isn't finished. Resume it (--resume), or give its newest checkpoint, {saved.folder}."
            )
    if not _holds_model(folder):
        resolve(name)
        return Source(name, None, None)
    source = Source(str(folder), None, None)
    run = folder.parent.parent if source.is_checkpoint else folder
    if not (run / RUN_FILE).is_file():
        return source
    record = read_run(run)
    done = int(record.metrics[-1]["step"]) if record.metrics else None
    return Source(str(folder), record, checkpoint.position_of(folder)[0] if source.is_checkpoint else done)


def _holds_model(folder: Path) -> bool:
    """Return whether ``folder`` holds a model or an adapter."""
    return (folder / CONFIG).is_file() or is_adapter_dir(folder)


def plain_model(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer so that they can be saved without an adapter.

    An adapter is merged into its base model. ``dtype`` auto keeps the data type of the saved weights.
    """
    tokenizer = load_tokenizer(name)
    wanted: torch.dtype = (load_config(name).dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    model = load_policy(name, wanted)
    _complete_generation_config(model, tokenizer)
    return model, tokenizer


def plain_copy(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Return a model with the weights of a loaded one, its adapter merged; it shares weights that stay the same.

    Raises:
        ModelError: The weights are in 4 bits, so that merging would lose precision.
    """
    base = base_model(model)
    if is_4bit(model):
        raise ModelError(
            "model: the weights of the given model are in 4 bits, so an adapter can't be merged into them. Use merge=False."
        )
    wanted = base.dtype if dtype == "auto" else getattr(torch, dtype)
    config = copy.deepcopy(base.config)
    config.dtype = wanted
    plain = meta_model(config, wanted)
    weights = {name: weight.detach().to(wanted) for name, weight in full_weights(model)}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain


def _complete_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set missing special tokens, without which generation would continue after the end of a response."""
    settings = model.generation_config
    if settings is not None:
        settings.eos_token_id = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
        settings.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else tokenizer.pad_token_id
