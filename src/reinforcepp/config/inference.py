"""Settings of what is done with a trained model: answer, talk, serve, hand on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reinforcepp.config._checks import check_sampling, check_values, filled, positive
from reinforcepp.errors import ConfigError

PREFERENCE_FILES = (".jsonl", ".csv")
REPOSITORY = r"[\w][\w.-]*(/[\w][\w.-]*)?"  # a name on the hub, with or without the user's


@dataclass(frozen=True)
class Answering:
    """Which model answers, and how its answers are sampled."""

    model: str = "builtin:tiny"
    """Model that answers: builtin:tiny, a folder or a hub name."""
    max_new_tokens: int = 384
    """Limit for an answer, in tokens."""
    temperature: float = 0.7
    """0 always takes the likeliest token, 1 samples the model's own distribution."""
    top_p: float = 0.9
    """Sample only from the likeliest tokens that make up this probability."""
    top_k: int = 50
    """Sample only from this many likeliest tokens; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    seed: int = 42
    """The same seed gives the same answers."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates; auto takes vLLM where it is installed and runs the model, else transformers."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        filled(self, "model")
        check_sampling(self)
        positive(self, "repetition_penalty")


@dataclass(frozen=True)
class GenerateConfig(Answering):
    """Answer prompts with a trained model."""

    prompt: str | None = None
    """The prompt; without it and prompts_file, prompts are read from standard input, one per line."""
    prompts_file: str | None = None
    """Text file with one prompt per line."""
    num_samples: int = 1
    """Answers per prompt."""
    best_of: int | None = None
    """Sample this many answers per prompt and keep the one that the reward model scores highest."""
    reward_model: str | None = None
    """Folder of a reward model, which scores every answer."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens."""
    output: str | None = None
    """File for the answers as JSON lines (prompt, completion, finish_reason, and reward if there is a reward model);
    default: text on the terminal."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        super().__post_init__()
        positive(self, "max_prompt_length", "num_samples", "best_of")
        if self.prompt is not None and self.prompts_file is not None:
            raise ConfigError("prompt and prompts_file contradict each other: give one of the two.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("prompt is empty: give the text to answer.")
        if self.best_of is not None and self.reward_model is None:
            raise ConfigError("best_of needs a reward model that says which answer is best: give reward_model.")
        if self.best_of is not None and self.num_samples > 1:
            raise ConfigError("num_samples and best_of contradict each other: best_of keeps one answer per prompt.")
        if self.reward_model is not None:
            filled(self, "reward_model")
        if self.output is not None and self.output == self.prompts_file:
            raise ConfigError(f"output and prompts_file are both {self.output}: give output another name.")


@dataclass(frozen=True)
class ChatConfig(Answering):
    """Talk with a trained model, and note which of two answers is better."""

    max_new_tokens: int = 256
    """Limit for an answer, in tokens."""
    max_length: int | None = None
    """Limit for the conversation and the answer together, in tokens; older turns are left out. Default: the model's
    context, at most 4096."""
    system: str | None = None
    """System message to begin with."""
    reward_model: str | None = None
    """Folder of a reward model, whose score is shown beside each answer."""
    preferences: str = "preferences.jsonl"
    """File to which /prefer appends pairs: .jsonl (conversations) or .csv (text)."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        super().__post_init__()
        positive(self, "max_length")
        filled(self, "preferences")
        if self.reward_model is not None:
            filled(self, "reward_model")
        if Path(self.preferences).suffix.lower() not in PREFERENCE_FILES:
            raise ConfigError(f"preferences must end in {' or '.join(PREFERENCE_FILES)}, not be {self.preferences}.")
        if self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ConfigError(
                f"max_length {self.max_length} leaves no room for a question beside max_new_tokens "
                f"{self.max_new_tokens}: raise the one or lower the other."
            )


@dataclass(frozen=True)
class ServeConfig:
    """Serve a trained model with vLLM, over an interface that OpenAI's clients speak."""

    model: str = "builtin:tiny"
    """Model to serve: builtin:tiny, the folder of a training or of a model, or a hub name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on."""
    api_key_file: str | None = None
    """File whose first line is the key that clients must send. Default: the variable VLLM_API_KEY, and without it no
    key is asked for. There is no setting for the key itself, as every user of the machine could read it there."""
    name: str | None = None
    """Name under which clients ask for the model. Default: that of its folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto takes that of the model."""
    max_length: int | None = None
    """Limit for prompt and answer together, in tokens. Default: the model's context, at most 8192."""
    batch_size: int = 64
    """Answers generated at a time; more wait."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        filled(self, "model", "host")
        positive(self, "max_length", "batch_size")
        if not 0 < self.port < 65536:
            raise ConfigError(f"port must be from 1 to 65535, not {self.port}.")
        for name in ("name", "api_key_file"):
            if getattr(self, name) is not None:
                filled(self, name)


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model to a plain folder, with a model card, for whatever reads transformers' models."""

    model: str = "runs/train"
    """The folder of a training or of a model, or a hub name."""
    output_dir: str = "models/export"
    """Folder to write; must not exist yet, or be empty."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto leaves them as they are."""
    merge: bool = True
    """Add an adapter to the model that it belongs to; else it is written alone, in peft's format."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        filled(self, "model", "output_dir")


@dataclass(frozen=True)
class PushConfig:
    """Export a trained model and upload it to the Hugging Face hub."""

    model: str = "runs/train"
    """The folder of a training or of a model."""
    repo: str | None = None
    """Name on the hub: USER/NAME, or NAME for the owner of the token; created if it isn't there. Default: the name of the
    model's folder."""
    private: bool = False
    """Nobody else may see it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto leaves them as they are."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        filled(self, "model")
        name = self.repository
        if not re.fullmatch(REPOSITORY, name, re.ASCII) or ".." in name or "--" in name or name[-1] in ".-":
            raise ConfigError(
                f"repo {name!r} is no name that the hub allows: give one of letters, digits, '-', '_' and '.', as in "
                "USER/NAME."
            )

    @property
    def repository(self) -> str:
        """The name on the hub that was given, or follows from the model's."""
        return Path(self.model).name if self.repo is None else self.repo
