"""Training on episodes: what the loss sees, how runs stop and resume in an episode, and what they write."""

import json
import os
import signal

import pytest
import tiny
import torch
from training.test_resume import files, noisy, stopping
from training.test_resume import trainer as plain_trainer

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.environments.examples import calculator
from reinforcepp.errors import ConfigError, EnvironmentFailed
from reinforcepp.models.loading import load_policy
from reinforcepp.models.tokenization import encode
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.completion_log import read_completions
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.types import Completion

ROWS = [{"prompt": f"Guess {i}.", "secret": chr(97 + i)} for i in range(6)]
SETTINGS = {
    "max_new_tokens": 60,
    "max_prompt_length": 40,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "seed": 5,
    "max_steps": 3,
    "max_turns": 3,
    "save_every": 1,
    "rollout": "transformers",
    "mixed_precision": "no",  # the tests compare exact numbers
}


class Guess:
    """Rewards each message with its share of the secret letter; ends with the second message that has no letter "e"."""

    def reset(self, row):
        self.secret, self.left = row["secret"], 2

    def step(self, message):
        text = message["content"]
        self.left -= "e" not in text
        return f"No, {len(text)}.", text.count(self.secret) + len(text) % 3 / 3, not self.left


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that ends a message after a few tokens, because a third of its tokens end one."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), tiny.chat_tokenizer()
    model = tiny.model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, len(tokenizer), 3)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(base, folder, make=Guess, rewards=None, rows=ROWS, heldout=None, **settings):
    args = ReinforceConfig(output_dir=str(folder), **(SETTINGS | settings))
    return ReinforceTrainer(base, rewards, args, rows, heldout, environment=make)


def same_files(one, other):
    assert files(one) == files(other)


# --- the loss ---------------------------------------------------------------------------------------------------------


def kept_batches(run):
    """Return a list that gets the batch of every step."""
    batches, record = [], run.run.record
    run.run.record = lambda step, batch, *others: (batches.append(batch), record(step, batch, *others))
    return batches


def test_the_loss_is_that_of_the_sampled_tokens_alone(base, tmp_path):
    """The gradient of one step equals that of -A · logp over the sampled tokens, row by row and without padding."""
    run = trainer(base, tmp_path / "run", max_steps=1, kl_coef=0, kl_limit=None, max_grad_norm=1e9)
    batches, gradients, policy = kept_batches(run), [], run.policy
    clip = run.update.policy.clip
    run.update.policy.clip = lambda: (
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters()}),
        clip(),
    )[1]
    run.train()
    batch = batches[0]
    completions, model = batch.rollout.completions, load_policy(base)
    masked = [len(c.ids) - len(c.sampled_ids) for c in completions]
    assert min(masked) > 0 and max(len(c.turns) for c in completions) > 2
    returns = []
    for c in completions:  # the reward of a turn and of those after it
        later, row = c.environment_reward, []
        for turn in c.turns:
            row += [later if turn.sampled else None] * (turn.stop - turn.start)
            later -= turn.reward or 0
        returns.append(row)
    known = torch.tensor([value for row in returns for value in row if value is not None], dtype=torch.float64)
    loss = 0
    for c, row in zip(completions, returns, strict=True):
        ids = torch.tensor([[*c.prompt.ids, *c.ids]])
        logprobs = model(ids).logits[0, len(c.prompt.ids) - 1 : -1].log_softmax(-1)
        for i, value in enumerate(row):
            if value is not None:
                advantage = (value - known.mean()) / known.std(correction=0)
                loss = loss - advantage * logprobs[i, c.ids[i]] / len(known)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[0][name], parameter.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "rloo", "grpo", "ppo"])
def test_every_estimator_trains_on_episodes(base, tmp_path, estimator):
    run = trainer(base, tmp_path / "run", estimator=estimator, num_generations=2, batch_size=2, max_steps=2)
    metrics = tiny.train(run)[-1]
    assert metrics["episodes/mean_turns"] > 1 and metrics["episodes/mean_environment_tokens"] > 10
    assert metrics["rewards/environment/mean"] == metrics["reward"] and metrics["grad_norm"] > 0


def test_entropy_kl_and_lengths_are_those_of_sampled_tokens(base, tmp_path):
    run = trainer(base, tmp_path / "run", max_steps=1)
    batches = kept_batches(run)
    metrics = tiny.train(run)[0]
    completions = batches[0].rollout.completions
    lengths = [len(c.sampled_ids) for c in completions]
    assert metrics["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert int(batches[0].rollout.mask_BT.sum()) == sum(lengths)
    assert metrics["sampling/logprob_gap_max"] < 1e-4  # the environment's tokens have no sampled log-probability
    rows = read_completions(tmp_path / "run" / "completions")
    assert [row["length"] for row in rows] == lengths
    turns = [json.loads(row["turns"]) for row in rows]
    assert [sum(turn["tokens"] for turn in row if turn["sampled"]) for row in turns] == lengths
    assert [sum(turn["reward"] or 0 for turn in row) for row in turns] == pytest.approx([row["reward"] for row in rows])


def test_rewards_of_functions_and_of_the_environment_are_added(base, tmp_path):
    seen = {}

    def judge(prompts, completions, completion_ids, environment_rewards, **_):
        seen.update(locals())
        return [float(len(messages)) for messages in completions]

    run = trainer(base, tmp_path / "run", rewards=[judge, "0.5*environment"], max_steps=1)
    batches = kept_batches(run)
    run.train()
    completions = batches[0].rollout.completions
    assert seen["completions"] == [c.messages for c in completions]
    assert seen["completion_ids"] == [list(c.sampled_ids) for c in completions]
    expected = [len(c.messages) + 0.5 * c.environment_reward for c in completions]
    assert batches[0].scores.total == pytest.approx(expected)


def test_rewards_of_turns_are_weighted_and_scaled_as_their_sum(base, tmp_path):
    """With the power 1, an episode of 4 sampled tokens with the weight 0.5 has an eighth of each turn's reward."""
    settings = {"reward_length_power": 1.0, "max_steps": 1}
    run = trainer(base, tmp_path / "run", rewards=["0.5*environment"], **settings)
    batches = kept_batches(run)
    run.train()
    rollout = batches[0].rollout
    for row, c in enumerate(rollout.completions):
        scale = 0.5 / len(c.sampled_ids)
        turns = [turn for turn in c.turns if turn.sampled]
        expected = [0.0] * len(c.ids)
        for turn in turns[:-1]:
            expected[turn.stop - 1] = turn.reward * scale
        assert rollout.turn_rewards_BT[row, : len(c.ids)].tolist() == pytest.approx(expected)
        assert float(rollout.rewards_B[row]) == pytest.approx(scale * c.environment_reward)


# --- stop and resume --------------------------------------------------------------------------------------------------


class Stops(Guess):
    """Sends the process a signal in the middle of an episode, once."""

    calls = 0

    def step(self, message):
        type(self).calls += 1
        if type(self).calls == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(message)


@pytest.mark.parametrize("settings", [{}, {"staleness": 1}, {"use_peft": True}], ids=str)
def test_a_run_stopped_in_an_episode_resumes_to_the_same_files(base, tmp_path, settings):
    trainer(base, tmp_path / "whole", **settings).train()
    Stops.calls = 0
    with pytest.raises(Interrupted):
        trainer(base, tmp_path / "run", Stops, **settings).train()
    assert len(read_metrics(tmp_path / "run")) < 3
    Stops.calls = 1000
    trainer(base, tmp_path / "run", Stops, resume=True, **settings).train()
    name = "adapter_model.safetensors" if "use_peft" in settings else "model.safetensors"
    for file in (name, "metrics.jsonl", *(f"completions/step-00000{i}.parquet" for i in (1, 2, 3))):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_a_checkpoint_in_the_middle_of_a_step_holds_the_episodes(base, tmp_path):
    several = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_iterations": 2}
    trainer(base, tmp_path / "whole", **several).train()
    run = trainer(base, tmp_path / "run", **several)
    stopping(run, 12)
    with pytest.raises(Interrupted):
        run.train()
    trainer(base, tmp_path / "run", resume=True, **several).train()
    same_files(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_an_environment_has_no_trace_of_episodes(base, tmp_path):
    run = plain_trainer(base, tmp_path / "run", noisy, max_steps=1)
    metrics = tiny.train(run)[0]
    assert not [name for name in metrics if name.startswith("episodes/")]
    assert "turns" not in read_completions(tmp_path / "run" / "completions")[0]


# --- tools ------------------------------------------------------------------------------------------------------------

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12 * 7"}}</tool_call>'


@pytest.fixture(scope="module")
def base_with_tools(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("tools"), tiny.chat_tokenizer(WITH_TOOLS)
    tiny.model(vocab_size=len(tokenizer), n_positions=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scripted(run, *texts):
    """Let the policy write ``texts`` in turn, in each episode."""
    rounds = iter(texts)

    def generate(prompts, sampling, *_):
        text = next(rounds)
        ids = (*encode(run.tokenizer, text), run.tokenizer.eos_token_id)
        return [Completion(prompt, ids, (-1.0,) * len(ids), text, "stop") for prompt in prompts]

    run.rollouts.checked.generate = generate


def test_tools_answer_calls_in_a_training(base_with_tools, tmp_path):
    settings = {"max_prompt_length": 600, "max_new_tokens": 300, "max_steps": 1}
    args = ReinforceConfig(output_dir=str(tmp_path / "run"), **(SETTINGS | settings))
    functions = [lambda completions, **_: [float(len(messages)) for messages in completions]]
    run = ReinforceTrainer(base_with_tools, functions, args, ROWS, tools=[calculator])
    scripted(run, CALL, "It is 84.")
    batches = kept_batches(run)
    metrics = tiny.train(run)[0]
    episode = batches[0].rollout.completions[0]
    assert '"name": "calculator"' in run.tokenizer.decode(episode.prompt.ids)
    assert [m["role"] for m in episode.messages] == ["assistant", "tool", "assistant"]
    assert episode.messages[1]["content"] == "84"
    assert (metrics["tools/call_frequency"], metrics["tools/failure_frequency"], metrics["reward"]) == (1, 0, 3)
    assert run.config.tools == ("reinforcepp.environments.examples:calculator",)
    assert "tools" in run.run.facts["inputs"]


def test_a_model_that_never_calls_a_tool_is_reported_once(base_with_tools, tmp_path, caplog):
    settings = {"max_prompt_length": 600, "max_new_tokens": 300, "max_steps": 3, "batch_size": 32, "kl_limit": None}
    rows = [{"prompt": f"Guess {i}."} for i in range(32)]
    args = ReinforceConfig(output_dir=str(tmp_path / "run"), tools=["reinforcepp.environments.examples:calculator"],
                           **(SETTINGS | settings))  # fmt: skip
    run = ReinforceTrainer(base_with_tools, [lambda completions, **_: [1.0 for _ in completions]], args, rows)
    scripted(run, *["I don't know."] * 3)
    run.train()
    assert caplog.text.count("none of the first 64 completions called one") == 1
    assert read_metrics(tmp_path / "run")[-1]["tools/call_frequency"] == 0


# --- evaluation, failures, settings -----------------------------------------------------------------------------------


def test_evaluations_run_episodes_and_skip_failed_ones(base, tmp_path):
    class Picky(Guess):
        def reset(self, row):
            if row["prompt"] == "Guess 1.":
                raise ValueError("no such row")
            super().reset(row)

    sets = {"one": ROWS[:2], "two": ROWS[2:4]}
    run = trainer(base, tmp_path / "run", Picky, heldout=sets, rows=ROWS[2:], max_steps=1)
    run.train()
    after = run.evaluations["after"]
    assert [c.prompt.text for c in after.parts["one"].completions] == ["Guess 0."]
    assert [c.prompt.text for c in after.parts["two"].completions] == ["Guess 2.", "Guess 3."]
    assert after.metrics()["episodes/failed"] == 1
    failed = [json.loads(line) for line in (tmp_path / "run" / "failed_episodes.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in failed} == {"Guess 1."} and "no such row" in failed[0]["error"]


def test_a_run_whose_environment_always_fails_stops_with_one_sentence(base, tmp_path):
    class Broken(Guess):
        def step(self, message):
            raise ValueError("no board")

    with pytest.raises(EnvironmentFailed, match=r"no board\. 4 of 4 episodes failed.* Saved the run after step 0 of 3"):
        trainer(base, tmp_path / "run", Broken).train()
    assert "no board" in (tmp_path / "run" / "failed_episodes.jsonl").read_text()


def test_settings_that_contradict_each_other_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="environment_kwargs: there is no environment"):
        ReinforceConfig(environment_kwargs='{"a": 1}')
    with pytest.raises(ConfigError, match="environment and tools: both are given"):
        ReinforceConfig(environment="a:B", tools=("c:d",))
    with pytest.raises(ConfigError, match="give it as module:Class"):
        ReinforceConfig(environment="guess")
    with pytest.raises(ConfigError, match="given in the settings and as an argument"):
        trainer(base, tmp_path / "run", environment="a:B")
