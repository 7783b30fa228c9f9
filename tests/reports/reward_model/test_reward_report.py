"""The files of a reward training and the report made of them."""

import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console
from scored import pair, pairs

from reinforcepp.commands.cli import main
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.files import write_json
from reinforcepp.monitoring.completion_log import save_completions
from reinforcepp.reports import reward_model as reward_report
from reinforcepp.reports.reward_model import (
    analyze,
    analyze_by_criterion,
    print_criteria,
    print_summary,
    save_pairs,
    terminal,
)
from reinforcepp.reports.reward_model.write import COLUMNS, read_pairs
from reinforcepp.rewards.card import CriterionCard, RewardCard, read_card
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.runtime import terminal as output

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)> [red]\x1b[31m\x9b2J\u202e & "quotes" \'too\''


TURNS = (
    {"role": "system", "content": "Be brief. " * 30},
    {"role": "user", "content": "Is the gateway up?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Are you\n  sure?"},
)


def write_reward_report(folder, output) -> str:
    """Write the page on a reward model and return the verdict."""
    html, verdict = reward_report.reward_report(folder)
    output.write_text(html, encoding="utf-8")
    return verdict


def card_for(scored, **changes):
    """A card as a training would have written it."""
    made = {
        "base_model": "some/model",
        "data": "my.csv",
        "data_sha256": "0" * 64,
        "train_pairs": 200,
        "heldout_pairs": len(scored),
        "figures": asdict(analyze(scored).metrics) if scored else {},
        "score_mean": 0.0,
        "score_std": 1.0,
        "settings": {},
        "fingerprint": [0.0] * 8,
        "train_accuracy": 0.97,
    }
    return RewardCard(**(made | changes))


def folder_of(scored, folder, **changes):
    """A reward model's folder, as far as the report is concerned."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "reward_model.json", asdict(card_for(scored, **changes)))
    save_pairs(scored, folder)
    return folder


def varied(count=120):
    return pairs([(-1) ** (i % 7 == 0) * (0.1 + i % 13) for i in range(count)], [i % 9 - 4 for i in range(count)])


# --- what a training writes -------------------------------------------------------------------------------------------


def test_a_training_writes_the_pairs_it_held_out(reward_folder):
    read, card = read_pairs(reward_folder), read_card(reward_folder)
    assert len(read) == card.heldout_pairs > 0
    assert parquet.read_table(reward_folder / "heldout.parquet").column_names == list(COLUMNS)
    assert asdict(analyze(read).metrics) == card.figures
    reward = load_reward_model(str(reward_folder))
    for one in read:
        scores = reward([one.prompt, one.prompt], [one.chosen, one.rejected])
        assert scores == pytest.approx([one.chosen_score, one.rejected_score], abs=1e-4)


def test_a_training_writes_the_page(reward_folder, tmp_path):
    verdict = write_reward_report(reward_folder, tmp_path / "again.html")
    assert verdict.startswith("Inconclusive (too few held-out pairs): ")
    assert (reward_folder / "report.html").read_bytes() == (tmp_path / "again.html").read_bytes()
    assert verdict in parsed((reward_folder / "report.html").read_text(encoding="utf-8"))[1]


def test_without_held_out_pairs_there_is_no_report(model_folder, pairs_csv, tmp_path, capfd):
    flags = ["--model", model_folder, "--data", pairs_csv, "--output_dir", tmp_path / "rm", "--num_train_epochs", 1]
    assert main(["reward", *map(str, flags), "--heldout_fraction", "0"]) == 0
    assert "No pairs were held out" in capfd.readouterr().err
    assert not {"heldout.parquet", "report.html"} & {path.name for path in (tmp_path / "rm").iterdir()}
    with pytest.raises(ConfigError, match=r"heldout_fraction 0\.1"):
        write_reward_report(tmp_path / "rm", tmp_path / "report.html")


def test_a_folder_with_these_files_is_one_of_ours(reward_folder, model_folder, pairs_csv, tmp_path):
    folder = tmp_path / "rm"
    shutil.copytree(reward_folder, folder)
    flags = ["--model", model_folder, "--data", pairs_csv, "--output_dir", folder, "--num_train_epochs", 1]
    assert main(["reward", *map(str, flags), "--overwrite"]) == 0
    assert (folder / "heldout.parquet").read_bytes() == (reward_folder / "heldout.parquet").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_reward_report(folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    return str(caught.value)


def test_an_older_folder_needs_a_new_training(tmp_path):
    folder = folder_of(varied(), tmp_path / "rm")
    (folder / "heldout.parquet").unlink()
    message = refused(folder, tmp_path)
    assert "heldout.parquet not found" in message and "same settings and overwrite=True" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("row,prompt\n"),
        lambda path: save_completions(path, {"row": [1]}),
        lambda path: parquet.write_table(pyarrow.table({name: ["x"] * 120 for name in COLUMNS}), path),
        lambda path: parquet.write_table(pyarrow.table({name: [None] * 120 for name in COLUMNS}), path),
        lambda path: parquet.write_table(parquet.read_table(path).set_column(8, "messages", [["x"] * 120]), path),
        lambda path: save_pairs([pair(float("nan"))] * 120, path.parent),
    ],
    ids=["cut", "empty", "text", "no columns", "strings", "nothing", "messages", "nan"],
)
def test_a_damaged_file_is_named(damage, tmp_path):
    folder = folder_of(varied(), tmp_path / "rm")
    damage(folder / "heldout.parquet")
    message = refused(folder, tmp_path)
    assert (
        message.startswith(f"{folder / 'heldout.parquet'}: ") and "damaged" in message and "overwrite=True" in message
    )


def test_another_models_pairs_are_refused(tmp_path):
    folder = folder_of(varied(), tmp_path / "rm")
    save_pairs(varied(7), folder)
    assert "7 pairs, but the card says 120" in refused(folder, tmp_path)


def test_a_folder_without_a_reward_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no reward_model\.json"):
        write_reward_report(tmp_path, tmp_path / "report.html")


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def printed(monkeypatch):
    """Return a function that returns the printed summary of pairs."""

    def ask(scored, **changes):
        console = Console(width=110, highlight=False)
        for module in (output, reward_report.terminal):
            monkeypatch.setattr(module, "console", console)
        with console.capture() as capture:
            print_summary(card_for(scored, **changes), analyze(scored))
        return capture.get()

    return ask


def test_the_terminal_shows_metrics_tables_and_the_verdict(printed):
    text = printed(varied())
    assert "120 held-out pairs: accuracy 0.85 (length-only baseline 0.49)" in text
    plain = text.replace("┃", "│")
    assert "│ margin " in plain and "│ chosen response " in plain and "│ about as long " in plain
    assert text.rstrip().splitlines()[-1].startswith("Good: accuracy 0.85 on 120 held-out pairs")


def test_few_pairs_make_no_tables(printed):
    text = printed(varied(39))
    assert "┃" not in text and len(text.splitlines()) == 2


# --- the page ---------------------------------------------------------------------------------------------------------


def parsed(text):
    """Return tags with their attributes, and the visible text on one line."""
    tags, shown = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.handle_data = shown.append
    parser.feed(text)
    return tags, " ".join("".join(shown).split())


def hostile(folder):
    scored = [
        *varied(),
        pair(-50.0, row=999, prompt=NASTY, chosen="c" + NASTY, rejected="r" + NASTY),
        pair(-49.0, row=998, rejected=NASTY + "long " * 200 + NASTY),
        pair(-48.0, row=997, messages=({"role": NASTY, "content": NASTY, "name": NASTY}, *TURNS)),
    ]
    return folder_of(scored, folder, base_model=NASTY, data=NASTY, settings={"x": NASTY})


def page_of(scored, folder, **changes):
    """The page on some pairs, as a path."""
    write_reward_report(folder_of(scored, folder / "rm", **changes), folder / "report.html")
    return folder / "report.html"


def drawn(text):
    """What the charts of a page are given, in their order."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text)
    return [json.loads(block) for block in blocks]


def test_hostile_text_is_shown_as_text(tmp_path):
    write_reward_report(hostile(tmp_path / "rm"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags, shown = parsed(text)
    assert not {"img", "link", "iframe", "b"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "onerror"} & attrs.keys()]
    assert shown.count('</script><script>alert("x")</script><img src=x') >= 11, (
        "model, title, data, four texts, and a message with its role and name"
    )
    assert not set(text) & set("\x1b\x9b\u202e")


def test_the_page_shows_the_metrics(tmp_path):
    scored = varied()
    text = page_of(scored, tmp_path).read_text(encoding="utf-8")
    _, shown = parsed(text)
    found = analyze(scored)
    assert "Accuracy0.850 0.78 to 0.900 ties; chance is 0.5" in shown
    assert "Training accuracy0.970" in shown and f"Length-only baseline{found.metrics.longer_wins:.3f}" in shown
    assert f"Accuracy without length{found.without_length:.3f}" in shown
    assert f"{found.metrics.length_correlation:+.2f}Pearson; Spearman {found.rank_correlation:+.2f}" in shown
    assert "120 held-out pairs on 120 prompts" in shown
    for bucket in [*found.by_margin, *found.by_length_difference, *found.by_length]:
        right = bucket.right
        assert f"{bucket.label}{right.count}{right.value:.2f} {right.low:.2f} to {right.high:.2f}" in shown
    for b in found.calibration:
        assert f"{b.confidence:.2f}{b.right.count}{b.right.value:.2f} " in shown and f"--due:{b.confidence:.1%}" in text
    first = found.by_margin[0].right
    assert f"--low:{first.low:.1%};--high:{first.high:.1%};--at:{first.value:.1%}" in text


def test_the_charts_show_the_metrics(tmp_path):
    scored = varied()
    calibration, scores, lengths = drawn(page_of(scored, tmp_path).read_text(encoding="utf-8"))
    bins = analyze(scored).calibration
    (curve,) = calibration["series"]
    assert calibration["diagonal"] and curve["n"] == [b.right.count for b in bins]
    assert curve["x"] == pytest.approx([b.confidence for b in bins], abs=1e-5)
    assert curve["y"] == pytest.approx([b.right.value for b in bins], abs=1e-5)
    assert [own["name"] for own in scores["series"]] == ["chosen", "rejected"]
    assert [sum(own["y"]) for own in scores["series"]] == pytest.approx([1, 1])
    assert scores["series"][0]["y"] != scores["series"][1]["y"]
    lowest = [own["y"][0] for own in scores["series"]]
    edge = scores["edges"][1]
    assert lowest == pytest.approx(
        [sum(getattr(p, key) < edge for p in scored) / 120 for key in ("chosen_score", "rejected_score")], abs=1e-5
    )
    assert scores["edges"][-1] == pytest.approx(max(p.chosen_score for p in scored))
    for own, length, score in zip(
        lengths["series"], ("chosen_length", "rejected_length"), ("chosen_score", "rejected_score"), strict=True
    ):
        assert own["x"] == [getattr(p, length) for p in scored]
        assert own["y"] == pytest.approx([getattr(p, score) for p in scored])
        assert own["labels"][:2] == ["row 0", "row 1"]


def test_many_pairs_are_sampled_for_the_chart(tmp_path):
    text = page_of(varied(3100), tmp_path).read_text(encoding="utf-8")
    assert [len(own["x"]) for own in drawn(text)[2]["series"]] == [1034, 1034]
    assert "; 1034 of 3100 pairs" in text


def test_worst_errors_are_listed_with_their_texts(tmp_path):
    scored = [*varied(), pair(-70.5, 3, row=777, prompt="Why?", chosen="Because.", rejected="x" * 5000)]
    _, shown = parsed(page_of(scored, tmp_path).read_text(encoding="utf-8"))
    listed = shown[shown.index("Worst errors") :]
    assert (
        "Row 777, margin -70.50 Prompt Why? Chosen, score -70.50, 13 tokensBecause. Rejected, score 0.00, 10 tokens"
        in listed
    )
    assert listed.count("x" * 5000) == 1
    assert listed.count("Row ") == 19 and listed.index("Row 777") < listed.index("Row 77,")


def test_worst_errors_show_conversations_turn_by_turn(tmp_path):
    scored = [*varied(), pair(-70.5, row=777, prompt="As one text", messages=TURNS)]
    tags, shown = parsed(page_of(scored, tmp_path).read_text(encoding="utf-8"))
    listed = shown[shown.index("Row 777") :]
    start = "System " + ("Be brief. " * 16)[:159] + "…"
    assert listed[listed.index(start) :].startswith(
        start + " " + "Be brief. " * 30 + "UserIs the gateway up? AssistantYes."
    )
    assert "UserAre you sure?" in listed and "As one text" not in listed
    given = [attrs["class"] for tag, attrs in tags if attrs.get("class", "").startswith("turn ")]
    assert given[:4] == ["turn system", "turn user", "turn assistant", "turn user"]
    assert [tag for tag, attrs in tags if attrs.get("class") == "turn system"] == ["details"]


# --- several criteria -------------------------------------------------------------------------------------------------


def two_criteria(folder, **changes):
    """A folder whose criterion safe has 40 pairs with 10 errors, and short 30 pairs without one."""
    safe = [replace(one, criterion="safe") for one in pairs([1.0] * 30 + [-2.0] * 10)]
    short = [replace(one, criterion="short") for one in pairs([3.0] * 30, [-4] * 30)]
    made = {
        "heldout_pairs": 45,
        "figures": {},
        "train_accuracy": None,
        "criteria": (
            CriterionCard("safe", 150, 7, 0, 40, 3, asdict(analyze(safe).metrics), 0.8125),
            CriterionCard("short", 160, 0, 0, 30, 15, asdict(analyze(short).metrics), 0.9375),
            CriterionCard("odd", 5, 0, 0, 0, 1, {}, None),
        ),
        "correlations": [[1, -0.25, 0.5], [-0.25, 1, 0], [0.5, 0, 1]],
    }
    scored = [*safe, *short]
    return folder_of(scored, folder, **(made | changes)), scored


def test_each_criterion_has_a_verdict_and_a_section(tmp_path):
    folder, scored = two_criteria(tmp_path / "rm")
    assert read_pairs(folder) == scored
    verdicts = write_reward_report(folder, tmp_path / "report.html").splitlines()
    assert [text.partition(" on ")[0] for text in verdicts] == [
        "safe: Usable: accuracy 0.75",
        "short: Doubtful: accuracy 1.00",
    ]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    _, shown = parsed(text)
    assert "Trained on 200 pairs" in shown and "45 held-out pairs" in shown
    assert len(drawn(text)) == 6 and text.count('class="criterion"') == 2
    assert "150 and 7" in shown and "40 and 3" in shown and "5 and 0" in shown and "-0.25" in shown
    sections = shown.split("Worst errors")
    assert sections[1].count("Row ") == 10 and "All pairs are in the right order." in sections[2]


def test_the_summary_of_criteria_in_the_terminal(tmp_path, capsys, monkeypatch):
    folder, scored = two_criteria(tmp_path / "rm")
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "console", Console(width=80, force_terminal=False))
        patch.setattr(terminal, "echo", lambda text, color="": print(text))
        print_criteria(read_card(folder), analyze_by_criterion(scored))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["safe", "40", "3", "0.75", "0.60 to 0.86", "0.50", "0.81"],
        ["short", "30", "15", "1.00", "0.89 to 1.00", "0.00", "0.94"],
        ["odd", "0", "1", "-", "-", "-", "-"],
    ]
    assert "safe and short -0.25; safe and odd +0.50; short and odd +0.00" in out
    assert "safe: Usable" in out and "odd: no held-out pair has a judgment" in out


def test_criteria_that_do_not_match_the_card_raise(tmp_path):
    folder, scored = two_criteria(tmp_path / "rm")
    save_pairs(scored[1:], folder)
    assert "the file has 69 pairs, but the card says 70" in refused(folder, tmp_path)


def test_without_errors_none_are_listed(tmp_path):
    _, shown = parsed(page_of(pairs([1.0] * 30), tmp_path).read_text(encoding="utf-8"))
    assert "All pairs are in the right order." in shown and "Row " not in shown


def test_an_old_card_has_a_page(tmp_path):
    folder = folder_of(varied(), tmp_path / "rm")
    card = json.loads((folder / "reward_model.json").read_text())
    del card["train_accuracy"]
    (folder / "reward_model.json").write_text(json.dumps(card))
    assert write_reward_report(folder, tmp_path / "report.html").startswith("Good: accuracy 0.85")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_there_is_a_page_for_any_number_of_pairs(count, tmp_path):
    for name, scored in {"some": varied(count), "ties": pairs([0.0] * count), "one": [pair(-1.0)] * count}.items():
        (tmp_path / name).mkdir()
        assert page_of(scored, tmp_path / name).stat().st_size > 10_000


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_of_criteria_in_a_browser(window, tmp_path, width):
    write_reward_report(two_criteria(tmp_path / "rm")[0], tmp_path / "report.html")
    browser = window(width=width)
    page = browser.open(tmp_path / "report.html")
    page.wait_for_selector(".chart canvas")
    assert page.locator(".chart canvas").count() == 6
    assert browser.complaints == [] and browser.overflow() <= 0 and browser.low_contrasts() == []
    page.click("text=short")
    assert page.url.endswith("#criterion-2") and page.locator("#criterion-2").inner_text() == "short"


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")])
def test_the_page_in_a_browser(window, tmp_path, width, scheme):
    write_reward_report(hostile(tmp_path / "rm"), tmp_path / "report.html")
    browser = window(width=width, scheme=scheme)
    page = browser.open(tmp_path / "report.html")
    page.wait_for_selector(".chart canvas")
    assert page.locator(".chart canvas").count() == 3
    assert browser.complaints == [] and browser.overflow() <= 0
    assert browser.low_contrasts() == []
    assert page.locator("ol.errors > li").count() == 20


def test_drawn_shares_match_the_scale(window, tmp_path):
    page = window().open(page_of(pairs([1.0] * 30 + [-1.0] * 10), tmp_path))
    (left, right), at = (
        page.eval_on_selector(".scale", "e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"),
        page.eval_on_selector(
            ".track .at", "e => (e.getBoundingClientRect().left + e.getBoundingClientRect().right) / 2"
        ),
    )
    assert at == pytest.approx(left + 0.75 * (right - left), abs=1.5)


def test_every_metric_is_readable_without_the_charts(window, tmp_path):
    page = window().open(page_of(varied(), tmp_path))
    labels = page.eval_on_selector_all(".plot", "all => all.map((e) => e.getAttribute('aria-label'))")
    assert [text.split(".")[0] for text in labels] == ["Calibration", "Score distribution", "Score against length"]
    assert page.locator(".numbers").count() == 3
    assert page.locator("table.buckets caption").all_inner_texts() == [
        "Accuracy by margin",
        "Accuracy by length difference",
        "Accuracy by length",
        "Accuracy by confidence",
    ]


def test_a_long_text_unfolds(window, tmp_path):
    scored = [pair(-5.0, row=1, rejected="word " * 1000)]
    page = window().open(page_of(scored, tmp_path))
    before = page.evaluate("document.documentElement.scrollHeight")
    page.get_by_role("button", name="More").click()
    assert page.evaluate("document.documentElement.scrollHeight") > before + 200
