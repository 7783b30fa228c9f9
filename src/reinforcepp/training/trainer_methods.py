"""Methods of TRL's and transformers' trainers, apart from ``train``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError
from reinforcepp.models.lora import has_adapter
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.run_dir import set_run_aside
from reinforcepp.training.callbacks import Callbacks
from reinforcepp.training.evaluation import Evaluator, logged_metrics
from reinforcepp.training.policy_run import PolicyRun
from reinforcepp.training.publish.card import model_card, write_card
from reinforcepp.training.publish.hub import create_for
from reinforcepp.training.publish.source import Source
from reinforcepp.training.publish.upload import UploadMethods

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_callback import CallbackHandler

FIXED = {
    "compute_loss": "the loss follows from the settings estimator and loss_type",
    "_compute_loss": "the loss follows from the settings estimator and loss_type",
    "_calculate_rewards": "give reward functions; they get prompts, completions, columns and trainer_state",
    "_generate": "give an engine, which generates",
    "_generate_and_score_completions": "give reward functions and an engine",
    "training_step": "use callbacks",
    "create_optimizer": "give optimizers",
    "create_scheduler": "give optimizers",
    "get_train_dataloader": "give the rows in their order, with shuffle_dataset False",
}
"""Methods of TRL's trainers that don't exist here, and what to use instead."""


AGENTS = {
    "environment_factory": "write a class with reset and step, and give it as environment",
    "rollout_func": "generate with an engine of your own",
}
"""Arguments of TRL's trainers for completions of several turns, and what to use instead."""


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raise an error for the first of the arguments ``given`` that isn't None; the trainer doesn't know them.

    Raises:
        ConfigError: an argument of TRL's trainers isn't supported.
        TypeError: there is no such argument in TRL either.
    """
    for name, value in given.items():
        if name not in AGENTS:
            raise TypeError(f"ReinforceTrainer got an unexpected argument {name!r}.")
        if value is not None:
            raise ConfigError(f"{name}: isn't supported. Instead, {AGENTS[name]}.")


class TrainerMethods(UploadMethods):
    """What :class:`~reinforcepp.ReinforceTrainer` offers around ``train``."""

    config: ReinforceConfig
    folder: Path
    ranks: Ranks
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    callbacks: Callbacks
    callback_handler: CallbackHandler
    evaluator: Evaluator
    run: PolicyRun

    def __init_subclass__(cls, **others: Any) -> None:
        """Refuse a subclass with methods that would silently have no effect."""
        super().__init_subclass__(**others)
        for name, instead in FIXED.items():
            if name in vars(cls):
                raise ConfigError(f"{cls.__name__}.{name}: ReinforceTrainer never calls it. Instead, {instead}.")

    def evaluate(
        self, eval_dataset: str | Iterable[Any] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Generate completions of held-out prompts with the current policy from fixed seeds, and score them.

        Args:
            eval_dataset: rows with a ``prompt``, a dictionary of several datasets, or the name of one of the trainer's;
                default: all rows of the trainer's ``eval_dataset``.
            metric_key_prefix: begins the name of each metric.

        Returns:
            The metrics under TRL's keys, such as ``eval_reward`` and ``eval_kl``, and ``eval_NAME_reward`` for each of several
            datasets; they are also in ``state.log_history``.
        """
        from transformers.trainer_utils import speed_metrics

        start, prefix = time.time(), metric_key_prefix
        evaluation = self.evaluator.evaluate(dataset=eval_dataset)
        samples = len(evaluation.completions)
        metrics = {f"{prefix}_samples": samples, **logged_metrics(evaluation.metrics(), prefix)}
        metrics |= speed_metrics(prefix, start, samples, math.ceil(samples / self.config.effective_rollout_batch_size))
        self.callbacks.evaluated(metrics)
        return metrics

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback of transformers, a class or an instance."""
        self.callbacks.add(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Remove a callback, by its class or itself, and return it; None if there is none."""
        return cast("TrainerCallback | None", self.callback_handler.pop_callback(callback))

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback, by its class or itself."""
        self.callback_handler.remove_callback(callback)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the policy as a folder that ``from_pretrained`` reads, by default ``args.output_dir``; rank 0 writes it."""
        folder = Path(output_dir or self.folder)
        if self.ranks.is_main:
            if folder == self.folder and not self.run.begun and not self.run.finished:
                set_run_aside(folder)
            save_model(self.policy, self.tokenizer, folder)
        self.ranks.barrier()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """Write the model card to ``README.md`` in ``args.output_dir``, as training does when it ends; rank 0 writes it.

        It names the base model and fingerprints of the data, and has the settings and results of the training.

        Args:
            model_name: title; default: ``args.hub_model_id``, or the name of ``args.output_dir``.
            dataset_name: name of the prompts, for example on the Hub.
            tags: further tags.
        """
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            card = self._card(self.config.hub_model_id, model_name, dataset_name, tags)
            write_card(card, self.folder)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repository ``args.hub_model_id`` on the Hub; with ``args.push_to_hub``, training begins with this.

        Raises:
            ReinforceError: see :meth:`push_to_hub`.
        """
        create_for(self.config, self.ranks, token)

    @override
    def _begin_push(self) -> Ranks:
        self.callbacks.call("on_push_begin")
        return self.ranks

    @override
    def _write_public(self, folder: Path) -> None:
        save_model(self.policy, self.tokenizer, folder)

    @override
    def _card(
        self,
        repository: str | None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        record = read_run(self.folder) if self.run.begun or self.run.finished else self.run.summary
        base = {"model": self.policy.config.name_or_path} if self.policy.config.name_or_path else {}
        record = replace(record, settings={**base, **record.settings})
        return model_card(
            Source(str(self.folder), record, self.callbacks.state.global_step),
            model_name or repository or self.folder.absolute().name,
            repository,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            adapter=has_adapter(self.policy),
        )

    def is_world_process_zero(self) -> bool:
        """Return whether this is rank 0."""
        return self.ranks.is_main

    def is_local_process_zero(self) -> bool:
        """Return whether this is the first rank of its node."""
        return bool(self.ranks.accelerator.is_local_main_process)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append ``logs`` to ``state.log_history`` with the current step, and give them to the callbacks."""
        self.callbacks.log(logs)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print ``metrics`` as transformers does; rank 0 prints."""
        from transformers.trainer_pt_utils import log_metrics

        log_metrics(self, split, metrics)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write ``metrics`` to ``SPLIT_results.json`` in ``args.output_dir`` and, if ``combined``, to ``all_results.json``."""
        from transformers.trainer_pt_utils import save_metrics

        self.folder.mkdir(parents=True, exist_ok=True)
        save_metrics(self, split, metrics, combined)

    def save_state(self) -> None:
        """Write ``state`` to ``trainer_state.json`` in ``args.output_dir``."""
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.callbacks.state.save_to_json(str(self.folder / "trainer_state.json"))
