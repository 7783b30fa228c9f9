"""Settings of the supervised warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcepp.config._checks import check_apart, check_values, filled
from reinforcepp.config.chat_template import Framing, check_framing
from reinforcepp.config.checkpointing import Keeping, check_keeping
from reinforcepp.config.columns import Mapped, check_columns
from reinforcepp.config.lora import check_adapters
from reinforcepp.config.precision import Computing
from reinforcepp.config.supervised import Fitting, check_fitting
from reinforcepp.config.training import Looking
from reinforcepp.errors import ConfigError, nearest


@dataclass(frozen=True)
class SftInputs(Mapped):
    """What a supervised warm-up starts from."""

    TEXTS = ("prompt", "completion", "chosen", "messages", "text")

    model: str = "builtin:tiny"
    """Language model to start from: builtin:tiny, a folder or a hub name."""
    data: str = "builtin:network"
    """CSV, TSV, JSON, JSONL or Parquet file with prompts and answers, conversations or plain text, a folder or pattern of
    such files, several with commas between them, or builtin:network."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    completion_column: str = "completion"
    """Column with the answer to learn; where there is none, the chosen answer of a preference file is."""
    chosen_column: str = "chosen"
    """Column with the preferred answer of a preference file."""
    messages_column: str = "messages"
    """Column with conversations, whose last answer is learnt; looked for where there are no prompts with answers."""
    text_column: str = "text"
    """Column with plain text, learnt as a whole; looked for where there is nothing of the above."""


@dataclass(frozen=True)
class SftConfig(Looking, Framing, Computing, Keeping, Fitting, SftInputs):
    """Fine-tune a language model on answers or plain text, as a warm-up before RL."""

    output_dir: str = "models/sft"
    """Folder for the fine-tuned model."""
    seed: int = 42
    """Decides the split and the order of the rows."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW; falls linearly to 0. Adapters take about ten times as much."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        check_values(self)
        check_keeping(self)
        check_adapters(self)
        check_framing(self)
        check_fitting(self)
        check_columns(self)
        if self.renamed:
            raise ConfigError(
                f"columns names {next(iter(self.renamed))}, which a warm-up has no use for; it asks for "
                f"{', '.join(self.TEXTS)}.{nearest(next(iter(self.renamed)), self.TEXTS)}"
            )
        filled(self, "model", "data")
        check_apart(self, "model", "data")
