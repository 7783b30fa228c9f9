"""Completion lengths, sharded memory, and the forecast for several nodes in benchmarks/: links, simulated pool, command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.traced import trained_model

import scripts
from reinforcepp.commands import cli
from reinforcepp.config import PlanConfig
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.monitoring.completion_log import COMPLETIONS, save_completions, step_file
from reinforcepp.planner import lengths, memory, timing
from reinforcepp.planner.device import Device, Rates
from reinforcepp.planner.memory import Job, Rows
from reinforcepp.planner.model_costs import FrozenModel, Pass, RowSize, TrainedModel
from reinforcepp.planner.trace import Line, Peak

cluster, pool, forecast = (scripts.benchmark(name) for name in ("scaling.cluster", "scaling.pool", "forecast"))
ForecastConfig, Links = cluster.ForecastConfig, cluster.Links
Conditions, SimulatedPool, simulate = pool.Conditions, pool.SimulatedPool, pool.simulate
F32, BF16 = torch.float32, torch.bfloat16
NEW = 64
NOTHING = Pass(Peak((Line(0, 0.0, 0.0),)), Line(0, 0.0, 0.0))
SHAPE = TrainedModel(
    parameters=10_000,
    score=NOTHING,
    row_flops=2_000_000,
    trained=10_000,
    stored=20_000,
    layers=4,
    vocabulary=100,
    head=1000,
    tied=False,
    separate_logits=True,
    packed=9000,
    cache_per_token=16,
    token_flops=20_000,
    token_calls=50,
    prompt_flops=300_000,
    prefill=NOTHING,
    first=NOTHING,
    later=NOTHING,
)
REWARD = FrozenModel(parameters=5000, score=NOTHING, row_flops=1_000_000)


def job(dtype: torch.dtype = BF16, **changes) -> Job:
    usual = {"critic": None, "judge": None, "size": RowSize(16, NEW), "dtype": dtype, "engine": "vllm", "gpus": 1}
    return Job(**({"policy": SHAPE, "reward": REWARD} | usual | changes))


def config(**changes) -> ForecastConfig:
    usual = {
        "max_prompt_length": 16,
        "max_new_tokens": NEW,
        "max_length": 128,
        "eval_prompts": 0,
        "batch_size": 64,
        "rollout": "vllm",
        "mixed_precision": "bf16",
        "device": "h100",
    }
    return ForecastConfig(**(usual | changes))


GPU = Device("a GPU", 8, 1e9, Rates(1e9, 1e8, measured=False))
EVERY = timing.Speeds(1e9, 1e9, 1e9)
CHANCE = lengths.geometric(20, NEW)


# --- lengths --------------------------------------------------------------------------------------------------------


def test_full_length_completions_all_have_the_maximum_length():
    full = lengths.full_length(NEW)
    assert full.mean == NEW
    assert set(cluster.sample_lengths(full, np.random.default_rng(0), 50)) == {NEW}


@pytest.mark.parametrize("mean", [1, 7, 40, NEW])
def test_geometric_lengths_have_a_constant_stop_probability(mean):
    found = lengths.geometric(mean, NEW)
    assert found.mean == pytest.approx(mean)
    on = found.active_T[1:] / found.active_T[:-1] if mean > 1 else np.zeros(1)
    assert np.allclose(on, on[0])  # the same chance to go on after each token
    drawn = cluster.sample_lengths(found, np.random.default_rng(0), 20_000)
    assert drawn.min() >= 1 and drawn.max() <= NEW
    assert drawn.mean() == pytest.approx(mean, rel=0.02)


def test_empirical_lengths_follow_the_recorded_lengths():
    found = lengths.empirical([1, 2, 2, 5, 100], 8, "somewhere")
    assert found.active_T.tolist() == [1, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2]
    assert found.mean == pytest.approx((1 + 2 + 2 + 5 + 8) / 5)
    drawn = cluster.sample_lengths(found, np.random.default_rng(0), 10_000)
    assert sorted(set(drawn)) == [1, 2, 5, 8]
    assert (drawn == 2).mean() == pytest.approx(0.4, abs=0.02)


def test_longest_equals_the_expected_maximum():
    found = lengths.empirical([1, 3], 3, "somewhere")
    assert found.any_active(1).sum() == pytest.approx(2)
    assert found.any_active(2).sum() == pytest.approx(3 * 0.75 + 1 * 0.25)
    drawn = cluster.sample_lengths(CHANCE, np.random.default_rng(1), 30_000 * 12).reshape(-1, 12)
    assert CHANCE.any_active(12).sum() == pytest.approx(drawn.max(1).mean(), rel=0.01)


def test_lengths_come_from_a_run_or_a_mean(tmp_path):
    save_completions(tmp_path / COMPLETIONS / step_file(1), {"completion": ["a", "b"], "length": [2, 4]})
    save_completions(tmp_path / COMPLETIONS / step_file(2), {"completion": ["c"], "length": [6]})
    found = lengths.lengths_for(config(lengths_from=str(tmp_path)))
    assert found.mean == pytest.approx(4) and "the 3 in" in found.note
    assert lengths.lengths_for(config(mean_new_tokens=10.0)).mean == pytest.approx(10)
    assert lengths.lengths_for(config()).mean == NEW
    (tmp_path / COMPLETIONS / step_file(2)).write_bytes(b"nothing")
    with pytest.raises(DataError, match="can't be read as a step's completions"):
        lengths.lengths_for(config(lengths_from=str(tmp_path)))
    with pytest.raises(DataError, match="has no completions"):
        lengths.lengths_for(config(lengths_from=str(tmp_path / "nowhere")))


# --- rollouts -------------------------------------------------------------------------------------------------------


def by_hand(one: Job, drawn: list[int], speeds: timing.Speeds) -> float:
    """A token of each after the other, as long as any goes on."""
    seconds, policy = 0.0, one.policy
    for t in range(max(drawn)):
        going = sum(length > t for length in drawn)
        read = one.dtype.itemsize * policy.packed + going * (one.size.prompt + t + 0.5) * policy.cache_per_token
        seconds += max(read / speeds.reading, going * policy.token_flops / speeds.decoding)
    return seconds


def test_a_batch_lasts_until_its_longest_completion_ends():
    speeds = timing.Speeds(1e9, 1e6, 1e6)
    drawn = cluster.sample_lengths(CHANCE, np.random.default_rng(0), 2000 * 8).reshape(-1, 8)
    simulated = np.mean([by_hand(job(), list(row), speeds) for row in drawn])
    assert timing.batch_seconds(job(), 8, speeds, CHANCE) == pytest.approx(simulated, rel=0.02)
    pieces = cluster.seconds_of_chunks(job(), speeds, drawn.reshape(-1, 1))
    prompts = 8 * (SHAPE.prompt_flops + 2 * SHAPE.head) / 1e9
    assert pieces(range(8)) == pytest.approx(by_hand(job(), list(drawn[0]), speeds) + prompts)


@pytest.mark.parametrize("times", [1, 4])
def test_straggler_time_lasts_until_the_slowest_device_ends(times):
    speeds = timing.Speeds(1e9, 1e9, 1e5)  # reading weights is what takes time
    policy = replace(SHAPE, cache_per_token=0)
    one, ranks, number = job(policy=policy, ranks=6), 6, 8
    drawn = cluster.sample_lengths(CHANCE, np.random.default_rng(0), 4000 * ranks * times * number)
    longest = drawn.reshape(4000, ranks, times, number).max(3).sum(2)
    weights = 2 * policy.packed / speeds.reading
    expected = weights * (longest.max(1) - longest.mean(1)).mean()
    rows = Rows(number * times, number * times, 0, number, 8, 1)
    assert timing.straggler_seconds(one, rows, speeds, CHANCE) == pytest.approx(
        expected, rel=0.25 if times > 1 else 0.03
    )
    assert timing.straggler_seconds(replace(one, ranks=1), rows, speeds, CHANCE) == 0
    assert timing.straggler_seconds(one, rows, speeds, lengths.full_length(NEW)) == pytest.approx(0, abs=1e-9)


def test_shorter_completions_take_less_time_in_every_phase():
    rows, wanted = Rows(64, 64, 0, 128, 8, 8), config()
    full = timing.step_seconds(job(), rows, wanted, EVERY, lengths.full_length(NEW))
    short = timing.step_seconds(job(), rows, wanted, EVERY, CHANCE)
    adam = timing.adam_seconds(job(), rows, wanted, 1e9)
    assert (short["update"] - adam) / (full["update"] - adam) == pytest.approx((16 + 20) / (16 + NEW))
    operations = timing.reward_flops(job(), rows) + timing.logprob_flops(job(), rows, wanted)
    assert short["scoring"] == pytest.approx(operations * (16 + 20) / (16 + NEW) / 1e9)
    assert short["rollout"] < full["rollout"]


# --- links ----------------------------------------------------------------------------------------------------------


def test_gather_seconds_equal_the_formula():
    links = Links(nodes=4, gpus=8, node_bandwidth=100.0, network_bandwidth=10.0)
    assert links.gather_seconds(800.0) == pytest.approx(800 * 3 / 4 / 10 + 800 * 7 / 8 / 100)
    assert Links(1, 1, 100.0, 10.0).gather_seconds(800.0) == 0
    found = cluster.links_for(config(network_gbps=80.0), 4, 8)
    assert (found.node_bandwidth, found.network_bandwidth) == (pytest.approx(0.7 * 450e9), pytest.approx(0.7 * 10e9))
    unknown = cluster.links_for(config(device="auto", gpus=8, gpu_memory=1.0), 1, 8)
    assert unknown.node_bandwidth == pytest.approx(0.7 * 32e9)


def test_communication_bytes_equal_the_formula():
    links = Links(2, 1, 1.0, 10.0)  # half of what is gathered, at 10 bytes a second
    rows = Rows(64, 64, 0, 128, 8, 5)
    twice = config(batch_size=64, micro_batch_size=8, gradient_accumulation_steps=4)
    assert twice.updates_per_step == 2

    def seconds(one: Job, wanted: PlanConfig = twice) -> float:
        return timing.communication_seconds(one, rows, wanted, links.gather_seconds) * 20

    for dtype in (F32, BF16):
        assert seconds(job(dtype)) == pytest.approx(2 * 2 * 4 * 10_000)  # once for each of two optimizer steps
    shards = job(BF16, sharded=True, ranks=2)
    assert seconds(shards) == pytest.approx(2 * 5 * (2 * 2 + 4) * 10_000)
    adapter = replace(SHAPE, trained=100)
    assert seconds(replace(shards, policy=adapter)) == pytest.approx(2 * 5 * (2 * 2 * 10_000 + 4 * 100))
    assert seconds(job(F32, critic=SHAPE)) == 2 * seconds(job(F32))


def test_seconds_to_transfer_new_weights():
    speeds = timing.Speeds(1.0, 1.0, 1000.0)
    links = Links(4, 8, 1e6, 100.0)
    weights = 2 * 10_000

    def seconds(of):
        return timing.weight_transfer_seconds(of, speeds, links.gather_seconds)

    gathered = links.gather_seconds(40_000)
    assert seconds(job(engine="transformers")) == seconds(job(engine="ray")) == 0
    assert seconds(job()) == pytest.approx(2 * weights / 1000)
    assert seconds(job(sharded=True, ranks=32)) == pytest.approx(2 * weights / 1000 + gathered)
    assert seconds(job(engine="ray", sharded=True, ranks=32)) == pytest.approx(gathered)
    pool = cluster.broadcast_seconds(job(engine="ray"), speeds, links)
    # The number of nodes with the weights doubles: 1, 2, 4, all 5.
    assert pool == pytest.approx(2 * weights / timing.HOST_LINK_BANDWIDTH + 3 * weights / 100)
    on_cpu = cluster.broadcast_seconds(job(engine="ray", gpus=0), speeds, links)
    assert on_cpu == pytest.approx(2 * weights / 1000 + 3 * weights / 100)


@given(st.integers(1, 64), st.integers(1, 8), st.floats(1, 1e9))
def test_more_bytes_and_slower_links_never_take_less_time(nodes, per_node, size):
    links = Links(nodes, per_node, 100.0, 10.0)
    now = links.gather_seconds(size)
    assert now <= links.gather_seconds(2 * size)
    assert now <= replace(links, network_bandwidth=5.0).gather_seconds(size)
    assert now <= replace(links, node_bandwidth=5.0).gather_seconds(size)
    assert now <= replace(links, nodes=nodes + 1).gather_seconds(size)


# --- many machines --------------------------------------------------------------------------------------------------


def test_node_counts_double_up_to_the_total():
    found = cluster.scales(job(), config(), GPU, CHANCE, 6)
    assert [(one.nodes, one.devices) for one in found] == [(1, 8), (2, 16), (4, 32), (6, 48)]
    assert cluster.scales(job(), config(), replace(GPU, rates=None), CHANCE, 6) == []
    assert [one.nodes for one in cluster.scales(job(), config(), GPU, CHANCE, 1)] == [1]
    for one in found:
        assert one.tokens_per_second == pytest.approx(64 * 20 / one.step)
        assert one.step == pytest.approx(sum(one.seconds.values()))


def test_phases_add_communication_to_the_times_of_one_device():
    wanted = config(network_gbps=1e-6, micro_batch_size=2)
    (one,) = cluster.scales(job(), wanted, replace(GPU, gpus=1), CHANCE, 1)
    speeds = timing.achieved(GPU.rates)
    alone = timing.step_seconds(job(), Rows.of(wanted, job()), wanted, speeds, CHANCE)
    assert {name: one.seconds[name] for name in alone} == alone
    assert one.seconds["waiting"] == one.seconds["exchange"] == 0 < one.seconds["sync"]
    *_, many = cluster.scales(job(), wanted, GPU, CHANCE, 4)
    rows, links = Rows.of(wanted, job(ranks=32)), cluster.links_for(wanted, 4, 8)
    on_32 = job(ranks=32, gpus=32)
    exchange = timing.communication_seconds(on_32, rows, wanted, links.gather_seconds)
    assert many.seconds["exchange"] == pytest.approx(exchange)
    in_float32 = timing.parallel_step_seconds(
        replace(on_32, dtype=F32), rows, wanted, speeds, CHANCE, links.gather_seconds
    )
    hidden = timing.pass_seconds(on_32, rows, wanted, speeds, CHANCE)  # The reduction overlaps with the passes.
    assert in_float32["exchange"] == pytest.approx(exchange - hidden)
    assert many.seconds["waiting"] == timing.straggler_seconds(on_32, rows, speeds, CHANCE) > 0
    fast = cluster.on_nodes(job(F32), replace(wanted, network_gbps=1e9), GPU, CHANCE, 4)
    assert fast.seconds["exchange"] == 0  # it is hidden behind the passes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.sampled_from(["vllm", "transformers"]), st.floats(1, NEW))
def test_more_nodes_never_compute_longer(nodes, sharded, engine, mean):
    one, found = job(sharded=sharded, engine=engine), lengths.geometric(mean, NEW)
    steps = [cluster.on_nodes(one, config(), GPU, found, number) for number in (nodes, nodes + 1)]
    for phase in ("rollout", "scoring", "update"):
        assert steps[1].seconds[phase] <= steps[0].seconds[phase] * (1 + 1e-9)
    assert steps[0].seconds["exchange"] <= steps[1].seconds["exchange"]
    alone = cluster.on_nodes(one, config(), GPU, found, 1)
    assert steps[1].step * (nodes + 1) >= alone.step * (1 - 1e-9)  # never more than ideal


def test_a_pool_generates_and_one_device_trains():
    wanted = config(rollout="ray://auto", rollout_batch_size=4, batch_size=256)
    pooled = job(engine="ray")
    found = cluster.scales(pooled, wanted, GPU, CHANCE, 4)
    assert [one.devices for one in found] == [8, 16, 32]
    assert len({one.seconds["update"] for one in found}) == len({one.seconds["scoring"] for one in found}) == 1
    for few, many in pairwise(found):
        assert many.seconds["rollout"] < few.seconds["rollout"] and many.seconds["waiting"] > 0
    limited = cluster.on_nodes(pooled, replace(wanted, rollout_workers=5), GPU, CHANCE, 4)
    assert limited.devices == 5
    own, waiting = cluster.pool_seconds(pooled, wanted, timing.achieved(GPU.rates), lengths.full_length(NEW), 64)
    assert waiting == pytest.approx(0) and own > 0  # all are given four each


def test_several_trainers_with_a_pool_share_scoring_and_update():
    wanted = config(rollout="ray://auto", rollout_batch_size=4, batch_size=256, device="h100")
    one, many = (
        cluster.on_nodes(job(engine="ray", ranks=ranks, gpus=ranks), replace(wanted, trainers=ranks), GPU, CHANCE, 4)
        for ranks in (1, 16)
    )
    assert one.devices == many.devices == 32  # the pool's
    for phase in ("rollout", "waiting", "sync"):
        assert many.seconds[phase] == one.seconds[phase]
    for phase in ("scoring", "update"):
        assert many.seconds[phase] < one.seconds[phase] / 4
    assert one.seconds["exchange"] == 0
    slow = replace(wanted, trainers=16, network_gbps=1e-6)
    assert cluster.on_nodes(job(engine="ray", ranks=16, gpus=16), slow, GPU, CHANCE, 4).seconds["exchange"] > 1
    slow = replace(slow, trainers=8)  # of one machine
    assert cluster.on_nodes(job(engine="ray", ranks=8, gpus=8), slow, GPU, CHANCE, 4).seconds["exchange"] < 1


def test_a_pool_has_enough_nodes_for_its_workers():
    assert cluster.number_of_nodes(config(nodes=3, gpus=8), 8) == 3
    assert cluster.number_of_nodes(config(), 8) == 1
    pooled = config(rollout="ray://auto", rollout_workers=1000)
    assert cluster.number_of_nodes(pooled, 8) == 125
    assert cluster.number_of_nodes(replace(pooled, nodes=2), 8) == 2
    shared = replace(pooled, vllm_tensor_parallel_size=4)
    assert cluster.number_of_nodes(shared, 8) == 500
    few = replace(shared, rollout_workers=0, batch_size=256)
    assert cluster.tensor_parallel(timing.Speeds(1.0, 2.0, 3.0, 4.0, 5.0), few) == (4.0, 8.0, 12.0, 4.0, 5.0)
    whole, parts = (cluster.on_nodes(job(engine="ray"), one, GPU, CHANCE, 4) for one in (pooled, few))
    assert (whole.devices, parts.devices) == (32, 8)
    alone, four = (
        cluster.pool_seconds(job(engine="ray"), few, speeds, CHANCE, 8)[0]
        for speeds in (timing.achieved(GPU.rates), cluster.tensor_parallel(timing.achieved(GPU.rates), few))
    )
    assert parts.seconds["rollout"] == pytest.approx(four) and alone / 4.01 < four < alone


# --- a simulated pool -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    workers=st.integers(1, 40),
    number=st.integers(1, 300),
    most=st.integers(1, 20),
    failures=st.sampled_from([0.0, 10.0, 40.0]),  # so few that no worker is lost ten times in a row
    spread=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_throughput_is_at_most_ideal_and_every_prompt_is_completed(workers, number, most, failures, spread, seed):
    crew = SimulatedPool(workers, lambda places: 1.0 + len(places), Conditions(failures, 20.0, spread), seed)
    for one in simulate(crew, number, most, 3, between=10.0):  # which asserts that each prompt is answered once
        assert 0 < one.useful <= workers * one.seconds * (1 + 1e-9)
        assert one.stats.lost > 0 or one.stats.requeued == 0
        assert one.scheduling >= 0
    assert len(crew.slowness) <= workers


def test_without_failures_all_workers_are_busy_until_the_end():
    (one,) = simulate(SimulatedPool(4, lambda places: float(len(places))), 64, 4, 1)
    assert (one.seconds, one.useful, one.stats.chunks, one.stats.lost) == (16.0, 64.0, 16, 0)


def test_failures_match_their_rate_and_cost_time():
    def course(failures: float) -> tuple[float, int]:
        crew = SimulatedPool(50, lambda places: 60.0, Conditions(failures, 120.0), seed=3)
        found = simulate(crew, 500, 1, 4)
        return sum(one.seconds for one in found), sum(one.stats.lost for one in found)

    calm, none = course(0.0)
    hard, lost = course(10.0)
    assert (calm, none) == (4 * 600.0, 0) and hard > calm
    assert lost == pytest.approx(50 * 10 * hard / 3600, rel=0.35)


def test_workers_are_replaced_between_rollouts():
    crew = SimulatedPool(3, lambda places: 1.0, Conditions(failures_per_hour=3600.0, start_seconds=50.0), seed=0)
    crew.idle(40.0)
    assert crew.now == 40.0 and crew.ready() == []
    assert len(crew._events) == 3  # each is replaced
    crew.idle(70.0)
    assert crew.now == 110.0


def test_the_same_seed_gives_the_same_simulation():
    def course(seed: int) -> list[float]:
        crew = SimulatedPool(5, lambda places: 1.0, Conditions(100.0, 3.0, 0.5), seed)
        return [one.seconds for one in simulate(crew, 40, 2, 3)]

    assert course(1) == course(1) != course(2)


# --- shards in memory -----------------------------------------------------------------------------------------------


def test_static_memory_of_shards():
    whole, shards = job(BF16, ranks=8), job(BF16, ranks=8, sharded=True)
    assert memory.static(job(F32, ranks=8))["gradient buckets"] == 4 * 10_000
    assert "gradient buckets" not in memory.static(whole)
    found = memory.static(shards)
    assert "gradient buckets" not in found
    assert (found["float32 weights"], found["AdamW's moments"]) == (4 * 10_000 / 8, 8 * 10_000 / 8)
    assert (found["policy"], found["reference"], found["reward model"]) == (20_000, 20_000, 10_000)
    assert memory.stepping(shards) == {"gradients": 4 * 10_000 / 8}
    in_float32 = memory.static(job(F32, ranks=8, sharded=True))
    assert in_float32["float32 weights"] == 4 * 10_000 / 8  # beside the copy that generates
    adapter = replace(shards, policy=replace(SHAPE, trained=100))
    assert memory.static(adapter)["float32 weights"] == 4 * 10_000 / 8
    assert memory.static(adapter)["AdamW's moments"] == 8 * 100 / 8
    assert timing.adam_bytes(shards, config()) == timing.adam_bytes(whole, config()) / 8


def test_loading_holds_the_weights_twice_before_sharding():
    found = memory.loading(job(BF16, ranks=8, sharded=True, critic=SHAPE))
    assert found == {
        "policy": 40_000,
        "float32 weights": 40_000,
        "reward model": 10_000,
        "critic": 20_000 + 40_000,
    }
    assert memory.loading(job(BF16, ranks=8))["float32 weights"] == 40_000


def test_gathered_weights_of_a_pass():
    shards = job(BF16, ranks=8, sharded=True)
    layer = (10_000 - 2 * 1000) / 4
    assert memory.gathered(shards) == {"gathered weights": 2 * (2 * layer + 2000) + (2 + 4) * layer}
    tied = replace(shards, policy=replace(SHAPE, tied=True))
    layer = (10_000 - 1000) / 4
    assert memory.gathered(tied) == {"gathered weights": 2 * (2 * layer + 1000) + (2 + 4) * layer}
    assert memory.gathered(job()) == {}
    assert "gathered weights" in memory.training(shards, Rows(8, 8, 0, 8, 8, 1))


def test_traces_count_one_shard_of_the_gradients():
    model = tiny.model("llama").config
    whole, shards = (trained_model(model, BF16, RowSize(12, 20), shards=number) for number in (1, 4))
    assert shards.later.at_head.gradients == whole.later.at_head.gradients // 4
    assert shards.later.at_head.constant == whole.later.at_head.constant
    assert shards.later.peak.at(2).gradients < whole.later.peak.at(2).gradients / 3


def test_ranks_share_the_rows_of_an_optimizer_step():
    wanted = config(batch_size=64, micro_batch_size=8, gradient_accumulation_steps=4)
    assert Rows.of(wanted, job()) == Rows(64, 64, 0, 128, 8, 4)
    assert Rows.of(wanted, job(ranks=8)) == Rows(8, 8, 0, 128, 8, 1)
    assert Rows.of(wanted, job(ranks=2)) == Rows(32, 32, 0, 128, 8, 2)


# --- settings and the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nodes": 0}, "nodes must be greater than 0"),
        ({"network_gbps": 0.0}, "network_gbps must be greater than 0"),
        ({"nodes": 9, "gpus": 8}, r"batch_size: 64 .*9 nodes x 8"),
        ({"mean_new_tokens": 65.0}, "mean_new_tokens .* 64, not 65"),
        ({"mean_new_tokens": 0.5}, "mean_new_tokens .*from 1 to max_new_tokens"),
        ({"mean_new_tokens": 5.0, "lengths_from": "runs/x"}, "mean_new_tokens and lengths_from"),
        ({"lengths_from": " "}, "lengths_from"),
        ({"fsdp": True, "rollout": "ray://auto"}, "fsdp: .* trainers"),
        ({"trainers": 2}, "trainers: .* pool"),
        ({"trainers": 0}, "trainers"),
        ({"trainers": 65, "rollout": "ray://auto"}, "batch_size: 64 .* 65 GPUs"),
        ({"fsdp": True, "offload_optimizer": True}, "offload_optimizer .* fsdp"),
    ],
)
def test_contradictory_settings_are_errors(changes, named):
    with pytest.raises(ConfigError, match=named):
        config(**changes)


def test_a_pool_can_have_more_workers_than_prompts():
    assert config(nodes=9, gpus=8, rollout="ray://auto").pooled


SIZES = (
    "--max_prompt_length 12 --max_new_tokens 20 --max_length 64 --batch_size 64 --eval_prompts 0 --mixed_precision bf16"
)
SETTINGS = ("--model", "model", *SIZES.split(), "--device", "h100")


def run(capsys, *flags: str) -> tuple[int, str]:
    flags = flags if "--rollout" in flags else ("--rollout", "transformers", *flags)
    code = forecast.main([*SETTINGS, *flags])
    out, err = capsys.readouterr()
    assert code != 2 or (out == "" and err.count("\n") == 1)
    return code, out + err


def rows_of(out: str) -> dict[str, list[str]]:
    """The table's rows by their titles."""
    return {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}


def test_a_table_of_nodes(folder, capsys):
    code, out = run(capsys, "--gpus", "8", "--nodes", "4", "--mean_new_tokens", "8")
    assert code == 0
    assert "on 32 x NVIDIA H100" in out and "Per step on each: 2 completions" in out
    lines = rows_of(out)
    assert lines["nodes"][1:] == ["1", "2", "4"] and lines["GPUs"][1:] == ["8", "16", "32"]
    assert lines["efficiency"][1] == "100%" and lines["speedup"][1] == "1.00"
    assert {"rollout, s", "stragglers, s", "scoring, s", "update, s", "step, s", "tokens/s"} <= set(lines)
    assert "never been checked against a measurement" in out and "mean of 8 tokens" in out
    assert "GB/s between nodes" in out
    code, out = run(capsys, "--gpus", "8")
    assert rows_of(out)["nodes"][1:] == ["1"] and "between nodes" not in out


def test_a_table_of_nodes_as_json(folder, capsys):
    code, out = run(capsys, "--gpus", "8", "--nodes", "2", "--fsdp", "--format", "json")
    found = json.loads(out)
    assert code == 0 and [one["devices"] for one in found["scaling"]] == [8, 16]
    one, two = found["scaling"]
    assert two["speedup"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"])
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)
    assert found["seconds"]["step"] == pytest.approx(sum(two["seconds"].values()))
    assert found["tokens_per_second"] == two["tokens_per_second"]
    parameters = found["parameters"]["policy"]
    assert found["phases"]["adamw"]["AdamW's moments"] == pytest.approx(8 * parameters / 16, abs=1)
    assert any("one of 16 shards" in sentence for sentence in found["assumptions"])


def test_a_pool_as_text(folder, capsys):
    ray = ("--rollout", "ray://auto", "--rollout_workers", "1000", "--gpus", "8")
    code, out = run(capsys, *ray, "--batch_size", "4000", "--nodes", "125")
    assert code == 0 and "on NVIDIA H100 with" in out
    lines = rows_of(out)
    assert lines["workers"][1:] == ["8", "16", "32", "64", "128", "256", "512", "1000"]
    assert "The pool has 1000 workers on 125 nodes" in out and "weight transfer, s" in lines
    _, out = run(capsys, *ray)
    assert "The pool has 1000 workers on 125 nodes" in out
    _, out = run(capsys, *ray, "--trainers", "16", "--fsdp")
    assert "on 16 x NVIDIA H100 with" in out and "Per step on each: 4 completions" in out
    assert "Every GPU holds one of 16 shards" in out and "GB/s between the GPUs of a node" in out
    assert "The pool has 1000 workers on 125 nodes" in out


def test_flags_override_settings_from_a_file(folder, capsys):
    (folder / "mine.yaml").write_text("nodes: 4\ngpus: 8\nfsdp: true\nrewards: [rule:length]\n")
    _, out = run(capsys, "--config", "mine.yaml", "--nodes", "2")
    assert rows_of(out)["nodes"][1:] == ["1", "2"] and "one of 16 shards" in out


def test_the_verdict_lists_options_that_reduce_the_models(folder, capsys):
    weights = json.loads(run(capsys, "--format", "json")[1])["parameters"]["policy"]

    def verdict(bytes_per_weight: float, *flags: str) -> str:
        room = str((memory.LIBRARIES["gpu"] + bytes_per_weight * weights) / 2**30)
        code, out = run(capsys, "--gpus", "8", "--nodes", "8", "--gpu_memory", room, *flags)
        assert code == 1
        return out

    reward = "a reward model behind a server (--rewards http://HOST:PORT/get_reward)"
    both = f"Reduce it with adapters on 4-bit weights (--use_peft --load_in_4bit) and {reward}."
    assert "Sharded (--fsdp), the models need" in verdict(12)
    assert "More GPUs don't help" in (out := verdict(9)) and both in out
    assert "More GPUs don't help" in (out := verdict(9, "--fsdp")) and both in out
    assert "More GPUs make the shards smaller." in verdict(10.1, "--fsdp")
    adapted = verdict(3, "--use_peft")
    assert "Sharded (--fsdp)" not in adapted and f"Reduce it with {reward}." in adapted
    assert "Reduce it" not in verdict(1, "--use_peft", "--rewards", "http://127.0.0.1:1/x")


def test_invalid_input_is_a_one_line_error(folder, capsys):
    code, err = run(capsys, "--lengths_from", "nowhere")
    assert code == 2 and err.startswith("error: lengths_from: nowhere has no completions")


# --- reinforcepp plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["nodes", "trainers", "network_gbps"])
def test_plan_names_the_forecast_for_settings_of_several_nodes(folder, capsys, setting):
    assert cli.main(["plan", *SETTINGS, f"--{setting}", "2"]) == 2
    err = capsys.readouterr().err
    assert setting in err and "benchmarks/forecast.py" in err
    (folder / "mine.yaml").write_text(f"{setting}: 2\n")
    assert cli.main(["plan", *SETTINGS, "--config", "mine.yaml"]) == 2
    assert "benchmarks/forecast.py" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"{setting}: .*forecast"):
        PlanConfig(**{setting: 2})


def test_plan_and_forecast_agree_on_one_node(folder, capsys):
    flags = ("--gpus", "8", "--fsdp", "--format", "json")
    found = json.loads(run(capsys, *flags)[1])
    assert cli.main(["plan", *SETTINGS, "--rollout", "transformers", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert found.pop("scaling")[0]["tokens_per_second"] == plan["tokens_per_second"]
    assert found == plan


@pytest.mark.parametrize("rollout", ["ray://auto", "vllm://a:1"])
def test_rollouts_elsewhere_take_no_time_in_the_plan(folder, capsys, rollout):
    assert cli.main(["plan", *SETTINGS, "--rollout", rollout, "--format", "json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds["rollout"] == seconds["waiting"] == 0 < seconds["update"]
