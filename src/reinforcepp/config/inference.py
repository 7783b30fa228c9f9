"""Settings of the commands that use a trained model: generate, chat, serve, export and push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from reinforcepp.config.base import (
    LAST_PORT,
    Config,
    FilledStr,
    MinP,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    Seed,
)
from reinforcepp.config.hub import check_repository
from reinforcepp.config.judge_spec import is_judge
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.config.shared import DeviceConfig
from reinforcepp.errors import ConfigError

TABLE_FILES = (".csv", ".tsv", ".parquet", ".arrow")
PREFERENCE_FILES = (".jsonl", ".csv")


@dataclass(frozen=True)
class SamplingConfig(DeviceConfig):
    """The model that generates, and how it samples."""

    model: FilledStr = "builtin:tiny"
    """Model: builtin:tiny, a folder or a Hub name"""
    max_new_tokens: PositiveInt = 384
    """Maximum length of a response, in tokens"""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature; 0 is greedy, 1 the model's own distribution"""
    top_p: Probability = 0.9
    """Sample from the likeliest tokens with this total probability; 1 disables"""
    top_k: NonNegativeInt = 50
    """Sample from this many likeliest tokens; 0 disables"""
    min_p: MinP = 0.0
    """Sample tokens above this fraction of the top probability; 0 disables"""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes tokens that already occurred less likely"""
    seed: Seed = 42
    """Sampling seed; the same seed gives the same responses"""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine; auto uses vLLM if it is installed and runs the model"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: the model's on a GPU, float32 on a CPU"""
    trust_remote_code: bool = False
    """Run code in the model's folder or repository, which can do anything"""


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """Generate responses to prompts with a trained model."""

    prompt: str | None = None
    """Prompt; default: prompts_file, or lines of standard input"""
    prompts_file: str | None = None
    """Text file with a prompt per line, data file, or reasoning_gym:TASK"""
    num_samples: PositiveInt = 1
    """Responses per prompt"""
    best_of: PositiveInt | None = None
    """Sample this many responses per prompt and keep the highest-reward one"""
    reward_model: FilledStr | None = None
    """Folder of a reward model, judge:MODEL?... or reasoning_gym; scores responses"""
    max_prompt_length: PositiveInt | None = None
    """Most tokens of a formatted prompt. Default: what the context leaves"""
    output: str | None = None
    """File for the responses as JSON lines; default: text on the terminal"""

    def _check_rules(self) -> None:
        if self.prompt is not None and self.prompts_file is not None:
            raise ConfigError("prompt and prompts_file contradict each other. Give one of the two.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("prompt is empty. Give a text.")
        if is_judge(self.reward_model):
            parse_source(str(self.reward_model))
        if self.best_of is not None and self.reward_model is None:
            raise ConfigError("best_of needs a reward model to choose a response. Give reward_model.")
        if self.best_of is not None and self.num_samples > 1:
            raise ConfigError(
                "num_samples and best_of contradict each other. Omit num_samples: best_of keeps one response."
            )
        if self.output is not None and self.output == self.prompts_file:
            raise ConfigError(f"output and prompts_file are both {self.output}. Give output another name.")
        if self.output is not None and (suffix := Path(self.output).suffix.lower()) in TABLE_FILES:
            raise ConfigError(
                f"output: {self.output} would hold JSON lines, which can't be read as {suffix}. Give a name that ends in .jsonl."
            )


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """Chat with a trained model, and record which of two responses is better."""

    max_new_tokens: PositiveInt = 256
    """Maximum length of a response, in tokens"""
    max_length: PositiveInt | None = None
    """Maximum length of the conversation, in tokens. Default: context, up to 4096"""
    system: str | None = None
    """System message at the beginning"""
    reward_model: FilledStr | None = None
    """Folder of a reward model, or judge:MODEL?..., that scores each response"""
    preferences: FilledStr = "preferences.jsonl"
    """File for the pairs of /prefer: .jsonl, or .csv for single questions"""

    def _check_rules(self) -> None:
        if is_judge(self.reward_model):
            parse_source(str(self.reward_model))
        if Path(self.preferences).suffix.lower() not in PREFERENCE_FILES:
            raise ConfigError(
                f"preferences: {self.preferences} has another file type. Give a name that ends in "
                f"{' or '.join(PREFERENCE_FILES)}."
            )
        if self.system is not None and Path(self.preferences).suffix.lower() == ".csv":
            raise ConfigError(
                f"preferences: {self.preferences} can't hold the system message, because a CSV file has no messages. Give a "
                ".jsonl file."
            )
        if self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ConfigError(
                f"max_length {self.max_length} leaves no room for a question in addition to max_new_tokens "
                f"{self.max_new_tokens}. Raise the one or lower the other."
            )


@dataclass(frozen=True)
class ServeConfig(DeviceConfig):
    """Serve a trained model with vLLM, for OpenAI clients."""

    model: FilledStr = "builtin:tiny"
    """Model to serve: builtin:tiny, a folder of a run or a model, or a Hub name"""
    host: FilledStr = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all addresses of this node"""
    port: Annotated[int, Range(above=0, at_most=LAST_PORT)] = 8000
    """Port to listen on"""
    api_key_file: FilledStr | None = None
    """File with the API key in line 1; default: VLLM_API_KEY, or no key"""
    name: FilledStr | None = None
    """Model name for clients; default: the name of its folder"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: the model's, if the device is fast in it"""
    max_length: PositiveInt | None = None
    """Maximum length of prompt and response, in tokens. Default: context, up to 8192"""
    batch_size: PositiveInt = 64
    """Responses generated at a time; further requests wait"""


@dataclass(frozen=True)
class ServeRewardConfig(DeviceConfig):
    """Serve a reward model's scores over HTTP, with the protocol of OpenRLHF's reward servers."""

    model: FilledStr = "models/reward_model"
    """Folder of a reward model, from reinforcepp reward"""
    host: FilledStr = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this node only, 0.0.0.0 all addresses"""
    port: Annotated[int, Range(at_least=0, at_most=LAST_PORT)] = 5000
    """Port to listen on; 0 chooses a free one"""
    batch_size: PositiveInt = 64
    """Texts scored at a time"""
    reward_normalize: bool = False
    """Standardize scores with the mean and deviation of the model's card"""


@dataclass(frozen=True)
class ExportConfig(Config):
    """Write a trained model to a folder with a model card, for programs that read transformers models."""

    model: FilledStr = "runs/train"
    """Folder of a run or a model, or a Hub name"""
    output_dir: FilledStr = "models/export"
    """Folder to write; must be empty or not exist"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights; auto keeps the model's"""
    merge: bool = True
    """Merge an adapter into its base model; otherwise export the adapter (PEFT)"""


@dataclass(frozen=True)
class PushConfig(Config):
    """Export a trained model and upload it to the Hugging Face Hub."""

    model: FilledStr = "runs/train"
    """Folder of a run or a model"""
    repo: str | None = None
    """Hub name: USER/NAME, or NAME for the token's owner; default: the folder's name"""
    private: bool = False
    """Create a private repository"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights; auto keeps the model's"""

    def _check_rules(self) -> None:
        check_repository("repo", self.repository)

    @property
    def repository(self) -> str:
        """Name on the Hub: the setting, or the name of the model's folder."""
        return Path(self.model).name if self.repo is None else self.repo
