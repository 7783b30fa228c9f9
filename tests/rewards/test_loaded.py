"""Loaded reward models, and folders that TRL saved, score as TRL's trainers do."""

import pytest
import real_tokenizers
import tiny
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from trl.trainer.grpo_trainer import GRPOTrainer

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.completion_log import read_completions
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.rollout.ray.reward_pool import rewards_to_pool
from reinforcepp.training.setup import start_policy
from reinforcepp.types import Completion, Prompt

ASKED = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "Is it up?"}],
]
ANSWERS = ["Run ip route and read it.", "No. "]


def classifier(family, **changes):
    """Return a classifier with random weights, wide enough that texts differ."""
    config = tiny.model(family, vocab_size=changes.pop("vocab_size", 330)).config
    config.num_labels, config.architectures = changes.pop("outputs", 1), None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def completions(conversational: bool, finish_reason="stop") -> list[Completion]:
    prompts = [Prompt("Why?", (1,), i, messages=tuple(ASKED[i]) if conversational else ()) for i in range(2)]
    return [Completion(prompts[i], (5,), (-1.0,), ANSWERS[i], finish_reason) for i in range(2)]


def scores_of_trl(reward, tokenizer, rows: list[Completion], folder) -> list[float]:
    """Return the scores that TRL's trainer computes."""
    policy = tiny.chat_tokenizer()
    args = trl.GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, num_generations=2)
    args.per_device_train_batch_size = 2
    asked = [list(map(dict, c.prompt.messages)) or c.prompt.text for c in rows]
    data = Dataset.from_list([{"prompt": prompt} for prompt in asked])
    trainer = GRPOTrainer(
        tiny.model("llama"), reward, args, data, processing_class=policy, reward_processing_classes=tokenizer
    )
    answers = [[{"role": "assistant", "content": c.text}] if c.prompt.messages else c.text for c in rows]
    found = trainer._calculate_rewards([{} for _ in rows], asked, answers, [list(c.ids) for c in rows])
    return found[:, 0].tolist()


@pytest.fixture
def padded_with_eos():
    tokenizer = tiny.chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_loaded_model_scores_as_in_trl(family, conversational, finish_reason, padded_with_eos, tmp_path):
    model, rows = classifier(family), completions(conversational, finish_reason)
    model.config._name_or_path = "org/judge"
    for tokenizer in (tiny.chat_tokenizer(), padded_with_eos, tiny.chat_tokenizer(bos="<s>")):
        expected = scores_of_trl(model, tokenizer, rows, tmp_path)
        rewards = load_rewards(model, None, None, tokenizer, texts_are_messages=False)
        assert rewards.score(rows).total == pytest.approx(expected, abs=1e-5) and rewards.names == ["judge"]
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


@pytest.mark.parametrize(
    "take",
    [lambda model: TrainedReward(model, tiny.chat_tokenizer()), lambda model: start_policy(model, ReinforceConfig())],
    ids=["reward", "policy"],
)
def test_the_gelu_of_a_loaded_model_is_fused(take):
    model, tokens, hooked = classifier("gpt2"), torch.randint(330, (1, 8)), []
    gelus = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    gelus[0].register_forward_hook(lambda *_: hooked.append(True))

    def score_and_gradient():
        score = model(tokens).logits.sum()
        return score, torch.autograd.grad(score, model.transformer.wte.weight)[0]

    expected = score_and_gradient()
    take(model)
    close = 1e-5 * max(1.0, float(expected[1].abs().max()))
    torch.testing.assert_close(score_and_gradient(), expected, rtol=1e-5, atol=close)
    assert len(hooked) == 2 and gelus and {type(module) for module in gelus} == {torch.nn.GELU}


@pytest.mark.full
@pytest.mark.parametrize("name", real_tokenizers.NAMES)
@pytest.mark.parametrize("conversational", [True, False])
def test_real_tokenizers(name, conversational, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers.folder_of(name))
    model, rows = classifier("llama", vocab_size=len(tokenizer)), completions(conversational)
    rewards = load_rewards(model, None, None, tokenizer, texts_are_messages=False)
    assert rewards.score(rows).total == pytest.approx(scores_of_trl(model, tokenizer, rows, tmp_path), abs=1e-5)


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_folder_that_trl_trained_scores_as_in_trl(finish_reason, tmp_path):
    tokenizer, folder = tiny.chat_tokenizer(), str(tmp_path / "judge")
    model = classifier("llama")
    model.config.pad_token_id = tokenizer.pad_token_id
    pair = {name: [*ASKED[0], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    args = trl.RewardConfig(output_dir=folder, report_to="none", use_cpu=True, bf16=False, max_steps=1)
    trainer = trl.RewardTrainer(model, args, train_dataset=Dataset.from_list([pair] * 8), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    rows = completions(True, finish_reason)
    rewards = load_rewards(folder)
    assert rewards.score(rows).total == pytest.approx(scores_of_trl(folder, None, rows, tmp_path), abs=1e-5)
    assert rewards.names == ["judge"]
    given = load_rewards([folder, len_of], None, None, [tokenizer, None])
    assert given.score(rows).by_function["judge"] == pytest.approx(rewards.score(rows).total, abs=1e-6)


def len_of(completions):
    return [0.0] * len(completions)


def test_a_text_prompt_is_a_user_message_if_the_policy_reads_it_so():
    tokenizer, model = tiny.chat_tokenizer(), classifier("llama")
    (text,) = load_rewards(model, None, None, tokenizer).functions
    (raw,) = load_rewards(model, None, None, tokenizer, texts_are_messages=False).functions
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert tokenizer.decode(text.encode("Why?", "So.")) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(raw.encode("Why?", "So.")) == "Why?So."
    assert raw.encode(ASKED[1], "So.") == text.encode("Is it up?", "So.")


def test_a_training_with_a_loaded_model_a_function_and_weights(tmp_path):
    tokenizer, model = tiny.chat_tokenizer(), classifier("llama", outputs=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.config._name_or_path = "org/judge"
    settings = {"max_new_tokens": 4, "batch_size": 2, "max_steps": 1, "rollout": "transformers", "num_generations": 2}
    args = ReinforceConfig(output_dir=str(tmp_path), reward_weights=[0.5, 1], **settings)
    rows = [{"prompt": asked} for asked in ASKED]
    trainer = ReinforceTrainer(
        tiny.model("llama"),
        [model, len_of],
        args,
        rows,
        processing_class=tokenizer,
        reward_processing_classes=[tokenizer, None],
    )
    trainer.train()
    (entry, *_) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["reward"] == pytest.approx(0.5 * entry["rewards/judge/mean"], abs=1e-5)
    (scored,) = trainer.rewards.trained
    for row in read_completions(tmp_path / "completions"):
        ids = scored.encode(row["messages"], row["completion"])
        assert row["reward/judge"] == pytest.approx(model(torch.tensor([ids])).logits[0, 0].item(), abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="a loaded reward model stays in its process"):
        rewards_to_pool(trainer.rewards, 1)


@pytest.mark.parametrize(
    ("model", "tokenizers", "message"),
    [
        (lambda: tiny.model("llama"), None, "LlamaForCausalLM isn't a sequence classifier"),
        (lambda: classifier("llama"), None, "a reward model created in memory has no tokenizer"),
        (lambda: classifier("llama"), [None, None], "reward_processing_classes: 2 for 1 rewards"),
    ],
)
def test_unusable_models_are_refused(model, tokenizers, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards([model()], None, None, tokenizers)


def test_a_trained_folder_accepts_its_own_tokenizer_only(reward_folder):
    own = AutoTokenizer.from_pretrained(reward_folder)
    load_rewards(str(reward_folder), None, None, own)
    with pytest.raises(ConfigError, match="the tokenizer differs from the one with which"):
        load_rewards(str(reward_folder), None, None, tiny.chat_tokenizer())
