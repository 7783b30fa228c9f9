"""The compare verb on tiny models: what it writes and tells, each figure against a naive loop, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from rewards.fake_judge import FakeJudge, verdict

from reinforcepp.commands import cli
from reinforcepp.commands.compare import measurement
from reinforcepp.commands.compare.command import chosen_answers, compare_models, prompts_to_answer
from reinforcepp.commands.compare.provenance import caveats
from reinforcepp.config import CompareConfig
from reinforcepp.data import load_prompts, read_preferences
from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.reports.comparison import text as report
from reinforcepp.reports.comparison.result import distinct_ngrams, distinct_share, mean_by_prompt
from reinforcepp.reports.comparison.statistics import Outcome, Rate
from reinforcepp.rollout.vllm.compat import node_problem

SMALL = ["--max_prompt_length", "64", "--max_new_tokens", "12", "--engine", "transformers"]
SMALL += ["--heldout_fraction", "0.5", "--bootstrap_samples", "200"]
INPUTS = ["--data", "pairs.csv", "--judge", "reward", "--output_dir", "out"]


@pytest.fixture(scope="session")
def models(tmp_path_factory, model_folder) -> dict[str, Path]:
    """A model like the first with other weights, one with another tokenizer, and one that is a little off the first."""
    folder = tmp_path_factory.mktemp("others")
    near = load_policy(str(model_folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.004 * torch.randn_like(parameter))
    near.save_pretrained(folder / "near")
    tiny.tokenizer().save_pretrained(folder / "near")
    other = tiny.save(folder / "other", n_positions=512, seed=7)
    foreign = tiny.save(folder / "foreign", n_positions=512, vocab_size=300)
    return {"a": model_folder, "near": folder / "near", "other": other, "foreign": foreign}


@pytest.fixture
def place(tmp_path, monkeypatch, models, reward_folder, pairs_csv) -> Path:
    """The working directory: models ``a``, ``near``, ``other`` and ``foreign``, ``reward`` and ``pairs.csv`` are there."""
    monkeypatch.chdir(tmp_path)
    for name, folder in {**models, "reward": reward_folder}.items():
        Path(name).symlink_to(folder)
    shutil.copy(pairs_csv, "pairs.csv")
    return tmp_path


@pytest.fixture
def compared(place, capsys):
    """``compared("a", "near", ...)`` is ``(compare.json, standard output, standard error)`` of the verb."""

    def run(*arguments: str) -> tuple[dict, str, str]:
        flags = ["--data", "pairs.csv", "--judge", "reward", "--output_dir", "out", "--overwrite", *SMALL]
        assert cli.main(["compare", *arguments[:2], *flags, *arguments[2:]]) == 0
        out, err = capsys.readouterr()
        return json.loads(Path("out/compare.json").read_text()), out, err

    return run


@pytest.fixture
def refused(place, capsys, monkeypatch):
    """``refused(*arguments)`` is the sentence after exit code 2; no weights are loaded and nothing is written before."""

    def run(*arguments: str) -> str:
        from transformers import PreTrainedModel

        before = sorted(place.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
            assert cli.main(["compare", *arguments]) == 2
        assert sorted(place.rglob("*")) == before
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


def answers(folder: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "answers.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_two_models(compared):
    result, out, err = compared("a", "other")
    outcome, figures, pairs = result["outcome"], result["figures"], answers()
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "answers.jsonl",
        "compare.html",
        "compare.json",
        "run.json",
    ]
    assert (result["model_a"], result["model_b"], result["judge"], result["reference"]) == ("a", "other", "reward", "A")
    assert outcome["prompts"] == len(pairs) == 4 == outcome["wins"] + outcome["ties"] + outcome["losses"]
    for side in "ab":
        own = figures[side.upper()]
        assert own["judge"] == pytest.approx(sum(pair[f"score_{side}"] for pair in pairs) / 4)
        assert own["characters"] == sum(len(pair[f"answer_{side}"]) for pair in pairs) / 4
        assert own["truncated"] == sum(pair[f"finish_{side}"] == "length" for pair in pairs) / 4
        assert own["perplexity"] > 1
    assert outcome["wins"] == sum(pair["score_b"] > pair["score_a"] for pair in pairs)
    assert [pair["better"] for pair in pairs].count("B") == outcome["wins"]
    assert figures["A"]["kl"] is None and figures["B"]["kl"] > 0.1
    for line in (
        "A: a",
        "B: other",
        "KL to A (nats/token)",
        "perplexity on chosen responses",
        "win rate of B over A",
    ):
        assert line in out
    assert out.splitlines()[-1].startswith("Verdict: ")
    assert "4 held-out prompts" in err and "responses of A 1/1" in err and "responses of B 1/1" in err
    # An earlier comparison is replaced only with --overwrite.
    assert cli.main(["compare", "a", "a", "--data", "pairs.csv", "--judge", "reward", "--output_dir", "out"]) == 2


@pytest.mark.skipif(bool(node_problem()), reason=node_problem())
def test_both_engines_give_the_same_responses(compared):
    responses = []
    for engine in ("transformers", "vllm"):
        compared("a", "near", "--engine", engine)
        responses.append([(row["answer_a"], row["answer_b"]) for row in answers()])
    assert responses[0] == responses[1] and any(a != b for a, b in responses[0])


def test_a_model_compared_with_itself_ties(compared):
    result, out, _ = compared("a", "a", "--num_samples", "3")
    outcome = result["outcome"]
    assert (outcome["wins"], outcome["ties"], outcome["losses"]) == (0, 12, 0)
    for name in ("win_rate", "length_controlled"):
        assert outcome[name] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert result["better"] is result["better_at_equal_length"] is None
    assert result["figures"]["B"] == {**result["figures"]["A"], "kl": 0.0, "kl_error": 0.0}
    verdict = out.splitlines()[-1]
    assert verdict.startswith("Verdict: inconclusive (the models tie on every prompt; win rate of B 0.500, ")
    assert "length-controlled: inconclusive (0.500, 0.500 to 0.500)" in verdict
    assert "gave the same responses" in Path("out/compare.html").read_text(encoding="utf-8")


def test_the_answers_are_data_with_the_prompts_that_were_sampled_from(compared, place):
    given = [
        [{"role": "system", "content": f"Be  brief {i}.\n"}, {"role": "user", "content": f" How many routes are {i}? "}]
        for i in range(4)
    ]
    rows = [{"prompt": prompt, "chat_template_kwargs": {"mood": i}} for i, prompt in enumerate(given)]
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared("a", "other", "--data", "talks.jsonl", "--max_prompt_length", "200", "--heldout_fraction", "0")
    read = read_preferences("out/answers.jsonl", chosen_column="answer_a", rejected_column="answer_b").pairs
    tokenizer = load_tokenizer("a")
    ids = {tuple(encode_prompt(tokenizer, pair.conversation)): pair.chat_template_kwargs for pair in read}
    assert ids == {tuple(encode_prompt(tokenizer, row["prompt"])): row["chat_template_kwargs"] for row in rows}


def test_the_same_seed_gives_the_same_comparison(compared):
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path("out").iterdir()}

    compared("a", "near", "--seed", "5")
    first = files()
    compared("a", "near", "--seed", "5")
    assert files() == first
    compared("a", "near", "--seed", "6")
    assert files()["answers.jsonl"] != first["answers.jsonl"]


def test_the_positions_name_the_models():
    config = cli.parse("compare", ["x", "y", "--seed", "3"])
    assert (config.model_a, config.model_b, config.seed) == ("x", "y", 3)
    assert cli.parse("compare", ["--seed", "3", "x", "y"]) == config
    assert cli.parse("compare", ["y", "--model_a", "x", "--seed", "3"]) == config
    assert cli.parse("compare", ["--model_a", "x", "--model_b", "y", "--seed", "3"]) == config
    assert cli.parse("compare", ["x"]).model_b == CompareConfig().model_b
    with pytest.raises(ConfigError, match="'z' doesn't belong"):
        cli.parse("compare", ["x", "y", "z"])


def test_the_tie_margin_reaches_the_outcome(compared):
    result, *_ = compared("a", "other", "--tie_margin", "1000")
    assert result["outcome"]["ties"] == 4 and {pair["better"] for pair in answers()} == {"tie"}


def test_the_built_in_judge_scores_the_built_in_data(place, capsys):
    flags = ["--max_prompts", "6", "--max_prompt_length", "64", "--max_new_tokens", "40", "--engine", "transformers"]
    assert cli.main(["compare", "builtin:tiny", "builtin:tiny", "--output_dir", "out", *flags]) == 0
    result, judge = json.loads(Path("out/compare.json").read_text()), GoldJudge()
    assert result["judge"] == "builtin:judge" and result["outcome"]["prompts"] == 6
    for pair in answers():
        assert pair["score_a"] == judge.score(pair["prompt"], pair["answer_a"])
    assert "6 held-out prompts" in capsys.readouterr().err


# --- which prompts ----------------------------------------------------------------------------------------------------


def config(**settings) -> CompareConfig:
    known = {"model_a": "a", "model_b": "near", "data": "pairs.csv", "judge": "reward", "engine": "transformers"}
    sizes = {"max_prompt_length": 64, "max_new_tokens": 12, "bootstrap_samples": 100}
    return CompareConfig(**{**known, **sizes, **settings})


def test_a_language_model_judges(compared, tmp_path, monkeypatch):
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path))
    with FakeJudge(lambda body: verdict(1 + len(body["messages"][-1]["content"]) % 10)) as fake:
        name = f"judge:m?rubric=safe&base_url={fake.base_url}"
        result, _, _ = compared("a", "near", "--judge", name)
        assert result["judge"] == name
        pairs = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
        scores = [pair[f"score_{side}"] for pair in pairs for side in "ab"]
        assert len(set(scores)) > 1 and all(0 <= score <= 1 for score in scores) and len(fake.asked) <= len(scores)
        assert caveats(config(judge=name)) == []
    Path("trained").mkdir()
    Path("trained/run.json").write_text(
        json.dumps({"settings": {"rewards": [f"0.5*{name}"], "data": "builtin:network"}})
    )
    (note,) = caveats(config(judge=name, model_b="trained"))
    assert note.startswith("B was trained with this judge")
    assert cli.main(["compare", "a", "near", "--data", "pairs.csv", "--judge", "judge:m?rubric=wrong"]) == 2


def test_prompts_without_a_score_are_skipped(compared, place, models):
    Path("skips.py").write_text(
        "def longer(completions, finish_reason, **_):\n"
        "    lengths = [len(c if isinstance(c, str) else c[0]['content']) for c in completions]\n"
        "    return [None if 'e' in str(c) else float(n) for c, n in zip(completions, lengths)]\n"
        "def never(completions, **_):\n"
        "    return [None] * len(completions)\n"
    )
    every = compared("a", "near", "--num_samples", "2")[0]["outcome"]["prompts"]
    everything = answers()
    result, out, err = compared("a", "near", "--num_samples", "2", "--judge", "skips.py:longer")
    unscored = {str(pair["prompt"]) for pair in everything if "e" in pair["answer_a"] + pair["answer_b"]}
    expected = [pair for pair in everything if str(pair["prompt"]) not in unscored]
    assert 0 < len(expected) < len(everything)
    assert [pair["answer_b"] for pair in answers()] == [pair["answer_b"] for pair in expected]
    assert all(pair["score_a"] == len(pair["answer_a"]) for pair in answers())
    assert result["outcome"]["prompts"] == every - len(unscored) and result["judge"] == "skips.py:longer"
    assert f"Skipped {len(unscored)} of {every} prompts: the judge didn't score all of their responses." in out + err
    assert cli.main(["compare", "a", "near", *INPUTS, *SMALL, "--overwrite", "--judge", "skips.py:never"]) == 2
    Path("trained").mkdir()
    Path("trained/run.json").write_text(json.dumps({"settings": {"rewards": ["0.5*skips.py:longer"]}}))
    (note,) = caveats(config(judge="skips.py:longer", model_b="trained"))
    assert note.startswith("B was trained with this judge")


def test_the_prompts_are_those_that_training_held_out(place):
    for seed in (42, 7):
        rows = prompts_to_answer(config(heldout_fraction=0.4, seed=seed))
        _, seen, heldout = load_prompts("pairs.csv", heldout_fraction=0.4, seed=seed)
        assert rows == heldout and not {row.prompt for row in rows} & {row.prompt for row in seen}
    assert len(prompts_to_answer(config(heldout_fraction=0))) == 8


def test_the_seed_samples_the_prompts(place):
    every = prompts_to_answer(config(heldout_fraction=0))
    chosen = {seed: prompts_to_answer(config(heldout_fraction=0, seed=seed, max_prompts=3)) for seed in range(6)}
    assert chosen[1] == prompts_to_answer(config(heldout_fraction=0, seed=1, max_prompts=3))
    assert len({tuple(row.prompt for row in rows) for rows in chosen.values()}) > 1
    assert all([row for row in every if row in rows] == rows and len(rows) == 3 for rows in chosen.values())
    assert len(prompts_to_answer(config(heldout_fraction=0, max_prompts=100))) == 8


def test_chosen_answers_are_those_of_the_prompts(place):
    rows = [("p", "one", "x"), ("q", "other", "x"), ("p ", "two", "x"), ("p", "one", "y"), ("p", "", "y")]
    with open("more.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "good", "bad"), *rows])
    settings = config(data="more.csv", heldout_fraction=0, chosen_column="good")
    every = prompts_to_answer(settings)
    assert [answer[:2] for answer in chosen_answers(settings, every)] == [("p", "one"), ("q", "other"), ("p ", "two")]
    assert [answer[:2] for answer in chosen_answers(settings, every[1:])] == [("q", "other")]
    assert chosen_answers(config(data="more.csv", heldout_fraction=0), every) == []


# --- the figures, against naive loops -----------------------------------------------------------------------------------


@torch.no_grad()
def log_softmax(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of what follows each id. -> (L, V)"""
    return (model(torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)


def naive_kl(own: Path, reference: Path, pairs: list[dict], side: str, temperature: float) -> list[list[float]]:
    """k3 of each token of each answer, from whole forward passes over each answer by itself."""
    models, tokenizer = [load_policy(str(folder)) for folder in (own, reference)], load_tokenizer(str(own))
    found = []
    for pair in pairs:
        start = tokenizer(pair["prompt"])["input_ids"]
        ids = pair[f"ids_{side}"]
        own, reference = (log_softmax(model, start + ids, temperature) for model in models)
        gaps = [float(own[len(start) - 1 + i, t] - reference[len(start) - 1 + i, t]) for i, t in enumerate(ids)]
        found.append([math.exp(-d) - 1 + d for d in gaps])
    return found


def token_mean(values: list[list[float]]) -> float:
    return sum(map(sum, values)) / sum(map(len, values))


@pytest.fixture
def with_ids(monkeypatch):
    """Return the sampled ids by side and response, which the files don't contain."""
    from reinforcepp.commands.compare import measurement

    kept: dict[str, list[list[int]]] = {}
    original = measurement._responses

    def answers_of(config, side, *rest):
        found = original(config, side, *rest)
        kept[side] = [list(answer.ids) for answer in found]
        return found

    monkeypatch.setattr(measurement, "_responses", answers_of)
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_kl_of_b_to_a_is_on_the_responses_of_b(place, models, with_ids, temperature):
    found = compare_models(config(heldout_fraction=0.5, temperature=temperature, num_samples=5))
    pairs = [{"prompt": pair.prompt, "ids_b": ids} for pair, ids in zip(found.pairs, with_ids["B"], strict=True)]
    values = naive_kl(models["near"], models["a"], pairs, "b", temperature)
    mean, own = token_mean(values), found.metrics["B"]
    assert own.kl == pytest.approx(mean, rel=1e-3) and mean > 0.001
    assert found.metrics["A"].kl is found.metrics["A"].kl_error is None
    prompts = [[kl for each in values[start : start + 5] for kl in each] for start in range(0, 20, 5)]
    left = [sum(each) - mean * len(each) for each in prompts]
    error = math.sqrt(4 / 3 * sum(value**2 for value in left)) / sum(map(len, prompts))
    assert own.kl_error == pytest.approx(error, rel=1e-2)


def test_a_third_model_can_be_the_reference(place, models, with_ids):
    found = compare_models(config(model_b="other", reference="near", heldout_fraction=0.5))
    assert found.reference == "near"
    for side, name in (("a", "a"), ("b", "other")):
        ids = with_ids[side.upper()]
        pairs = [{"prompt": p.prompt, f"ids_{side}": own} for p, own in zip(found.pairs, ids, strict=True)]
        expected = token_mean(naive_kl(models[name], models["near"], pairs, side, 1.0))
        assert found.metrics[side.upper()].kl == pytest.approx(expected, rel=1e-3)


def test_model_b_can_be_the_reference(place):
    found = compare_models(config(reference="near", heldout_fraction=0.5))
    assert found.reference == "B" and found.metrics["B"].kl is None and found.metrics["A"].kl > 0


def test_only_one_model_is_in_memory_at_a_time(place, monkeypatch):
    import gc
    import weakref

    from reinforcepp.commands.compare import measurement

    alive: list[weakref.ref] = []
    loaded: list[str] = []

    def load(name, dtype):
        gc.collect()
        assert not [model for model in alive if model() is not None]
        model = load_policy(name, dtype)
        alive.append(weakref.ref(model))
        loaded.append(name)
        return model

    monkeypatch.setattr(measurement, "load_policy", load)
    compare_models(config(model_b="other", reference="near", heldout_fraction=0.5))
    assert loaded == ["a", "other", "near"]


def test_the_perplexity_counts_every_token_of_the_response_and_its_end(place, models):
    settings = config(heldout_fraction=0.5)
    found = compare_models(settings)
    chosen = chosen_answers(settings, prompts_to_answer(settings))
    assert found.chosen_answers == len(chosen) == 4
    for side, name in (("A", "a"), ("B", "near")):
        model, tokenizer = load_policy(str(models[name])), load_tokenizer(str(models[name]))
        total, tokens = 0.0, 0
        for prompt, answer, _ in chosen:
            start = tokenizer(prompt)["input_ids"]
            ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            read = log_softmax(model, start + ids)
            total -= sum(float(read[len(start) - 1 + i, token]) for i, token in enumerate(ids))
            tokens += len(ids)
        assert found.metrics[side].perplexity == pytest.approx(math.exp(total / tokens), rel=1e-3)


def test_diversity_by_hand():
    assert distinct_share(["a b", "a b", "A b"]) == pytest.approx(2 / 3)
    # a b a / a c: the words a b c of 5, the pairs ab ba ac of 3; none reaches across.
    assert distinct_ngrams(["A b, a", "a c"], 1) == pytest.approx(3 / 5)
    assert distinct_ngrams(["A b, a", "a c"], 2) == pytest.approx(3 / 3)
    assert distinct_ngrams(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_ngrams(["", "a"], 2) == 0


def test_the_standard_error_is_over_prompts(place):
    assert mean_by_prompt([1, 2, 3, 5], 2) == [1.5, 4]
    found = compare_models(config(heldout_fraction=0.5, num_samples=3))
    means = mean_by_prompt([pair.score_b for pair in found.pairs], 3)
    mean = sum(means) / 4
    assert found.metrics["B"].judge == pytest.approx(mean)
    expected = math.sqrt(sum((value - mean) ** 2 for value in means) / 3 / 4)
    assert found.metrics["B"].judge_error == pytest.approx(expected)


def test_the_outcome_averages_by_prompt(place):
    found = compare_models(config(model_b="other", heldout_fraction=0, num_samples=2, max_new_tokens=4))
    worth = {"A": 0.0, "tie": 0.5, "B": 1.0}
    means = mean_by_prompt([worth[pair.better] for pair in found.pairs], 2)
    assert found.outcome.win_rate.value == pytest.approx(sum(means) / 8)
    decided = sum(mean != 0.5 for mean in means)
    mixed = sum(
        a != b for a, b in zip(*(map(worth.get, [p.better for p in found.pairs][i::2]) for i in (0, 1)), strict=True)
    )
    assert found.outcome.decided == decided and mixed > 0
    gaps = [len(pair.answer_b) - len(pair.answer_a) for pair in found.pairs]
    shares = [sum(gap > 0 for gap in gaps) / 16, sum(gap < 0 for gap in gaps) / 16]
    assert [found.outcome.longer, found.outcome.shorter] == shares and shares[0] != shares[1]


def test_both_models_share_sampling_seeds(place, with_ids):
    """Two models that are almost one then agree far more often than two draws from one of them do."""
    found = compare_models(config(heldout_fraction=0.5, num_samples=16, max_new_tokens=1))
    assert [pair.sample for pair in found.pairs] == list(range(16)) * 4
    assert all(len({pair.prompt for pair in found.pairs[i : i + 16]}) == 1 for i in range(0, 64, 16))
    a, b = with_ids["A"], with_ids["B"]
    same = sum(one == other for one, other in zip(a, b, strict=True))
    apart = sum(one == other for one, other in zip(a, b[1:], strict=False))
    assert same > 2 * apart + 5
    assert all(pair.better == "tie" for pair in found.pairs if pair.answer_a == pair.answer_b)


# --- skipped metrics and their reasons ----------------------------------------------------------------------------------


def test_models_with_different_tokenizers_have_no_kl(compared):
    result, out, _ = compared("a", "foreign")
    assert result["figures"]["A"]["kl"] is result["figures"]["B"]["kl"] is None
    assert "KL to A" not in out
    assert "Note: Skipped the KL of B to a" in out and "different tokenizers" in out
    assert "The perplexities aren't comparable" in out


def test_tokens_unknown_to_the_reference_have_no_kl(compared, place):
    """Vocabularies with the same tokens can be padded to different sizes, and a model can sample an id from its padding."""
    tiny.model(vocab_size=400, n_positions=512).save_pretrained("padded")
    tiny.tokenizer().save_pretrained("padded")
    result, out, _ = compared("a", "padded")
    assert result["figures"]["B"]["kl"] is None
    assert "Note: Skipped the KL of B: it generated tokens that a doesn't have." in out
    assert compared("padded", "a")[0]["figures"]["B"]["kl"] > 0


def test_the_kl_needs_the_models_own_distributions(compared):
    for flags in (["--temperature", "0"], ["--top_k", "3"], ["--top_p", "0.9"]):
        result, out, _ = compared("a", "near", *flags)
        assert result["figures"]["B"]["kl"] is None and "Note: Skipped the KL" in out


def test_without_chosen_responses_there_is_no_perplexity(compared, place):
    Path("prompts.csv").write_text("prompt\n" + "\n".join(f"What is {i}?" for i in range(8)))
    result, out, _ = compared("a", "near", "--data", "prompts.csv")
    assert result["figures"]["A"]["perplexity"] is None and result["chosen_answers"] == 0
    assert "perplexity on" not in out and "Skipped the perplexity: prompts.csv has no responses" in out


def test_too_long_chosen_responses_are_counted(compared):
    lines = Path("pairs.csv").read_text(encoding="utf-8").splitlines()
    Path("long.csv").write_text("\n".join([*lines, f"Tell me?,{'long ' * 400},x"]), encoding="utf-8")
    _, out, _ = compared("a", "near", "--data", "long.csv", "--heldout_fraction", "0")
    assert "The perplexity covers 8 of 9 chosen responses" in out


def test_long_prompts_are_reported(compared):
    _, _, err = compared("a", "near", "--max_prompt_length", "10")
    assert "exceed 10 tokens of A" in err


def test_training_on_the_judge_or_on_the_prompts_is_reported(compared, place, models):
    Path("trained").mkdir()
    for path in models["near"].iterdir():
        Path("trained", path.name).symlink_to(path)
    run = {"reward_model": "reward", "data": "pairs.csv", "seed": 1, "heldout_fraction": 0.5, "prompt_column": "prompt"}

    def notes(settings: dict, **changes) -> str:
        Path("trained/run.json").write_text(json.dumps({"settings": run | changes}))
        return " ".join(caveats(config(model_b="trained", **({"heldout_fraction": 0.5} | settings))))

    judged, seen = "B was trained with this judge as its reward", "contains some of these prompts. Use --seed 1"
    assert judged in notes({}) and seen in notes({})
    assert notes({"seed": 1}, reward_model="elsewhere") == ""
    card = json.loads(Path("reward/reward_model.json").read_text())
    run["reward_model"] = None  # as a training from Python records it
    Path("trained/run.json").write_text(
        json.dumps({"settings": run, "rewards": [{"name": "f", "card": None}, {"card": card}]})
    )
    assert judged in " ".join(caveats(config(model_b="trained")))
    run["reward_model"] = "reward"
    assert "trained on all prompts" in notes({}, heldout_fraction=0)
    assert "B was trained on most of the prompts" in notes({"heldout_fraction": 0})
    assert "pairs.csv" not in notes({}, data="builtin:network")
    notes({})
    _, out, _ = compared("a", "trained")
    assert f"Note: {judged}" in out and seen in out
    Path("trained/run.json").write_text("damaged")
    assert caveats(config(model_b="trained")) == []


def test_a_checkpoint_is_of_its_run(place, models):
    Path("run/checkpoints/step-000003").mkdir(parents=True)
    Path("run/run.json").write_text(json.dumps({"settings": {"reward_model": "reward", "data": "builtin:network"}}))
    found = caveats(config(model_b="run/checkpoints/step-000003"))
    assert len(found) == 1 and "B was trained with this judge" in found[0]


# --- sentences --------------------------------------------------------------------------------------------------------


def outcome_of(raw: Rate, equal: Rate, *, decided: int = 50, longer: float = 0.5, shorter: float = 0.4) -> Outcome:
    return Outcome(60, 30, 20, 10, decided, raw, equal, longer, shorter)


BETTER, WORSE, NEITHER = Rate(0.7, 0.6, 0.8), Rate(0.3, 0.2, 0.4), Rate(0.52, 0.45, 0.6)


@pytest.mark.parametrize(
    ("raw", "equal", "text"),
    [
        (
            BETTER,
            BETTER,
            "Verdict: B is better (win rate of B 0.700, 95% interval 0.600 to 0.800); length-controlled: B is better (0.700",
        ),
        (WORSE, WORSE, "Verdict: A is better (win rate of B 0.30"),
        (
            NEITHER,
            NEITHER,
            "Verdict: inconclusive (win rate of B 0.520, 95% interval 0.450 to 0.600); length-controlled: inconclusive",
        ),
        (BETTER, NEITHER, "to 0.800); length-controlled: inconclusive (0.520, 0.450 to 0.600)."),
        (BETTER, WORSE, "to 0.800); length-controlled: A is better (0.300, 0.200 to 0.400)."),
        (
            NEITHER,
            BETTER,
            "Verdict: inconclusive (win rate of B 0.520, 95% interval 0.450 to 0.600); length-controlled: B",
        ),
    ],
)
def test_the_verdict(raw, equal, text):
    class Found:
        outcome = outcome_of(raw, equal)

    assert text in report.verdict(Found)


def test_the_verdict_on_too_few_prompts_is_inconclusive():
    class Found:
        outcome = outcome_of(BETTER, BETTER, decided=5)

    assert report.verdict(Found).startswith(
        "Verdict: inconclusive (the models differ on 5 of 60 prompts, which is too few; win rate of B 0.70"
    )


def test_limitations_of_an_outcome():
    assert report.limits(outcome_of(BETTER, BETTER)) == []
    assert "longer one in 97% of" in report.limits(outcome_of(BETTER, BETTER, longer=0.97, shorter=0.02))[0]
    assert "shorter one in 90% of" in report.limits(outcome_of(BETTER, BETTER, longer=0.0, shorter=0.9))[0]
    assert report.limits(outcome_of(BETTER, BETTER, longer=0.0, shorter=0.01)) == []


def test_a_models_text_can_not_steer_the_terminal(compared, monkeypatch):
    Path("bad\x1b[2J[bold]").symlink_to(Path("a").resolve())
    _, out, err = compared("a", "bad\x1b[2J[bold]")
    assert "\x1b[2J" not in out + err and "B: bad\ufffd[2J[bold]" in out


def test_a_closed_pipe_is_not_an_error(place, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["compare", "a", "a", *INPUTS, *SMALL]) == 0
    assert "error" not in capsys.readouterr().err and Path("out/compare.html").is_file()


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["./none", "near", *INPUTS], ["./none: model folder not found"]),
        (["a", "./naer", *INPUTS], ["./naer: model folder not found", "Did you mean 'near'"]),
        (["a", "near", *INPUTS, "--reference", "./none"], ["./none: model folder not found"]),
        (["a", "near", "--data", "pairs.csv"], ["judge: missing", "pairs.csv", "--judge"]),
        (["a", "near", "--judge", "none"], ["judge", "builtin:network"]),
        (
            ["a", "near", "--data", "pairs.csv", "--judge", "builtin:judge"],
            ["only builtin:network", "reward model"],
        ),
        (["a", "near", *INPUTS, "--judge", "a"], ["a: no score head", "isn't a reward model"]),
        (["a", "near", *INPUTS, "--judge", "./none"], ["./none: reward model folder not found"]),
        (["a", "near", *INPUTS, "--judge", "none.py:f"], ["none.py"]),
        (["a", "near", *INPUTS, "--data", "none.csv"], ["none.csv", "no such file"]),
        (["a", "near", *INPUTS, "--prompt_column", "q"], ["no column 'q'", "--prompt_column"]),
        (["a", "near", *INPUTS, "--output_dir", "a"], ["output_dir", "holds the --model_a a"]),
        (["a", "near", *INPUTS, "--output_dir", "full"], ["output_dir: full holds files", "(mine)"]),
        (["a", "near", *INPUTS, "--output_dir", "full", "--overwrite"], ["full holds files", "mine"]),
        (["a", "near", *INPUTS, "--output_dir", "pairs.csv"], ["pairs.csv"]),
        (["a", "near", *INPUTS, "--max_new_tokens", "600"], ["max_new_tokens 600", "512 tokens"]),
        (["a", "near", *INPUTS, "--num_samples", "0"], ["num_samples must be greater than 0, not 0"]),
        (["a", "near", *INPUTS, "--bootstrap_samples", "99"], ["bootstrap_samples must be at least 100, not 99"]),
        (["a", "near", *INPUTS, "--tie_margin", "-1"], ["tie_margin must be at least 0"]),
        (["a", "near", *INPUTS, "--tie_margin", "nan"], ["tie_margin must be a finite number"]),
        (["a", "near", *INPUTS, "--max_prompts", "-1"], ["max_prompts must be at least 0"]),
        (["a", "near", *INPUTS, "--temperature", "-1"], ["temperature must be at least 0"]),
        (["a", "near", *INPUTS, "--top_p", "0"], ["top_p must be greater than 0"]),
        (["a", "", *INPUTS], ["model_b is empty"]),
        (["a", "near", "third", *INPUTS], ["'third' doesn't belong"]),
    ],
)
def test_mistakes_are_one_sentence(refused, place, arguments, named):
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    message = refused(*arguments)
    assert [part for part in named if part not in message] == []


def test_weights_that_do_not_fit_leave_the_earlier_comparison(compared, place, models, capsys):
    compared("a", "near")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.copytree(models["near"], "broken")
    values = json.loads(Path("broken/config.json").read_text())
    Path("broken/config.json").write_text(json.dumps(values | {"n_layer": 3}))
    assert cli.main(["compare", "a", "broken", *INPUTS, *SMALL, "--overwrite"]) == 2
    assert "don't match" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_all_models_have_one_dtype(place, monkeypatch):
    """Rounding of one model would count as a difference."""
    asked = []
    monkeypatch.setattr(
        measurement, "inference_dtype", lambda requested, *stored: asked.append((requested, *stored)) or torch.float16
    )
    config = CompareConfig(model_a="a", model_b="near", reference="other", data="pairs.csv", judge="reward")
    given = load_policy("near", torch.bfloat16)
    prepared = measurement.prepare(config, prompts_to_answer(config), {"B": given})
    assert asked == [("auto", torch.float32, torch.bfloat16, torch.float32)]
    assert {side: model.load().dtype for side, model in prepared.items()} == {
        "A": torch.float16,
        "B": torch.bfloat16,  # passed by the caller
        "reference": torch.float16,
    }
