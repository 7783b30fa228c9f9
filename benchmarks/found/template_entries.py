"""Entries about chat templates, special tokens, and reward functions."""

from __future__ import annotations

import datetime
from pathlib import Path

from found.inputs import (
    CHATML,
    DATED,
    END,
    FIXED,
    PREFILLED,
    accepted,
    command,
    entry,
    error_of,
    expect,
    refused,
    rows_file,
    saved,
    supervised,
    tokenizer,
    train,
)
from reinforcepp.config.reward_rules import make_rule
from reinforcepp.data import SftRow
from reinforcepp.models.conversations import format_completion, format_prompt
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.tokenization import encode_example, encode_prompt
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.training.sft_trainer import to_example
from reinforcepp.types import Completion, Prompt, Sampling

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT = ("<|im_start|>", "<|im_end|>")


class Tomorrow(datetime.datetime):
    """The clock of the next day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:  # type: ignore[override]
        """Return the time in 25 hours."""
        later = datetime.datetime.now(tz) + datetime.timedelta(hours=25)
        return cls.fromtimestamp(later.timestamp(), tz)


def dated(folder: Path) -> str:
    """Check that a reward model with a dated template loads on the next day and formats prompts as before."""
    from unittest import mock

    from reinforcepp import load_reward_model

    accepted(supervised("reward", saved(folder / "m", tokenizer(DATED, special=CHAT)), folder))
    today = format_prompt(load_tokenizer(str(folder / "reward")), "Why?")
    import transformers.utils.chat_template_utils as rendering

    rendering._compile_jinja_template.cache_clear()  # the compiled template holds the clock of today
    with mock.patch.object(rendering, "datetime", Tomorrow):
        again = load_tokenizer(str(folder / "reward"))
        load_reward_model(str(folder / "reward"))
        later = format_prompt(again, "Why?")
    rendering._compile_jinja_template.cache_clear()
    return expect(later == today, (today, later))


@entry("F4", "a template with strftime_now, used on the next day", "the date is stored, and the reward model loads")
def dates_in_templates(folder: Path) -> str:
    return dated(folder)


@entry("K-D", "a reward model with a dated template", "its scores don't depend on the day")
def dates_and_scores(folder: Path) -> str:
    return dated(folder)


@entry("F6a", "tags that are special tokens of the tokenizer", "reward functions see them")
def tags_as_special_tokens(folder: Path) -> str:
    tok = tokenizer(special=TAGS)
    base = saved(folder / "m", tok, vocab=420)
    policy = load_policy(str(base))
    think = tok.convert_tokens_to_ids("<think>")
    engine = TransformersEngine(policy, load_tokenizer(str(base)))
    policy.register_forward_hook(lambda module, given, output: output.logits[..., think].fill_(1e4) and output)
    (completion,) = engine.generate([Prompt("", (40, 41), 0, {})], Sampling(2, temperature=0))
    return expect("<think>" in completion.text, completion.text)


@entry("F6b", "a template that opens <think>", "rule:format counts the opened tag")
def opened_thoughts(folder: Path) -> str:
    from reinforcepp.models.conversations import prefill
    from reinforcepp.rewards.functions import score_with

    tok = load_tokenizer(str(saved(folder / "m", tokenizer(PREFILLED, special=("<|User|>", "<|Assistant|>")))))
    prompt = Prompt("Why?", (1,), 0, {}, prefill=prefill(tok))
    answer = Completion(prompt, (5,), (-1.0,), "because</think><answer>So.</answer>", "stop")
    return expect(score_with([make_rule("format")], [answer]).total == [1.0])


@entry("F6c", "GSM8K answers with #### and rule:exact_match", "the numbers are compared; a constant rule warns")
def grade_school_math(folder: Path) -> str:
    solution = "He has 2 + 3 = 5 pens.\n#### 5"
    found = make_rule("exact_match")(["", ""], ["Adding gives\n#### 5", "#### 6"], answer=[solution, solution])
    expect(found == [1, 0], found)
    return expect(make_rule(r"exact_match?pattern=#### (\d+)")([""], ["#### 5"], answer=[solution]) == [1])


@entry("F6d", "a template that removes reasoning from answers", "SFT and reward texts are whole")
def removed_reasoning(folder: Path) -> str:
    tok = load_tokenizer(str(saved(folder / "m", tokenizer(PREFILLED, special=("<|User|>", "<|Assistant|>")))))
    for answer in ("<think>two and two</think>Four.", "<think>a guess</think>Four."):
        expect(answer.removeprefix("<think>") in format_completion(tok, "2 + 2?", answer), answer)
        example = to_example(tok, SftRow("2 + 2?", answer))
        text = tok.decode([*example.context, *example.target])
        expect(answer.removeprefix("<think>") in text, text)
    return FIXED


@entry("F6e", "an answer that contains the text of EOS", "it is encoded as plain text")
def eos_in_answers(folder: Path) -> str:
    tok = load_tokenizer(str(saved(folder / "m", tokenizer())))
    ids = list(encode_example(tok, "Why?", f"one {END} two"))
    expect(ids.count(tok.eos_token_id) == 1 and ids[-1] == tok.eos_token_id, ids)
    return expect("two" in tok.decode(ids), tok.decode(ids))


@entry("F19", "reward functions that return a dict, a set, or a string", "an error that names the type")
def odd_rewards(folder: Path) -> str:
    from reinforcepp.rewards.functions import score_with

    answers = [Completion(Prompt("a?", (1,), i, {}), (5,), (-1.0,), "a", "stop") for i in range(2)]
    for value in ({"a": 1.0, "b": 2.0}, {1.0, 2.0}, "12"):
        error = error_of(lambda value=value: score_with([lambda prompts, completions, **_: value], answers))
        expect(type(value).__name__ in error, error)
    return "refused"


@entry("K-A", "base models that add BOS, in SFT, rollouts, and reward texts", "one BOS everywhere")
def bos_everywhere(folder: Path) -> str:
    tok = load_tokenizer(str(saved(folder / "m", tokenizer(bos="<bos>"))))
    plain, answer = to_example(tok, SftRow(None, "Rice.")), to_example(tok, SftRow("Why?", "So."))
    for ids in (
        encode_prompt(tok, "Why?"),
        encode_example(tok, "Why?", "So."),
        [*plain.context, *plain.target],
        answer.context,
    ):
        expect(next(iter(ids)) == tok.bos_token_id and list(ids).count(tok.bos_token_id) == 1, ids)
    return FIXED


@entry("K-7", "a template with an end of turn other than EOS", "answers end at the end of turn")
def end_of_turn(folder: Path) -> str:
    tok = load_tokenizer(str(saved(folder / "m", tokenizer(CHATML, special=CHAT))))
    end = tok.convert_tokens_to_ids("<|im_end|>")
    expect(list(encode_example(tok, "Why?", "So."))[-1] == end)
    return expect(to_example(tok, SftRow("Why?", "So.")).target[-1] == end)


@entry("K-9", "templates of R1-like models in reward training", "accepted, or refused by train, too")
def reasoning_templates(folder: Path) -> str:
    base = saved(folder / "m", tokenizer(PREFILLED, special=("<|User|>", "<|Assistant|>")))
    ran = supervised("reward", base, folder)
    return FIXED if ran.code == 0 else (refused(ran) and refused(train(base, folder)))


@entry(
    "K-13",
    "thinking switched off by a variable; an answer cut within a thought",
    "kwargs reach the template; scored as sampled",
)
def thinking(folder: Path) -> str:
    template = (
        CHATML
        + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}"
    )
    base = saved(folder / "m", tokenizer(template, special=CHAT))
    asked = ("--chat_template_kwargs", '{"enable_thinking": false}')
    accepted(supervised("sft", base, folder, *asked))
    tok = load_tokenizer(str(folder / "sft"))
    expect(format_prompt(tok, "Why?").endswith("<no_think>"), format_prompt(tok, "Why?"))
    ids = encode_example(tok, "Why?", "<think>not yet", finished=False)
    return expect(tok.decode(ids).endswith("<think>not yet"), tok.decode(ids))


@entry("R2", "plan for a CPU that emulates bfloat16", "a warning with both speeds, and time in readable units")
def emulated_bfloat16(folder: Path) -> str:
    from unittest import mock

    from reinforcepp.models import precision
    from reinforcepp.planner import device

    def speed(kind: str, dtype: object, *rest: object) -> float:
        return 0.2e9 if "bfloat16" in str(dtype) else 50e9

    speeds = mock.patch.object(precision, "cpu_flops", lambda: (0.2e9, 50e9))
    with speeds, mock.patch.object(device, "matmul_flops", speed):
        ran = command(
            "plan",
            "--model",
            saved(folder / "m"),
            "--device",
            "cpu",
            "--mixed_precision",
            "bf16",
            "--max_prompt_length",
            64,
        )
    return expect("0.2 GFLOP/s" in ran.out and "50 GFLOP/s" in ran.out, ran.out + ran.err)


@entry("R3", "the default learning rates", "they come from measurements, and depend on the training")
def measured_defaults(folder: Path) -> str:
    results = Path(__file__).parents[1] / "results" / "defaults.json"
    expect(results.is_file(), "benchmarks/results/defaults.json is missing")
    ran = supervised("reward", saved(folder / "m"), folder, data=rows_file(folder / "p.jsonl"))
    return expect("earning rate" in ran.err or "learning_rate" in ran.err, ran.err)
