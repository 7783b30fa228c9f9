"""Data checks: each problem is found where it was inserted and nowhere else, and a cleaned copy has none left."""

# ruff: noqa: RUF001 (some of these tests are about characters that look like others)

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from weakref import ref

import pytest

from reinforcepp.commands import cli
from reinforcepp.commands.lint import check, damage, rules, similar
from reinforcepp.commands.lint.check import check_data
from reinforcepp.commands.lint.findings import Finding, LintReport
from reinforcepp.config import LintConfig
from reinforcepp.data import read_table
from reinforcepp.errors import ConfigError, DataError, ModelError
from scripts import ROOT

HEAD = ("prompt", "chosen", "rejected")
EXAMPLE = ROOT / "example_feedback_diverse.csv"
NAMES = (
    "router",
    "gateway",
    "switch",
    "tunnel",
    "bridge",
    "laptop",
    "printer",
    "server",
    "camera",
    "modem",
    "phone",
    "beacon",
    "relay",
    "probe",
)
VERBS = (
    "restart",
    "trace",
    "rename",
    "measure",
    "capture",
    "block",
    "mirror",
    "drain",
    "limit",
    "repair",
    "archive",
    "watch",
    "silence",
)


def sound(number: int = 24) -> list[tuple[str, str, str]]:
    """Return pairs without a problem; chosen and rejected are longer in turn."""
    draw = random.Random(3)
    rows = []
    for i in range(number):
        name, verb = NAMES[i % len(NAMES)], VERBS[i % len(VERBS)]
        good, bad = (" ".join(draw.choices(NAMES + VERBS, k=12)) for _ in range(2))
        more = " and then some more words"
        rows.append((f"How would one {verb} the {name} of floor {i}?", good + more * (i % 2), bad + more * (1 - i % 2)))
    return rows


@pytest.fixture
def write(tmp_path):
    def write(rows, name: str = "data.csv", head: tuple[str, ...] = HEAD) -> str:
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        return str(tmp_path / name)

    return write


def found(path: str, **settings) -> dict[str, Finding]:
    """Return the findings by rule; each rule has at most one finding per file."""
    report = check_data(LintConfig(data=path, **settings))
    assert len({each.rule for each in report.findings}) == len(report.findings)
    return {each.rule: each for each in report.findings}


def only(path: str, rule: str, **settings) -> Finding:
    findings = found(path, **settings)
    assert list(findings) == [rule]
    return findings[rule]


# --- no false positives -----------------------------------------------------------------------------------------------


def test_sound_data_has_no_findings(write):
    assert found(write(sound())) == {}


@pytest.mark.parametrize("model", [None, "builtin:tiny"])
def test_sample_file_has_no_findings(model):
    assert found(str(EXAMPLE), model=model) == {}


def test_built_in_data_has_near_duplicates_only():
    report = check_data(LintConfig(model="builtin:tiny"))
    assert [each.noun for each in report.files] == ["pair", "pair"]
    assert {(each.rule, each.severity) for each in report.findings} == {("near-duplicate", "info")}
    assert not report.fails("warning")


@pytest.mark.parametrize(
    "text",
    [
        "naïve café, Größe, señor, œuvre, 5 € für 3½ Stück",
        "«CAFÉ»",
        "MENÜ…",
        "„MENÜ“",
        "Viel Spaß…",
        "„Spaß“",
        "AMANHÃ… ou depois",
        "“AMANHÃ”",
        "HYVÄÄ…",
        "voilà…»",
        "‹é…»",
        "Привет, мир",
        "日本語のテキスト",
        "שלום עולם",
        "👩\u200d💻 and ✓",
        "tab\tand\nline",
    ],
)
def test_real_text_is_not_damaged(text):
    assert damage.clean_text(text) == text
    assert not damage.has_controls(text)
    assert damage.find_lost(text) == -1


# --- skipped, contradictory and near-duplicate rows -----------------------------------------------------------------------


def test_empty_cells(write):
    rows = sound()
    rows[2] = (rows[2][0], " ", rows[2][2])
    rows[5] = ("", *rows[5][1:])
    finding = only(write(rows), "empty")
    assert (finding.severity, finding.rows, finding.fixable) == ("error", (4, 7), True)
    assert "chosen in row 4, prompt in row 7" in finding.message


def test_chosen_equal_to_rejected(write):
    rows = sound()
    rows[3] = (rows[3][0], "the  same", "the same")
    finding = only(write(rows), "equal")
    assert (finding.severity, finding.rows, finding.fixable) == ("error", (5,), True)
    assert "chosen equal to rejected (row 5)" in str(finding)


def test_duplicates(write):
    rows = sound()
    finding = only(write([*rows, rows[0], rows[0], rows[7]]), "duplicate")
    assert (finding.severity, finding.fixable) == ("warning", True)
    assert finding.pairs == ((26, 2), (27, 2), (28, 9))
    assert "26 and 2, 27 and 2, 28 and 9" in finding.message


def test_contradictory_pairs(write):
    rows = sound()
    prompt, chosen, rejected = rows[4]
    finding = only(write([*rows, (prompt, rejected, chosen)]), "contradiction")
    assert (finding.severity, finding.rows, finding.pairs, finding.fixable) == ("error", (6, 26), ((26, 6),), True)
    assert prompt in finding.examples[0]


def test_examples_show_conversations_turn_by_turn(tmp_path, capsys):
    prompt = [{"role": "system", "content": "Be \x1b brief."}, {"role": "user", "content": "Up?"}]
    pairs = [("good", "bad"), ("bad", "good")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(path)["contradiction"].examples == ("row 1:\nSystem: Be \ufffd brief.\nUser: Up?",)
    cli.main(["lint", str(path), "--fail_on", "never"])
    assert "    row 1:\n      System: Be \ufffd brief.\n      User: Up?\n" in capsys.readouterr().out


def test_near_duplicates(write):
    rows = sound(60)
    prompt, chosen, rejected = rows[0]
    finding = only(
        write([*rows, (prompt.upper() + "!", chosen, rejected + " too")]), "near-duplicate", near_duplicate=0.9
    )
    assert (finding.severity, finding.pairs) == ("info", ((62, 2),))
    rows += [
        (prompt, chosen, rejected + f" {word}")
        for _, (prompt, chosen, rejected) in zip(NAMES, rows, strict=False)
        for word in ("too",)
    ]
    assert only(write(rows), "near-duplicate").severity == "warning"


def test_contradictory_pair_is_not_a_near_duplicate(write):
    rows = sound()
    prompt, chosen, rejected = rows[4]
    assert "near-duplicate" not in found(write([*rows, (prompt, rejected, chosen)]))


def jaccard(one, other) -> float:
    first, second = set(similar.shingles(one)), set(similar.shingles(other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("threshold", [0.5, 0.62, 0.8, 1.0])
def test_all_near_duplicates_are_found(threshold):
    draw = random.Random(1)
    texts = []
    for _ in range(300):
        text = [draw.choice("abc") for _ in range(draw.randint(0, 14))]
        if texts and draw.random() < 0.5:
            text = list(draw.choice(texts)[0].split())
            for _ in range(draw.randint(0, 2)):
                text.insert(draw.randint(0, len(text)), draw.choice("abcdefgh"))
        texts.append((" ".join(text), draw.choice(["yes", "no"])))
    expected = {i for i in range(300) if any(jaccard(texts[i], texts[j]) >= threshold - 1e-9 for j in range(i))}
    matches = similar.near_duplicates(texts, threshold)
    assert {match.position for match in matches} == expected and 0 < len(expected) < 300
    for position, other, similarity in matches:
        assert other < position
        assert similarity == pytest.approx(jaccard(texts[position], texts[other]))


def test_texts_from_one_template_are_not_compared_pair_by_pair(monkeypatch):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    template = " ".join(draw.choices(words, k=70))
    texts = [(f"{template} {' '.join(draw.choices(words, k=40))}",) for _ in range(200)]
    texts.append((texts[7][0] + " more",))
    compared, intersect = [], similar.np.intersect1d
    monkeypatch.setattr(similar.np, "intersect1d", lambda *a, **k: compared.append(1) or intersect(*a, **k))
    assert [(match.position, match.other) for match in similar.near_duplicates(texts, 0.8)] == [(200, 7)]
    assert len(compared) < len(texts)


def test_large_files_show_progress_with_the_time_left(write, monkeypatch, capsys):
    path = write(sound())
    check_data(LintConfig(data=path, model="builtin:tiny"))
    assert "left" not in capsys.readouterr().err
    monkeypatch.setattr(check, "PROGRESS_ROWS", 24)
    monkeypatch.setattr(rules, "PROGRESS_ROWS", 24)
    check_data(LintConfig(data=path, model="builtin:tiny"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("s left")]
    titles = ("searching near-duplicates", "checking texts", "searching leakage", "tokenizing")
    assert [title for title in titles if not any(line.startswith(f"{title}, % 100/100") for line in lines)] == []


def test_rules_hold_the_texts_but_not_the_cells(write, monkeypatch):
    tables = []
    monkeypatch.setattr(check, "read_table", lambda *a, **k: tables.append(ref(table := read_table(*a, **k))) or table)
    alive = []
    monkeypatch.setattr(rules, "check_file", lambda file, threshold: alive.extend(table() for table in tables) or [])
    check_data(LintConfig(data=write(sound())))
    assert alive == [None]


def test_shingles_without_spaces_are_character_3_grams():
    near = ("ルーターを再起動してください", "ルーターを再起動してください。")
    assert jaccard([near[0]], [near[1]]) == 1
    assert 0 < jaccard(["ルーターを再起動してください"], ["スイッチを再起動してください"]) < 1


# --- damaged text -------------------------------------------------------------------------------------------------------

MOJIBAKE = [
    "Zürich für 5 €",
    "it’s “quoted” – so…",
    "¿Qué pasó mañana?",
    "São é à",
    "« oui », n° 5",
    "Привет",
    "日本",
    "👍 ok",
    "Ünal Åland",
]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", MOJIBAKE)
def test_mojibake_is_repaired(text, encoding):
    # As in browsers and spreadsheets, bytes that Windows-1252 lacks are kept.
    wrong = "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())
    assert wrong != text
    assert damage.repair_encoding(wrong) == text
    twice = "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in wrong.encode())
    assert damage.repair_encoding(twice) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\x1b[31;1mred\x1b[0m b", "ared b"),
        ("bell\x07 and\x0bfeed", "bell and feed"),
        ("\ufeffstart", "start"),
        ("ï»¿start", "start"),
        ("Ã\x07¼", "ü"),  # valid only after a first cleaning
        ("\x08", ""),
    ],
)
def test_control_characters_are_stripped(text, clean):
    assert damage.clean_text(text) == clean


def test_damaged_text_is_found_with_row_numbers(write):
    rows = sound()
    rows[1] = (rows[1][0], rows[1][1] + " cafÃ©", rows[1][2])
    rows[6] = (rows[6][0], rows[6][1], rows[6][2] + " itâ€™s")
    finding = only(write(rows), "damaged-text")
    assert (finding.severity, finding.rows, finding.fixable) == ("warning", (3, 8), True)
    assert "cafÃ© -> ..." in finding.examples[0] and finding.examples[0].endswith("café")


def test_punctuation_of_windows_1252_is_restored(write):
    text = "It\u2019s \u201cgood\u201d \u2013 really\u2026".encode("cp1252").decode("latin1")
    assert damage.clean_text(text) == "It\u2019s \u201cgood\u201d \u2013 really\u2026"


def test_control_characters_are_found(write):
    rows = sound()
    rows[1] = (rows[1][0] + "\x1b[2J", *rows[1][1:])
    finding = only(write(rows), "control-characters")
    assert (finding.severity, finding.rows, finding.fixable) == ("warning", (3,), True)


@pytest.mark.parametrize("harm", ["caf\ufffd", "he said â€ and left", "cafï¿½"])
def test_lost_characters_are_found_but_not_fixed(write, harm):
    rows = sound()
    rows[1] = (rows[1][0], rows[1][1] + f" {harm}", rows[1][2])
    finding = only(write(rows), "lost-characters")
    assert (finding.severity, finding.rows, finding.fixable) == ("warning", (3,), False)
    assert harm in finding.examples[0]


# --- content --------------------------------------------------------------------------------------------------------------


def test_other_script(write):
    rows = sound()
    rows[3] = (rows[3][0], "Перезагрузите маршрутизатор", rows[3][2])
    finding = only(write(rows), "script")
    assert (finding.severity, finding.rows) == ("warning", (5,))
    assert "another script than Latin" in finding.message


def test_text_with_half_of_its_letters_in_the_main_script_is_not_in_another_one(write):
    rows = sound()
    rows[0] = (rows[0][0], "абвгд abcde", rows[0][2])
    rows[1] = (rows[1][0], "абвгде abcde", rows[1][2])
    assert only(write(rows), "script").rows == (3,)


def test_mixed_scripts_are_info_only(write):
    rows = [
        (p, f"Ответ номер {i}: {i * 'да'}", "Не знаю ничего") if i % 2 else (p, c, r)
        for i, (p, c, r) in enumerate(sound())
    ]
    assert found(write(rows))["script"].severity == "info"


@pytest.mark.parametrize("text", ["x = 𝑎𝑏𝑐𝑑𝑒𝑓𝑔𝑕𝑖𝑗", "Ω µ α", "日本", "1234567890 %%% ???"])
def test_signs_and_few_letters_are_not_another_script(write, text):
    rows = sound()
    rows[3] = (rows[3][0], text, rows[3][2])
    assert "script" not in found(write(rows))


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("How would one restart the router of floor 0? Pull the plug.", True),
        ("Question: how would one restart  the ROUTER of floor 0. Answer: pull the plug.", True),
        ("To restart the router of floor 0, pull the plug.", False),
    ],
)
def test_answers_that_repeat_the_prompt(write, answer, repeats):
    rows = sound()
    rows[0] = (rows[0][0], rows[0][1], answer)
    findings = found(write(rows))
    assert list(findings) == ["repeated-prompt"] * repeats
    if repeats:
        assert findings["repeated-prompt"].rows == (2,)
        assert "rejected in row 2" in findings["repeated-prompt"].message


def test_short_prompt_can_occur_in_an_answer(write):
    rows = sound()
    rows[0] = ("The router?", "Ask the router itself what is wrong.", rows[0][2])
    assert found(write(rows)) == {}
    rows[0] = ("The router?", "the router", rows[0][2])
    assert list(found(write(rows))) == ["repeated-prompt"]


@pytest.mark.parametrize("which", ["longer", "shorter"])
def test_length_bias(write, which):
    rows = [(p, *sorted((c, r), key=len, reverse=which == "longer")) for p, c, r in sound()]
    finding = only(write(rows), "length-bias")
    assert finding.severity == "warning"
    assert f"the {which} answer in 100% of 24 pairs" in finding.message


def test_small_file_has_no_length_bias(write):
    rows = [(p, *sorted((c, r), key=len)) for p, c, r in sound(7)]
    assert list(found(write(rows))) == ["too-little"]


def test_p_value_matches_the_binomial_distribution():
    from math import comb

    for trials, successes in [(30, 15), (30, 22), (30, 6), (100, 65), (101, 50)]:
        distance = abs(successes - trials / 2)
        exact = sum(comb(trials, k) for k in range(trials + 1) if abs(k - trials / 2) >= distance) / 2**trials
        assert rules.binomial_p(successes, trials) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("number", "severity"), [(0, "error"), (1, "error"), (2, "warning"), (19, "warning"), (20, None)]
)
def test_too_little_data(write, number, severity):
    rows = [*sound()[:number], ("skipped", "same", "same")]
    finding = found(write(rows)).get("too-little")
    assert (finding and finding.severity) == severity


def test_contradictory_pairs_are_not_usable(write):
    rows = sound(20)
    assert "too-little" in found(write([*rows, (rows[0][0], rows[0][2], rows[0][1])]))


# --- across the split, and lengths in tokens -------------------------------------------------------------------------------


def test_leakage_between_training_and_held_out_prompts(write):
    from reinforcepp.data import load_preferences

    rows = sound()
    again = [(prompt.upper(), rejected[::-1], chosen[::-1]) for prompt, chosen, rejected in rows]
    path = write(rows + again)
    finding = found(path, heldout_fraction=0.25, seed=1)["leakage"]
    assert finding.severity == "warning"
    _, train, heldout = load_preferences(path, heldout_fraction=0.25, seed=1)
    known = {pair.prompt.lower(): pair.row for pair in train}
    expected = {(pair.row, known[pair.prompt.lower()]) for pair in heldout if pair.prompt.lower() in known}
    assert expected and set(finding.pairs) == expected
    assert "leakage" not in found(path, heldout_fraction=0)


def test_equal_prompts_do_not_leak(write):
    rows = sound()
    assert found(write([*rows, *((prompt, rejected[::-1], chosen[::-1]) for prompt, chosen, rejected in rows)])) == {}


def test_lengths_use_the_tokenizer_of_the_model(write, model_folder):
    rows = sound()
    rows[2] = ("very " * 30 + "long?", *rows[2][1:])
    rows[4] = (rows[4][0], rows[4][1], "word " * 300 + "end")
    path = write(rows)
    assert not {"long-prompt", "long-pair"} & set(found(path))
    limits = {"max_prompt_length": 80, "max_length": 400}
    findings = found(path, model=str(model_folder), **limits)
    assert (findings["long-prompt"].rows, findings["long-pair"].rows) == ((4,), (6,))
    assert "max_prompt_length 80" in findings["long-prompt"].message
    assert "max_length 400" in findings["long-pair"].message
    # The model's context of 512 tokens is an upper limit.
    assert "max_length 512" in found(path, model=str(model_folder), max_length=100_000)["long-pair"].message


def test_texts_at_the_limit_are_not_too_long(write):
    from reinforcepp.models.conversations import format_prompt
    from reinforcepp.models.loading import load_tokenizer
    from reinforcepp.models.tokenization import encode, encode_example

    rows, tokenizer = sound(), load_tokenizer("builtin:tiny")
    prompts = max(len(encode(tokenizer, format_prompt(tokenizer, prompt))) for prompt, _, _ in rows)
    pairs = max(len(encode_example(tokenizer, row[0], answer)) for row in rows for answer in row[1:])
    path = write(rows)
    assert found(path, model="builtin:tiny", max_prompt_length=prompts, max_length=pairs) == {}
    findings = found(path, model="builtin:tiny", max_prompt_length=prompts - 1, max_length=pairs - 1)
    assert set(findings) == {"long-prompt", "long-pair"}
    assert f"the longest with {pairs}" in findings["long-pair"].message


def test_missing_model_is_an_error(write):
    with pytest.raises(ModelError, match=r"\./none"):
        check_data(LintConfig(data=write(sound()), model="./none"))


# --- files of prompts, other columns ----------------------------------------------------------------------------------------


def test_file_of_prompts(write):
    rows = [(prompt, "x") for prompt, _, _ in sound()]
    path = write([*rows, rows[1], ("", "x"), ("cafÃ©?", "x")], head=("prompt", "answer"))
    findings = found(path)
    assert set(findings) == {"empty", "duplicate", "damaged-text", "prompts-only"}
    assert findings["prompts-only"].severity == "info"
    assert findings["duplicate"].pairs == ((26, 3),)


def test_one_answer_column_without_the_other_is_an_error(write):
    with pytest.raises(DataError, match="no column 'rejected'"):
        found(write([("a", "b")], head=("prompt", "chosen")))
    # If the user names answer columns, they must exist.
    with pytest.raises(DataError, match="no column 'good'"):
        found(write([("a", "b")], head=("prompt", "x")), chosen_column="good", rejected_column="bad")
    with pytest.raises(DataError, match="no column 'worse'"):
        found(write([("a", "b")], head=("prompt", "chosen")), chosen_column="chosen", rejected_column="worse")


def test_columns_by_other_names(write):
    rows = sound()
    rows[3] = (rows[3][0], "", rows[3][2])
    path = write(rows, head=("q", "good", "bad"))
    finding = only(path, "empty", prompt_column="q", chosen_column="good", rejected_column="bad")
    assert "good in row 5" in finding.message


def test_lint_without_model_loads_no_torch():
    import subprocess

    code = f"import sys; from reinforcepp import lint; lint({str(EXAMPLE)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# --- other formats ------------------------------------------------------------------------------------------------------------


def as_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_parquet(path: Path, rows: list[dict]) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def turns(prompt: str, chosen: str, rejected: str) -> dict:
    """Return the pair as conversations that contain the prompt."""
    asked = {"role": "user", "content": prompt}
    return {
        name: [asked, {"role": "assistant", "content": text}]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.mark.parametrize("shape", [pair, turns])
@pytest.mark.parametrize("writer", [as_lines, as_parquet])
def test_every_format_gives_the_same_findings(write, tmp_path, writer, shape):
    rows = sound()
    rows[3] = (rows[3][0], "the  same", "the same")
    rows[5] = (rows[5][0], "cafÃ©", rows[5][2])
    rows += [rows[0], (rows[7][0], rows[7][2], rows[7][1])]
    suffix = {as_lines: "jsonl", as_parquet: "parquet"}[writer]
    other = found(writer(tmp_path / f"other.{suffix}", [shape(*row) for row in rows]))
    assert ("read-as" in other) == (shape is turns)
    if shape is turns:
        finding = other.pop("read-as")
        assert finding.severity == "info" and "shared beginning of 'chosen' and 'rejected'" in finding.message
    plain = found(write(rows))
    assert list(other) == list(plain) and {"equal", "duplicate", "contradiction", "damaged-text"} <= set(other)
    for rule, finding in other.items():
        assert finding.rows == tuple(row - 1 for row in plain[rule].rows)  # CSV rows are counted from the header.


def test_rows_of_an_unusable_shape(tmp_path):
    rows = [turns(*row) for row in sound()]
    rows[2]["chosen"][0] = {"role": "user", "content": "Something else?"}
    finding = found(as_lines(tmp_path / "data.jsonl", rows))["shape"]
    assert (finding.severity, finding.rows, finding.fixable) == ("error", (3,), True)
    assert "answers to different prompts in row 3" in finding.message


def test_rows_of_several_files_carry_the_file_name(tmp_path):
    rows = [pair(*row) for row in sound()]
    as_lines(tmp_path / "a.jsonl", rows[:12])
    as_lines(tmp_path / "b.jsonl", [*rows[12:], rows[0], {**rows[3], "chosen": ""}])
    findings = found(f"{tmp_path}/*.jsonl")
    assert set(findings) == {"duplicate", "empty"}
    assert findings["duplicate"].pairs == (("b.jsonl:13", "a.jsonl:1"),)
    assert "chosen in row b.jsonl:14" in findings["empty"].message


FAULTY = [
    {**pair("Is the cafÃ© open?", "itâ€™s open", "no"), "n": 1, "more": {"l": [1.5, None]}, "note": " Ã¼ "},
    {**pair("Is it up?", "yes", "no"), "n": 2},
    {**pair("Is it up?", "yes", "no"), "n": 3},
]


def test_jsonl_copy_keeps_types_and_other_columns(tmp_path):
    path, copy = as_lines(tmp_path / "data.jsonl", FAULTY), tmp_path / "copy.jsonl"
    assert cli.main(["lint", path, "--fix", str(copy), "--fail_on", "never"]) == 0
    rows = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert rows == [{**FAULTY[0], **pair("Is the café open?", "it’s open", "no")}, FAULTY[1]]
    log = [json.loads(line) for line in Path(f"{copy}.log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(each["row"], each["action"]) for each in log] == [(1, "changed"), (3, "dropped")]
    assert cli.main(["lint", str(copy), "--fix", str(tmp_path / "again.jsonl"), "--fail_on", "never"]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == copy.read_bytes()


def test_copy_of_conversations_keeps_their_shape(tmp_path):
    shaped = [turns(row["prompt"], row["chosen"], row["rejected"]) for row in FAULTY]
    shaped.append({"chosen": [{"role": "user", "content": "x"}], "rejected": "y"})
    path, copy = as_lines(tmp_path / "data.ndjson", shaped), tmp_path / "copy.ndjson"
    assert cli.main(["lint", path, "--fix", str(copy), "--fail_on", "never"]) == 0
    rows = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert rows == [turns("Is the café open?", "it’s open", "no"), shaped[1]]


def test_tsv_copy_is_tsv(tmp_path):
    path, copy = tmp_path / "data.tsv", tmp_path / "copy.tsv"
    path.write_text('prompt\tchosen\tx\trejected\nwhy?\t"a\tb"\t1,2\tc\nwhy?\t"a\tb"\t1,2\tc\n')
    assert cli.main(["lint", str(path), "--fix", str(copy), "--fail_on", "never"]) == 0
    assert copy.read_text() == 'prompt\tchosen\tx\trejected\nwhy?\t"a\tb"\t1,2\tc\n'


@pytest.mark.parametrize(
    ("data", "fix", "message"),
    [
        ("data.parquet", "out.parquet", "not a single .csv, .tsv, .jsonl or .ndjson file"),
        ("data.json", "out.json", "not a single"),
        ("a.jsonl,b.jsonl", "out.jsonl", "not a single"),
        ("*.jsonl", "out.jsonl", "not a single"),
        ("folder", "out.jsonl", "not a single"),
        ("folder.csv", "out.csv", "not a single"),
        ("a.jsonl", "out.csv", "ends in .jsonl"),
        ("a.csv", "out.jsonl", "ends in .csv"),
    ],
)
def test_unsupported_copies_are_errors(tmp_path, monkeypatch, data, fix, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "a.csv"):
        Path(name).touch()
    Path("folder.csv").mkdir()
    with pytest.raises(ConfigError) as caught:
        LintConfig(data=data, fix=fix)
    assert message in str(caught.value)


def test_report_offers_a_copy_for_supported_formats(tmp_path, capsys):
    rows = [pair(*row) for row in [*sound(), sound()[0]]]
    for writer, name, offered in ((as_lines, "x.jsonl", True), (as_parquet, "x.parquet", False)):
        assert cli.main(["lint", writer(tmp_path / name, rows)]) == 0
        assert ("--fix OUT.jsonl" in capsys.readouterr().out) == offered


# --- the cleaned copy ---------------------------------------------------------------------------------------------------------


def faulty() -> list[tuple[str, ...]]:
    rows = [(str(i), *row, "kept, with a comma") for i, row in enumerate(sound())]
    first = rows[0]
    return [
        *rows,  # 2 to 25
        first,  # 26 repeats row 2
        ("c", rows[4][1], rows[4][3], rows[4][2], ""),  # 27 contradicts row 6
        ("e", "empty?", "", "x", ""),  # 28
        ("s", "same?", "y", "y", ""),  # 29
        ("m", "Is the cafÃ© open?", "itâ€™s\x07 open", 'no, "closed"\nat once', "Ã¼"),  # 30
        ("d", "Is the café open?", "it’s open", 'no, "closed"\nat once', ""),  # 32 equals row 30 after its repair
    ]


COLUMNS = ("id", *HEAD, "note")


@pytest.fixture
def fixed(write, tmp_path, capsys):
    path = write(faulty(), head=COLUMNS)
    before = Path(path).read_bytes()
    assert cli.main(["lint", path, "--fix", str(tmp_path / "out.csv")]) == 1
    assert Path(path).read_bytes() == before
    assert "6 rows dropped, 1 changed" in " ".join(capsys.readouterr().err.split())
    return tmp_path / "out.csv"


def test_copy_keeps_order_and_other_columns(fixed):
    with open(fixed, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == COLUMNS
    good = [row for i, row in enumerate(faulty()[:24]) if i != 4]
    repaired = ("m", "Is the café open?", "it’s open", 'no, "closed"\nat once', "Ã¼")
    assert [tuple(row) for row in rows] == [*good, repaired]


def test_log_lists_every_changed_or_dropped_row(fixed):
    log = [json.loads(line) for line in Path(f"{fixed}.log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(each["row"], each["action"], each["reason"]) for each in log if each["row"] != 30] == [
        (6, "dropped", "contradicts row 27"),
        (26, "dropped", "duplicate of row 2"),
        (27, "dropped", "contradicts row 6"),
        (28, "dropped", "empty chosen"),
        (29, "dropped", "with chosen equal to rejected"),
        (32, "dropped", "duplicate of row 30"),
    ]
    (changed,) = [each for each in log if each["row"] == 30]
    assert changed["before"] == {"prompt": "Is the cafÃ© open?", "chosen": "itâ€™s\x07 open"}
    assert changed["after"] == {"prompt": "Is the café open?", "chosen": "it’s open"}
    assert log[0]["after"] is None and log[0]["before"]["prompt"] == faulty()[4][1]


def test_copy_has_nothing_left_to_fix(fixed, tmp_path, capsys):
    report = check_data(LintConfig(data=str(fixed)))
    assert [each for each in report.findings if each.fixable] == []
    assert cli.main(["lint", str(fixed), "--fix", str(tmp_path / "again.csv")]) == 0
    assert (tmp_path / "again.csv").read_bytes() == fixed.read_bytes()
    assert (tmp_path / "again.csv.log.jsonl").read_text() == ""


def test_empty_copy_is_not_written(write, tmp_path, capsys):
    path = write([("a", "same", "same")])
    assert cli.main(["lint", path, "--fix", str(tmp_path / "out.csv")]) == 2
    assert "no row would be left" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data.csv"]


def test_no_file_is_overwritten(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(faulty(), head=COLUMNS)
    Path("old.csv").write_text("mine")
    Path("half.csv.log.jsonl").write_text("mine")
    Path("link.csv").symlink_to("data.csv")
    Path("hard.csv").hardlink_to("data.csv")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    for flags in (
        ("--fix", "old.csv"),
        ("--fix", "half.csv"),
        ("--fix", "./data.csv"),
        ("--fix", path),
        ("--fix", "link.csv"),
        ("--fix", "hard.csv"),
        ("--output", "data.csv"),
        ("--output", "link.csv"),
        ("--output", "hard.csv"),
        ("--fix", "new.csv", "--output", "./new.csv"),
        ("--fix", "new.csv", "--output", path.replace("data.csv", "new.csv.log.jsonl")),
        ("--fix", "none/new.csv"),
        ("--output", "none/report.txt"),
        ("--fix", "new.txt"),
    ):
        assert cli.main(["lint", "data.csv", *flags]) == 2, flags
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, flags
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before, flags


def test_built_in_data_cannot_be_fixed():
    with pytest.raises(ConfigError, match="builtin:network"):
        LintConfig(fix="out.csv")


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "flags", "code"),
    [
        ("sound", (), 0),
        ("sound", ("--fail_on", "warning"), 0),
        ("warning", (), 0),
        ("warning", ("--fail_on", "warning"), 1),
        ("error", (), 1),
        ("error", ("--fail_on", "warning"), 1),
        ("error", ("--fail_on", "never"), 0),
    ],
)
def test_exit_codes(write, capsys, rows, flags, code):
    data = {"sound": sound(), "warning": [*sound(), sound()[0]], "error": [*sound(), ("p", "", "r")]}[rows]
    assert cli.main(["lint", write(data), *flags]) == code
    out, err = capsys.readouterr()
    assert err == ""
    assert ("No problems found." in out) == (rows == "sound")


def test_data_is_a_positional_argument_in_any_place(write, capsys, monkeypatch):
    path = write(sound())
    for arguments in ([path], ["--data", path], ["--seed", "1", path], [path, "--seed=1"], [f"--data={path}"]):
        assert cli.parse("lint", arguments).data == path
    settings = Path(path).with_name("settings.yaml")
    settings.write_text("data: other.csv\nseed: 3\n")
    assert cli.parse("lint", [path, "--config", str(settings)]) == LintConfig(data=path, seed=3)
    for arguments in ([path, "b.csv"], [path, "--data", "b.csv"], ["--data=b.csv", path], [path, "--zzz", "1"]):
        assert cli.main(["lint", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"prompt,chosen,rejected\n", "no row"),
        (b"prompt,chosen,rejected\na,caf\xe9,b\n", "isn't valid UTF-8"),
        (b'prompt,chosen,rejected\na,"b,c\n', "double quote"),
        (b"q,x\na,b\n", "no column 'prompt'"),
    ],
)
def test_unreadable_files_are_errors(tmp_path, capsys, contents, problem):
    path = tmp_path / "x.csv"
    if contents is not None:
        path.write_bytes(contents)
    assert cli.main(["lint", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and problem in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"near_duplicate": 0.4}, "near_duplicate"),
        ({"near_duplicate": 1.1}, "near_duplicate"),
        ({"fix": ""}, "fix"),
        ({"fix": "x.json"}, "x.json"),
        ({"output": " "}, "output"),
        ({"model": ""}, "model"),
        ({"data": ""}, "data"),
        ({"fail_on": "warnings"}, "Did you mean 'warning'"),
        ({"format": "xml"}, "format"),
        ({"prompt_column": "chosen"}, "chosen"),
    ],
)
def test_invalid_settings_are_errors(settings, part, write):
    with pytest.raises(ConfigError) as caught:
        check_data(LintConfig(**({"data": write(sound())} | settings)))
    assert part in str(caught.value)


NASTY = '<script>alert("x")</script> [red]\x1b[31m\x9b2J'


def nasty(write) -> str:
    rows = sound()
    rows[1] = (rows[1][0] + NASTY, *rows[1][1:])
    return write([*rows, (NASTY, "", NASTY)], name="a<b>[bold].csv")


def test_data_cannot_control_the_terminal(write, tmp_path, capsys):
    path = nasty(write)
    assert cli.main(["lint", path]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x9b" not in out
    assert "[red]" in out and "a<b>[bold].csv" in out
    assert "error: empty: 1 row has an empty cell (chosen in row 26)" in out
    assert out.endswith("1 error, 1 warning. --fix OUT.csv writes a cleaned copy without 2 of them.\n")
    assert cli.main(["lint", path, "--output", str(tmp_path / "report.txt")]) == 1
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == out
    assert capsys.readouterr().out == ""


def test_json_report_is_complete(write, tmp_path, capsys):
    path = nasty(write)
    assert cli.main(["lint", path, "--format", "json"]) == 1
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    report = json.loads(out)
    assert report["data"] == path
    assert report["files"] == [{"file": "a<b>[bold].csv", "noun": "pair", "rows": 25, "usable": 24}]
    assert report["counts"] == {"error": 1, "warning": 1, "info": 0}
    empty, controls = report["findings"]
    assert (empty["rule"], empty["severity"], empty["rows"], empty["fixable"]) == ("empty", "error", [26], True)
    assert set(empty) == {*["rule", "severity", "file", "message", "cure", "rows", "pairs", "examples", "fixable"]}
    assert empty["cure"] and controls["rule"] == "control-characters"
    assert cli.main(["lint", path, "--format", "json", "--output", str(tmp_path / "r.json")]) == 1
    assert json.loads((tmp_path / "r.json").read_text()) == report


def test_html_report_is_self_contained_and_escaped(write, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert cli.main(["lint", nasty(write), "--format", "html", "--output", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    tags, shown = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.handle_data = shown.append
    parser.feed(text)
    assert not {"script", "img", "link", "iframe", "b"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href"} & attrs.keys()]
    assert '<script>alert("x")</script>' in "".join(shown)
    assert "a<b>[bold].csv" in "".join(shown)
    assert "\x1b" not in text and "\x9b" not in text


def test_most_severe_findings_come_first(write):
    rows = [*sound(3), sound()[0], ("p", "", "r")]
    severities = [each.severity for each in check_data(LintConfig(data=write(rows))).findings]
    assert severities == ["error", "warning", "warning"]


def test_report_counts_and_fails_by_severity():
    def report(*severities):
        return LintReport("x", (), tuple(Finding("r", severity, "x", "m", "c") for severity in severities))

    assert report("info", "warning", "info").counts == {"error": 0, "warning": 1, "info": 2}
    assert [report("info").fails(each) for each in ("error", "warning", "never")] == [False, False, False]
    assert [report("warning").fails(each) for each in ("error", "warning", "never")] == [False, True, False]
    assert [report("error").fails(each) for each in ("error", "warning", "never")] == [True, True, False]


def test_lint_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, "my.csv")
    assert cli.main(["lint", "my.csv"]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["my.csv"]
