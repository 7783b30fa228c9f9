"""The doctor's rules, one function each: they map a run's record to a finding or None.

The thresholds are far from the values of sound runs, so a finding is worth reading. docs/doctor.md lists them, and
``benchmarks/doctor.py`` tests each rule on runs with its problem and all rules on sound runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.data import count
from reinforcepp.monitoring.doctor.finding import Finding
from reinforcepp.monitoring.doctor.trends import MIN_STEPS, heldout_change, reward_rises, trend_of
from reinforcepp.monitoring.run_record import RunRecord

HIGH_KL = 1.0  # nats per token; aligned models end at a few tenths
ZERO_KL = 1e-6  # rounding errors alone reach this
TINY_KL = 1e-4
MIN_LEARNING_RATE_SUM = 1e-4  # Adam moves a weight by up to the learning rate per step; weights are some hundredths
ENTROPY_FACTOR = 0.15
LENGTH_FACTORS = (0.5, 1.75)
REPEATED_RISE = 0.1
DISTINCT_FACTOR = 0.5
NO_SIGNAL_RATIO = 0.5
TOP_RATIO, CLIPPED_RATIO = 0.9, 0.2
TRUNCATED_RATIO = 0.3
OUT_OF_TURNS = 0.95
FAILED_RATIO = 0.1
SPIKE_FACTOR, SPIKE_RATIO = 10.0, 0.02
SAMPLING_GAP = 0.1
DROPPED_RATIO = 0.5
MIN_ACCURACY, MIN_PAIRS = 0.6, 20
MAX_LENGTH_CORRELATION = 0.6
MIN_PROMPTS, MAX_EPOCHS = 64, 30

Rule = Callable[[RunRecord], Finding | None]


def kl_explosion(run: RunRecord) -> Finding | None:
    """Find a policy far from the reference policy."""
    kl = trend_of(run.metrics, "kl")
    limit = run.settings.get("kl_limit") or math.inf
    over = [int(m["step"]) for m in run.metrics if m.get("kl", 0.0) > limit]
    if not over and (kl is None or kl.late <= HIGH_KL):
        return None
    evidence = f"KL to the reference policy is {kl.late:.2f} nats per token over the last steps." if kl else ""
    if over:
        evidence = f"In step {over[0]} the KL exceeded kl_limit {limit:g}. {evidence}".strip()
    return Finding(
        "kl_explosion",
        "error",
        "KL to the reference policy is too high",
        evidence,
        "The learning rate is too high for the KL penalty, or the reward favors text that the reference policy never generates.",
        "Halve learning_rate, raise kl_coef two to five times, or set kl_target 0.05. Read the highest-reward samples.",
    )


def kl_inert(run: RunRecord) -> Finding | None:
    """Find a KL that stays at zero although the policy is trained."""
    values = run.series("kl")
    if len(values) < MIN_STEPS or max(values) > ZERO_KL or sum(run.series("learning_rate")) < MIN_LEARNING_RATE_SUM:
        return None
    if no_signal(run) is not None:  # this explains a KL of zero
        return None
    return Finding(
        "kl_inert",
        "error",
        "KL to the reference policy stays at zero",
        f"At most {max(values):.1e} nats per token in {len(values)} steps, although the learning rate moves the weights.",
        "The reference policy is the trained model itself, so the KL penalty has no effect, or no updates are made (all "
        "skipped, or all advantages are zero).",
        "Pass the trainer a model that nothing else references, check grad_norm and skipped_updates, and start again.",
    )


def entropy_collapse(run: RunRecord) -> Finding | None:
    """Find a policy without exploration."""
    entropy = trend_of(run.metrics, "entropy")
    if entropy is None or entropy.early <= 0 or entropy.factor > ENTROPY_FACTOR:
        return None
    return Finding(
        "entropy_collapse",
        "error",
        "Entropy collapse",
        f"Entropy fell from {entropy.early:.3g} to {entropy.late:.3g} nats per token.",
        "Updates are too large, or one phrase satisfies the reward.",
        "Lower learning_rate, raise kl_coef, sample at temperature 1, or add more varied prompts.",
    )


def length_change(run: RunRecord) -> Finding | None:
    """Find responses that become much longer or much shorter."""
    length = trend_of(run.metrics, "completions/mean_length")
    if length is None or LENGTH_FACTORS[0] <= length.factor <= LENGTH_FACTORS[1]:
        return None
    grows = length.factor > 1
    return Finding(
        "length_drift" if grows else "length_collapse",
        "warning",
        f"Responses become much {'longer' if grows else 'shorter'}",
        f"Mean length was {length.early:.0f} tokens at first and is {length.late:.0f} now.",
        f"The reward favors {'length' if grows else 'brevity'}. Most reward models learn this from their data.",
        "Check reward against length in the report. Add a length penalty, balance the lengths in the preference data, or raise "
        f"kl_coef.{' Limit max_new_tokens.' if grows else ''}",
    )


def reward_hacking(run: RunRecord) -> Finding | None:
    """Find a training reward that rises while the responses get worse."""
    reward, judge = heldout_change(run.evaluations, "reward"), heldout_change(run.evaluations, "judge")
    fix = (
        "Read the highest-reward samples and find their common flaw. Fix the reward (preference pairs that reject the flaw, or "
        "a rule against it), raise kl_coef, or stop earlier (eval_every, keep_best)."
    )
    title = "Reward hacking: the reward rises while the responses get worse"
    cause = "The policy has found a flaw that the reward favors."
    if judge is not None:
        rose = reward_rises(run.metrics, _completions(run)) or (reward is not None and reward.outcome == "improved")
        if not rose or judge.outcome != "regressed":
            return None
        evidence = f"The judge's held-out mean changed by {judge.interval}, while the reward rose."
        return Finding("reward_hacking", "error", title, evidence, cause, fix)
    if not reward_rises(run.metrics, _completions(run)):
        return None
    trends = []
    repeated, distinct = (trend_of(run.metrics, f"completions/{name}_ratio") for name in ("repeated", "distinct"))
    if repeated is not None and repeated.change > REPEATED_RISE:
        trends.append(f"repeated word 4-grams rose from {repeated.early:.0%} to {repeated.late:.0%} of a response")
    if distinct is not None and distinct.factor < DISTINCT_FACTOR:
        trends.append(f"distinct responses fell from {distinct.early:.0%} to {distinct.late:.0%} of a batch")
    if not trends:
        return None
    return Finding("reward_hacking", "error", title, f"The reward rose, and {' and '.join(trends)}.", cause, fix)


def no_signal(run: RunRecord) -> Finding | None:
    """Find rewards that don't distinguish responses."""
    groups, spread = trend_of(run.metrics, "frac_reward_zero_std"), trend_of(run.metrics, "reward_std")
    spec = ESTIMATORS.get(run.settings.get("estimator", ""))
    if (spec is None or spec.grouped) and groups is not None and groups.late > NO_SIGNAL_RATIO:
        evidence = f"In {groups.late:.0%} of the groups, all completions have the same reward."
    elif spread is not None and spread.late <= 1e-6 * max(1.0, abs(run.series("reward")[-1])):
        evidence = "All completions of a batch have the same reward."
    else:
        return None
    return Finding(
        "no_signal",
        "error",
        "Rewards don't distinguish responses",
        evidence,
        "The reward is constant, all prompts are too easy or too hard, or all completions of a prompt are alike.",
        "Check the reward on a few responses by hand. Use other prompts, a higher temperature, a larger num_generations, "
        "dynamic_sampling, or estimator reinforce_plus_plus, which compares the whole batch.",
    )


def reward_saturated(run: RunRecord) -> Finding | None:
    """Find rewards that are clipped or mostly at their maximum."""
    top, clipped = trend_of(run.metrics, "reward_top_ratio"), trend_of(run.metrics, "reward_clipped_ratio")
    if clipped is not None and clipped.late > CLIPPED_RATIO:
        evidence = f"The setting reward_clip {run.settings.get('reward_clip')} clips {clipped.late:.0%} of the rewards."
        fix = "Raise or omit reward_clip. Advantages are normalized anyway."
    elif top is not None and top.late > TOP_RATIO and no_signal(run) is None:
        evidence = f"{top.late:.0%} of the completions have the highest reward of their batch."
        fix = "Use harder prompts or a finer-grained reward, because this one gives little more signal."
    else:
        return None
    return Finding(
        "reward_saturated",
        "warning",
        "The reward is saturated",
        evidence,
        "Better responses get no higher reward.",
        fix,
    )


def truncation(run: RunRecord) -> Finding | None:
    """Find many truncated completions."""
    clipped = trend_of(run.metrics, "completions/clipped_ratio")
    if clipped is None or clipped.late <= TRUNCATED_RATIO or out_of_turns(run) is not None:
        return None
    return Finding(
        "truncation",
        "warning",
        "Many completions are truncated",
        f"{clipped.late:.0%} of the completions reach max_new_tokens {run.settings.get('max_new_tokens', '')}".rstrip()
        + ".",
        "The limit is too low, or the policy doesn't learn to finish because the reward rarely sees a finished response.",
        "Raise max_new_tokens, or start from a fine-tuned model that finishes its responses.",
    )


def out_of_turns(run: RunRecord) -> Finding | None:
    """Find an environment in which nearly all episodes use all turns without an end."""
    turns, clipped = trend_of(run.metrics, "episodes/mean_turns"), trend_of(run.metrics, "completions/clipped_ratio")
    limit = run.settings.get("max_turns")
    if turns is None or clipped is None or not limit:
        return None
    if turns.late < OUT_OF_TURNS * limit or clipped.late < OUT_OF_TURNS:
        return None
    return Finding(
        "out_of_turns",
        "warning",
        "Episodes run out of turns",
        f"Episodes have {turns.late:.1f} of max_turns {limit} turns, and {clipped.late:.0%} of them end without done.",
        "The limit is too low for the task, the environment doesn't return done, or the policy repeats the same message.",
        "Read the conversations in the report. Then raise max_turns, return done, or end an episode that makes no progress.",
    )


def failed_episodes(run: RunRecord) -> Finding | None:
    """Find many episodes that failed, so that they aren't trained on."""
    failed = trend_of(run.metrics, "episodes/failed")
    if failed is None or failed.late <= FAILED_RATIO * _completions(run):
        return None
    return Finding(
        "failed_episodes",
        "warning",
        "Many episodes fail",
        f"{failed.late:.1f} of {_completions(run)} episodes per step fail.",
        "The environment raises, hangs, or returns an unusable value.",
        "Read the reasons in the report or in failed_episodes.jsonl, and correct the environment or raise environment_timeout.",
    )


def tools_unused(run: RunRecord) -> Finding | None:
    """Find a policy with tools that doesn't call them."""
    calls = trend_of(run.metrics, "tools/call_frequency")
    if calls is None or calls.late > 0:
        return None
    return Finding(
        "tools_unused",
        "warning",
        "The policy doesn't call its tools",
        f"0 calls over the last steps ({calls.early:.2g} per episode at first).",
        "The prompt doesn't ask for calls, the model doesn't know the format of calls, or the reward is as high without them.",
        "Say in the prompt when to call a tool, use a model that was trained to call tools, or run SFT on examples of calls.",
    )


def gradient_spikes(run: RunRecord) -> Finding | None:
    """Find steps with far larger gradients than the others, or skipped updates."""
    norms = run.series("grad_norm")
    skipped = sum(run.series("skipped_updates"))
    if len(norms) < MIN_STEPS and not skipped:
        return None
    usual = median(norms) if norms else 0.0
    limit = max(SPIKE_FACTOR * usual, run.settings.get("max_grad_norm", 1.0))
    spikes = [int(m["step"]) for m in run.metrics if m.get("grad_norm", 0.0) > limit]
    if not skipped and len(spikes) < max(2, math.ceil(SPIKE_RATIO * len(norms))):
        return None
    evidence = [f"{count(int(skipped), 'skipped update')} because of unusable values"] if skipped else []
    if spikes:
        evidence.append(
            f"{len(spikes)} steps exceed {SPIKE_FACTOR:g} times the median gradient norm {usual:.3g} (first in step {spikes[0]})"
        )
    return Finding(
        "gradient_spikes",
        "warning",
        "Gradient spikes",
        f"{' and '.join(evidence)}.",
        "The learning rate is too high, batches are too small, or some rewards or texts are outliers.",
        "Lower learning_rate, raise batch_size, set reward_clip, or lower max_grad_norm. Check the completions of those steps.",
    )


def learning_rate_low(run: RunRecord) -> Finding | None:
    """Find a policy that hardly changes."""
    kl, rates = trend_of(run.metrics, "kl"), run.series("learning_rate")
    if kl is None or kl.late >= TINY_KL or kl_inert(run) is not None or no_signal(run) is not None:
        return None
    if reward_rises(run.metrics, _completions(run)):
        return None
    return Finding(
        "learning_rate_low",
        "warning",
        "The policy hardly changes",
        f"KL to the reference policy is {kl.late:.1e} nats per token after {len(rates)} steps, and the reward hasn't risen.",
        f"The learning rate of up to {max(rates):.1g} is too low for this number of steps.",
        "Raise learning_rate tenfold (1e-6 to 1e-5 is usual for full fine-tuning of models with billions of parameters, 1e-4 for "
        "small models), or train longer.",
    )


def engine_out_of_step(run: RunRecord) -> Finding | None:
    """Find an engine that samples from a different distribution than the trained policy."""
    gap = trend_of(run.metrics, "sampling/logprob_gap_mean")
    if gap is None or gap.late <= SAMPLING_GAP:
        return None
    return Finding(
        "engine_out_of_step",
        "error",
        "The rollout engine is out of sync with the trainer",
        f"Its log-probabilities differ from the trainer's by {gap.late:.2g} nats per token ({gap.early:.2g} at first).",
        "The engine has old weights, a different precision, or different sampling settings.",
        "Check whether the gap disappears with --rollout transformers. Lower sync_check_every to detect its start. Keep "
        "importance_correction on.",
    )


def trust_region(run: RunRecord) -> Finding | None:
    """Find a trust region that most completions are outside of."""
    dropped = trend_of(run.metrics, "sampling/trust_region_dropped_ratio")
    if dropped is None or dropped.late <= DROPPED_RATIO or engine_out_of_step(run) is not None:
        return None
    return Finding(
        "trust_region",
        "warning",
        "The trust region drops most completions",
        f"{dropped.late:.0%} of the completions have no policy loss ({dropped.early:.0%} at first).",
        "The policy moves too far between sampling and training, or importance_max_kl is below the engine's rounding errors.",
        "Lower staleness or learning_rate, or raise importance_max_kl.",
    )


def reward_model(run: RunRecord) -> Finding | None:
    """Find a reward model that is hardly better than chance or length-biased."""
    for card in run.reward_cards:
        metrics = card.get("figures") or {}
        if metrics.get("pairs", 0) < MIN_PAIRS:
            continue
        accuracy, longer = metrics["accuracy"], metrics["longer_wins"]
        evidence = f"Held-out accuracy {accuracy:.2f} on {metrics['pairs']} pairs"
        fix = (
            "Train it on more or cleaner pairs (reinforcepp lint finds problems in them), or from a larger base model."
        )
        if accuracy < MIN_ACCURACY:
            return Finding(
                "reward_model_chance",
                "error",
                "The reward model is hardly better than chance",
                f"{evidence}.",
                "The pairs are too few or contradictory, the training is too short, or the base model is too small.",
                fix,
            )
        if metrics["length_correlation"] > MAX_LENGTH_CORRELATION and longer > MIN_ACCURACY:
            return Finding(
                "reward_model_length",
                "warning",
                "The reward model is length-biased",
                f"{evidence}, but the correlation of score and length is {metrics['length_correlation']:+.2f}, and the "
                f"length-only baseline has accuracy {longer:.2f}.",
                "In its data, the better responses are the longer ones.",
                f"Balance the lengths of chosen and rejected responses. {fix}",
            )
    return None


def few_prompts(run: RunRecord) -> Finding | None:
    """Find prompts that repeat often."""
    prompts = run.facts.get("prompts")
    epochs = run.metrics[-1].get("epoch", 0.0) if run.metrics else 0.0
    if not prompts or (prompts >= MIN_PROMPTS and epochs <= MAX_EPOCHS):
        return None
    return Finding(
        "few_prompts",
        "info",
        "Few prompts",
        f"{prompts} prompts were used {epochs:.0f} times each so far.",
        "The policy can overfit these prompts, and the held-out prompts, if any, are too few to show it.",
        "Add prompts, which need no responses. Use several hundred at least.",
    )


RULES: tuple[Rule, ...] = (
    reward_hacking,
    kl_explosion,
    kl_inert,
    entropy_collapse,
    engine_out_of_step,
    trust_region,
    no_signal,
    reward_model,
    length_change,
    truncation,
    out_of_turns,
    failed_episodes,
    tools_unused,
    reward_saturated,
    gradient_spikes,
    learning_rate_low,
    few_prompts,
)


def _completions(run: RunRecord) -> int:
    """Return the completions per step."""
    return int(run.settings.get("batch_size", 1)) * int(run.settings.get("num_generations", 1))
