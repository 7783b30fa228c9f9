"""The built-in data, judge and model: no leakage, no shortcut, no reward hacking of the judge, loadable."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys

import pytest

from reinforcepp.data.builtin import data_paths, model_path
from reinforcepp.data.builtin.corpus import (
    HELDOUT_TEMPLATES,
    TRAIN_TEMPLATES,
    Fact,
    csv_text,
    load_facts,
    preference_rows,
    pretraining_rows,
)
from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.errors import DataError

FACTS = load_facts()
by_fact = pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)


@pytest.fixture(scope="module")
def judge() -> GoldJudge:
    return GoldJudge()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


def question(fact: Fact, template: str = HELDOUT_TEMPLATES[0]) -> str:
    return template.format(task=fact.tasks[0])


def test_facts_are_complete_and_distinct():
    assert len(FACTS) >= 60
    assert len({fact.id for fact in FACTS}) == len(FACTS)
    tasks = [task.lower() for fact in FACTS for task in fact.tasks]
    assert len(set(tasks)) == len(tasks)
    answers = [answer for fact in FACTS for answer in (*fact.good, *fact.bad.values())]
    assert len(set(answers)) == len(answers)
    assert all(len(fact.tasks) >= 5 and 2 <= len(fact.good) <= 3 for fact in FACTS)


def test_heldout_templates_and_prompts_are_never_trained_on():
    assert not set(TRAIN_TEMPLATES) & set(HELDOUT_TEMPLATES)
    trained = {row.prompt for row in preference_rows("train")}
    trained |= {prompt for prompt, _ in itertools.islice(pretraining_rows(0, 0.5), 20_000)}
    held_out = {template.format(task=task) for template in HELDOUT_TEMPLATES for fact in FACTS for task in fact.tasks}
    heldout_rows = preference_rows("heldout")
    assert {row.prompt for row in heldout_rows} <= held_out
    assert not {prompt.lower() for prompt in trained} & {prompt.lower() for prompt in held_out}
    # A template could also leak inside a more polite one, so the test looks for its words around any task.
    for fact in FACTS:
        for template in HELDOUT_TEMPLATES:
            wording = question(fact, template).lower().rstrip("?.")
            assert not any(wording in prompt.lower() for prompt in trained)
    assert {row.topic for row in heldout_rows} == {fact.id for fact in FACTS}


@pytest.mark.parametrize(("path", "split"), [*zip(data_paths(), ("train", "heldout"), strict=True)])
def test_data_files_match_the_generating_functions(path, split):
    assert path.read_text(encoding="utf-8") == csv_text(preference_rows(split))
    with path.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["prompt", "chosen", "rejected", "topic"]


def test_generated_rows_depend_on_the_seed_only():
    assert preference_rows("train") == preference_rows("train")
    assert preference_rows("train", seed=1) != preference_rows("train")
    first, again = (list(itertools.islice(pretraining_rows(3, 0.5), 50)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_does_not_reveal_the_label(split, length):
    rows = preference_rows(split)
    assert sum(length(row.chosen) > length(row.rejected) for row in rows) <= 0.65 * len(rows)
    assert sum(length(row.chosen) < length(row.rejected) for row in rows) <= 0.65 * len(rows)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_quarter_of_rejected_answers_are_good_answers_to_another_question(split, judge):
    good = {answer: fact.id for fact in FACTS for answer in fact.good}
    rows = preference_rows(split)
    assert 0.2 <= sum(row.rejected in good for row in rows) / len(rows) <= 0.3
    assert all(judge.score(row.prompt, row.chosen) > 0.5 >= judge.score(row.prompt, row.rejected) for row in rows)


def test_misplaced_answers_require_reading_the_question():
    """Most of these pairs occur in both directions, so only the question decides which answer is right."""
    good = {answer for fact in FACTS for answer in fact.good}
    pairs = [(row.chosen, row.rejected) for row in preference_rows("train") if row.rejected in good]
    assert sum((rejected, chosen) in pairs for chosen, rejected in pairs) >= 0.95 * len(pairs)


@by_fact
def test_judge_agrees_with_the_authors(fact, judge):
    for answer in fact.good:
        assert judge.score(question(fact), answer) >= 0.99
        assert judge.score(question(fact, TRAIN_TEMPLATES[0]), f" {answer}\n") >= 0.99
    for answer in fact.bad.values():
        assert judge.score(question(fact), answer) <= 0.5


@by_fact
def test_judge_rejects_good_answers_to_other_questions(fact, judge):
    for other in FACTS:
        if other.id != fact.id:
            assert all(judge.score(question(fact), answer) <= 0.5 for answer in other.good)


@by_fact
def test_judge_is_not_hacked_by_repetition_or_length(fact, judge):
    prompt = question(fact)
    assert judge.score(prompt, "") == 0.0
    assert all(judge.score(prompt, " ".join([answer] * 2)) == 0.0 for answer in fact.good)
    assert all(judge.score(prompt, " ".join([answer] * 8)) == 0.0 for answer in fact.good)
    assert judge.score(prompt, " ".join(fact.good)) <= 0.5
    everything = " ".join(answer for each in FACTS for answer in each.good)
    assert judge.score(prompt, everything) == 0.0
    others = [other.good[0] for other in FACTS if other.id != fact.id][:2]
    assert judge.score(prompt, " ".join([fact.good[0], *others])) <= 0.5
    assert all(judge.score(prompt, f"{fact.good[0]} {answer}") <= 0.9 for answer in fact.bad.values())
    command = fact.good[0].split("`")[1]
    assert judge.score(prompt, " ".join([f"`{command}`"] * 12)) == 0.0


def test_judge_accepts_greetings_case_and_whitespace(judge):
    fact = FACTS[0]
    for wording in ("Hi, {}", "{} Thanks.", "  {}  ", "Hello! {} Please."):
        assert judge.topic(wording.format(question(fact).lower())) == fact.id
    assert all(judge.topic(prompt) for prompt, _ in itertools.islice(pretraining_rows(1, 0.5), 2_000))
    with pytest.raises(DataError, match="builtin:network"):
        judge.score("How do I bake bread?", "With flour.")


def test_judge_and_corpus_import_no_torch():
    code = "import sys, reinforcepp.data.builtin.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_folder_is_small_and_contains_no_local_path():
    names = {path.name for path in model_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= names
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 16 * 2**20
    metrics = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))["heldout"]
    assert 0.40 <= metrics["gold_mean"] <= 0.58
    assert metrics["gold_best_of_samples"] >= 0.97
    for path in model_path().glob("*.json"):
        assert str(model_path().parents[3]) not in path.read_text(encoding="utf-8")


def test_prompt_format_and_special_tokens(tokenizer):
    message = [{"role": "user", "content": "How do I ping?"}]
    formatted = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert formatted == "Question: How do I ping?\nAnswer:"
    answered = [*message, {"role": "assistant", "content": "Run `ping`."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{formatted} Run `ping`.<|endoftext|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<|pad|>"}
    assert tokenizer(formatted)["input_ids"][-1] != tokenizer.eos_token_id, "the tokenizer must not append EOS"
    odd = "Größe: `%{time_total}`\n\t日本 ok"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_every_authored_answer_fits_the_generation_limit(tokenizer):
    answers = [f" {answer}" for fact in FACTS for answer in (*fact.good, *fact.bad.values())]
    assert max(len(ids) for ids in tokenizer(answers)["input_ids"]) + 1 <= 64


def test_model_loads_and_fits_its_tokenizer(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path())
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.config.n_embd // model.config.n_head in (32, 64)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    fact = FACTS[0]
    ids = tokenizer(f"Question: {question(fact)}\nAnswer:")["input_ids"]
    right, unrelated = (tokenizer(f" {answer}")["input_ids"] for answer in (fact.good[0], FACTS[-1].good[0]))
    with torch.no_grad():
        right_loss, unrelated_loss = (
            model(torch.tensor([ids + answer]), labels=torch.tensor([[-100] * len(ids) + answer])).loss
            for answer in (right, unrelated)
        )
    assert right_loss < unrelated_loss / 2
