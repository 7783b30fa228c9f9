"""What a reward model says of preference pairs; ``reward_report`` makes figures of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reinforcepp.errors import TrainingDiverged
from reinforcepp.models.tokenization import encode, encode_example, format_prompt
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.types import Preference, ScoredPair


def score_pairs(reward: TrainedReward, pairs: Sequence[Preference]) -> list[ScoredPair]:
    """Score both answers of every pair, in the order of ``pairs``.

    Raises:
        TrainingDiverged: if a score isn't finite.
    """
    if not pairs:
        return []
    tokenizer = reward.tokenizer
    starts = [len(encode(tokenizer, format_prompt(tokenizer, p.prompt))) for p in pairs]
    chosen = [encode_example(tokenizer, p.prompt, p.chosen) for p in pairs]
    rejected = [encode_example(tokenizer, p.prompt, p.rejected) for p in pairs]
    chosen_scores, rejected_scores = reward.score_rows(chosen), reward.score_rows(rejected)
    for pair, *scores in zip(pairs, chosen_scores, rejected_scores, strict=True):
        if not all(map(math.isfinite, scores)):
            raise TrainingDiverged(f"The score of an answer in row {pair.row} isn't finite. Lower learning_rate.")
    return [
        ScoredPair(
            row=pair.row,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            chosen_score=chosen_scores[i],
            rejected_score=rejected_scores[i],
            chosen_length=len(chosen[i]) - starts[i],
            rejected_length=len(rejected[i]) - starts[i],
        )
        for i, pair in enumerate(pairs)
    ]
