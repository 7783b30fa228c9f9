"""The commands label export, import and agreement, and label itself as a process."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("sqlalchemy")

from reinforcepp.commands import cli
from reinforcepp.config import LabelConfig
from reinforcepp.data import PromptRow
from reinforcepp.data.feedback import Answer, Choice, Edit, NewUnit, Ranking, Ratings, Store
from reinforcepp.data.feedback.answer_files import read_answers
from reinforcepp.data.feedback.preferences import preference_rows
from reinforcepp.data.loading import load_preferences
from reinforcepp.errors import RolloutError
from reinforcepp.labeling.generation import CHUNK_PROMPTS, BackgroundGeneration
from reinforcepp.labeling.quality import measure
from reinforcepp.labeling.units import gold_units, make_units
from reinforcepp.rewards.trained import load_reward_model

TEXTS = [Answer("Run ip route.", "model-a", {"temperature": 0.7}), Answer("Reboot it.", "model-b")]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'And, "now"?\nQuick.'}]
VOTES = [
    (NewUnit("pair", "question, one", TEXTS, "routing"), "ann", Choice(0, 2), 3.0),
    (NewUnit("pair", "question, one", TEXTS, "routing"), "ben", Choice(1), 5.0),
    (NewUnit("pair", MESSAGES, TEXTS), "ann", Choice(None, tie="bad"), 1.0),
    (NewUnit("rank", "rank", [Answer(text) for text in "abc"]), "ann", Ranking((2, 1, 3)), 1.0),
    (NewUnit("rate", "rate", TEXTS), "ann", Ratings(({"safe": 5, "helpful": 4}, {"safe": 1, "helpful": 4})), 1.0),
    (NewUnit("edit", "edit", TEXTS), "ann", Edit(1, "Reboot it, please.", 2), 1.0),
]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "feedback.db"
    store = Store(path)
    store.add_votes(VOTES)
    store.close()
    return path


def rows_in(path):
    store = Store(path, create=False)
    rows = list(preference_rows(store))
    store.close()
    return rows


def run(*words):
    return cli.main(["label", *map(str, words)])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_export_trains_like_the_database(database, tmp_path, suffix):
    output = tmp_path / f"pairs{suffix}"
    assert run("export", output, "--database", database) == 0
    settings = {"heldout_fraction": 0.0, "seed": 0}

    def pairs(source):
        found = load_preferences(str(source), **settings)[1]
        prompts = [list(map(dict, each.messages)) or each.prompt for each in found]
        return [(p, each.chosen, each.rejected, each.margin, each.tie) for p, each in zip(prompts, found, strict=True)]

    wanted = pairs(database)
    assert len(wanted) == 8
    if suffix == ".parquet":
        wanted = [([{"role": "user", "content": p}] if isinstance(p, str) else p, *more) for (p, *more) in wanted]
    assert pairs(output) == wanted


def test_exported_rows_have_metadata(database, tmp_path):
    run("export", tmp_path / "x.jsonl", "--database", database)
    row = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert (row["labeler"], row["seconds"], row["chosen_model"], row["chosen_temperature"], row["margin"]) == (
        "ann, ben", 4.0, "model-a", 0.7, 0.25,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["argilla", "label-studio"])
def test_records_of_other_tools_come_back_as_they_were(database, tmp_path, kind):
    output = tmp_path / "records.json"
    assert run("export", output, "--database", database, "--format", kind) == 0
    again = tmp_path / "again.db"
    assert run("import", output, "--database", again) == 0
    assert run("import", output, "--database", again) == 0, "the same votes again change nothing"
    before, after = rows_in(database), rows_in(again)
    unknown = {"chosen_model", "rejected_model", "chosen_temperature"} if kind == "label-studio" else set()
    assert [{k: v for k, v in row.items() if k not in unknown} for row in after] == [
        {k: v for k, v in row.items() if k not in unknown} for row in before
    ]


def test_records_as_argilla_and_label_studio_write_them(tmp_path):
    """Fields and questions have other names there."""
    argilla = {
        "id": "1",
        "fields": {"instruction": "q1", "response-1": "x", "response-2": "y"},
        "responses": {"better": [{"value": "response-2", "user_id": "u"}]},
        "status": "completed",
    }
    studio = {
        "id": 7,
        "data": {"prompt": "q2", "answer1": "x", "answer2": "y"},
        "annotations": [{"completed_by": 3, "lead_time": 2.5, "was_cancelled": False, "result": [
            {"from_name": "comparison", "to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": "left"}}
        ]}, {"completed_by": 4, "was_cancelled": True, "result": []}],
    }  # fmt: skip
    compare = {"prompt": "q3", "answer_a": "x", "answer_b": "y", "vote": "B", "model_a": "m", "model_b": "n"}
    for number, record in enumerate((argilla, studio, compare)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([record]))
        assert run("import", path, "--database", tmp_path / "f.db") == 0
    rows = rows_in(tmp_path / "f.db")
    assert [(row["prompt"], row["chosen"], row["labeler"], row["chosen_model"]) for row in rows] == [
        ("q1", "y", "import u", None),
        ("q2", "x", "import 3", None),
        ("q3", "y", "import", "n"),
    ]


def test_a_preference_file_is_imported(pairs_csv, tmp_path):
    assert run("import", pairs_csv, "--database", tmp_path / "f.db", "--labeler", "crowd") == 0
    rows = rows_in(tmp_path / "f.db")
    assert len(rows) == 8
    assert rows[0]["chosen"] == "Run ip route and read the default line."
    assert rows[0]["labeler"] == "crowd"


def test_agreement_is_printed_and_written(database, tmp_path, capsys):
    store = Store(database)
    (unit,) = [each for each in store.unjudged("judge:x") if each.prompt == "question, one"]
    store.add_judgment("judge:x", unit.id, Choice(0))
    (tied,) = [each for each in store.unjudged("judge:x") if each.prompt != "question, one"]
    store.add_judgment("judge:x", tied.id, Choice(None, tie="good"))
    store.close()
    assert run("agreement", "--database", database, "--output", tmp_path / "a.json") == 0
    out = capsys.readouterr().out
    assert "Judge judge:x has the preference of the people in 50% (1/2) of the units" in out
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["judges"] == {"judge:x": {"count": 1, "total": 2}}
    assert [each["name"] for each in record["labelers"]] == ["ann", "ben", "judge:x"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("export x.txt", "isn't a file of format trl"),
        ("export x.json", "isn't a file of format trl"),
        ("export x.csv --format argilla", "isn't a file of format argilla"),
        ("export x.csv --database none.db", "no such file"),
        ("export pairs.csv --database f.db", "already exists"),
        ("export x.csv --database f.db", "no votes"),
        ("agreement --database f.db", "no votes"),
        ("import none.json", "no such file"),
        ("import prompts.csv", "no responses"),
        ("--database f.db --port 0", "nothing to label"),
        ("--data prompts.csv --database f.db --port 0", "no responses to label"),
        ("--data pairs.csv --guidelines none.md --port 0", "file none.md not found"),
        ("--task pair --num_answers 3", "doesn't fit task pair"),
        ("--select uncertain", "Give --reward_model"),
        ("--host 192.0.2.1", "can't listen"),
    ],
)
def test_mistakes_are_one_line_errors(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Store("f.db").close()
    (tmp_path / "prompts.csv").write_text("prompt\nWhat is DNS?\n")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    assert run(*words.split()) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert "Traceback" not in err


# --- responses of models ----------------------------------------------------------------------------------------------


@pytest.fixture
def generate(tmp_path):
    from reinforcepp.commands.label.models import generation, load_scores

    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,topic\n" + "".join(f"Why is host {i} slow?,t{i % 2}\n" for i in range(10)))

    def run_to_end(database, models=("builtin:tiny",), **settings):
        settings = {"max_new_tokens": 8, "engine": "transformers", "use_cpu": True, "data": str(prompts)} | settings
        config = LabelConfig(models=models, database=str(database), **settings)
        store = Store(database)
        with generation(config, store, load_scores(config)) as background:
            background.start()
            while background.is_running:
                time.sleep(0.05)
        units = [*store.unjudged("x", config.task)]
        store.close()
        return units

    return run_to_end


@pytest.mark.full
def test_models_respond_in_the_background(generate, tmp_path, model_folder):
    units = generate(tmp_path / "f.db", ("builtin:tiny", str(model_folder)))
    assert 8 <= len(units) <= 10, "equal responses make no unit"
    for unit in units:
        assert [each.model for each in unit.answers] == ["builtin:tiny", str(model_folder)]
        assert [each.sampling["temperature"] for each in unit.answers] == [0.7, 1.0]
        assert unit.topic in ("t0", "t1")
    again = generate(tmp_path / "f.db", ("builtin:tiny", str(model_folder)))
    assert [each.id for each in again] == [each.id for each in units]
    assert len(generate(tmp_path / "f.db", max_prompts=3, num_answers=3, task="rank")) == 3


@pytest.mark.full
def test_uncertain_responses_of_models_come_first(generate, tmp_path, reward_folder):
    units = generate(tmp_path / "f.db", select="uncertain", reward_model=(str(reward_folder),))
    reward = load_reward_model(str(reward_folder))
    scores = []
    for unit in units:
        reasons = ["length" if each.truncated else "stop" for each in unit.answers]
        scores.append(reward([unit.prompt] * 2, [each.text for each in unit.answers], reasons))
    margins = [abs(one - other) for one, other in scores]
    assert margins == sorted(margins)
    assert margins[0] < margins[-1]


@pytest.mark.full
def test_a_failing_engine_keeps_the_units_so_far(tmp_path, capsys):
    store = Store(tmp_path / "f.db")

    def respond(indices):
        if 0 not in indices:
            raise RolloutError("The engine failed. Restart it.")
        return [NewUnit("pair", f"question {i}", TEXTS) for i in indices]

    background = BackgroundGeneration(store, [PromptRow(str(i), {}) for i in range(20)], respond)
    background.start()
    background.stop()
    assert len(store.unjudged("x")) == CHUNK_PROMPTS
    store.close()


# --- files with responses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], [("a", None), ("b", None)]),
        ([{"prompt": "q", "answers": ["a", "b", "a", " "]}], [("a", None), ("b", None)]),
        ([{"prompt": "q", "responses": [{"text": "a", "model": "m"}, {"content": "b"}]}], [("a", "m"), ("b", None)]),
        ([{"prompt": "q", "completion": t, "model": f"m{t}"} for t in "abc"], [("a", "ma"), ("b", "mb"), ("c", "mc")]),
        (
            [{"prompt": "q", "answer_a": "a", "answer_b": "b", "model_a": "m", "better": "A", "score_a": 1.0}],
            [("a", "m"), ("b", None)],
        ),
        (
            [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}],
            [("a", None)],
        ),
    ],
)
def test_formats_of_responses(rows, answers, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_answers(path)
    assert [(each.text, each.model) for each in found.answers] == answers


def test_gold_units_know_the_better_answer(pairs_csv):
    units = gold_units(read_answers(pairs_csv))
    assert len(units) == 8
    assert {each.gold for each in units} == {Choice(0)}
    assert units[0].answers[0].text == "Run ip route and read the default line."


def test_uncertain_units_come_first(pairs_csv):
    """By hand: one model is least certain at the smallest margin; two disagree most at the largest difference."""
    answered = read_answers(pairs_csv)[:3]
    margins = [[3.0, 0.0], [0.1, 0.0], [-2.0, 0.0]]
    others = [[3.0, 0.0], [0.1, 0.0], [2.0, 0.0]]

    def order(*scores):
        units = make_units(answered, "pair", num_answers=2, scores=scores)
        return sorted(range(3), key=lambda i: units[i].priority)

    assert order(lambda rows: margins) == [1, 2, 0]
    assert order(lambda rows: margins, lambda rows: others)[0] == 2


def test_measurements_by_hand(tmp_path):
    """Two people agree on two of three units: observed disagreement 1/3, alpha 4/9; the page's first answer won twice."""
    store = Store(tmp_path / "f.db")
    units = [NewUnit("pair", str(i), TEXTS) for i in range(3)]
    store.add_votes([(unit, "ann", Choice(better), 2.0) for unit, better in zip(units, (0, 1, 0), strict=True)])
    store.add_votes([(unit, "ben", Choice(better), 2.0) for unit, better in zip(units, (0, 1, 1), strict=True)])
    quality = measure(store)
    store.close()
    assert quality.alpha["all"] == pytest.approx(4 / 9)
    assert quality.units.value == 1.0
    assert [each.votes for each in quality.labelers] == [3, 3]
