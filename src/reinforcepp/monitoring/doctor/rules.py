"""The rules, one function each: a run's record to a finding, or None.

The bounds are wide of what sound runs show, so that a finding is worth reading: docs/doctor.md has them in a table, and
``benchmarks/doctor.py`` tries every rule on trainings with its fault and all rules on sound ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from reinforcepp.monitoring.doctor.finding import Finding
from reinforcepp.monitoring.doctor.trends import FEWEST, course, since_start, surely_rises
from reinforcepp.monitoring.run_record import RunRecord

KL_FAR = 1.0  # nats per token; aligned models end at a few tenths
KL_NONE = 1e-6  # what rounding alone gives
KL_TINY = 1e-4
LR_PATH = 1e-4  # Adam moves a weight by up to the learning rate per step; weights are some hundredths
ENTROPY_SHARE = 0.15
LENGTH_FACTORS = (0.5, 1.75)
REPEATED_RISE = 0.1
DISTINCT_SHARE = 0.5
NO_SIGNAL = 0.5
AT_TOP, CLIPPED = 0.9, 0.2
TRUNCATED = 0.3
SPIKE, SPIKES = 10.0, 0.02
GAP = 0.1
ACCURACY, ENOUGH_PAIRS = 0.6, 20
LENGTH_CORRELATION = 0.6
FEW_PROMPTS, OFTEN = 64, 30

Rule = Callable[[RunRecord], Finding | None]


def kl_explosion(run: RunRecord) -> Finding | None:
    """The policy is far from where it started."""
    kl = course(run.metrics, "kl")
    limit = run.settings.get("kl_limit") or math.inf
    over = [int(m["step"]) for m in run.metrics if m.get("kl", 0.0) > limit]
    if not over and (kl is None or kl.late <= KL_FAR):
        return None
    evidence = f"KL to the start is {kl.late:.2f} nats per token over the last steps." if kl else ""
    if over:
        evidence = f"In step {over[0]} the KL went over kl_limit {limit:g}. {evidence}".strip()
    return Finding(
        "kl_explosion",
        "serious",
        "The policy has run far from its start",
        evidence,
        "The learning rate is too high for the KL penalty, or the reward pays for text that the start would never write.",
        "Halve learning_rate, raise kl_coef two to five times, or set kl_target 0.05; read the best-rewarded samples.",
    )


def kl_inert(run: RunRecord) -> Finding | None:
    """The KL stays at zero although the policy is trained."""
    values = run.series("kl")
    if len(values) < FEWEST or max(values) > KL_NONE or sum(run.series("learning_rate")) < LR_PATH:
        return None
    if no_signal(run) is not None:  # that explains it
        return None
    return Finding(
        "kl_inert",
        "serious",
        "The KL to the start stays at zero",
        f"At most {max(values):.1e} nats per token in {len(values)} steps, with a learning rate that moves the weights.",
        "The reference is the trained model itself, so it moves along, and nothing holds the policy back; or no update is "
        "made (every one left out, or all advantages zero).",
        "Give the trainer a model that nothing else holds, look at grad_norm and skipped_updates, and start again.",
    )


def entropy_collapse(run: RunRecord) -> Finding | None:
    """The policy has stopped trying anything."""
    entropy = course(run.metrics, "entropy")
    if entropy is None or entropy.early <= 0 or entropy.factor > ENTROPY_SHARE:
        return None
    return Finding(
        "entropy_collapse",
        "serious",
        "The policy says only one thing any more",
        f"Entropy fell from {entropy.early:.3g} to {entropy.late:.3g} nats per token.",
        "Updates are too large, or a reward that one phrase satisfies.",
        "Lower learning_rate, raise kl_coef, sample at temperature 1, or use more and more varied prompts.",
    )


def length_change(run: RunRecord) -> Finding | None:
    """Answers become much longer or much shorter."""
    length = course(run.metrics, "completions/mean_length")
    if length is None or LENGTH_FACTORS[0] <= length.factor <= LENGTH_FACTORS[1]:
        return None
    grows = length.factor > 1
    return Finding(
        "length_drift" if grows else "length_collapse",
        "warning",
        f"Answers become much {'longer' if grows else 'shorter'}",
        f"{length.early:.0f} tokens at first, {length.late:.0f} now.",
        f"The reward pays for {'length' if grows else 'brevity'}: most reward models have learned some of that from their data.",
        "Compare reward against length in the report; add a length penalty or a length-balanced reward model, or raise "
        f"kl_coef{'; cap max_new_tokens' if grows else ''}.",
    )


def reward_hacking(run: RunRecord) -> Finding | None:
    """The training reward rises while the answers get worse."""
    reward, judge = since_start(run.evaluations, "reward"), since_start(run.evaluations, "judge")
    cure = (
        "Read the highest-rewarded samples: what they share is what the reward overpays. Mend the reward (more pairs with "
        "that flaw rejected, or a rule against it), raise kl_coef, or stop earlier (eval_every, keep_best)."
    )
    title = "The reward rises while the answers get worse"
    cause = "The policy has found what the reward overpays."
    if judge is not None:
        rose = surely_rises(run.metrics, _completions(run)) or (reward is not None and reward.shown == "better")
        if not rose or judge.shown != "worse":
            return None
        evidence = (
            f"The judge's held-out mean changed by {judge.gain:+.3f} (± {2 * judge.error:.3f}), while the reward rose."
        )
        return Finding("reward_hacking", "serious", title, evidence, cause, cure)
    if not surely_rises(run.metrics, _completions(run)):
        return None
    signs = []
    repeated, distinct = (course(run.metrics, f"completions/{name}_ratio") for name in ("repeated", "distinct"))
    if repeated is not None and repeated.change > REPEATED_RISE:
        signs.append(f"repeated runs of words rose from {repeated.early:.0%} to {repeated.late:.0%} of an answer")
    if distinct is not None and distinct.factor < DISTINCT_SHARE:
        signs.append(f"different answers fell from {distinct.early:.0%} to {distinct.late:.0%} of a batch")
    if not signs:
        return None
    return Finding("reward_hacking", "serious", title, f"The reward rose, and {' and '.join(signs)}.", cause, cure)


def no_signal(run: RunRecord) -> Finding | None:
    """Rewards don't tell answers apart."""
    groups, spread = course(run.metrics, "frac_reward_zero_std"), course(run.metrics, "reward_std")
    if groups is not None and groups.late > NO_SIGNAL:
        evidence = f"In {groups.late:.0%} of the groups all completions have the same reward."
    elif spread is not None and spread.late <= 1e-6 * max(1.0, abs(run.series("reward")[-1])):
        evidence = "All completions of a batch have the same reward."
    else:
        return None
    return Finding(
        "no_signal",
        "serious",
        "Rewards don't tell answers apart",
        evidence,
        "The reward is constant, the prompts are all too easy or too hard for it, or the samples of a prompt are all alike.",
        "Check the reward on a few answers by hand; use other prompts, a higher temperature, more num_generations, or the "
        "estimator reinforce_plus_plus, which compares over the whole batch.",
    )


def reward_saturated(run: RunRecord) -> Finding | None:
    """Rewards are cut off, or most are as high as they get."""
    top, clipped = course(run.metrics, "reward_top_ratio"), course(run.metrics, "reward_clipped_ratio")
    if clipped is not None and clipped.late > CLIPPED:
        evidence = f"The setting reward_clip {run.settings.get('reward_clip')} cuts {clipped.late:.0%} of the rewards."
        cure = "Raise reward_clip, or leave it out: advantages are normalised anyway."
    elif top is not None and top.late > AT_TOP and no_signal(run) is None:
        evidence = f"{top.late:.0%} of the completions have the highest reward of their batch."
        cure = "Use harder prompts or a finer reward; what is left to learn from this one is little."
    else:
        return None
    return Finding(
        "reward_saturated",
        "warning",
        "The reward is at its limit",
        evidence,
        "Better answers get no more reward.",
        cure,
    )


def truncation(run: RunRecord) -> Finding | None:
    """Many answers are cut off."""
    clipped = course(run.metrics, "completions/clipped_ratio")
    if clipped is None or clipped.late <= TRUNCATED:
        return None
    return Finding(
        "truncation",
        "warning",
        "Many answers are cut off",
        f"{clipped.late:.0%} of the completions end at max_new_tokens {run.settings.get('max_new_tokens', '')}.".replace(
            " .", "."
        ),
        "The limit is too low, or the policy doesn't learn to end: a reward that never sees an ending can't pay for it.",
        "Raise max_new_tokens, or start from a model that ends its answers (a fine-tuned one).",
    )


def gradient_spikes(run: RunRecord) -> Finding | None:
    """Single steps with far larger gradients than the others, or updates left out."""
    norms = run.series("grad_norm")
    skipped = sum(run.series("skipped_updates"))
    if len(norms) < FEWEST and not skipped:
        return None
    usual = median(norms) if norms else 0.0
    limit = max(SPIKE * usual, run.settings.get("max_grad_norm", 1.0))
    spikes = [int(m["step"]) for m in run.metrics if m.get("grad_norm", 0.0) > limit]
    if not skipped and len(spikes) < max(2, math.ceil(SPIKES * len(norms))):
        return None
    told = [f"{int(skipped)} updates were left out because a value could not be used"] if skipped else []
    if spikes:
        told.append(
            f"{len(spikes)} steps have a gradient over {SPIKE:g} times the usual {usual:.3g} (first: step {spikes[0]})"
        )
    return Finding(
        "gradient_spikes",
        "warning",
        "The gradient jumps",
        f"{' and '.join(told)}.",
        "The learning rate is too high, batches are too small, or some rewards or texts are far out.",
        "Lower learning_rate, raise batch_size, set reward_clip, or lower max_grad_norm; look at the completions of those steps.",
    )


def learning_rate_low(run: RunRecord) -> Finding | None:
    """The policy hardly moves."""
    kl, rates = course(run.metrics, "kl"), run.series("learning_rate")
    if kl is None or kl.late >= KL_TINY or kl_inert(run) is not None or no_signal(run) is not None:
        return None
    if surely_rises(run.metrics, _completions(run)):
        return None
    return Finding(
        "learning_rate_low",
        "warning",
        "The policy hardly changes",
        f"KL to the start is {kl.late:.1e} nats per token after {len(rates)} steps, and the reward has not risen.",
        f"The learning rate, at most {max(rates):.1g}, is too low for so few steps.",
        "Raise learning_rate ten times (1e-6 to 1e-5 is usual for whole models of billions of parameters, 1e-4 for small "
        "ones), or train longer.",
    )


def engine_out_of_step(run: RunRecord) -> Finding | None:
    """The engine samples from another distribution than the trainer trains."""
    gap = course(run.metrics, "sampling/logprob_gap_mean")
    if gap is None or gap.late <= GAP:
        return None
    return Finding(
        "engine_out_of_step",
        "serious",
        "The rollout engine is out of step with the trainer",
        f"Its log-probabilities differ by {gap.late:.2g} per token from the trainer's ({gap.early:.2g} at first).",
        "The engine has old weights, another precision, or samples with other settings.",
        "Use --rollout transformers to see whether it goes away; lower sync_check_every to catch it where it begins; keep "
        "importance_correction on.",
    )


def reward_model(run: RunRecord) -> Finding | None:
    """The trained reward model is no better than a coin, or judges by length."""
    for card in run.reward_cards:
        figures = card.get("figures") or {}
        if figures.get("pairs", 0) < ENOUGH_PAIRS:
            continue
        accuracy, longer = figures["accuracy"], figures["longer_wins"]
        told = f"Held-out accuracy {accuracy:.2f} on {figures['pairs']} pairs"
        cure = "Train it on more, or cleaner, pairs (reinforcepp lint finds what is wrong with them), or from a larger model."
        if accuracy < ACCURACY:
            return Finding(
                "reward_model_chance",
                "serious",
                "The reward model is hardly better than a coin",
                f"{told}.",
                "Too few or contradictory pairs, too short a training, or a base model that is too small.",
                cure,
            )
        if figures["length_correlation"] > LENGTH_CORRELATION and longer > ACCURACY:
            return Finding(
                "reward_model_length",
                "warning",
                "The reward model judges by length",
                f"{told}, but the correlation of score and length is {figures['length_correlation']:+.2f}, and always "
                f"choosing the longer answer would be right in {longer:.0%}.",
                "In its data the better answers are the longer ones.",
                f"Balance the lengths of chosen and rejected answers. {cure}",
            )
    return None


def few_prompts(run: RunRecord) -> Finding | None:
    """The same prompts come back again and again."""
    prompts = run.facts.get("prompts")
    epochs = run.metrics[-1].get("epoch", 0.0) if run.metrics else 0.0
    if not prompts or (prompts >= FEW_PROMPTS and epochs <= OFTEN):
        return None
    return Finding(
        "few_prompts",
        "note",
        "There are few prompts",
        f"{prompts} prompts, each used {epochs:.0f} times so far.",
        "The policy can learn these prompts by heart, and the held-out ones, if there are any, are too few to show it.",
        "Add prompts: they need no answers. Some hundreds are a beginning.",
    )


RULES: tuple[Rule, ...] = (
    reward_hacking,
    kl_explosion,
    kl_inert,
    entropy_collapse,
    engine_out_of_step,
    no_signal,
    reward_model,
    length_change,
    truncation,
    reward_saturated,
    gradient_spikes,
    learning_rate_low,
    few_prompts,
)


def _completions(run: RunRecord) -> int:
    """Completions per step."""
    return int(run.settings.get("batch_size", 1)) * int(run.settings.get("num_generations", 1))
