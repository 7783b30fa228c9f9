"""Train a reward model from preference pairs with TRL's RewardTrainer (see ``resumable``).

Ours around it: the split by prompt before training, one framing for training and scoring, the score read where the
attention mask ends, held-out figures, and a card with a fingerprint beside the weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reinforcepp import checkpoint
from reinforcepp.adapters import with_adapter
from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.data import SpooledRows, load_preferences
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.framing import framed
from reinforcepp.models import context_length, load_config, load_tokenizer, save_model, weight_bytes, weights_hash
from reinforcepp.observe import MetricLog, Progress, reading_progress, restore_logs, say
from reinforcepp.observe.interrupt import Interrupted, StopAsked, stop_signals
from reinforcepp.observe.watchdog import Watchdog
from reinforcepp.preparation import loading
from reinforcepp.reward_card import RewardCard
from reinforcepp.reward_models import load_reward_weights, new_reward_model
from reinforcepp.reward_report import analyse, save_pairs, summary, tell, write_page
from reinforcepp.rewards.measure import score_pairs
from reinforcepp.rewards.trained import TrainedReward, save_reward_model
from reinforcepp.run_folder import RUN_FILE, check_output, check_unchanged, clear, describe_run
from reinforcepp.tokens import encode_answer
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"
MOST_SCORED = 2000


def train_reward_model(config: RewardModelConfig) -> RewardCard:
    """Train, measure and save a reward model as ``config`` says; returns its card.

    Raises:
        ReinforceError: for anything wrong with data, model or folder, before any weight is loaded.
    """
    copies = (
        3 * (config.keep_last + 1) + 1
    )  # the checkpoints and the one being written, with Adam's moments, and the model
    folder = check_output(
        config.output_dir,
        overwrite=config.overwrite,
        resume=config.resume,
        needed_bytes=copies * weight_bytes(config.model),
    )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision fp16 needs a GPU when a reward model is trained: use bf16.")
    saved = checkpoint.chosen(folder, config)
    with reading_progress(config.streaming) as told:
        data, train, heldout = load_preferences(
            config.data,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            **config.column_names,
            streaming=config.streaming,
            told=told,
        )
    say(data.summary())
    tokenizer = framed(load_tokenizer(config.model), config)
    limit = min(config.max_length, context_length(load_config(config.model)) or config.max_length)
    train = _within(tokenizer, train, limit, "training")
    heldout = _within(tokenizer, heldout, limit, "held-out")
    if not train:
        raise DataError(f"No training pair of {data.source} fits into max_length {limit} tokens: raise max_length.")

    model = new_reward_model(config.model, config.seed, **loading(config))
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed, head=model.score)
    if saved is not None:
        check_unchanged(saved.state["inputs"], inputs, config.allowed_changes)
    else:
        clear(folder)
    if not (folder / RUN_FILE).is_file():
        describe_run(folder, as_dict(config), {"train_pairs": len(train), "heldout_pairs": len(heldout)})
    _fit(model, tokenizer, train, config, folder, inputs, saved)
    used = model.eval()
    if config.load_in_4bit:  # whoever uses it adds the adapter to weights in full
        save_model(model, tokenizer, folder)
        used = load_reward_weights(folder)
    scorer = TrainedReward(used, tokenizer, batch_size=config.batch_size * 2)
    on_train = summary(score_pairs(scorer, _scored_of(train)))
    pairs = score_pairs(scorer, _scored_of(heldout))
    analysis = analyse(pairs) if pairs else None
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        figures=asdict(analysis.figures) if analysis else {},
        score_mean=on_train.mean_score,
        score_std=on_train.score_std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=on_train.accuracy,
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which tells that all is there
    save_reward_model(TrainedReward(model, tokenizer), card, folder)
    tell(card, analysis)
    if analysis:
        write_page(card, pairs, analysis, folder / REPORT_FILE)
    say(
        f"Saved the reward model to {folder}" + (f", its report to {folder / REPORT_FILE}" if analysis else ""), "green"
    )
    return card


def _within(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], limit: int, part: str
) -> Sequence[Preference]:
    long = [
        place
        for place, p in enumerate(pairs)
        if max(len(encode_answer(tokenizer, p.prompt, a)) for a in (p.chosen, p.rejected)) > limit
    ]
    if not long:
        return pairs
    rows = ", ".join(str(pairs[place].row) for place in long[:5]) + (", …" if len(long) > 5 else "")
    say(f"Left out {len(long)} {part} pairs longer than {limit} tokens (rows {rows}); raise max_length to keep them.")
    if isinstance(pairs, SpooledRows):
        return pairs.without(long)
    left_out = set(long)
    return [pair for place, pair in enumerate(pairs) if place not in left_out]


def _scored_of(pairs: Sequence[Preference]) -> Sequence[Preference]:
    """Of pairs on the disk those that figures are made of: to score millions would take as long as to train on them."""
    if not isinstance(pairs, SpooledRows) or len(pairs) <= MOST_SCORED:
        return pairs
    say(f"Figures are those of {MOST_SCORED:,} of {len(pairs):,} pairs, evenly spread.")
    return list(pairs.spread(MOST_SCORED))


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Preference],
    config: RewardModelConfig,
    folder: Path,
    inputs: dict[str, str],
    saved: checkpoint.Checkpoint | None,
) -> None:
    """Train ``model``, from the checkpoint ``saved`` on if there is one; stop, after saving, where a signal asks for it."""
    from transformers import PrinterCallback, ProgressCallback
    from trl import RewardConfig

    from reinforcepp.resumable import Keeper, ResumableRewardTrainer

    steps = math.ceil(len(pairs) / config.batch_size) * config.num_train_epochs
    begun = 0
    if saved is not None:
        begun = saved.step
        restore_logs(saved.folder, folder)
        say(f"Going on after step {begun} of {steps}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(MetricLog()) as log,
        Progress("reward model", steps, begun) as progress,
        stop_signals() as stop,
        Watchdog(folder, config.watchdog_seconds) as watchdog,
    ):
        log.open(folder)
        arguments = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.accumulation,
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            warmup_steps=max(1, steps // 10),
            center_rewards_coefficient=config.center_rewards_coefficient,
            max_length=None,
            use_cpu=not torch.accelerator.is_available(),
            bf16=config.mixed_precision == "bf16",
            fp16=config.mixed_precision == "fp16",
            gradient_checkpointing=config.gradient_checkpointing,
            torch_compile=config.torch_compile,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",  # no more than the Keeper asks for
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=config.seed,
        )
        keeper = Keeper(log, progress, stop, watchdog)
        trainer = ResumableRewardTrainer(
            settings=config,
            folder=folder,
            inputs=inputs,
            model=model,
            args=arguments,
            train_dataset=_tokenised(tokenizer, pairs, scratch),
            processing_class=tokenizer,
            callbacks=[keeper],
        )
        for parameter in model.parameters():
            if parameter.requires_grad:  # the trainer rounds adapters beside weights of 4 bits
                parameter.data = parameter.data.float()
        keeper.attend(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
        except StopAsked as asked:
            done = trainer.state.global_step
            if done:
                trainer._save_checkpoint(model)
            raise Interrupted(f"after step {done} of {steps}", stop.exit_code) from asked
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # scores are computed in float32


def _tokenised(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], scratch: str) -> Dataset:
    """What TRL trains on; of pairs on the disk it is in ``scratch``."""
    from datasets import Dataset

    def rows() -> Iterator[dict[str, list[int]]]:
        for pair in pairs:
            answers = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            yield {name: encode_answer(tokenizer, pair.prompt, answer) for name, answer in answers.items()}

    if not isinstance(pairs, SpooledRows):
        return Dataset.from_list(list(rows()))
    return Dataset.from_generator(rows, cache_dir=scratch, fingerprint=pairs.digest)
