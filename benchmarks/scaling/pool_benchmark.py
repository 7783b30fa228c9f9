"""The pool of benchmarks/scaling.py: the scheduler's own code with simulated workers, and what Ray's own calls take."""

from __future__ import annotations

import json
import tempfile
import time
from statistics import fmean
from typing import Any

import numpy as np

from reinforcepp.planner import lengths, timing
from reinforcepp.planner.command import make_plan
from reinforcepp.planner.report import Plan
from reinforcepp.types import Completion, Prompt
from scaling.cluster import ForecastConfig, sample_lengths, seconds_of_chunks
from scaling.points import USUAL, save_shape
from scaling.pool import Conditions, SimulatedPool, simulate

WORKERS = (1, 10, 100, 1000)
FAILURES = (0.0, 0.1, 1.0)
"""Of each worker, in an hour: 1,000 workers lose 100 and 1,000 of them."""
PIECES = (1, 4)
"""Of each worker in a step."""
LOST_FOR, BETWEEN, SPREAD = 120.0, 30.0, 0.05
"""Seconds until a worker is replaced, seconds that a step takes beside its rollout, deviation of workers' speeds."""
STEPS = 10
EVENTS = 100
"""Of Ray, that are timed."""
PATIENCE = 120.0
"""Seconds until one of them has to have come."""


def pool() -> dict[str, Any]:
    """Pools of all sizes, with and without failures, with one piece or several for each worker in a step."""
    with tempfile.TemporaryDirectory() as folder:
        save_shape("7B", folder)
        settings = {"model": folder, "rollout": "ray://auto", "use_peft": True}
        plan = make_plan(ForecastConfig(**(USUAL | settings)))
    calls = ray_calls(plan)
    rows = [
        simulated(plan, workers, failures, pieces, calls[workers])
        for pieces in PIECES
        for failures in FAILURES
        for workers in WORKERS
    ]
    return {
        "meaning": "share_of_ideal: of workers' time, what went into answers that were kept",
        "settings": {"seconds_lost": LOST_FOR, "seconds_between": BETWEEN, "spread": SPREAD, "steps": STEPS},
        "ray_seconds_per_piece": {str(workers): seconds for workers, seconds in calls.items()},
        "rows": rows,
    }


def simulated(plan: Plan, workers: int, failures: float, pieces: int, call: float) -> dict[str, Any]:
    """Throughput against the ideal, what was done again, and the driver's own load, where Ray takes ``call`` for a piece."""
    config, rates = plan.config, plan.device.rates
    assert rates is not None
    most = config.effective_rollout_batch_size // config.num_generations
    number = workers * most * pieces
    lengths_PN = sample_lengths(lengths.lengths_for(config), np.random.default_rng(workers), number)[:, None]
    seconds_of = seconds_of_chunks(plan.job, timing.achieved(rates), lengths_PN)
    pool = SimulatedPool(workers, seconds_of, Conditions(failures, LOST_FOR, SPREAD), seed=workers)
    found = simulate(pool, number, most, STEPS, BETWEEN)
    seconds, scheduling = sum(one.seconds for one in found), sum(one.scheduling for one in found)
    dealt = sum(one.stats.chunks for one in found)
    result = {
        "workers": workers,
        "failures_per_hour": failures,
        "pieces": pieces,
        "prompts": number,
        "tokens_per_second": STEPS * float(lengths_PN.sum()) / seconds,
        "share_of_ideal": sum(one.useful for one in found) / workers / seconds,
        "rollout_seconds": fmean(one.seconds for one in found),
        "lost": sum(one.stats.lost for one in found),
        "again_share": sum(one.stats.requeued for one in found) / (STEPS * number),
        "scheduler_microseconds_per_prompt": 1e6 * scheduling / (STEPS * number),
        "scheduler_share_of_time": scheduling / seconds,
        "ray_share_of_time": call * dealt / seconds,
    }
    print(json.dumps(result), flush=True)
    return result


# --- Ray's own calls ------------------------------------------------------------------------------------------------


def ray_calls(plan: Plan) -> dict[int, float]:
    """Seconds of this process that Ray takes to hand a piece out, to see that it is done and to bring the answers.

    One actor stands for all workers, with as many tasks under way as they would have: looking at them takes longer, the more
    there are.
    """
    import ray

    size, most = plan.job.size, plan.config.effective_rollout_batch_size
    prompts = [Prompt("", tuple(range(size.prompt)), key) for key in range(most)]
    ids = tuple(range(round(lengths.lengths_for(plan.config).mean)))
    answers = [[Completion(prompt, ids, tuple(map(float, ids)), "", "stop")] for prompt in prompts]
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False, num_cpus=1)
    actor = ray.remote(echo()).options(max_concurrency=2 * max(WORKERS)).remote(answers)
    sampling, found = ray.put(None), {}
    tasks: dict[Any, int] = {}

    def event(number: int) -> None:
        """A piece is answered, and its worker is given another one."""
        actor.let_go.remote()
        (done, *_), _ = ray.wait(list(tasks), num_returns=1, timeout=PATIENCE)
        ray.get(done)
        del tasks[done]
        tasks[actor.answer.remote(prompts, sampling)] = number

    for workers in WORKERS:
        tasks |= {actor.answer.remote(prompts, sampling): place for place in range(workers - len(tasks))}
        event(0)  # sets things up
        begin = time.process_time()
        for number in range(EVENTS):
            event(number)
        found[workers] = (time.process_time() - begin) / EVENTS
        print(f"Ray with {workers} tasks: {1e3 * found[workers]:.2f} ms a piece", flush=True)
    ray.shutdown()
    return found


def echo() -> type:
    """A class that Ray can send as it is, without what this module imports."""

    class Echo:
        """Answers as ``ray_worker.Worker`` does, when it is let go."""

        def __init__(self, answers: Any) -> None:
            import asyncio

            self.answers, self.gate = answers, asyncio.Queue()

        async def answer(self, prompts: Any, sampling: Any) -> Any:
            await self.gate.get()
            return self.answers

        async def let_go(self) -> None:
            self.gate.put_nowait(None)

    return Echo
