"""Tasksets and environments of the real package verifiers, with a scripted policy."""

import sys
import textwrap
from functools import partial

import pytest
import tiny

from reinforcepp.config.data_spec import data_names
from reinforcepp.data import load_prompts
from reinforcepp.data.verifiers import tasks_of
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.environments.verifiers import VerifiersEnvironment
from reinforcepp.errors import ConfigError, EnvironmentFailed
from reinforcepp.models.tokenization import encode, encode_prompt, end_token_id
from reinforcepp.types import Completion, Prompt, Sampling

SUMS = """
    import verifiers.v1 as vf

    class Data(vf.TaskData):
        answer: str = ""

    class Sum(vf.Task[Data]):
        @vf.reward(weight=2.0)
        async def right(self, task, trace) -> float:
            return float(trace.last_reply == task.answer)

        @vf.reward(weight=0.5)
        async def short(self, trace) -> float:
            return float(len(trace.last_reply) < 5)

    class Config(vf.TasksetConfig):
        count: int = 3
        system: str = ""

    class Sums(vf.Taskset[Sum, Config]):
        def load(self):
            for i in range(self.config.count):
                prompt = f"What is {i} + 1?"
                system = self.config.system or None
                yield Sum(Data(prompt=prompt, system_prompt=system, answer=str(i + 1)), self.config.task)

    __all__ = ["Sums"]
"""
GUESSING = """
    import verifiers.v1 as vf

    class Data(vf.TaskData):
        secret: int = 0

    class Guess(vf.Task[Data]):
        @vf.reward
        async def right(self, task, trace) -> float:
            return float(trace.last_reply == str(task.secret))

        @vf.stop
        async def gives_up(self, trace: vf.Trace) -> bool:
            return bool(trace.assistant_messages) and trace.last_reply == "stop"

    class Guesses(vf.Taskset[Guess, vf.TasksetConfig]):
        def load(self):
            return [Guess(Data(secret=n, system_prompt="Guess.")) for n in (7, 3)]

    class GuessConfig(vf.EnvConfig):
        player: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"})

    class GuessEnv(vf.Env[GuessConfig]):
        async def run(self, task, agents):
            async with agents.player.interaction(task) as game:
                answer = await game.turn("Name a number.")
                while not answer.terminated and answer.last_reply != str(task.data.secret):
                    low = int(answer.last_reply) < task.data.secret if answer.last_reply.isdigit() else True
                    answer = await game.turn("Higher." if low else "Lower.")

        async def finalize(self, task, episode):
            (trace,) = episode.traces
            trace.record_reward("turns", -0.1 * trace.num_turns)

    __all__ = ["Guesses", "GuessEnv"]
"""


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """Return a function that writes a module of a taskset and returns its name."""
    pytest.importorskip("verifiers.v1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source, *changes):
        name = f"taskset_{abs(hash((tmp_path, source, changes)))}"
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    yield write
    tasks_of.cache_clear()


def rows(name, fraction=0.0):
    return load_prompts(f"verifiers:{name}", heldout_fraction=fraction, seed=0)


def play(name, *texts, num_samples=1, max_turns=10):
    """Return the episodes of each task, in which the policy's message number n is ``texts[n]``, and what it was asked."""
    tokenizer = tiny.chat_tokenizer()
    prompts = [
        Prompt(row.prompt, tuple(encode_prompt(tokenizer, row.conversation)), key, row.columns, messages=row.messages)
        for key, row in enumerate(rows(name)[1])
    ]
    asked = []

    def generate(prompts, sampling):
        asked.append([tokenizer.decode(prompt.ids) for prompt in prompts])
        ids = (*encode(tokenizer, texts[len(asked) - 1]), end_token_id(tokenizer))
        return [Completion(prompt, ids, (-0.5,) * len(ids), texts[len(asked) - 1], "stop") for prompt in prompts]

    make = partial(VerifiersEnvironment, max_turns=max_turns)
    run = EpisodeRunner("verifiers", make, tokenizer, max_turns=8, timeout=20.0, max_prompt_length=400)
    try:
        return run.run(prompts, Sampling(400, num_samples=num_samples), generate), asked
    finally:
        run.close()


def rewards(episode):
    return [turn.reward for turn in episode.turns if turn.sampled]


# --- without the package ----------------------------------------------------------------------------------------------


def test_a_taskset_is_a_source_of_rows_with_options():
    (name,) = data_names("verifiers:gsm8k?limit=5&weight=2")
    assert (name.taskset, name.weight, name.generator, name.paths) == ("gsm8k", 2.0, (("limit", "5"),), [])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    tasks_of.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'reinforcepp\[verifiers\]'"):
        rows("gsm8k")


# --- single turns -----------------------------------------------------------------------------------------------------


def test_rows_are_the_tasks_of_the_taskset(taskset):
    name = taskset(SUMS)
    data, train, heldout = rows(f"{name}?count=10&system=Add.", fraction=0.2)
    assert len(data.rows) == 10 and len(train) == 8 and len(heldout) == 2
    row = data.rows[1]
    assert [message["role"] for message in row.messages] == ["system", "user"] and row.prompt.endswith("What is 1 + 1?")
    assert row.columns["verifiers"] == f"{name}?count=10&system=Add.#1"
    assert len(rows(f"{name}?count=10&limit=4")[0].rows) == 4


def test_an_answer_gets_the_weighted_rewards_of_its_task(taskset):
    episodes, asked = play(taskset(SUMS), "2")
    # 2 x right + 0.5 x short: the tasks ask 0 + 1, 1 + 1 and 2 + 1
    assert [rewards(episode) for episode in episodes] == [[0.5], [2.5], [0.5]]
    assert [turn.sampled for turn in episodes[0].turns] == [True] and "What is 0 + 1?" in asked[0][0]


# --- several turns ----------------------------------------------------------------------------------------------------


def test_a_tasksets_own_environment_writes_between_the_policys_messages(taskset):
    episodes, asked = play(taskset(GUESSING), "5", "7", "3")
    high, low = episodes  # the secrets are 7 and 3
    assert [dict(turn.messages[0])["content"] for turn in high.turns] == ["5", "Higher.", "7"]
    assert [dict(turn.messages[0])["content"] for turn in low.turns] == ["5", "Lower.", "7", "Lower.", "3"]
    assert rewards(high) == [None, pytest.approx(1 - 0.1 * 2)] and rewards(low) == [
        None,
        None,
        pytest.approx(1 - 0.1 * 3),
    ]
    assert "Guess." in asked[0][0] and "Name a number." in asked[0][0]
    assert [len(each) for each in asked] == [2, 2, 1]


def test_a_stop_condition_ends_the_episode_and_is_scored(taskset):
    episodes, _ = play(taskset(GUESSING), "stop")
    assert [rewards(episode) for episode in episodes] == [[pytest.approx(-0.1)]] * 2


def test_the_limit_of_turns_ends_the_episode_and_is_scored(taskset):
    change = ("vf.AgentConfig(harness=", "vf.AgentConfig(max_turns=1, harness=")  # the environment's own limit
    for name, limit, turns in ((taskset(GUESSING), 2, 2), (taskset(GUESSING, change), 2, 1)):
        episodes, asked = play(name, "5", "5", max_turns=limit)
        assert [rewards(episode)[-1] for episode in episodes] == [pytest.approx(-0.1 * turns)] * 2
        assert len(asked) == turns and {episode.finish_reason for episode in episodes} == {"stop"}


def test_samples_of_a_task_have_episodes_of_their_own(taskset):
    episodes, asked = play(taskset(GUESSING), "7", "3", num_samples=2)
    assert [rewards(episode)[-1] for episode in episodes] == [pytest.approx(v) for v in (0.9, 0.9, 0.8, 0.8)]
    assert [len(each) for each in asked] == [4, 2]


# --- what isn't supported ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("class Sum(vf.Task[Data]):", "class Sum(vf.Task[Data]):\n        NEEDS_CONTAINER = True\n"),
            "needs a container",
        ),
        (("async def short(self, trace)", "async def short(self, trace, runtime)"), "runs programs in short"),
        (
            (
                "@vf.reward(weight=0.5)",
                "async def setup(self, trace, runtime):\n            pass\n\n        @vf.reward(weight=0.5)",
            ),
            "runs programs in setup",
        ),
        (
            ("class Sums(vf.Taskset[Sum, Config]):", "class Sums(vf.Taskset[Sum, Config]):\n        INFINITE = True\n"),
            "never ends. Set limit",
        ),
        (("yield Sum(", "raise KeyError('no file') or Sum("), "load failed: KeyError"),
        (('__all__ = ["Sums"]', "__all__ = []"), "exports no Taskset subclass"),
    ],
)
def test_an_unusable_taskset_is_one_sentence(taskset, change, message):
    with pytest.raises(ConfigError, match=message) as raised:
        rows(taskset(SUMS, change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("count=x", "count"),
        ("cuont=3", "'cuont' not found. Did you mean 'count'"),
        ("limit=0", "limit must be a number"),
        ("count=0", "has no task"),
    ],
)
def test_an_invalid_option_is_one_sentence(taskset, options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        rows(f"{taskset(SUMS)}?{options}")
    assert "\n" not in str(raised.value)


def test_an_unknown_taskset_is_named(taskset):
    with pytest.raises(ConfigError, match="'no-such-tasks' not found"):
        rows("no-such-tasks")


def test_an_environment_with_two_agents_is_refused(taskset):
    change = ("player: vf.AgentConfig", "judge: vf.AgentConfig = vf.AgentConfig()\n        player: vf.AgentConfig")
    with pytest.raises(EnvironmentFailed, match="2 agents"):
        play(taskset(GUESSING, change), "5")


def test_an_environment_that_raises_fails_its_episode(taskset):
    change = ("low = int(", "raise KeyError('lost')\n                    low = int(")
    with pytest.raises(EnvironmentFailed, match="lost"):
        play(taskset(GUESSING, change), "5")
