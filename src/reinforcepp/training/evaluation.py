"""Evaluations on held-out prompts: reward, KL to the reference policy, length, variety."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.config.shared import is_due
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, RewardError
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.tokenization import pad_values
from reinforcepp.monitoring.completion_log import columns_of
from reinforcepp.monitoring.step_metrics import completion_metrics, reward_metrics
from reinforcepp.rewards.functions import FAILED_KEY, RewardScores, drop_failed, join_scores
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.rollout.engine import preserve_random_state
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reinforcepp.training.policy_run import PolicyRun
    from reinforcepp.training.rollout_scheduler import RolloutScheduler
    from reinforcepp.training.run_guard import Heartbeat

EVALUATION_SEED = 1_000_003
SCORING_BATCH_SIZE = 16
BEFORE, AFTER = "before", "after"
TRL_KEYS = {
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "distinct": "completions/distinct_ratio",
}
RankEvaluation = tuple[list[Completion], RewardScores, list[float | None], list[tuple[float, int]], list[float]]
"""A rank's completions, their rewards, their judge's scores, their :func:`kl_sums`, and sums of their entropy in nats."""
Logprobs = tuple[Tensor, Tensor, Tensor]
"""``(logprobs_BT, entropy_BT, mask_BT)`` of a batch of completions."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics over the held-out prompts, one completion each, and the completions.

    ``reward_error`` is the standard error of the mean reward. ``judge`` is the mean score of a judge that has no part in
    training, None without a judge. Both skip completions without a score. ``kl`` is the token mean of k3 to the reference
    policy, in nats; ``truncated`` the share of completions truncated at the length limit; ``distinct`` the number of distinct
    responses divided by the number of prompts; ``length`` the mean number of tokens. ``details`` are further metrics under
    the keys of training steps, such as ``rewards/NAME/mean``, and ``extra`` the columns that reward functions logged.
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
    details: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    parts: dict[str, Evaluation] = field(default_factory=dict)
    """The evaluation of each dataset by its name, if there are several."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics, for a JSON file."""
        names = ("reward", "reward_error", "judge", "judge_error", "kl", "length", "truncated", "distinct")
        metrics = {name: float(value) for name in names if (value := getattr(self, name)) is not None}
        metrics |= {name: float(value) for name, value in self.details.items()}
        for dataset, part in self.parts.items():
            metrics |= {f"{dataset}_{TRL_KEYS.get(name, name)}": value for name, value in part.metrics().items()}
        return metrics

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the completions as a table with one row each."""
        known = columns_of(self.completions)
        judged = {} if self.judgements is None else {"judge": self.judgements}
        first = {name: known.pop(name) for name in ("prompt", "completion")}
        logged = {f"extra/{name}": values for name, values in self.extra.items()}
        return first | {"reward": self.rewards} | judged | logged | known


def logged_metrics(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """Return :meth:`Evaluation.metrics` under TRL's keys: ``eval_reward``, ``eval_completions/mean_length`` and so on."""
    return {f"{prefix}_{TRL_KEYS.get(name, name)}": value for name, value in metrics.items()}


def evaluate(
    generate: Callable[[Sequence[Prompt], Sampling], list[Completion]],
    sets: Mapping[str, Sequence[Prompt]],
    sampling: Sampling,
    rewards: RewardSum,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pad_id: int,
    judge: RewardSum | None = None,
    *,
    ranks: Ranks,
) -> Evaluation:
    """Generate one completion per prompt of all ``sets`` and score it.

    Each rank does its share, and all get the whole evaluation. Several sets are also evaluated one by one.

    Raises:
        RewardError: a reward function or server fails, or no completion has a score.
    """
    prompts = [prompt for part in sets.values() for prompt in part]

    def evaluate_local() -> RankEvaluation:
        # A rank without prompts generates too, because all ranks can share the engine.
        completions, failed = drop_failed(generate(ranks.local_slice(prompts), sampling))
        scores = rewards.score(completions)
        if failed:
            scores.counts[FAILED_KEY] = float(len(failed))
        judgements = judge.score(completions).total if judge is not None else []
        logprobs = completion_logprobs(policy, completions, sampling.temperature, pad_id)
        kl = kl_sums(logprobs, completion_logprobs(reference, completions, sampling.temperature, pad_id))
        entropy = [nats for _, nats_BT, mask_BT in logprobs for nats in (nats_BT * mask_BT).sum(-1).tolist()]
        return completions, scores, judgements, kl, entropy

    parts = ranks.gather(ranks.run_or_raise_all(evaluate_local))
    scores = join_scores([part[1] for part in parts])
    completions = [completion for part in parts for completion in part[0]]
    judgements = [score for part in parts for score in part[2]]
    kl = [row for part in parts for row in part[3]]
    entropy = [nats for part in parts for nats in part[4]]
    whole = _evaluation(completions, scores, judgements if judge is not None else None, kl, entropy)
    if len(sets) == 1:
        return whole
    found = dict[str, Evaluation]()
    for name, prompts_of in sets.items():
        keys = {prompt.key for prompt in prompts_of}
        rows = [row for row, completion in enumerate(completions) if completion.prompt.key in keys]
        own = replace(scores.rows(rows), skipped=0, counts={})
        judged = [judgements[row] for row in rows] if judge is not None else None
        parts_of = [completions[row] for row in rows], own, judged, [kl[row] for row in rows]
        found[name] = _evaluation(*parts_of, [entropy[row] for row in rows], name)
    return replace(whole, parts=found)


def _evaluation(
    completions: list[Completion],
    scores: RewardScores,
    judgements: list[float | None] | None,
    kl: list[tuple[float, int]],
    entropy: list[float],
    dataset: str = "",
) -> Evaluation:
    """Return the evaluation of completions that are scored; ``kl`` and ``entropy`` are sums over each completion's tokens.

    Raises:
        RewardError: no completion has a score.
    """
    judged = [score for score in judgements or () if score is not None]
    for name, known in [("rewards", scores.known), *([("judge", judged)] if judgements is not None else [])]:
        if not known:
            place = f" of {dataset}" if dataset else ""
            raise RewardError(
                f"{name}: no held-out completion{place} has a score. Skip evaluations with eval_prompts 0."
            )
    details = {
        **reward_metrics(scores),
        **completion_metrics(completions),
        "entropy": sum(entropy) / max(1, sum(tokens for _, tokens in kl)),
    }
    return Evaluation(
        reward=fmean(scores.known),
        reward_error=standard_error(scores.known),
        judge=None if judgements is None else fmean(judged),
        judge_error=None if judgements is None else standard_error(judged),
        kl=mean_kl(kl),
        length=fmean(len(c.sampled_ids) for c in completions),
        truncated=fmean(c.finish_reason == "length" for c in completions),
        distinct=len({c.text for c in completions}) / len(completions),
        completions=completions,
        rewards=scores.total,
        judgements=judgements,
        details={name: value for name, value in details.items() if name not in ("reward", *TRL_KEYS.values())},
        extra=scores.extra,
    )


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of one or more ``values``."""
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))


@torch.no_grad()
def completion_logprobs(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    temperature: float,
    pad_id: int,
    report: Callable[[int], None] = lambda rows: None,
) -> list[Logprobs]:
    """Return log-probabilities of the completions under ``model``, for each ``SCORING_BATCH_SIZE`` completions.

    The tensors are on the CPU, so the model can be freed before they are used. ``report`` gets the number of completions of
    each batch once it is finished.
    """
    batches = []
    for start in range(0, len(completions), SCORING_BATCH_SIZE):
        rows = completions[start : start + SCORING_BATCH_SIZE]
        prompts, responses = [c.prompt.ids for c in rows], [c.ids for c in rows]
        tensors = response_logprobs(model, prompts, responses, pad_id=pad_id, temperature=temperature)
        logprobs_BT, entropy_BT, mask_BT = (tensor.cpu() for tensor in tensors)
        if any(c.turns for c in rows):
            mask_BT = pad_values([[float(sampled) for sampled in c.mask] for c in rows])
        batches.append((logprobs_BT, entropy_BT, mask_BT))
        report(len(rows))
    return batches


def kl_sums(policy: Sequence[Logprobs], reference: Sequence[Logprobs]) -> list[tuple[float, int]]:
    """Return the sum of k3 over the tokens of each completion, in nats, and the number of its tokens.

    Both arguments come from :func:`completion_logprobs` of the same completions, under the policy and the reference policy.
    """
    sums = []
    for (policy_BT, _, mask_BT), (ref_BT, *_) in zip(policy, reference, strict=True):
        kl_B = (kl_estimate(policy_BT, ref_BT, "k3") * mask_BT).double().sum(-1)
        sums += list(zip(kl_B.tolist(), mask_BT.sum(-1).int().tolist(), strict=True))
    return sums


def mean_kl(sums: Sequence[tuple[float, int]]) -> float:
    """Return the mean over all tokens from :func:`kl_sums`."""
    return sum(kl for kl, _ in sums) / max(1, sum(tokens for _, tokens in sums))


class Evaluator:
    """Evaluates the policy of a run on its held-out prompts, always with the same seeds.

    Args:
        sets: the held-out prompts of each dataset; the setting ``eval_prompts`` limits the number used during training.
        encode: returns the prompts of another dataset.
        rewards: the reward functions of the training.
        judge: a reward function that has no part in training, if any.
        reference: the reference policy.
        rollouts: owns the engine that generates.
        run: records each evaluation.
        heartbeat: watchdog and stop signals.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Prompt]],
        encode: Callable[[Any], Mapping[str, Sequence[Prompt]]],
        rewards: RewardSum,
        judge: RewardSum | None,
        reference: PreTrainedModel,
        rollouts: RolloutScheduler,
        run: PolicyRun,
        heartbeat: Heartbeat,
    ) -> None:
        self.sets = sets
        self.encode = encode
        self.rewards = rewards
        self.judge = judge
        self.reference = reference
        self.rollouts = rollouts
        self.policy_run = run
        self.heartbeat = heartbeat
        self.evaluations: dict[str, Evaluation] = {}
        self.latest: tuple[int, Evaluation] | None = None
        """The latest evaluation and its step, while the policy has these weights."""

    def evaluate(self, limit: int | None = None, dataset: Any = None) -> Evaluation:
        """Return an evaluation of the current policy, without recording it.

        Args:
            limit: the first ``limit`` prompts of each dataset are used; default: all.
            dataset: held-out rows, several datasets by name, or the name of one of those of the trainer.

        Raises:
            ConfigError: there are no held-out prompts.
        """
        if isinstance(dataset, str) and dataset in self.sets:
            sets: Mapping[str, Sequence[Prompt]] = {"": self.sets[dataset]}
        else:
            sets = self.sets if dataset is None else self.encode(dataset)
        sets = {name: prompts[:limit] for name, prompts in sets.items() if prompts}
        if not sets:
            raise ConfigError("eval_dataset: no rows to evaluate on. Give held-out rows when you create the trainer.")
        config, rollouts = self.policy_run.config, self.rollouts
        rollouts.use_current_weights()
        return evaluate(
            rollouts.generate,
            sets,
            Sampling(config.max_new_tokens, config.temperature, seed=EVALUATION_SEED),
            self.rewards,
            rollouts.policy,
            self.reference,
            self.policy_run.update.pad_id,
            judge=self.judge,
            ranks=rollouts.ranks,
        )

    def run(self, name: str) -> None:
        """Evaluate on the first ``eval_prompts`` held-out prompts, if any, and record the evaluation under ``name``."""
        limit = self.policy_run.config.eval_prompts
        if limit and any(self.sets.values()):
            self.heartbeat.beat(f"evaluation {name!r}")
            run = self.policy_run
            step, report = run.state.step, name != BEFORE or run.callbacks.logs_start
            if self.latest is not None and self.latest[0] == step:
                report = False
            else:
                with self.heartbeat.interruptible(), preserve_random_state():
                    self.latest = step, self.evaluate(limit)
            self.evaluations[name] = self.latest[1]
            report = (
                report and name not in run.state.evaluations
            )  # a resumed run repeats the last one for its completions
            run.record_evaluation(name, self.evaluations[name], report=report)

    def run_if_due(self, step: int) -> None:
        """Evaluate after the last step, every ``eval_every`` steps, and if a callback asks for it.

        The evaluation of this step can be recorded already, if the run was resumed.
        """
        config, callbacks = self.policy_run.config, self.policy_run.callbacks
        name = AFTER if callbacks.last_step and not config.load_best_model_at_end else f"step {step}"
        every = is_due(config.eval_every, step, callbacks.steps_per_epoch)
        due = every or callbacks.last_step or callbacks.control.should_evaluate
        if due and step > 0 and name not in self.policy_run.state.evaluations:
            self.run(name)
