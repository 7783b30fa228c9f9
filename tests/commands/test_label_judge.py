"""The command label with a judge instead of people: its votes, its position bias, and its failures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")

from rewards.fake_judge import FakeJudge, completion

from reinforcepp.commands import cli
from reinforcepp.data.feedback import Answer, Choice, NewUnit, Ranking, Skip, Store
from reinforcepp.data.feedback.preferences import all_votes
from reinforcepp.rewards.judge.judge import Judge

PAIRS = 6
ANSWERS = re.compile(r"answer A:\n(.*)\n.*answer B:\n(.*)\n")


def prefers(body):
    """Prefer "good" in both orders, except for question 0, for which A is always better."""
    text = body["messages"][-1]["content"]
    a, _ = ANSWERS.search(text).groups()
    better = "A" if a == "good" or "question 0" in text else "B"
    return completion(json.dumps({"reason": f"A is {a}.", "better": better}))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "home"))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "REINFORCEPP_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    rows = "".join(f"question {i},good,bad\n" for i in range(PAIRS))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n" + rows)
    with FakeJudge(prefers) as fake:
        yield fake


def label(fake, *words, options="", data=True):
    given = ["--data", "pairs.csv"] if data else []
    return cli.main(["label", *given, "--judge", f"judge:m?base_url={fake.base_url}{options}", *words])


def votes(path="feedback.db"):
    store = Store(path, create=False)
    found = [cast for _, casts in all_votes(store) for cast in casts if cast.kind == "judge"]
    store.close()
    return found


def test_a_judge_labels_all_pairs_once_and_its_bias_is_reported(fake, capsys):
    assert label(fake) == 0
    out, err = capsys.readouterr()
    bias = "changed 1 of 6 verdicts (16.7%), and 58.3% of 12 decided votes are for the answer shown first."
    assert bias in out and out.startswith("judge_helpful judge:m#")
    assert "labeling 6/6, 12 requests, 0 from the cache, 0 s left" in err
    assert "Labeled 6 pairs with 12 requests, 0 from the cache. The votes are in feedback.db." in err
    found = votes()
    assert [each.vote for each in found].count(Choice(0)) == 5 and Choice(None, tie="good") in [
        each.vote for each in found
    ]
    assert {each.labeler for each in found} == {out.partition(": The")[0]}
    store = Store("feedback.db")
    details = next(each for each in store.details(found[0].labeler) if each["votes"] == ["first"] * 2)
    store.close()
    assert details == {
        "model": "m",
        "rubric": "helpful",
        "votes": ["first"] * 2,
        "reasons": ["A is good.", "A is bad."],
    }
    assert all(0 <= each.seconds < 60 for each in found)
    assert label(fake, data=False) == 0 and len(fake.asked) == 12
    out, err = capsys.readouterr()
    assert bias in out and "Labeled no further pairs." in err
    assert "Most verdicts follow the order" not in err
    assert label(fake, options="&rubric=safe") == 0 and len(fake.asked) == 24 and len(votes()) == 12


def test_agreement_compares_the_judge_with_people(fake, capsys):
    assert label(fake) == 0
    assert cli.main(["label", "agreement"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Judge judge_helpful judge:m#\w+ has no units with votes of people", out)
    assert "…" not in out, "names are whole"
    pair = [Answer("good"), Answer("bad")]
    store = Store("feedback.db")
    store.add_votes([(NewUnit("pair", f"question {i}", pair), "ann", Choice(int(i > 3)), 2.0) for i in range(PAIRS)])
    store.close()
    capsys.readouterr()
    assert cli.main(["label", "agreement", "--output", "a.json"]) == 0
    assert re.search(
        r"Judge judge_helpful judge:m#\w+ has the preference of the people in 50% \(3/6\) of the units",
        capsys.readouterr().out,
    )
    ann, judge = json.loads(Path("a.json").read_text())["labelers"]
    assert (ann["kind"], judge["kind"], judge["votes"]) == ("human", "judge", 6)
    assert judge["first"] == {"count": 7, "total": 12} and ann["first"]["total"] == 0


@pytest.mark.parametrize("failure", [(401, b""), completion(None, refusal="No.")])
def test_a_failing_judge_keeps_its_votes_and_the_next_run_continues(fake, failure, capsys):
    options = "&cache=none&concurrency=1"
    fake.reply = lambda body: prefers(body) if len(fake.asked) <= 5 else failure
    assert label(fake, options=options) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"error: .* Labeled 2 pairs with \d requests, 0 from the cache\. The votes are in feedback\.db\.", err
    )
    assert err.endswith("To continue, run the same command again.\n") and "Traceback" not in err
    assert len(votes()) == 2
    fake.reply, before = prefers, len(fake.asked)
    assert label(fake, options=options) == 0 and len(fake.asked) - before == 2 * (PAIRS - 2)
    assert len(votes()) == PAIRS and "changed 1 of 6 verdicts" in capsys.readouterr().out, "with those of the first run"


def test_a_pair_without_a_verdict_can_be_skipped(fake, capsys):
    fake.reply = lambda body: (
        completion(None, refusal="No.") if "question 3" in body["messages"][-1]["content"] else prefers(body)
    )
    assert label(fake, options="&no_verdict=skip") == 0
    assert [each.vote for each in votes()].count(Skip()) == 1
    out, err = capsys.readouterr()
    assert "of 5 verdicts" in out and "2 without a verdict" in err
    asked = len(fake.asked)
    assert label(fake, options="&no_verdict=skip") == 0 and len(fake.asked) == asked, "a skipped pair isn't asked again"


def test_a_budget_stops_the_judge_and_more_of_it_continues(fake, capsys):
    options = "&cache=v.sqlite&concurrency=1&input_price=10&output_price=10&max_dollars=9&max_requests="
    assert label(fake, options=f"{options}5") == 2
    err = capsys.readouterr().err
    assert "records 5 of 5 requests. Raise max_requests" in err and len(fake.asked) == 5
    assert re.search(
        r"with 5 requests, 0 from the cache, \$0\.0055 \(budget: 5 of 5 requests, \$0\.0055 of \$9\)\.", err
    )
    assert len(votes()) == 2
    assert label(fake, options=f"{options}12") == 0 and len(fake.asked) == 12, "the fifth verdict is in the cache"
    assert len(votes()) == PAIRS


def test_an_interrupted_judge_keeps_its_votes(fake, capsys, monkeypatch):
    compare = Judge.compare

    def interrupted(self, pairs, report):
        compare(self, pairs[:2], report)
        raise KeyboardInterrupt

    monkeypatch.setattr(Judge, "compare", interrupted)
    assert label(fake) == 130
    err = capsys.readouterr().err
    assert "Interrupted. Labeled 2 pairs with 4 requests" in err and "run the same command again" in err
    assert len(votes()) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--judge m", "isn't a language model as judge. Write it as in judge:MODEL?base_url="),
        ("--judge judge:m", "the server is missing. Add base_url="),
        ("--judge judge:m?base_url=URL&rubrik=safe", "Did you mean 'rubric'"),
        ("--judge judge:m?base_url=URL&env=TEAM_KEY", "error: judge:m: the environment variable TEAM_KEY isn't set"),
        ("--judge judge:m?base_url=URL --task rank", "so task rank doesn't fit"),
        ("--judge judge:m?base_url=http://127.0.0.1:9/v1&attempts=1", "can't be reached"),
        ("--judge judge:m?base_url=URL", "answered 404"),
        ("--judge judge:m?base_url=URL --database empty.db", "nothing to label"),
        ("--judge judge:m?base_url=URL --database ranks.db", "ranks.db has no pairs"),
    ],
)
def test_mistakes_are_one_line_errors(fake, words, problem, capsys):
    fake.reply = lambda body: (404, {"error": {"message": "The model `m` does not exist."}})
    store = Store("ranks.db")
    store.add_votes([(NewUnit("rank", "q", [Answer(text) for text in "abc"]), "ann", Ranking((1, 2, 3)), 1.0)])
    store.close()
    given = words.replace("URL", fake.base_url).split()
    assert cli.main(["label", *given, *([] if "--database" in given else ["--data", "pairs.csv"])]) == 2
    err = capsys.readouterr().err
    assert problem in err and "Traceback" not in err and len(err.splitlines()) <= 3 and "Labeled" not in err


@pytest.mark.full
def test_a_judge_labels_while_models_respond(fake, capsys):
    fake.reply = lambda body: completion('{"reason": "", "better": "B"}')
    models = ["builtin:tiny", "--data", "pairs.csv", "--max_new_tokens", "8", "--engine", "transformers"]
    assert label(fake, *models, data=False) == 0
    out, err = capsys.readouterr()
    labeled = len(votes())
    assert 4 <= labeled <= PAIRS and f"changed {labeled} of {labeled} verdicts" in out
    assert "Most verdicts follow the order" in err
    assert "Responded to all 6 prompts." in err
