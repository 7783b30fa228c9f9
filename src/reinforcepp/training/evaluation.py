"""How a policy answers held-out prompts: reward, distance from the reference, length, variety."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import RewardError
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.monitoring.completion_log import columns_of
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.rollout.engine import RolloutEngine, preserve_random_state
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reinforcepp.training.policy_run import PolicyRun
    from reinforcepp.training.rollout_scheduler import RolloutScheduler
    from reinforcepp.training.run_guard import Heartbeat

EVALUATION_SEED = 1_000_003
BATCH = 16
Answers = tuple[list[Completion], list[float | None], list[float | None], list[tuple[float, int]]]
"""Completions, their rewards, what a judge says of them, and their :func:`kl_sums`."""
Logprobs = tuple[Tensor, Tensor]
"""``(logprobs_BT, mask_BT)`` of a batch of completions."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over the held-out prompts, one completion each, and the completions themselves.

    ``reward_error`` is the standard error of the mean reward; ``judge`` is what a judge that takes no part in training
    thinks of the same answers, None without one; answers that weren't scored have no part in either. ``kl`` is the mean
    over tokens of k3 against the reference, in nats; ``truncated`` the share cut off at the length limit;
    ``distinct`` the number of different answers over the number of prompts; ``length`` the mean in tokens.
    """

    reward: float
    reward_error: float
    judge: float | None
    judge_error: float | None
    kl: float
    length: float
    truncated: float
    distinct: float
    completions: list[Completion]
    rewards: list[float | None]
    judgements: list[float | None] | None

    def figures(self) -> dict[str, float]:
        """The numbers alone, for a JSON file."""
        names = ("reward", "reward_error", "judge", "judge_error", "kl", "length", "truncated", "distinct")
        return {name: float(value) for name in names if (value := getattr(self, name)) is not None}

    def columns(self) -> dict[str, Sequence[Any]]:
        """The answers as a table, one row each."""
        known = columns_of(self.completions)
        judged = {} if self.judgements is None else {"judge": self.judgements}
        first = {name: known.pop(name) for name in ("prompt", "completion")}
        return first | {"reward": self.rewards} | judged | known


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rewards: RewardSum,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pad_id: int,
    judge: RewardSum | None = None,
    *,
    ranks: Ranks,
) -> Evaluation:
    """Answer ``prompts`` once each and score the answers; each rank does its share, and all get the whole.

    Raises:
        RewardError: if a reward function or server fails, or none of the answers is scored.
    """

    def part() -> Answers:
        own = ranks.local_slice(prompts)
        completions = engine.generate(own, sampling)  # without any, too: all processes may share the engine
        scored = [None if who is None else who.score(completions).total for who in (rewards, judge)]
        kl = kl_sums(
            answer_logprobs(policy, completions, sampling.temperature, pad_id),
            answer_logprobs(reference, completions, sampling.temperature, pad_id),
        )
        return completions, scored[0] or [], scored[1] or [], kl

    told = ranks.gather(ranks.run_or_raise_all(part))
    completions, scores, judgements, kl = (
        [item for one in column for item in one] for column in zip(*told, strict=True)
    )
    known = [[score for score in said if score is not None] for said in (scores, judgements)]
    for who, said in zip(("rewards", "judge"), known if judge is not None else known[:1], strict=False):
        if not said:
            raise RewardError(
                f"The {who} scored none of the held-out answers: with --eval_prompts 0 they aren't asked for."
            )
    return Evaluation(
        reward=fmean(known[0]),
        reward_error=standard_error(known[0]),
        judge=None if judge is None else fmean(known[1]),
        judge_error=None if judge is None else standard_error(known[1]),
        kl=mean_kl(kl),
        length=fmean(len(c.ids) for c in completions),
        truncated=fmean(c.finish_reason == "length" for c in completions),
        distinct=len({c.text for c in completions}) / len(completions),
        completions=completions,
        rewards=scores,
        judgements=None if judge is None else judgements,
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of ``values``, at least one."""
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel, completions: Sequence[Completion], temperature: float, pad_id: int
) -> list[Logprobs]:
    """``(logprobs_BT, mask_BT)`` of the completions' tokens under ``model``, sixteen completions after another.

    They are on the CPU, so that the model may be gone when they are used.
    """
    batches = []
    for start in range(0, len(completions), BATCH):
        rows = completions[start : start + BATCH]
        prompts, responses = [c.prompt.ids for c in rows], [c.ids for c in rows]
        logprobs_BT, _, mask_BT = response_logprobs(model, prompts, responses, pad_id=pad_id, temperature=temperature)
        batches.append((logprobs_BT.cpu(), mask_BT.cpu()))
    return batches


def kl_sums(own: Sequence[Logprobs], reference: Sequence[Logprobs]) -> list[tuple[float, int]]:
    """Of each answer, the sum of k3 over its tokens, in nats, and their number.

    Both sides are what :func:`answer_logprobs` gave of the same answers, ``own`` under the model that said them.
    """
    sums = []
    for (own_BT, mask_BT), (ref_BT, _) in zip(own, reference, strict=True):
        kl_B = (kl_estimate(own_BT, ref_BT, "k3") * mask_BT).double().sum(-1)
        sums += list(zip(kl_B.tolist(), mask_BT.sum(-1).int().tolist(), strict=True))
    return sums


def mean_kl(sums: Sequence[tuple[float, int]]) -> float:
    """Mean over all tokens of what :func:`kl_sums` gave."""
    return sum(kl for kl, _ in sums) / max(1, sum(tokens for _, tokens in sums))


class Evaluator:
    """Evaluates the policy of a run on its held-out prompts, always with the same seeds.

    Args:
        prompts: the held-out prompts; the setting ``eval_prompts`` limits their number.
        rewards: the reward functions of the training.
        judge: a reward function that has no part in training, if any.
        reference: the reference policy.
        rollouts: owns the engine that generates.
        run: records each evaluation.
        heartbeat: watchdog and stop signals.
        num_steps: steps of the run.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: RewardSum,
        judge: RewardSum | None,
        reference: PreTrainedModel,
        rollouts: RolloutScheduler,
        run: PolicyRun,
        heartbeat: Heartbeat,
        num_steps: int,
    ) -> None:
        self.prompts = prompts
        self.rewards = rewards
        self.judge = judge
        self.reference = reference
        self.rollouts = rollouts
        self.policy_run = run
        self.heartbeat = heartbeat
        self.num_steps = num_steps
        self.evaluations: dict[str, Evaluation] = {}

    def evaluate(self) -> Evaluation:
        """Return an evaluation of the current policy, without recording it."""
        config, rollouts = self.policy_run.config, self.rollouts
        rollouts.use_current_weights()
        return evaluate(
            rollouts.engine,
            self.prompts[: config.eval_prompts],
            Sampling(config.max_new_tokens, config.temperature, seed=EVALUATION_SEED),
            self.rewards,
            rollouts.policy,
            self.reference,
            self.policy_run.update.pad_id,
            judge=self.judge,
            ranks=rollouts.ranks,
        )

    def run(self, name: str) -> None:
        """Evaluate, if there are held-out prompts, and record the evaluation under ``name``."""
        if self.policy_run.config.eval_prompts and self.prompts:
            self.heartbeat.beat(f"evaluation {name!r}")
            with self.heartbeat.interruptible(), preserve_random_state():
                self.evaluations[name] = self.evaluate()
            self.policy_run.record_evaluation(name, self.evaluations[name])

    def run_if_due(self, step: int) -> None:
        """Evaluate every ``eval_every`` steps, unless the evaluation of this step is recorded already."""
        every, name = self.policy_run.config.eval_every, f"step {step}"
        if every and 0 < step < self.num_steps and step % every == 0 and name not in self.policy_run.state.evaluations:
            self.run(name)
