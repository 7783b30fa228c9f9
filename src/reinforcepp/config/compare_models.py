"""Settings of the comparison of two models.

Sampling is that of training, not that of generate: what is compared are the models' own distributions, as in the held-out
figures of a training, and only so is the mean of k3 the KL. Likelier tokens alone would hide how the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import (
    check_apart,
    check_judge,
    check_output,
    check_sampling,
    check_values,
    filled,
    judge_for,
    not_negative,
    positive,
)
from reinforcepp.config.columns import Columns, check_columns
from reinforcepp.errors import ConfigError

FEWEST_RESAMPLES = 100
"""With fewer, the ends of a 95 % interval would be two or three of the resamples."""


@dataclass(frozen=True)
class CompareInputs:
    """What is compared, and on what."""

    model_a: str = "builtin:tiny"
    """Model A: builtin:tiny, a folder or a hub name; it may also stand right after the verb, without the flag."""
    model_b: str = "runs/train"
    """Model B, of which the win rate is told; it may also stand right after model A."""
    data: str = "builtin:network"
    """CSV file with prompts, or builtin:network. The held-out prompts are answered; without any, all of them."""
    judge: str = "auto"
    """Scores the answers: builtin:judge, which knows builtin:network, or the folder of a reward model; auto is
    builtin:judge for builtin:network."""
    reference: str | None = None
    """Model to which the KL is measured; default: model A, so that the KL is that of B to A."""


@dataclass(frozen=True)
class CompareConfig(Columns, CompareInputs):
    """Compare two models' answers to the same held-out prompts, drawn with the same random numbers."""

    output_dir: str = "runs/compare"
    """Folder for compare.json, answers.jsonl and the page compare.html."""
    overwrite: bool = False
    """Replace the comparison that output_dir holds."""
    seed: int = 42
    """Decides the split, as it does in training (take the training's own), the sampled tokens and the intervals."""
    max_prompts: int = 0
    """Prompts to answer, chosen at random among the held-out ones; 0 is all."""
    num_samples: int = 1
    """Answers of each model to a prompt; the first of A is compared with the first of B, and so on."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens."""
    max_new_tokens: int = 384
    """Limit for an answer, in tokens."""
    temperature: float = 1.0
    """1 samples the models' own distributions, 0 always takes the likeliest token. For answers as generate gives them
    set 0.7, with top_p 0.9 and top_k 50."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that make up this probability; the KL is told for 1 only."""
    top_k: int = 0
    """Sample only from this many likeliest tokens; 0 is off, and the KL is told for 0 only."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates; auto takes vLLM where it is installed and runs both models, else transformers."""
    tie_margin: float = 0.0
    """Scores that differ by no more than this are a tie."""
    bootstrap_samples: int = 10_000
    """Resamples of the prompts from which the 95 % intervals are read."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        check_values(self)
        check_output(self)
        check_sampling(self)
        positive(self, "max_prompt_length")
        check_columns(self)
        positive(self, "num_samples")
        not_negative(self, "max_prompts", "tie_margin")
        if self.bootstrap_samples < FEWEST_RESAMPLES:
            raise ConfigError(f"bootstrap_samples must be at least {FEWEST_RESAMPLES}, not {self.bootstrap_samples}.")
        inputs = ["model_a", "model_b", "data", "judge", *(["reference"] if self.reference is not None else [])]
        filled(self, *inputs)
        check_apart(self, *inputs)
        if judge_for(self.judge, self.data) is None:
            raise ConfigError(
                f"There is no judge for {self.data}, so nothing could be said about its answers: give the folder of a reward "
                "model, as in --judge models/reward_model."
            )
        check_judge(self.judge, self.data, cure="give the folder of a reward model")

    @property
    def judge_name(self) -> str:
        """The judge there is in fact."""
        return str(judge_for(self.judge, self.data))
