"""A pool that serves several data-parallel ranks: the same training as on one rank, and errors on all ranks."""

import importlib.util
import json

import pytest
from safetensors.torch import load_file

import scripts
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import COMPLETIONS, read_completions

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed")
SCORERS = ["--reward_workers", "1"]
REWARD = """
import os

def spread(prompts, completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]

def fails(prompts, completions, completion_ids, **_):
    if os.environ.get("RANK") == os.environ.get("FAILS"):
        raise ValueError("out of order")
    return spread(prompts, completions, completion_ids)
"""
SCRIPT = """
import atexit, json, sys, threading
import tiny, torch
from rollout.contract import prepared_model, prepared_tokenizer
from dataclasses import replace
from pathlib import Path
from reinforcepp import ReinforceConfig
from reinforcepp.rollout import factory
from reinforcepp.distributed.ranks import Ranks, exit_process, init_process_group
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.errors import EngineLost
from reinforcepp.rollout.selection import EngineChoice
from reinforcepp.types import Completion, Prompt, Sampling

init_process_group(60)
ranks = Ranks()
seen = []

class Engine:
    name, dtype, fails = "pool", torch.bfloat16, False

    def generate(self, prompts, sampling):
        if self.fails:
            raise EngineLost("no worker is left")
        seen.append(len(prompts))
        return [
            Completion(p, (p.key, sample, ranks.index), (0.0,) * 3, p.text, "stop")
            for p in prompts for sample in range(sampling.num_samples)
        ]

    def generate_everywhere(self, prompts, sampling):
        return 2 * self.generate(prompts, sampling)

    def load_weights(self, model):
        self.dtype, self.fails = torch.float32, model == "bad"

    def close(self):
        seen.append("closed")

held = []
def start(*_, **settings):
    held.append(Engine())
    return held[-1]

factory.start_engine = start
given = prepared_model(), prepared_tokenizer(), ReinforceConfig(watchdog_seconds=60), ranks, 0, Path("run"), 512
assert factory.start_training_engine(EngineChoice("vllm", ""), *given) is held.pop()
engine = factory.start_training_engine(EngineChoice("ray", "", "auto"), *given)
result = {"started": len(held), "name": engine.name, "dtype": str(engine.dtype)}
prompts = [Prompt(f"{ranks.index}", (1,), 10 * ranks.index + i) for i in range([2, 0, 1][ranks.index])]

def generate():  # while the training uses its process group
    result["answers"] = [(c.prompt.key, c.text, c.ids) for c in engine.generate(prompts, Sampling(3, num_samples=2))]

thread = threading.Thread(target=generate)
thread.start()
result["sum"] = [float(ranks.sum(torch.tensor(1.0))) for _ in range(50)][-1]
thread.join()

class Turns:
    def reset(self, row):
        self.left = row["turns"]

    def step(self, message):
        self.left -= 1
        return "Again.", 1.0, self.left == 0

played = [replace(prompt, columns={"turns": ranks.index + 1}) for prompt in prompts]
runner = EpisodeRunner("Turns", Turns, given[1], 9, 20.0, max_prompt_length=90)
episodes = runner.run(played, Sampling(90), engine.generate, engine.any_rank)
result["turns"] = [sum(turn.sampled for turn in episode.turns) for episode in episodes]
result["everywhere"] = [c.ids for c in engine.generate_everywhere(prompts[:1], Sampling(3))]
(*_, whole) = engine.stream(Prompt("s", (1,), 7 + ranks.index), Sampling(3))
result["streamed"] = whole.prompt.key
engine.load_weights("bad")
result["later"] = str(engine.dtype)
try:
    engine.generate(prompts, Sampling(3))
except EngineLost as error:
    result["error"] = str(error)
engine.close()
result["seen"] = seen
open(f"{sys.argv[1]}/{ranks.index}", "w").write(json.dumps(result))

class Late:
    def __del__(self):
        print("Python's shutdown")

late = Late()
atexit.register(print, "at exit")
exit_process(0)
"""


def test_all_ranks_use_the_engine_of_rank_zero(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = scripts.forked(3, tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at exit") == 3 and "shutdown" not in done.stdout
    first, second, third = (json.loads((tmp_path / str(i)).read_text()) for i in range(3))
    assert [rank["started"] for rank in (first, second, third)] == [1, 0, 0]
    assert first["answers"] == [[key, "0", [key, sample, 0]] for key in (0, 1) for sample in (0, 1)]
    assert second["answers"] == []
    assert third["answers"] == [[20, "2", [20, sample, 0]] for sample in (0, 1)]
    # in three rounds of episodes, all ranks call the engine, also the second one, which has no prompts
    assert [first["turns"], second["turns"], third["turns"]] == [[1, 1], [], [3]]
    assert first["seen"] == [3, 3, 1, 1, 1, 3, "closed"] and second["seen"] == third["seen"] == []
    for index, rank in enumerate((first, second, third)):
        assert (rank["name"], rank["dtype"], rank["later"]) == ("pool", "torch.bfloat16", "torch.float32")
        assert rank["sum"] == 3 and rank["streamed"] == 7 + index
        assert rank["everywhere"] == 2 * [[0, 0, 0]]  # rank 0's prompts
        assert rank["error"] == "no worker is left"


def train(folder, model, data, count, *rest, reward="spread", trained=(), **environment):
    """Run a training with the function ``reward`` and the reward models in the folders ``trained``."""
    functions = folder.parent / "functions.py"
    functions.write_text(REWARD)
    named = {"--mode": "train_rlhf", "--model_name": model, "--data_path": data, "--rlhf_model_path": folder}
    named |= {"--learning_rate": "1e-4", "--eval_prompts": "3", "--batch_size": "5", "--micro_batch_size": "2"}
    named |= {"--max_steps": "3", "--max_new_tokens": "8", "--max_prompt_length": "40"}
    words = [word for pair in named.items() for word in pair] + ["--rewards", f"{functions}:{reward}", *trained]
    return scripts.launched(count, scripts.ROOT / "reinforce_cli.py", *words, *rest, **environment)


@pytest.mark.full
@needs_ray
def test_a_pool_trains_two_ranks_like_one(tmp_path, model_folder, pairs_csv, reward_folder):
    """Asynchronous rollouts, so that a thread requests completions during the update; the second batch is a single prompt.

    The single process generates and scores without the pool.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    alone, pool = ["--rollout", "transformers"], ["--rollout", "ray://local", "--rollout_workers", "1", *SCORERS]
    for folder, count, rest, environment in ((one, 1, alone, {}), (two, 2, pool, scripts.FSDP2)):
        done = train(
            folder, model_folder, pairs_csv, count, "--staleness", "1", *rest, trained=[reward_folder], **environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Saved policy to") == 1
    texts = [
        sorted((row["step"], row["completion"]) for row in read_completions(run / COMPLETIONS)) for run in (one, two)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 4
    assert [line["staleness"] for line in read_metrics(two)] == [0, 1, 1]
    begun, weights, others = (load_file(folder / "model.safetensors") for folder in (model_folder, one, two))
    names = [name for name in begun if not name.endswith("attn.c_attn.bias")]  # that of the keys moves at random
    assert max(float((weights[name] - others[name]).abs().max()) for name in names) <= 1e-5
    assert max(float((weights[name] - begun[name]).abs().max()) for name in names) > 1e-4


@pytest.mark.full
@needs_ray
def test_a_reward_that_fails_on_one_rank_stops_all_ranks(tmp_path, model_folder, pairs_csv, reward_folder):
    """No rank waits for scores that the failed rank will never request."""
    pool = ["--rollout", "ray://local", "--rollout_workers", "1", *SCORERS]
    named = {"reward": "fails", "trained": [reward_folder], "FAILS": "1"}
    done = train(tmp_path / "run", model_folder, pairs_csv, 2, *pool, "--watchdog_seconds", "600", **named)
    assert done.returncode != 0
    assert done.stderr.count("error: Reward function fails: failed") == 1 and "out of order" in done.stderr


@pytest.mark.full
@needs_ray
def test_an_unreachable_cluster_is_reported_once_for_all_ranks(tmp_path, model_folder, pairs_csv):
    done = train(tmp_path / "run", model_folder, pairs_csv, 2, "--rollout", "ray://127.0.0.1:9")
    assert done.returncode != 0
    assert done.stderr.count("no Ray cluster responds at 127.0.0.1:9") == 1
    assert "Traceback" not in done.stderr.split("error: --rollout")[0]
