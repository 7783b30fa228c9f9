"""The commands label export, import and agreement, and label itself as a process."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("sqlalchemy")

from reinforcepp.commands import cli
from reinforcepp.commands.label.files import add_from_file, add_gold, put_uncertain_first, units_of
from reinforcepp.config import LabelConfig
from reinforcepp.data import PromptRow, load_prompts
from reinforcepp.data.feedback import Answer, Choice, Edit, NewUnit, Ranking, Ratings, Store
from reinforcepp.data.feedback.answer_files import read_answers
from reinforcepp.data.feedback.preferences import preference_rows
from reinforcepp.data.loading import load_preferences
from reinforcepp.errors import RolloutError
from reinforcepp.labeling.generation import CHUNK_PROMPTS, BackgroundGeneration
from reinforcepp.labeling.quality import measure
from reinforcepp.labeling.queue import Queue
from reinforcepp.labeling.units import gold_units, make_units
from reinforcepp.rewards.trained import load_reward_model

TEXTS = [Answer("Run ip route.", "model-a", {"temperature": 0.7}), Answer("Reboot it.", "model-b")]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'And, "now"?\nQuick.'}]
TOOLS = {"tools": [{"name": "t"}], "chat_template_kwargs": {"enable_thinking": False}}
VOTES = [
    (NewUnit("pair", "question, one", TEXTS, "routing"), "ann", Choice(0, 2), 3.0),
    (NewUnit("pair", "question, one", TEXTS, "routing"), "ben", Choice(1), 5.0),
    (NewUnit("pair", MESSAGES, TEXTS), "ann", Choice(None, tie="bad"), 1.0),
    (NewUnit("rank", "rank", [Answer(text) for text in "abc"]), "ann", Ranking((2, 1, 2)), 1.0),
    (NewUnit("pair", "tools", [Answer("c", truncated=True), Answer("d")], None, TOOLS), "ann", Choice(1), 1.0),
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
    assert len(wanted) == 9
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
    assert after == before
    assert run("import", output, "--database", database) == 0
    assert rows_in(database) == before, "the units are those of the database"


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
    compare |= {"temperature": 0.5, "truncated_b": True, "chat_template_kwargs": {"k": 1}}
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
    assert (rows[2]["chosen_temperature"], rows[2]["chosen_truncated"], rows[2]["rejected_truncated"]) == (
        0.5,
        True,
        False,
    )
    assert rows[2]["chat_template_kwargs"] == {"k": 1}


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
    (tied,) = [each for each in store.unjudged("judge:x") if each.prompt == MESSAGES]
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
        ("--data pairs.csv --gold answers.jsonl --port 0", "no pairs with a known better response"),
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
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "q", "answers": ["a", "b"]}))
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


# --- commands that run again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "export x.csv",
        "agreement",
        "import none.json",
        "import prompts.csv",
        "import bad.json",
        "--port 0",
        "--data prompts.csv --port 0",
        "--data pairs.csv --gold prompts.csv --port 0",
        "builtin:tiny --data none.csv --port 0",
    ],
)
def test_a_command_that_fails_makes_no_database(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\nWhat is DNS?\n")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    (tmp_path / "bad.json").write_text(json.dumps([{"fields": [], "responses": 3}]))
    assert run(*words.split()) == 2
    assert not list(tmp_path.glob("feedback.db*"))


def test_units_of_an_earlier_run_are_ordered_by_the_present_reward_models(tmp_path, pairs_csv):
    """Also if the file is given again, whose units are in the database already."""
    config = LabelConfig(data=str(pairs_csv), select="uncertain", reward_model=("rm",), overlap=2)
    store = Store(tmp_path / "f.db")
    add_from_file(LabelConfig(data=str(pairs_csv)), store)
    first = store.open_units("pair")
    add_from_file(config, store)
    assert store.open_units("pair") == first
    margins = {each.prompt: float(i) for i, each in enumerate(first)}
    put_uncertain_first(config, store, [lambda rows: [[margins[row.prompt], 0.0] for row in rows]])
    assert [each.prompt for each in store.unjudged("x")] == list(margins)
    queue = Queue(store)
    ann, ben = (queue.next(store.labeler(name)) for name in ("ann", "ben"))
    assert ann.unit.prompt == ben.unit.prompt == first[0].prompt, "the overlap is 2 now"
    store.close()


GOLD_VOTES = {
    "pair": (Choice(0), Choice(1)),
    "rank": (Ranking((1, 2)), Ranking((2, 1))),
    "rate": (Ratings(({"safe": 5}, {"safe": 1})), Ratings(({"safe": 1}, {"safe": 1}))),
    "edit": (Edit(0, "x", 2), Edit(1, "x", 2)),
}


@pytest.mark.parametrize("task", GOLD_VOTES)
def test_gold_units_have_the_task_of_the_other_units(task, tmp_path, pairs_csv):
    store = Store(tmp_path / "f.db")
    add_gold(LabelConfig(gold=str(pairs_csv), task=task), store)
    queue = Queue(store, gold_every=1)
    for name, vote in zip(("ann", "ben"), GOLD_VOTES[task], strict=True):
        labeler = store.labeler(name)
        assigned = queue.next(labeler)
        assert assigned.unit.task == task
        queue.vote(labeler, assigned.token, vote, 1.0)
    assert [each.gold.value for each in measure(store).labelers] == [1.0, 0.0]
    store.close()


def test_held_out_prompts_of_the_built_in_data_are_not_labeled(tmp_path):
    from reinforcepp.commands.label.models import _prompts

    store = Store(tmp_path / "f.db")
    _, seen, heldout = load_prompts("builtin:network", heldout_fraction=0.0, seed=0)
    labeled = {row.prompt for row in _prompts(LabelConfig(models=("a",), data="builtin:network"), store)}
    store.close()
    assert heldout and labeled == {row.prompt for row in seen}


def test_prompts_with_all_responses_need_no_new_ones(tmp_path):
    """With two models and two temperatures, each model responds at one of them."""
    from reinforcepp.commands.label.models import _answered, _prompts, parameters

    data = tmp_path / "prompts.csv"
    data.write_text("prompt\nWhat is DNS?\nWhat is NAT?\n")
    config = LabelConfig(models=("a", "b"), temperature=(0.7, 1.0), data=str(data))
    store = Store(tmp_path / "f.db")
    rows = _prompts(config, store)
    assert len(rows) == 2
    answers = [Answer(model, model, parameters(config, each)) for model, each in (("a", 0.7), ("b", 1.0))]
    store.add_units(units_of(config, [_answered(rows[0], answers)]))
    assert [row.prompt for row in _prompts(config, store)] == [rows[1].prompt]
    store.close()


def test_records_that_can_not_be_used_are_skipped_and_reported(tmp_path, capsys):
    good = {
        "fields": {"prompt": "q", "response_1": "x", "response_2": "y"},
        "responses": {"better": [{"value": "response_2"}]},
    }
    bad = [
        good | {"responses": {"better": ["response_2"]}},
        good | {"fields": {"prompt": "q", "response_1": "x", "response_2": "x"}},
        good | {"fields": {"response_1": "x", "response_2": "y"}},
    ]
    counted_from_0 = good | {"fields": {"prompt": "q", "response_0": "x", "response_1": "y"}}
    user = {"responses": {"better": [{"value": "response_2", "user_id": "u"}]}, "metadata": {"seconds_u": -1}}
    (tmp_path / "r.json").write_text(json.dumps([good, *bad, counted_from_0, good | user]))
    assert run("import", tmp_path / "r.json", "--database", tmp_path / "f.db") == 0
    assert "skipped 3 records. The first one, record 2: " in " ".join(capsys.readouterr().err.split())
    (row,) = rows_in(tmp_path / "f.db")
    assert (row["chosen"], row["labeler"], row["seconds"]) == ("y", "import, import u", 0.0)
