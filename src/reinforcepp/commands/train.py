"""The command ``train``: read the prompts, train the policy, print the change on held-out prompts and the diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reinforcepp.config import TrainConfig
from reinforcepp.config.data_spec import data_entries
from reinforcepp.data import PromptRow, load_prompts
from reinforcepp.data.rows import normalize
from reinforcepp.distributed.ranks import init_process_group
from reinforcepp.monitoring import reading_progress
from reinforcepp.monitoring.doctor import diagnose
from reinforcepp.monitoring.metric_delta import change_of
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.run_dir import check_output
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.reinforce_trainer import ReinforceTrainer


def run_train(config: TrainConfig) -> None:
    """Train a policy on all ranks of this job."""
    init_process_group(config.watchdog_seconds)
    train(config)


def train(config: TrainConfig) -> ReinforceTrainer:
    """Train a policy and return its trainer.

    Raises:
        ConfigError: the output directory isn't free. From Python, the trainer would set an earlier run aside.
    """
    check_output(config.output_dir, overwrite=config.overwrite, resume=config.resume)
    train_rows, heldout_rows = read_sources(config) if config.interleave_probs else read_rows(config, config.data)
    trainer = ReinforceTrainer(
        model=config.model,
        reward_funcs=config.reward_sources,
        args=config,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
        judge=config.judge_name,
    )
    trainer.train()
    print_change(trainer)
    diagnosis = diagnose(read_run(trainer.folder))
    more = f" Details: reinforcepp doctor {config.output_dir}" if diagnosis.findings else ""
    echo(f"Doctor: {diagnosis.sentence}{more}", "yellow" if diagnosis.worst in ("error", "warning") else "")
    return trainer


def read_rows(config: TrainConfig, data: str) -> tuple[Sequence[PromptRow], Sequence[PromptRow]]:
    """Return the rows of ``data`` for training, and those that are held out."""
    with reading_progress(config.streaming) as on_progress:
        found, train_rows, heldout_rows = load_prompts(
            data,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            **config.column_names,
            renamed=config.renamed,
            max_bad_rows=config.max_bad_rows,
            streaming=config.streaming,
            on_progress=on_progress,
        )
    echo(found.summary())
    return train_rows, heldout_rows


def read_sources(config: TrainConfig) -> tuple[Mapping[str, Sequence[PromptRow]], Mapping[str, Sequence[PromptRow]]]:
    """Return the rows of each entry of ``data`` by its name; no prompt that one of them holds out is trained on."""
    read = {name: read_rows(config, text) for name, text in data_entries(config.data).items()}
    held_out = {normalize(row.prompt) for _, rows in read.values() for row in rows}
    train_rows = {
        name: [row for row in rows if normalize(row.prompt) not in held_out] for name, (rows, _) in read.items()
    }
    return train_rows, {name: rows for name, (_, rows) in read.items() if rows}


def print_change(trainer: ReinforceTrainer) -> None:
    """Print the metrics on held-out prompts before and after training."""
    if not {"before", "after"} <= set(trainer.evaluations):
        return
    before, after = trainer.evaluations["before"], trainer.evaluations["after"]
    metrics = before.metrics(), after.metrics()
    changes = [str(change) for name in ("reward", "judge") if (change := change_of(name, *metrics)) is not None]
    echo(
        f"Held-out prompts ({len(after.completions)}): {', '.join(changes)}, KL to the reference policy {after.kl:.4f} "
        f"nats/token, length {before.length:.0f} -> {after.length:.0f} tokens"
    )
