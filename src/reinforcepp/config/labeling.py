"""Settings of the commands that collect human feedback: label, and its export, import and agreement."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from reinforcepp.config.base import (
    LAST_PORT,
    Config,
    FilledStr,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    Seed,
)
from reinforcepp.config.judge_spec import is_judge
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.config.shared import DeviceConfig
from reinforcepp.config.values import NAMES
from reinforcepp.errors import ConfigError

MAX_ANSWERS = 5
Task = Literal["pair", "rank", "rate", "edit"]


@dataclass(frozen=True)
class DatabaseConfig(Config):
    """The database of the feedback."""

    database: FilledStr = "feedback.db"
    """SQLite file, or a PostgreSQL server: postgresql://USER@HOST/NAME"""


@dataclass(frozen=True)
class LabelConfig(DeviceConfig, DatabaseConfig):
    """Collect feedback on responses, from people in a browser or from a language model."""

    models: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Models that respond: folders, Hub names, builtin:tiny; none: data has responses"""
    data: FilledStr | None = None
    """Prompts, or a file with responses. Default: builtin:network if there are models"""
    task: Task = "pair"
    """Task: choose the better of 2, rank up to 5, rate by criteria, or edit the better"""
    judge: FilledStr | None = None
    """Language model that labels the pairs instead of people: judge:MODEL?rubric=..."""
    num_answers: Annotated[int, Range(at_least=1, at_most=MAX_ANSWERS)] | None = None
    """Responses per prompt, the models' in turn. Default: 2, for rank 4"""
    criteria: tuple[str, ...] = field(default=("helpful", "correct", "safe"), metadata=NAMES)
    """Criteria of the task rate"""
    overlap: PositiveInt = 1
    """Labelers who get each unit"""
    select: Literal["random", "uncertain"] = "random"
    """Order of the units: random, or first those on which reward models are uncertain"""
    reward_model: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Folders of reward models for select uncertain; several: where they disagree"""
    gold: FilledStr | None = None
    """Preference file with known answers that tests the labelers, hidden in the queue"""
    gold_every: NonNegativeInt = 10
    """One of this many units of a labeler is from gold"""
    repeat_every: NonNegativeInt = 20
    """One of this many units repeats an earlier one of the labeler; 0 for none"""
    lease_minutes: PositiveFloat = 30.0
    """Minutes until an open unit can go to another labeler"""
    guidelines: FilledStr | None = None
    """File with instructions for labelers, in Markdown"""
    title: FilledStr | None = None
    """Heading of the pages; default: Label responses"""
    host: FilledStr = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this node only, others need a token"""
    port: Annotated[int, Range(at_least=0, at_most=LAST_PORT)] = 8400
    """Port to listen on; 0 chooses a free one"""
    open_browser: bool = True
    """Open the page in this node's browser, if there is one"""
    max_prompts: NonNegativeInt = 0
    """Number of prompts, chosen at random; 0 uses all"""
    max_new_tokens: PositiveInt = 384
    """Maximum length of a response, in tokens"""
    temperature: tuple[float, ...] = (0.7, 1.0)
    """Sampling temperatures, for the responses to a prompt in turn; 0 is greedy"""
    top_p: Probability = 0.95
    """Sample from the likeliest tokens with this total probability; 1 disables"""
    seed: Seed = 42
    """Seed of the order of the units and of sampling"""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine; auto uses vLLM if it is installed and runs the model"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: the model's on a GPU, float32 on a CPU"""
    trust_remote_code: bool = False
    """Run code in the model's folder or repository, which can do anything"""

    @property
    def uses_this_node(self) -> bool:
        """Whether a model runs; only then torch is loaded."""
        return bool(self.models or self.reward_model)

    @property
    def answers_per_prompt(self) -> int:
        """The setting num_answers, or its default for the task."""
        return self.num_answers or (4 if self.task == "rank" else 2)

    def _check_rules(self) -> None:
        if self.judge is not None:
            if not is_judge(self.judge):
                raise ConfigError(
                    f"judge: {self.judge} isn't a language model as judge. Write it as in "
                    "judge:MODEL?base_url=http://127.0.0.1:8000/v1."
                )
            parse_source(self.judge)
            if self.task != "pair":
                raise ConfigError(f"judge: a judge labels pairs, so task {self.task} doesn't fit. Omit one of the two.")
        if self.task == "pair" and self.answers_per_prompt != 2:
            raise ConfigError(f"num_answers: {self.num_answers} doesn't fit task pair. Omit it, or use task rank.")
        if self.task == "edit" and self.answers_per_prompt > 2:
            raise ConfigError(f"num_answers: {self.num_answers} doesn't fit task edit. Use 1 or 2.")
        if self.task == "rank" and self.answers_per_prompt < 2:
            raise ConfigError("num_answers: a ranking needs at least 2 responses. Raise it, or use task rate.")
        if not self.temperature or min(self.temperature) < 0:
            raise ConfigError(f"temperature: {list(self.temperature)} must be numbers of at least 0. Correct them.")
        if self.select == "uncertain" and not self.reward_model:
            raise ConfigError("select uncertain needs reward models that judge the units. Give reward_model.")
        if self.reward_model and self.select != "uncertain":
            raise ConfigError("reward_model applies only to select uncertain. Add select uncertain, or omit it.")
        if self.task == "rate" and not self.criteria:
            raise ConfigError("criteria is empty. Give at least one for the task rate.")
        if bad := next((name for name in self.criteria if not name.isidentifier()), None):
            raise ConfigError(f"criteria: {bad!r} isn't a name. Use letters, digits and underscores.")
        if self.gold is not None and not self.gold_every:
            raise ConfigError("gold and gold_every 0 contradict each other. Omit one of the two.")


@dataclass(frozen=True)
class LabelExportConfig(DatabaseConfig):
    """Write the votes of a feedback database to a file."""

    output: FilledStr = "feedback.jsonl"
    """File to write: .csv, .jsonl or .parquet, or .json for the other formats"""
    format: Literal["trl", "argilla", "label-studio"] = "trl"
    """Format: preference pairs as in TRL, or records of Argilla or Label Studio"""
    overwrite: bool = False
    """Replace the file"""

    def _check_rules(self) -> None:
        suffix = Path(self.output).suffix.lower()
        wanted = (".json",) if self.format != "trl" else (".csv", ".jsonl", ".parquet")
        if suffix not in wanted:
            raise ConfigError(
                f"output: {self.output} isn't a file of format {self.format}. Give a name that ends in {' or '.join(wanted)}."
            )


@dataclass(frozen=True)
class LabelImportConfig(DatabaseConfig):
    """Add the votes in a file to a feedback database."""

    data: FilledStr = "feedback.json"
    """File of Argilla, Label Studio, the compare page, or preference pairs"""
    labeler: FilledStr = "import"
    """Name of the labeler for votes that name none"""


@dataclass(frozen=True)
class LabelAgreementConfig(DatabaseConfig):
    """Measure how much labelers, and judges, agree."""

    output: FilledStr | None = None
    """JSON file for the measurements; default: only the terminal"""
