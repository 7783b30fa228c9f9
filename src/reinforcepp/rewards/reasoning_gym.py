"""The verifiers of reasoning-gym as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reinforcepp.config.data_spec import REASONING_GYM
from reinforcepp.data.reasoning_gym import score_answer
from reinforcepp.errors import ConfigError


class ReasoningGymReward:
    """The score from 0 to 1 that the task's own verifier gives to the last ``<answer>`` of a completion, 0 without one.

    Rows of other data in the same batch have no score. The metric ``accuracy`` is the fraction of completions with the score 1.

    Raises:
        ConfigError: The package isn't installed, or the data has no entries of reasoning-gym.
    """

    name = REASONING_GYM

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        *,
        reasoning_gym: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Score each completion."""
        if reasoning_gym is None:
            raise ConfigError(
                f"rewards: {REASONING_GYM} needs the column {REASONING_GYM!r}, which rows of {REASONING_GYM}:TASK have. Use "
                "such data, or another reward."
            )
        scores = [
            None if entry is None else score_answer(entry, final_answer(completion))
            for entry, completion in zip(reasoning_gym, completions, strict=True)
        ]
        known = [score for score in scores if score is not None]
        if known and log_metric is not None:
            log_metric("accuracy", sum(score >= 1 for score in known) / len(known))
        return scores


def final_answer(completion: Any) -> str | None:
    """Return the text in the last ``<answer>`` tags of a completion, or of the last message that the policy wrote."""
    from reasoning_gym.utils import extract_answer

    if not isinstance(completion, str):
        completion = next((each["content"] for each in reversed(completion) if each["role"] == "assistant"), "")
    return extract_answer(completion or "")
