"""TRL's RewardTrainer with the checkpoints, signals, guardrails and card of this package. Importing this file loads TRL."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from typing_extensions import override

from reinforcepp.algorithm.preferences import preference_loss
from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import load_config, tokenizer_for, weights_hash
from reinforcepp.models.lora import has_adapter
from reinforcepp.models.padding import separate_pad_token
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.reward_models import as_classifier, load_reward_weights, new_classifier
from reinforcepp.models.reward_texts import TextForm
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.rewards.card import RewardCard, read_card
from reinforcepp.rewards.trained import TrainedReward, save_reward_model
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.checkpoint import FinishedRun, finish
from reinforcepp.training.pair_datasets import (
    ODD_WEIGHT,
    as_dataset,
    as_datasets,
    card_data,
    name_of,
    print_skipped,
    reads_plain_text,
    tokenizing_errors,
)
from reinforcepp.training.precision import with_precision
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.training.publish.card import reward_model_card, without_private, write_card
from reinforcepp.training.publish.hub import create_for
from reinforcepp.training.publish.upload import UploadMethods
from reinforcepp.training.reward_card import CardData, RewardResult, evaluate_and_save, savable
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import loading_reward_model, with_reward_adapter
from reinforcepp.training.supervised_loop import (
    SupervisedTrainer,
    TrainingCallback,
    load_weights,
    run_trainer,
    trl_arguments,
)
from reinforcepp.training.supervised_setup import (
    OpenedRun,
    begin,
    check_run,
    join_ranks,
    length_limit,
    no_progress_bars,
    open_run_dir,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
    )


Rows: TypeAlias = Dataset | IterableDataset | Sequence[Mapping[str, Any]]
JUDGED = ("side", "margin", "weight")
"""Columns of the trainer that aren't inputs of the model."""


class PairCollator(DataCollatorForPreference):
    """Pads the token ids of pairs, and adds their judgments, one per output of the model, and weights, if they have them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "side" in examples[0]:
            batch["side"] = torch.tensor([example["side"] for example in examples], dtype=torch.float)
        if "weight" in examples[0]:
            weights = torch.tensor([example["weight"] for example in examples], dtype=torch.float)
            odd = weights[~(weights.isfinite() & (weights >= 0))]
            if len(odd):  # in a stream, whose rows can't be checked before
                raise DataError(ODD_WEIGHT.format("weight", odd[0].item()))
            batch["weight"] = weights
        return batch


class ResumableRewardTrainer(UploadMethods, SupervisedTrainer, TrlRewardTrainer):
    """Trains a loaded model on pairs: rows of ``chosen_ids`` and ``rejected_ids``.

    Rows can have ``margin``, a number as in TRL, or ``side`` and ``margin`` with one number per output of the model. The loss
    is :func:`preference_loss` plus a penalty that centers scores, as in TRL. The column ``weight`` multiplies both.

    Args:
        model: classifier, trained in place.
        tokenizer: its prepared tokenizer.
        config: settings, with a learning rate.
        form: of the texts, for scoring.
        max_length: longer rows are skipped; None keeps all.
        named: further arguments of TRL's trainer.
    """

    title = "reward model"
    kind = "reward"
    logged = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    headline = ("accuracy", "accuracy")

    card: RewardCard | None = None
    """Card of the trained model, after training."""
    card_data: CardData
    inputs: Mapping[str, str]
    """Hashes of model and data."""
    precision: Mapping[str, str] = {}
    """The reason for the precision, for ``run.json``."""
    opened: OpenedRun | None = None
    """The output directory, if it is checked already."""
    _began = False
    _prefix = "eval"

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardModelConfig,
        form: TextForm = "answer",
        max_length: int | None = None,
        data_collator: DataCollator | None = None,
        **named: Any,
    ) -> None:
        self.config, self.tokenizer, self.form = config, tokenizer, form
        evaluation = named.get("eval_dataset")
        if config.eval_every and evaluation is None:
            raise ConfigError("eval_every: there are no held-out pairs to evaluate. Give some, or omit eval_every.")
        output = str(Path(config.output_dir).expanduser())
        arguments = trl_arguments(type(self), config, Ranks().count, output_dir=output, max_length=max_length)
        if config.eval_every and not isinstance(evaluation, Mapping):
            arguments.metric_for_best_model, arguments.greater_is_better = "loss", False  # for EarlyStoppingCallback
        labels = model.config.id2label
        model.config.num_labels = 1  # TRL refuses a model with several outputs, although its loops can train one
        collator = data_collator or PairCollator(pad_token_id=int(tokenizer.pad_token_id))
        super().__init__(model=model, args=arguments, data_collator=collator, processing_class=tokenizer, **named)
        model.config.id2label, model.config.label2id = labels, {label: i for i, label in labels.items()}
        self.labels = list(labels.values())

    @staticmethod
    def arguments(config: RewardModelConfig, **common: Any) -> TrainingArguments:
        """Return TRL's arguments."""
        steps = {"eval_strategy": "steps", "eval_steps": config.eval_every} if config.eval_every else {}
        every = {"eval_strategy": "epoch"} if config.eval_every < 0 else steps
        return RewardConfig(
            center_rewards_coefficient=config.center_rewards_coefficient,
            disable_dropout=config.disable_dropout,
            **every,
            **common,
        )

    @staticmethod
    def load_model(folder: Path) -> PreTrainedModel:
        """Load a reward model with any number of outputs."""
        return load_reward_weights(folder, outputs=None)

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None, **_: Any) -> TrainOutput:
        """Train, evaluate and save the model in ``output_dir``; a second call continues an interrupted training.

        Args:
            resume_from_checkpoint: True for the latest checkpoint in ``output_dir``, or the folder of a checkpoint.

        Raises:
            ReinforceError: the output directory can't be used, or training diverged.
            KeyboardInterrupt: a signal stopped training; a checkpoint is saved.
        """
        resume = resume_from_checkpoint or self.config.resume or self._began
        resume = resume if isinstance(resume, bool) else os.fspath(resume)
        config = replace(self.config, resume=resume, overwrite=self.config.overwrite and not resume)
        folder, saved = self.opened or open_run_dir(config, loaded=True)
        self.opened = None
        if isinstance(saved, FinishedRun):
            saved.close(config, self.inputs)
            load_weights(self, folder)
            self.card, self.state.global_step = read_card(folder), saved.step
            return TrainOutput(saved.step, 0.0, {})
        data = self.card_data
        if config.push_to_hub:
            create_for(config, Ranks())
        facts = {"train_pairs": data.train_pairs, "heldout_pairs": data.heldout_pairs, "inputs": dict(self.inputs)}
        facts |= self.precision
        with begin(folder, config, self.inputs, saved, facts) as run:
            self._began = True
            check_run(run, self.model, self.tokenizer, config, self.train_dataset)
            output = run_trainer(self, self.tokenizer, config, run)
            self.card = RankZero(run.ranks, config.watchdog_seconds).run(
                lambda: self._evaluate_and_save(folder, config)
            )
        if config.push_to_hub:
            self.push_to_hub()
        return output

    def _evaluate_and_save(self, folder: Path, config: RewardModelConfig) -> RewardCard:
        card = evaluate_and_save(self.model.eval(), self.tokenizer, config, folder, self.card_data, self.form)
        finish(folder, config, dict(self.inputs), self.state.global_step)
        return card

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False) -> None:
        """Save weights, tokenizer and card, as :meth:`train` does in ``args.output_dir``; rank 0 writes."""
        output = Path(self.config.output_dir).expanduser()
        folder = Path(output_dir or output).expanduser()
        ranks = Ranks()
        if ranks.is_main and (self.card is None or folder.resolve() != output.resolve()):
            self._write_model(folder, self.card)
        ranks.barrier()

    def _write_model(self, folder: Path, card: RewardCard | None) -> None:
        if card is None:  # not trained
            save_model(self.model, self.tokenizer, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_reward_model(TrainedReward(savable(self.model), self.tokenizer), card, folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a model card to ``README.md`` in ``args.output_dir``: base model, data, accuracy, settings; rank 0 writes it.

        Args:
            model_name: title; default: ``args.hub_model_id``, or the name of ``args.output_dir``.
            dataset_name: name of the pairs, for example on the Hub.
            tags: further tags.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_card(self._card(self.config.hub_model_id, model_name, dataset_name, tags), folder)

    @override
    def _card(
        self,
        repository: str | None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        folder = Path(self.args.output_dir).absolute()
        card = asdict(self.card) if self.card is not None else {}
        rewards = [{"name": folder.name, "card": card | ({"data": dataset_name} if dataset_name else {})}]
        settings = as_dict(self.config) | {"model": self.model.config.name_or_path or "A language model"}
        return reward_model_card(
            RunRecord(folder, settings, {"kind": type(self.config).__name__, "rewards": rewards}),
            model_name or repository or folder.name,
            repository,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            adapter=has_adapter(self.model),
        )

    @override
    def _begin_push(self) -> Ranks:
        return Ranks()

    @override
    def _write_public(self, folder: Path) -> None:
        output = Path(self.args.output_dir)
        self._write_model(folder, without_private(self.card, output) if self.card is not None else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of this package if a callback asks for one, because that of transformers is pickled."""
        callback = next(each for each in self.callback_handler.callbacks if isinstance(each, TrainingCallback))
        callback.save(self.state, self.model, self.optimizer, self.lr_scheduler)

    def result(self, metrics: dict[str, float]) -> RewardResult:
        """Return the trained model as a reward function, with its card and ``metrics``."""
        reward = TrainedReward(self.model.eval(), self.tokenizer)
        reward.form, reward.card = self.form, self.card
        if len(self.labels) > 1:
            reward.output_weights, reward.labels = (1 / len(self.labels),) * len(self.labels), self.labels
        return RewardResult.of(reward, metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return metrics of held-out pairs: ``eval_loss``, ``eval_accuracy``, ``eval_margin`` and others, as in TRL.

        Args:
            eval_dataset: pairs, several datasets by name, or the name of one of ``self.eval_dataset``, which is the default. The
                metrics of a dataset with a name begin with ``eval_NAME_``.
            ignore_keys: outputs of the model that ``compute_metrics`` doesn't get.
            metric_key_prefix: instead of ``eval``.
        """
        self._prefix = metric_key_prefix
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics; those of a held-out dataset with a name, which TRL logs without it, also get the name."""
        if not self.model.training and self._prefix != "eval":
            logs |= {
                f"{self._prefix}_{key}": sum(values) / len(values) for key, values in self._metrics["eval"].items()
            }
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", *JUDGED]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of all outputs, and record the metrics that TRL records for one."""
        texts = {name: value for name, value in inputs.items() if name not in JUDGED}
        outputs = model(**texts) if is_encoder(self.model.config) else model(**texts, use_cache=False)
        chosen_BC, rejected_BC = outputs.logits.float().chunk(2)
        sides_BC = inputs.get("side", torch.ones_like(chosen_BC))
        margins_BC = inputs.get("margin", torch.zeros_like(chosen_BC)).reshape(chosen_BC.shape)
        weights_B1 = inputs.get("weight", torch.ones_like(chosen_BC[:, 0])).reshape(-1, 1)
        loss = preference_loss(chosen_BC - rejected_BC, sides_BC, margins_BC, weights_B1)
        if coefficient := self.args.center_rewards_coefficient:
            loss = loss + coefficient * (weights_B1 * (chosen_BC + rejected_BC) ** 2).mean()
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum())
            self._total_train_tokens += int(tokens.sum())
        self._record(outputs.logits.detach().float(), sides_BC)
        return (loss, outputs) if return_outputs else loss

    def _record(self, scores_2BC: torch.Tensor, sides_BC: torch.Tensor) -> None:
        """Record the metrics of a micro-batch of all ranks; accuracy and margin are those of decided pairs."""
        chosen_BC, rejected_BC = scores_2BC.chunk(2)
        sides_BC = sides_BC.nan_to_num()
        margins_BC = sides_BC * (chosen_BC - rejected_BC)
        sums = torch.stack([(sides_BC != 0).sum(0), (margins_BC > 0).sum(0), margins_BC.sum(0)])
        decided_C, right_C, margin_C = self.accelerator.reduce(sums, "sum").tolist()
        scores = self.accelerator.gather(scores_2BC)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["num_tokens"] = [self._total_train_tokens]
        # A batch without a decided pair is right as often as by chance.
        metrics["accuracy"].append(sum(right_C) / sum(decided_C) if any(decided_C) else 0.5)
        metrics["margin"].append(sum(margin_C) / max(1, sum(decided_C)))
        if len(self.labels) > 1:
            for label, decided, right in zip(self.labels, decided_C, right_C, strict=True):
                if decided:
                    metrics[f"accuracy/{label}"].append(right / decided)
        for name, value in (("mean", scores.mean()), ("min", scores.min()), ("max", scores.max())):
            metrics[f"{name}_reward"].append(value.item())


class RewardTrainer(ResumableRewardTrainer):
    """Trains a reward model on pairs in memory; arguments, data formats and methods are those of TRL's RewardTrainer.

    Rows with messages are read in the chat template, rows with texts as plain text that ends with EOS, as in TRL. The score is
    read where transformers reads it. :meth:`train` saves the model with its card in ``args.output_dir``.

    Args:
        model: name or folder, a loaded classifier with one output, also with an adapter, or a loaded language model, which
            gets a new score head. Loaded models are trained in place.
        args: settings; ``args.model``, ``args.data`` and ``args.heldout_fraction`` aren't used.
        data_collator: makes a batch of tokenized rows.
        train_dataset: rows with ``chosen`` and ``rejected``, texts or messages, with or without ``prompt``; or tokenized rows
            with ``chosen_ids`` and ``rejected_ids``. A list of dictionaries, a ``Dataset``, or an ``IterableDataset`` together
            with ``args.max_steps``. Optional columns: ``margin``, ``weight``, ``tools``, ``chat_template_kwargs``.
        eval_dataset: held-out rows, or a dictionary of several datasets by name.
        processing_class: tokenizer; default: the model's.
        compute_metrics: returns further metrics of an evaluation from ``transformers.EvalPrediction``.
        callbacks: of transformers.
        optimizers: optimizer and schedule, instead of those of ``args``.
        optimizer_cls_and_kwargs: class and arguments of the optimizer, instead of those of ``args``.
        preprocess_logits_for_metrics: changes the scores that ``compute_metrics`` gets.
        quantization_config: for a model that is given by name.
        peft_config: adapter to train instead of all weights. The score head is always trained.

    Raises:
        ReinforceError: settings, data and model don't fit together.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        args: RewardModelConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        config = args or RewardModelConfig()
        if not isinstance(config, RewardModelConfig):
            raise ConfigError(
                f"args: {type(config).__name__} isn't a RewardModelConfig, which accepts TRL's names of settings. Give one."
            )
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        train = as_dataset(train_dataset, "train_dataset", config)
        evaluation = as_datasets(eval_dataset, config)
        if isinstance(train, IterableDataset) and not config.max_steps:
            raise ConfigError("train_dataset: an IterableDataset has no length. Set max_steps.")
        if config.trust_remote_code:
            allow_remote_code(model if isinstance(model, str) else model.config.name_or_path, config.output_dir)
        model_config = load_config(model) if isinstance(model, str) else model.config
        config = replace(
            config,
            model=model if isinstance(model, str) else model_config.name_or_path or type(model).__name__,
            data=name_of(train),
            use_peft=config.use_peft or peft_config is not None or has_adapter(model),
            prompt_format="plain" if reads_plain_text(train, config) else config.prompt_format,
        )
        join_ranks(config)
        config, precision = with_precision(with_learning_rate(config, model_config), model_config)
        tokenizer = with_chat_template(tokenizer_for(model_config, processing_class), config)
        if isinstance(model, str):
            quantized = {"quantization_config": quantization_config} if quantization_config is not None else {}
            built = new_classifier(model, config.seed, **loading_reward_model(config) | quantized)
            separate_pad_token(built, tokenizer, resize=not config.use_peft)
        else:
            if quantization_config is not None:
                echo("quantization_config: not used, because the model is already loaded.", "yellow")
            built = as_classifier(model, config.seed)
        built = with_reward_adapter(built, config, peft_config)
        super().__init__(
            model=built,
            tokenizer=tokenizer,
            config=config,
            form="conversation",
            max_length=length_limit(config, model_config),
            data_collator=data_collator,
            train_dataset=train,
            eval_dataset=evaluation,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        first = next(iter(self.train_dataset), None)
        if first is None:
            raise DataError(
                f"train_dataset: no row fits into max_length {self.args.max_length} tokens. Raise max_length."
            )
        print_prompt_format(tokenizer, [], first["chosen_ids"])
        self.card_data = card_data(self.train_dataset, self.eval_dataset, tokenizer, config)
        self.inputs, self.precision = {"model": weights_hash(built), "data": self.card_data.sha256}, precision

    def _prepare_dataset(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase, args: RewardConfig, dataset_name: str
    ) -> Dataset | IterableDataset:
        """Return tokenized rows of at most ``args.max_length`` tokens, as TRL does, and print how many are longer."""
        rows = as_dataset(dataset, dataset_name, self.config)
        with no_progress_bars(), tokenizing_errors(dataset_name):
            prepared = super()._prepare_dataset(rows, processing_class, args, dataset_name)
        print_skipped(rows, prepared, dataset_name, args.max_length)
        return prepared
