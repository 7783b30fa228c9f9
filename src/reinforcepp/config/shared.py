"""Settings that several commands share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from reinforcepp.config.aliases import aliases_of
from reinforcepp.config.base import (
    Config,
    FilledStr,
    FilledText,
    JsonText,
    NonNegativeCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    StepInterval,
    check_output_dir,
    json_object,
)
from reinforcepp.config.data_spec import REASONING_GYM, data_names, is_reasoning_gym
from reinforcepp.config.learning_rates import Training
from reinforcepp.config.values import NAMES, SWITCH_OR_TEXT, EmptyIfNone
from reinforcepp.errors import ConfigError, nearest, option

JUDGE, JUDGED_DATA = "builtin:judge", "builtin:network"
Scheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""Learning rate schedules of transformers that depend on the step alone."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
INPUTS = ("model", "data", "reward_model")
"""Inputs of a run, whose content can change under the same name."""


def is_due(every: int, step: int, steps_per_epoch: int) -> bool:
    """Return whether save_every or eval_every, with the value ``every``, is due after ``step`` steps."""
    interval = steps_per_epoch if every == -1 else every
    return interval > 0 and step % interval == 0


@dataclass(frozen=True)
class CheckpointConfig(Config):
    """Where and how often a training run is saved, and how it resumes."""

    output_dir: str = "runs/train"
    """Folder for everything the run writes"""
    save_every: StepInterval = 50
    """Steps between checkpoints; 0: only if a signal stops the run, -1: every epoch"""
    keep_last: PositiveInt | None = None
    """Latest checkpoints to keep, also when training ends. Default: 1 until then"""
    keep_best: str | None = None
    """Metric whose best checkpoint is also kept, e.g. reward; -METRIC for lowest"""
    max_skipped_updates: NonNegativeInt = 3
    """Skipped updates allowed in a row before the run stops"""
    watchdog_seconds: NonNegativeFloat = 1800.0
    """Seconds without progress before the run ends with stacks.txt; 0 disables"""
    overwrite: bool = False
    """Replace the run in output_dir"""
    resume: bool | str = field(default=False, metadata=SWITCH_OR_TEXT)
    """Resume from the latest checkpoint in output_dir, or from a checkpoint folder"""
    allow_changes: str | None = None
    """Settings, separated by commas, that a resumed run can change"""

    @property
    def checkpoints_at_most(self) -> int:
        """Largest number of checkpoints on the disk at a time, including the one being written."""
        return self.latest_kept + (self.keep_best is not None) + 1 if self.save_every else 1

    @property
    def latest_kept(self) -> int:
        """Number of latest checkpoints to keep during training."""
        return self.keep_last or 1

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether checkpoints stay when training is finished and the model is saved."""
        return self.keep_last is not None or self.keep_best is not None

    @property
    def allowed_changes(self) -> list[str]:
        """Names in allow_changes."""
        names = [name.strip() for name in (self.allow_changes or "").split(",")]
        aliases = aliases_of(type(self))
        given = [(aliases[name].settings or (name,)) if name in aliases else (name,) for name in names if name]
        return [setting for settings in given for setting in settings]

    def _check_rules(self) -> None:
        check_output_dir(self.output_dir, self.overwrite, self.resume)
        if self.resume == "":
            raise ConfigError("resume is empty. Omit the path to resume from the latest checkpoint.")
        if self.keep_best is not None and not self.keep_best.strip("- "):
            raise ConfigError("keep_best is empty. Give the name of a metric, for example reward.")
        if self.keep_best is not None and not self.save_every:
            raise ConfigError("keep_best needs checkpoints, but save_every is 0. Set save_every to a number of steps.")
        known = {setting.name for setting in fields(self)} | set(INPUTS)
        for name in self.allowed_changes:
            if name not in known:
                raise ConfigError(f"allow_changes: setting {name!r} not found.{nearest(name, known)}")
        if self.allowed_changes and not self.resume:
            raise ConfigError(f"allow_changes applies only to a resumed run. Add {option('resume')}.")


@dataclass(frozen=True)
class DeviceConfig(Config):
    """Where a command computes."""

    use_cpu: bool = False
    """Compute on the CPU and hide the GPUs from this process"""

    @property
    def uses_this_node(self) -> bool:
        """Whether the command computes on, or is about, the devices of this node."""
        return True


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optimizer and its learning rate, with the names of transformers."""

    TRAINING: ClassVar[Training]

    learning_rate: PositiveFloat | None = None
    """Peak learning rate; default: by model size, and full or LoRA training"""
    lr_scheduler_type: Scheduler = "linear"
    """Learning rate schedule after the warmup"""
    lr_scheduler_kwargs: JsonText | None = None
    """Arguments of the schedule in transformers, JSON: {"min_lr_rate": 0.1}"""
    warmup_ratio: Share = 0.1
    """Fraction of all optimizer steps in which the learning rate rises to its peak"""
    warmup_steps: NonNegativeCount = 0
    """Optimizer steps of the warmup; below 1: fraction of all; 0 uses warmup_ratio"""
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"] = "adamw_torch_fused"
    """Optimizer; AdamW keeps two moments per weight, adafactor and sgd fewer"""
    adam_beta1: Share = 0.9
    """AdamW's decay of the mean of gradients"""
    adam_beta2: Share = 0.999
    """AdamW's decay of the mean of squared gradients"""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's addend to the root of squared gradients"""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, of all weights but norms and biases"""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum gradient norm; larger gradients are scaled down"""

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate of a started training, which has replaced None by the default."""
        assert self.learning_rate is not None
        return self.learning_rate

    def warmup_of(self, steps: int) -> int:
        """Return the warmup steps of a training of ``steps`` optimizer steps."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil((self.warmup_steps or self.warmup_ratio) * steps)

    @property
    def schedule_arguments(self) -> dict[str, Any]:
        """The arguments in ``lr_scheduler_kwargs``."""
        return json_object("lr_scheduler_kwargs", self.lr_scheduler_kwargs, '{"min_lr_rate": 0.1}')

    def _check_rules(self) -> None:
        if self.schedule_arguments and self.lr_scheduler_type.startswith("constant"):
            raise ConfigError(
                f"lr_scheduler_kwargs: the schedule {self.lr_scheduler_type} has no arguments. Remove them, or set "
                "lr_scheduler_type."
            )
        if self.warmup_steps > 1 and not float(self.warmup_steps).is_integer():
            raise ConfigError(
                f"warmup_steps: {self.warmup_steps} is neither a whole number of steps nor a fraction below 1. Give one of these."
            )


@dataclass(frozen=True)
class TrackingConfig(Config):
    """Trackers of a training."""

    report_to: Annotated[tuple[str, ...], EmptyIfNone()] = field(default=(), metadata=NAMES)
    """Trackers of the metrics, e.g. tensorboard wandb mlflow trackio; none: none"""
    run_name: FilledStr | None = None
    """Name of the run in wandb, mlflow, trackio and swanlab"""

    def _check_rules(self) -> None:
        for name in self.report_to:
            if name not in TRACKERS:
                raise ConfigError(
                    f"report_to: tracker {name!r} not found, only {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}"
                )


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Settings of LoRA, with the names of TRL and peft."""

    use_peft: bool = False
    """Train LoRA adapters instead of all weights; saves memory"""
    lora_r: PositiveInt = 16
    """Rank of the adapters"""
    lora_alpha: PositiveFloat = 32.0
    """Adapter scale: lora_alpha / lora_r, or lora_alpha / sqrt(lora_r) with rsLoRA"""
    lora_dropout: Share = 0.0
    """Dropout probability of adapter inputs"""
    lora_target_modules: tuple[str, ...] = field(default=("all-linear",), metadata=NAMES)
    """Layers with adapters, by suffix (q_proj v_proj); all-linear: all but the head"""
    use_rslora: bool = False
    """Rank-stabilized LoRA: adapter scale lora_alpha / sqrt(lora_r)"""
    use_dora: bool = False
    """DoRA: train direction and magnitude separately; slower"""
    load_in_4bit: bool = False
    """QLoRA: load base weights in 4 bits (nf4, bitsandbytes); needs use_peft"""

    def _check_rules(self) -> None:
        targets = self.lora_target_modules
        if not targets or not all(name.strip() for name in targets):
            raise ConfigError(
                "lora_target_modules is empty. Name layers, as in q_proj v_proj, or omit it for all-linear."
            )
        if "all-linear" in targets and len(targets) > 1:
            raise ConfigError("lora_target_modules: all-linear can't be combined with other names. Remove one.")
        if not self.use_peft:
            settings = fields(AdapterConfig)
            changed = [setting.name for setting in settings if getattr(self, setting.name) != setting.default]
            if changed:
                raise ConfigError(
                    f"{changed[0]} is a LoRA setting, and LoRA is off. Add {option('use_peft')}, or omit {changed[0]}."
                )
        if self.load_in_4bit and self.use_dora:
            raise ConfigError("use_dora needs full-precision weights, which load_in_4bit removes. Give one of the two.")


MODEL_CONFIG = frozenset({"attn_implementation", "dtype", *(setting.name for setting in fields(AdapterConfig))})
"""Settings that are also in TRL's ModelConfig: TrlParser refuses a flag that two classes have."""


@dataclass(frozen=True)
class ComputeConfig(AdapterConfig, DeviceConfig):
    """How a model is trained. Apart from LoRA, these settings change results only by rounding error."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Compute in 16 bits, with float32 master weights; auto: bf16 if it is fast here"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time"""
    gradient_checkpointing_kwargs: JsonText | None = None
    """Accepted for TRL: {"use_reentrant": false}, which always applies"""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention implementation; auto is the choice of transformers, mostly sdpa"""
    torch_compile: bool = False
    """Compile the model with torch.compile; the first steps take minutes"""
    trust_remote_code: bool = False
    """Run code in the model's folder or repository, which can do anything"""

    @property
    def float32_setting(self) -> str | None:
        """The setting that needs ``mixed_precision`` no, if there is one; auto is then no."""
        return None

    def _check_rules(self) -> None:
        name, example = "gradient_checkpointing_kwargs", '{"use_reentrant": false}'
        given = json_object(name, self.gradient_checkpointing_kwargs, example)
        if given not in ({}, {"use_reentrant": False}):
            raise ConfigError(
                f"{name}: {self.gradient_checkpointing_kwargs} isn't supported, because checkpointing isn't reentrant here, "
                f"which gives the same gradients. Use {example}, or omit it."
            )


@dataclass(frozen=True)
class ChatTemplateConfig(Config):
    """The prompt format, which is stored with the trained model and used in generation."""

    prompt_format: Literal["auto", "plain", "question_answer"] = "auto"
    """Form of prompts; auto: the chat template, or plain text if there is none"""
    chat_template: FilledText | None = None
    """Chat template (Jinja), its file, or a tokenizer's folder; default: the model's"""
    system_prompt: FilledText | None = None
    """System prompt of every conversation, stored in the chat template"""
    chat_template_kwargs: JsonText | None = None
    """Variables of the chat template, JSON: {"enable_thinking": false}"""

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables in ``chat_template_kwargs``."""
        return json_object("chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}')

    def _check_rules(self) -> None:
        _ = self.template_variables
        if self.chat_template is not None and self.prompt_format != "auto":
            raise ConfigError(
                f"prompt_format: {self.prompt_format} and chat_template are both templates of the prompt. Omit one of them."
            )


@dataclass(frozen=True)
class DryRunConfig(Config):
    """Whether the command stops before it loads or writes anything."""

    dry_run: bool = False
    """Print settings, plan and first rows, and stop; loads and writes nothing"""


@dataclass(frozen=True)
class ColumnMapping(Config):
    """Names of columns; ``TEXTS`` are the columns that have their own setting."""

    TEXTS: ClassVar[tuple[str, ...]] = ()

    columns: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Column names, NAME=COLUMN (prompt=question), also for reward functions"""
    heldout_fraction: Share = 0.1
    """Fraction of prompts held out for evaluation; built-in data has its own split"""

    @property
    def column_names(self) -> dict[str, Any]:
        """Column names as keyword arguments of the functions that read data."""
        named = self._named
        return {f"{name}_column": named.get(name, getattr(self, f"{name}_column")) for name in self.TEXTS}

    @property
    def renamed(self) -> dict[str, str]:
        """Columns of the file by the names that reward functions use."""
        return {name: column for name, column in self._named.items() if name not in self.TEXTS}

    @property
    def _named(self) -> dict[str, str]:
        return dict(text.split("=", 1) for text in self.columns)

    def _check_rules(self) -> None:
        seen: set[str] = set()
        for text in self.columns:
            name, equals, column = text.partition("=")
            if not (name.strip() and equals and column.strip()):
                raise ConfigError(f"columns: {text!r} isn't NAME=COLUMN. Write it as in prompt=question.")
            if name in seen:
                raise ConfigError(f"columns: {name} is given twice. Remove one.")
            if name in self.TEXTS and getattr(self, f"{name}_column") != name:
                raise ConfigError(f"{name}_column and columns both name the column of the {name}. Remove one.")
            seen.add(name)


@dataclass(frozen=True)
class ColumnConfig(ColumnMapping):
    """Column names of preference and prompt files."""

    TEXTS = ("prompt", "chosen", "rejected")

    prompt_column: str = "prompt"
    """Column with the prompt"""
    chosen_column: str = "chosen"
    """Column with the preferred response"""
    rejected_column: str = "rejected"
    """Column with the other response"""


@dataclass(frozen=True)
class BadRowsConfig(Config):
    """How many unusable rows a data file can have."""

    max_bad_rows: NonNegativeFloat = 0.01
    """Rows to skip if a cell isn't text or messages: a fraction, or a number from 1"""


@dataclass(frozen=True)
class DataLoadingConfig(BadRowsConfig, ColumnConfig):
    """How data files are read."""

    streaming: bool = False
    """Keep rows on disk (in TMPDIR) instead of in memory, for large data"""


def judge_for(judge: str, data: str) -> str | None:
    """Return the judge that the setting ``judge`` means for ``data``, or None for none."""
    if judge == "auto":
        return JUDGE if data == JUDGED_DATA else REASONING_GYM if is_reasoning_gym(data) else None
    return None if judge == "none" else judge


def check_judge(judge: str, data: str, fix: str = "Use judge none, or another reward model") -> None:
    """Check that the built-in judge scores only the built-in data, and the verifiers of reasoning-gym only its tasks."""
    check_verifier("judge", judge, data)
    if judge == JUDGE and data != JUDGED_DATA:
        raise ConfigError(f"judge: {JUDGE} can score only {JUDGED_DATA}, not {data}. {fix}.")
    check_verifier("judge", judge, data)


def check_verifier(setting: str, reward: str, data: str) -> None:
    """Check that the reward ``reasoning_gym`` has tasks to score in the data."""
    if reward == REASONING_GYM and not any(name.task is not None for name in data_names(data)):
        raise ConfigError(
            f"{setting}: {REASONING_GYM} scores only its own tasks, not {data}. Give data such as {REASONING_GYM}:chain_sum."
        )
