"""Token ids of real tokenizers equal those of ``apply_chat_template``, wherever texts are formatted."""

import pytest
import real_tokenizers
import torch
from transformers import AutoTokenizer

from reinforcepp.commands.chat.conversation import Conversation
from reinforcepp.data import PromptRow, SftRow
from reinforcepp.models import prompt_format, tokenization
from reinforcepp.models.loading import end_ids
from reinforcepp.models.special_tokens import special_tokens
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.training.sft_trainer import to_example
from reinforcepp.types import Completion

pytestmark = pytest.mark.full

TURNS = [
    ("Why is the Wi-Fi slow?", "Measure signal and channel load first."),
    ("  Two lines,\n\nand spaces  ", "1. one\n2. two\n\n```bash\nip route\n```"),
    ("请解释一下默认路由。", "默认路由把数据包发往网关。"),
    ("Schreib ein Gedicht über Straßen!", "Über allen Gipfeln ist Ruh …"),
    ("What is 17 * 3?", "51"),
    ("emoji 👩‍💻 and a\ttab", "🎉🎉 done"),
    ("def f(x):\n    return x", "    return x + 1"),
]


@pytest.fixture(scope="module", params=real_tokenizers.NAMES)
def tokenizer(request):
    return AutoTokenizer.from_pretrained(real_tokenizers.folder_of(request.param))


class Rows:
    """Stands for a reward model and keeps the rows that it scores."""

    def __init__(self, tokenizer):
        self.reward = TrainedReward(torch.nn.Module(), tokenizer)
        self.reward.score_rows = self.score
        self.rows = []

    def score(self, rows):
        self.rows += rows
        return [0.0] * len(rows)


def templated(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, return_dict=True, **settings)["input_ids"]


def whole(tokenizer, prompt, answer):
    """Return the ids of the template up to the end token, because templates write a line break after it."""
    ids = templated(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    end = tokenization.end_token_id(tokenizer)
    return ids[: len(ids) - ids[::-1].index(end)]


@pytest.mark.parametrize(("prompt", "answer"), TURNS)
def test_prompts_answers_and_conversations(tokenizer, prompt, answer):
    start = templated(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = whole(tokenizer, prompt, answer)
    (rollout,), _ = tokenization.encode_prompts(tokenizer, [PromptRow(prompt, {}, 0)], max_prompt_length=999)
    assert list(rollout.ids) == tokenization.encode_prompt(tokenizer, prompt) == start
    assert tokenization.encode_example(tokenizer, prompt, answer) == ids
    example = to_example(tokenizer, SftRow(prompt, answer))
    assert (example.context, example.target) == (start, ids[len(start) :])
    scored = Rows(tokenizer)
    scored.reward([prompt], [answer])
    assert scored.rows == [ids]


def test_a_chat(tokenizer):
    chat = Conversation(tokenizer, room=4096, system="Be short.")
    messages = [{"role": "system", "content": "Be short."}]
    for question, answer in TURNS:
        prompt = chat.ask(question)
        messages.append({"role": "user", "content": question})
        assert list(prompt.ids) == templated(tokenizer, messages, add_generation_prompt=True)
        chat.answered(Completion(prompt, (1,), (0.0,), answer, "stop"))
        messages.append({"role": "assistant", "content": answer})


BORDERS = [
    ("The sky is", " blue."),
    ("  How? \n\n", "\tSo.\n"),
    ("答案是", "《红楼梦》"),
    ("def f(x):\n    return", " x\n\n"),
]


@pytest.mark.parametrize("name", real_tokenizers.NAMES)
def test_prompts_of_a_base_model_without_a_template(name):
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers.folder_of(name))
    tokenizer.chat_template = prompt_format.plain_template(tokenizer)
    for prompt, answer in [*TURNS, *BORDERS]:
        assert tokenization.encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
        whole = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        assert tokenization.encode_example(tokenizer, prompt, answer) == whole
    tokenizer.chat_template = prompt_format.question_answer_template(tokenizer)
    for prompt, answer in TURNS:
        start = tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
        context, target = tokenization.split_example(tokenizer, prompt, answer)
        assert context == start and tokenizer.decode(target) == f" {answer}{tokenizer.eos_token}"


def test_special_tokens_in_the_data(tokenizer):
    named = sorted(special_tokens(tokenizer).others, key=len)[-20:]
    expected = [i for i in tokenization.encode_example(tokenizer, "a", "b") if i in tokenizer.added_tokens_decoder]
    for text in [*named, f"x {tokenizer.eos_token} y"]:
        ids = tokenization.encode_example(tokenizer, text, f"x {text} y")
        special = tokenizer.convert_tokens_to_ids([*special_tokens(tokenizer).others])
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        assert f"x {text} y" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("name", "eos", "end"),
    [
        ("qwen3", "<|endoftext|>", "<|im_end|>"),
        ("llama3_1", "<|end_of_text|>", "<|eot_id|>"),
        ("gemma3", "<eos>", "<end_of_turn>"),
    ],
)
def test_an_answer_ends_with_the_end_of_its_turn_whatever_eos_is(name, eos, end):
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers.folder_of(name), eos_token=eos)
    ids = tokenization.encode_example(tokenizer, "Why?", "So.")
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end) and tokenizer.eos_token_id not in ids
    assert end_ids([7], tokenizer) == {7, ids[-1], tokenizer.eos_token_id}
