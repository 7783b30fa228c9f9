"""The math against hand-computed goldens, and against naive loops on random shapes."""

import math
import random
from itertools import pairwise
from statistics import mean, stdev

import pytest
import torch
from torch.profiler import profile

from reinforcepp.algorithm.advantages import clip_rewards, compute_advantages, returns_to_go, token_rewards
from reinforcepp.algorithm.critic import compute_gae, value_loss
from reinforcepp.algorithm.discount import discounted_sums
from reinforcepp.algorithm.groups import group_advantages
from reinforcepp.algorithm.importance import importance_weights
from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.loss_types import LOSS_TYPES, Objective
from reinforcepp.algorithm.losses import policy_loss
from reinforcepp.algorithm.means import StepSize, masked_mean
from reinforcepp.algorithm.moments import combine_moments, moment_sums, normalize
from reinforcepp.algorithm.preferences import preference_loss
from reinforcepp.errors import ConfigError

NAN = float("nan")


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32)


def mask_of(lengths, width=None):
    width = width or max(lengths)
    return tensor([[1.0] * n + [0.0] * (width - n) for n in lengths])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.float(), tensor(expected), rtol=0, atol=tolerance)


# --- goldens --------------------------------------------------------------------------------------------------------

G1 = {
    "rewards_B": tensor([1, -1]),
    "kl_BT": tensor([[0.2, -0.1, 0.4], [-0.2, 0.1, -6]]),
    "mask_BT": tensor([[1, 1, 1], [1, 1, 0]]),
}


def test_g1_returns_and_advantages_with_kl():
    advantages, returns = compute_advantages(**G1, kl_coef=0.1)
    close(returns, [[0.95, 0.97, 0.96], [-0.99, -1.01, 0]])
    close(advantages, [[0.806047, 0.826875, 0.816461], [-1.214278, -1.235106, 0]])


def test_g1_discounted():
    _, returns = compute_advantages(**G1, kl_coef=0.1, gamma=0.9)
    close(returns, [[0.7666, 0.874, 0.96], [-0.889, -1.01, 0]])


def baseline(**changes):
    arguments = {
        "rewards_B": tensor([1, 0, 1, 1]),
        "kl_BT": None,
        "mask_BT": mask_of([3, 1, 2, 2]),
        "kl_coef": 0.0,
        "estimator": "reinforce_plus_plus_baseline",
        "group_ids_B": torch.tensor([7, 7, 9, 9]),
    }
    return compute_advantages(**(arguments | changes))


def test_g2_baseline_weighted_by_tokens():
    advantages, _ = baseline()
    close(advantages[:, 0], [1.133893, -1.889822, -0.377964, -0.377964])


def test_g2_baseline_weighted_by_sequences():
    advantages, _ = baseline(normalize_over="sequences")
    close(advantages[:, 0], [1.414214, -1.414214, 0, 0])


def test_g3_normalization_is_global_over_ranks():
    rewards, mask = tensor([3, 1, -1, -3]), mask_of([2, 1, 2, 2])
    returns = returns_to_go(token_rewards(rewards, None, mask, 0.0), mask)
    ranks = [(returns[:2], mask[:2]), (returns[2:], mask[2:])]
    global_moments = combine_moments(sum(moment_sums(*rank) for rank in ranks))
    parts = [normalize(*rank, global_moments) for rank in ranks]
    close(torch.cat(parts)[:, 0], [1.333946, 0.485071, -0.363803, -1.212678])


def test_g4_returns_skip_masked_tokens():
    returns = returns_to_go(tensor([[0, 0, 1]]), tensor([[1, 0, 1]]), gamma=0.5)
    close(returns, [[0.5, 0, 1]])


TWO_TURNS = tensor([[1, 1, 0, 1, 1]])


def test_a_discount_per_turn_applies_only_between_turns():
    reward, arguments = tensor([1]), {"kl_coef": 0.0, "gamma": 0.5}
    _, per_token = compute_advantages(reward, None, TWO_TURNS, **arguments)
    close(per_token, [[0.125, 0.25, 0, 0.5, 1]])
    _, per_turn = compute_advantages(reward, None, TWO_TURNS, discount_per="turns", **arguments)
    close(per_turn, [[0.5, 0.5, 0, 1, 1]])


def test_turns_are_paid_at_their_own_last_token():
    """R = 3, of which the first turn earned 2: token rewards [0, 2, 0, 0, 1], whatever the masked slots hold."""
    turns = tensor([[0, 2, NAN, 0, 0]])
    close(token_rewards(tensor([3]), None, TWO_TURNS, 0.0, turns), [[0, 2, 0, 0, 1]])
    arguments = {"kl_BT": None, "mask_BT": TWO_TURNS, "kl_coef": 0.0, "turn_rewards_BT": turns}
    close(compute_advantages(tensor([3]), **arguments)[1], [[3, 3, 0, 1, 1]])
    _, per_token = compute_advantages(tensor([3]), gamma=0.5, **arguments)
    close(per_token, [[1.125, 2.25, 0, 0.5, 1]])  # 2 + .5 · .5, then half of it
    _, per_turn = compute_advantages(tensor([3]), gamma=0.5, discount_per="turns", **arguments)
    close(per_turn, [[2.5, 2.5, 0, 1, 1]])  # 2 + .5 · 1


def test_gae_discounts_per_turn_and_decays_by_lambda_per_token():
    """Deltas -.25 (0 + .25 - .5), 0 (0 + .5 · .5 - .25) and .5 (1 - .5); A = .5, 0 + .5 · .5 · .5, -.25 + .5 · .125."""
    values = tensor([[0.5, 0.25, NAN, 0.5]])
    _, returns = compute_advantages(
        tensor([1]),
        None,
        tensor([[1, 1, 0, 1]]),
        kl_coef=0.0,
        gamma=0.5,
        discount_per="turns",
        estimator="ppo",
        values_BT=values,
        gae_lambda=0.5,
    )
    close(returns, [[-0.1875 + 0.5, 0.125 + 0.25, 0, 0.5 + 0.5]])


def test_a_group_baseline_compares_the_sums_of_the_turns():
    one, _ = baseline()
    other, _ = baseline(turn_rewards_BT=tensor([[1, 0, 0], [0, 0, 0], [0.5, 0, 0], [0, 0, 0]]))
    close(one, other.tolist(), 0)


G5_RATIOS, G5_ADVANTAGES = tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 4]]), tensor([[1, 1, -1, -1, 2, -1]])


@pytest.mark.parametrize(("dual_clip", "expected"), [(None, 0.4), (3.0, 0.233333)])
def test_g5_clipped_surrogate(dual_clip, expected):
    loss, stats = policy_loss(
        G5_RATIOS.log(), torch.zeros(1, 6), G5_ADVANTAGES, torch.ones(1, 6), Objective(dual_clip=dual_clip)
    )
    close(loss, expected)
    close(stats["clip_ratio/region_mean"], 1 / 3)


def test_g5_token_losses():
    for i, expected in enumerate([-1.2, -0.5, 1.5, 0.8, -2.2, 4.0]):
        only = torch.zeros(1, 6)
        only[0, i] = 1
        loss, _ = policy_loss(G5_RATIOS.log(), torch.zeros(1, 6), G5_ADVANTAGES, only)
        close(loss, expected)


def test_clip_bounds_are_not_swapped():
    ratios, advantages = tensor([[1.25, 0.75]]).log(), tensor([[1, -1]])
    loss, _ = policy_loss(
        ratios, torch.zeros(1, 2), advantages, torch.ones(1, 2), Objective(clip_low=0.1, clip_high=0.3)
    )
    close(loss, (-1.25 + 0.9) / 2)


def test_g6_reward_is_clipped_before_centering():
    clipped = clip_rewards(tensor([30, 20]), (-10, 10))
    close(group_advantages(clipped, torch.tensor([0, 0]), "group_mean", scaled=False), [0, 0])
    assert clip_rewards(tensor([30]), None) == 30


def test_g7_token_mean_over_the_whole_step():
    close(masked_mean(tensor([[1, 2, 0], [3, 4, 5]]), mask_of([2, 3])), 3.0)
    parts = [tensor([[1, 2]]), tensor([[3, 4, 5, 6, 7]])]
    close(sum(masked_mean(p, torch.ones_like(p), denominator=7) for p in parts), 4.0)


@pytest.mark.parametrize(
    ("mode", "weights", "expected"),
    [("tis", [1.105171, 5, 0.5, 1.051271], -1.914111), ("icepop", [1.105171, 0, 0, 1.051271], -0.539111)],
)
def test_g8_correction_for_samples_of_another_engine(mode, weights, expected):
    old, rollout = tensor([[-1, -2, -0.5, -1]]), tensor([[-1.1, -4, 0.5, -1.05]])
    actual = importance_weights(old, rollout, torch.ones(1, 4), mode=mode, low=0.5, high=5)
    close(actual, [weights])
    loss, _ = policy_loss(old, old, torch.ones(1, 4), torch.ones(1, 4), weights_BT=actual)
    close(loss, expected)
    assert importance_weights(old, rollout, torch.ones(1, 4), mode="off", low=0.5, high=5) is None


@pytest.mark.parametrize(
    ("kind", "values", "gradient"),
    [
        ("k1", [0.2, -0.1, 0.4], [1, 1, 1]),
        ("k2", [0.02, 0.005, 0.08], [0.2, -0.1, 0.4]),
        ("k3", [0.018731, 0.005171, 0.070320], [0.181269, -0.105171, 0.329680]),
    ],
)
def test_g9_kl_estimators_and_their_gradients(kind, values, gradient):
    logprobs = tensor([0.2, -0.1, 0.4]).requires_grad_()
    kl = kl_estimate(logprobs, torch.zeros(3), kind)
    kl.sum().backward()
    close(kl.detach(), values)
    close(logprobs.grad, gradient)


def test_k2_keeps_its_gradient_far_from_the_reference():
    logprobs = tensor([-60.0]).requires_grad_()
    kl_estimate(logprobs, torch.zeros(1), "k2").sum().backward()
    close(logprobs.grad, [-60])


def test_k3_stays_finite_far_from_the_reference():
    logprobs = tensor([-500.0]).requires_grad_()
    kl_estimate(logprobs, torch.zeros(1), "k3").sum().backward()
    assert logprobs.grad.isfinite().all()


# --- naive loops as oracle ------------------------------------------------------------------------------------------


def random_batch(seed):
    rng = random.Random(seed)
    rows, width = rng.randint(2, 9), rng.randint(1, 7)
    mask = [[float(rng.random() < 0.7) for _ in range(width)] for _ in range(rows)]
    mask[0][0] = 1.0
    kl = [[rng.gauss(0, 1) for _ in range(width)] for _ in range(rows)]
    return [rng.gauss(0, 2) for _ in range(rows)], kl, mask, rng.choice([0.0, 0.1, 1.0]), rng.choice([1.0, 0.9, 0.0])


def naive_advantages(rewards, kl, mask, kl_coef, gamma):
    returns = []
    for reward, kl_row, mask_row in zip(rewards, kl, mask, strict=True):
        sampled = [t for t, m in enumerate(mask_row) if m]
        row, following = [0.0] * len(mask_row), 0.0
        for t in reversed(sampled):
            following = (reward if t == sampled[-1] else 0.0) - kl_coef * kl_row[t] + gamma * following
            row[t] = following
        returns.append(row)
    flat = [g for row, m in zip(returns, mask, strict=True) for g, one in zip(row, m, strict=True) if one]
    mean = sum(flat) / len(flat)
    std = math.sqrt(max(sum((g - mean) ** 2 for g in flat) / len(flat), 1e-8))
    advantages = [
        [(g - mean) / std if one else 0.0 for g, one in zip(row, m, strict=True)]
        for row, m in zip(returns, mask, strict=True)
    ]
    return advantages, returns


@pytest.mark.parametrize("seed", range(30))
def test_advantages_equal_a_naive_loop(seed):
    rewards, kl, mask, kl_coef, gamma = random_batch(seed)
    actual = compute_advantages(tensor(rewards), tensor(kl), tensor(mask), kl_coef=kl_coef, gamma=gamma)
    expected = naive_advantages(rewards, kl, mask, kl_coef, gamma)
    close(actual[0], expected[0], 1e-4)
    close(actual[1], expected[1], 1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_policy_loss_equals_a_naive_loop(seed):
    _, logprobs, mask, _, _ = random_batch(seed)
    rng = random.Random(seed)
    old = [[x + rng.gauss(0, 0.3) for x in row] for row in logprobs]
    gain = [[rng.gauss(0, 1) for _ in row] for row in logprobs]
    low, high = rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)
    losses, clipped = [], 0
    for i, row in enumerate(mask):
        for t, one in enumerate(row):
            if one:
                ratio = math.exp(logprobs[i][t] - old[i][t])
                bounded = min(max(ratio, 1 - low), 1 + high)
                losses.append(-min(ratio * gain[i][t], bounded * gain[i][t]))
                clipped += bounded * gain[i][t] < ratio * gain[i][t]
    loss, stats = policy_loss(
        tensor(logprobs), tensor(old), tensor(gain), tensor(mask), Objective(clip_low=low, clip_high=high)
    )
    close(loss, sum(losses) / len(losses))
    close(stats["clip_ratio/region_mean"], clipped / len(losses))


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "rloo", "grpo"])
@pytest.mark.parametrize("seed", range(10))
def test_group_estimators_equal_a_naive_loop_after_a_shuffle(seed, estimator):
    rng = random.Random(seed)
    ids = [g for g in range(4) for _ in range(rng.randint(2, 4))]
    rng.shuffle(ids)
    rewards = [rng.gauss(0, 1) for _ in ids]
    groups = {g: [r for r, i in zip(rewards, ids, strict=True) if i == g] for g in ids}
    expected_of = {
        "reinforce_plus_plus_baseline": lambda r, g: r - mean(g),
        "rloo": lambda r, g: r - (sum(g) - r) / (len(g) - 1),
        "grpo": lambda r, g: (r - mean(g)) / (stdev(g) + 1e-4),
    }[estimator]
    expected = [expected_of(r, groups[g]) for r, g in zip(rewards, ids, strict=True)]
    lengths = [rng.randint(1, 5) for _ in ids]
    _, actual = compute_advantages(  # the returns aren't normalized over the batch
        tensor(rewards),
        None,
        mask_of(lengths),
        kl_coef=0.0,
        gamma=1.0,
        estimator=estimator,
        group_ids_B=torch.tensor(ids),
    )
    width = max(lengths)
    close(actual, [[a] * n + [0.0] * (width - n) for a, n in zip(expected, lengths, strict=True)], 1e-4)


def test_rloo_subtracts_the_kl_of_the_whole_response_and_normalizes_nothing():
    kl = tensor([[0.5, 0.5, NAN], [1, 1, 1]])
    advantages, _ = compute_advantages(
        tensor([3, 1]), kl, mask_of([2, 3]), kl_coef=0.1, estimator="rloo", group_ids_B=torch.tensor([4, 4])
    )
    close(advantages, [[2.2, 2.2, 0], [-2.2, -2.2, -2.2]])  # penalized rewards 2.9 and 0.7, each minus the other


@pytest.mark.parametrize(
    "estimator", ["rloo", "grpo", "reinforce_plus_plus_baseline", "reinforce_plus_plus", "flash_reinforce"]
)
def test_advantages_and_returns_share_no_memory(estimator):
    """A checkpoint in the middle of a step holds both."""
    advantages, returns = baseline(estimator=estimator)
    assert advantages.data_ptr() != returns.data_ptr()


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    advantages, _ = compute_advantages(
        tensor([1, 3, 10, 10]),
        None,
        mask_of([1, 2, 1, 1]),
        kl_coef=0.0,
        estimator="grpo",
        group_ids_B=torch.tensor([0, 0, 1, 1]),
    )
    scale = 1 / (math.sqrt(2) + 1e-4)
    close(advantages, [[-scale, 0], [scale, scale], [0, 0], [0, 0]])


@pytest.mark.parametrize("seed", range(30))
def test_gae_equals_a_naive_loop(seed):
    """Explicit sums of discounted deltas over the unmasked tokens."""
    _, values, mask, _, _ = random_batch(seed)
    rng = random.Random(seed)
    gamma, lam = rng.choice([1.0, 0.95]), rng.choice([1.0, 0.95, 0.0])
    token_rewards = [[rng.gauss(0, 1) for _ in row] for row in mask]
    expected = []
    for r, v, m in zip(token_rewards, values, mask, strict=True):
        positions = [t for t, one in enumerate(m) if one]
        following = [*positions[1:], None][: len(positions)]
        deltas = [
            r[t] + (gamma * v[u] if u is not None else 0.0) - v[t] for t, u in zip(positions, following, strict=True)
        ]
        row = [0.0] * len(m)
        for i, t in enumerate(positions):
            row[t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
        expected.append(row)
    actual, returns = compute_gae(tensor(token_rewards), tensor(values), tensor(mask), gamma=gamma, lam=lam)
    close(actual, expected, 1e-4)
    close(
        returns,
        [[(a + v) * m for a, v, m in zip(*rows, strict=True)] for rows in zip(expected, values, mask, strict=True)],
        1e-4,
    )


@pytest.mark.parametrize("seed", range(10))
def test_turn_discounts_and_turn_rewards_equal_a_naive_loop(seed):
    rng = random.Random(seed)
    mask = [[int(rng.random() < 0.6) for _ in range(9)] for _ in range(4)]
    turns = [[rng.gauss(0, 1) * one for one in row] for row in mask]
    rewards, gamma, expected = [rng.gauss(0, 1) for _ in mask], rng.random(), []
    for reward, turn_row, row in zip(rewards, turns, mask, strict=True):
        sampled = [t for t, one in enumerate(row) if one]
        earned = {t: turn_row[t] for t in sampled}
        if sampled:
            earned[sampled[-1]] += reward - sum(turn_row)
        discount = {t: 1.0 if u == t + 1 else gamma for t, u in pairwise(sampled)}
        returns, following = [0.0] * len(row), 0.0
        for t in reversed(sampled):
            returns[t] = following = earned[t] + discount.get(t, 1.0) * following
        expected.append(returns)
    arguments = {"kl_coef": 0.0, "gamma": gamma, "discount_per": "turns", "turn_rewards_BT": tensor(turns)}
    _, actual = compute_advantages(tensor(rewards), None, tensor(mask), **arguments)
    close(actual, expected)


def looped(values_BT, mask_BT, discount):
    """S_t = v_t + discount · S_{t+1}, token by token in float64; masked tokens pass the next sum on."""
    sums_BT, following_B = torch.zeros_like(values_BT, dtype=torch.float64), torch.zeros(len(values_BT)).double()
    for t in reversed(range(values_BT.shape[1])):
        own_B = values_BT[:, t].double() + discount * following_B
        sums_BT[:, t] = following_B = torch.where(mask_BT[:, t], own_B, following_B)
    return sums_BT


@pytest.mark.parametrize("discount", [1.0, 0.999, 0.5, 1e-6, 0.0])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 301])
def test_discounted_sums_equal_a_loop_over_tokens(discount, tokens):
    torch.manual_seed(tokens)
    values_BT, mask_BT = torch.randn(8, tokens), torch.rand(8, tokens) < torch.linspace(0, 1, 8)[:, None]
    found_BT = discounted_sums(torch.where(mask_BT, values_BT, NAN), mask_BT, discount)
    torch.testing.assert_close(found_BT.double(), looped(values_BT, mask_BT, discount), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 0.9999, 0.99, 0.5])
def test_long_sequences_keep_their_precision(gamma):
    tokens = 32768
    mask_BT = torch.ones(2, tokens, dtype=torch.bool)
    values_BT = torch.zeros(2, tokens)
    values_BT[0, -1] = 1.0  # a reward at the end, as in a training
    values_BT[1] = 1.0
    exponents = torch.arange(tokens - 1, -1, -1).double()
    sums = exponents + 1 if gamma == 1 else (1 - gamma ** (exponents + 1)) / (1 - gamma)
    found_BT = returns_to_go(values_BT, mask_BT, gamma).double()
    torch.testing.assert_close(found_BT, torch.stack([gamma**exponents, sums]), rtol=1e-6, atol=1e-37)


def test_advantages_take_few_operations_however_long_the_sequences():
    def operations(tokens):
        ones_BT = torch.ones(1, tokens)
        with profile() as profiled:
            compute_gae(ones_BT, ones_BT, ones_BT, gamma=0.9, lam=0.9)
        return len(profiled.events())

    assert operations(4096) < 2 * operations(64)


def test_gae_ignores_masked_values():
    mask = tensor([[1, 0, 1, 0]])
    result = compute_gae(tensor([[0, NAN, 1, NAN]]), tensor([[0.5, NAN, 0.25, NAN]]), mask, gamma=1.0, lam=1.0)
    close(result[0], [[0.5, 0, 0.75, 0]])
    close(result[1], [[1, 0, 1, 0]])


def test_ppo_normalizes_gae_over_the_same_rewards():
    values = tensor([[0.3, -0.2, 0.1], [0.4, 0.2, 0]])
    advantages, returns = compute_advantages(**G1, kl_coef=0.1, estimator="ppo", values_BT=values, gae_lambda=1.0)
    raw = tensor([[0.95, 0.97, 0.96], [-0.99, -1.01, 0]]) - values
    flat = raw[G1["mask_BT"].bool()]
    close(returns, [[0.95, 0.97, 0.96], [-0.99, -1.01, 0]])
    close(advantages[G1["mask_BT"].bool()], ((flat - flat.mean()) / flat.std(correction=0)).tolist())
    with pytest.raises(ConfigError, match="values_BT"):
        compute_advantages(**G1, kl_coef=0.1, estimator="ppo")


def test_the_value_loss_is_the_larger_of_the_clipped_and_unclipped_loss():
    values, old, returns = tensor([[1, 0.1, 3, 9]]), tensor([[0, 0, 0, 0]]), tensor([[2, 1, 2, 0]])
    mask = tensor([[1, 1, 1, 0]])
    # squares of (1 or .2) - 2, (.1 or .1) - 1, (3 or .2) - 2, the last masked
    close(value_loss(values, old, returns, mask, clip=0.2), (1.8**2 + 0.9**2 + 1.8**2) / 2 / 3)
    close(value_loss(values, old, returns, mask, clip=None), (1 + 0.9**2 + 1) / 2 / 3)


# --- properties (G12) -----------------------------------------------------------------------------------------------


def test_adding_a_constant_to_every_reward_changes_nothing():
    mask = mask_of([3, 1, 2])
    one, _ = compute_advantages(tensor([1, 5, -2]), None, mask, kl_coef=0.0)
    other, _ = compute_advantages(tensor([1, 5, -2]) + 1000, None, mask, kl_coef=0.0)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_permuting_rows_permutes_advantages():
    order = torch.tensor([1, 0])
    one, _ = compute_advantages(**G1, kl_coef=0.1)
    other, _ = compute_advantages(**{k: v[order] for k, v in G1.items()}, kl_coef=0.1)
    torch.testing.assert_close(one[order], other)
    shuffle = torch.tensor([2, 0, 3, 1])
    one, _ = baseline()
    other, _ = baseline(
        rewards_B=tensor([1, 0, 1, 1])[shuffle],
        mask_BT=mask_of([3, 1, 2, 2])[shuffle],
        group_ids_B=torch.tensor([7, 7, 9, 9])[shuffle],
    )
    torch.testing.assert_close(one[shuffle], other)


def test_more_padding_and_nan_in_masked_slots_change_nothing():
    def padded(values, fill):
        return torch.cat([values, torch.full((2, 4), fill)], dim=1)

    mask = padded(G1["mask_BT"], 0.0)
    kl = torch.where(mask.bool(), padded(G1["kl_BT"], NAN), NAN)
    one, _ = compute_advantages(**G1, kl_coef=0.1)
    other, _ = compute_advantages(G1["rewards_B"], kl, mask, kl_coef=0.1)
    torch.testing.assert_close(padded(one, 0.0), other)

    logprobs = torch.where(mask.bool(), -1.0, NAN).requires_grad_()
    old = torch.where(mask.bool(), -1.1, NAN)
    gain = torch.where(mask.bool(), 1.0, NAN)
    loss, stats = policy_loss(logprobs, old, gain, mask, weights_BT=gain)
    loss.backward()
    assert loss.isfinite() and all(s.isfinite() for s in stats.values())
    assert logprobs.grad.isfinite().all() and (logprobs.grad[mask == 0] == 0).all()
    assert (logprobs.grad[mask == 1] != 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_splitting_into_micro_batches_changes_nothing(loss_type, level):
    torch.manual_seed(0)
    mask = mask_of([1, 4, 2, 3])
    logprobs, old, gain, kl = (torch.randn(4, 4) for _ in range(4))

    def loss_of(rows):
        given = logprobs[rows], old[rows], gain[rows], mask[rows], Objective(loss_type, level)
        return policy_loss(*given, kl_BT=kl[rows], size=StepSize(10, 4, 4))

    whole, whole_stats = loss_of(slice(0, 4))
    parts = [loss_of(slice(0, 1)), loss_of(slice(1, 4))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for key, value in whole_stats.items():
        combine = {"n": min, "x": max}.get(key[-1], sum) if key.endswith(("_min", "_max")) else sum
        torch.testing.assert_close(combine(stats[key] for _, stats in parts), value)


def test_equal_returns_give_exactly_zero():
    advantages, _ = compute_advantages(tensor([2, 2]), None, mask_of([3, 1]), kl_coef=0.0)
    assert (advantages == 0).all()


def test_a_wholly_masked_batch_has_loss_zero_and_no_gradient():
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3))
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()
    advantages, _ = compute_advantages(tensor([1, 2]), None, torch.zeros(2, 3), kl_coef=0.0)
    assert (advantages == 0).all()


def test_an_exploding_ratio_keeps_finite_gradients():
    logprobs = tensor([[500.0, -500.0]]).requires_grad_()
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), tensor([[-1, 1]]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coef": 0.1}, "kl_coef.* 0.1"),
        ({"gamma": 0.9}, "gamma: 0.9"),
        ({"group_ids_B": None}, "group_ids_B"),
        ({"group_ids_B": torch.tensor([0, 1, 2, 2])}, "2 of 3 prompts have a single sample"),
        ({"estimator": "reinforce_plusplus"}, "Did you mean 'reinforce_plus_plus'"),
    ],
)
def test_contradictions_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        baseline(**changes)


def test_unknown_kl_kind():
    with pytest.raises(ConfigError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# --- the loss of a reward model ---------------------------------------------------------------------------------------


def test_the_loss_of_preferences():
    """Golden G11: chosen [1, 0.2], rejected [0, 0.7]."""
    differences_BC = tensor([[1.0], [-0.5]])
    ones_B1 = torch.ones(2, 1)
    for margin, loss in ((0.0, 0.643669), (0.5, 0.893669)):
        found = preference_loss(differences_BC, ones_B1, margin * ones_B1, ones_B1)
        assert found.item() == pytest.approx(loss, abs=1e-5)


def test_the_loss_of_several_criteria():
    """By hand: log(1 + e^-1) = .313262, log(1 + e^.5) = .974077, log(1 + e^2) = 2.126928, a tie at 2: 1.126928; over 2·3.

    The weights of the pairs are 3 and 0.5.
    """
    differences_BC = torch.tensor([[1.0, -0.5, 2.0], [2.0, 9.0, 1.0]], requires_grad=True)
    sides_BC = tensor([[1, 1, -1], [0, NAN, 1]])
    margins_BC, weights_B1 = tensor([[0, 0, 0], [5, 5, 0.5]]), tensor([[3], [0.5]])
    loss = preference_loss(differences_BC, sides_BC, margins_BC, weights_B1)
    by_pair = (0.313262 + 0.974077 + 2.126928, 1.126928 + 0.474077)
    assert loss.item() == pytest.approx((3 * by_pair[0] + 0.5 * by_pair[1]) / 6, abs=1e-5)
    loss.backward()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = [[-sigmoid(-1), -sigmoid(0.5), sigmoid(2)], [sigmoid(2) - 0.5, 0, -sigmoid(-0.5)]]
    assert differences_BC.grad == pytest.approx(weights_B1 * tensor(expected) / 6, abs=1e-6)
    parts = [
        preference_loss(*(each[i : i + 1] for each in (differences_BC, sides_BC, margins_BC, weights_B1)))
        for i in range(2)
    ]
    assert sum(parts).item() / 2 == pytest.approx(loss.item(), abs=1e-6)
