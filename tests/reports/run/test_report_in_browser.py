"""The report in a real Chromium: complaints, charts, hostile text, keyboard, light and dark, a phone's width."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import HOSTILE, episode, evaluation_metrics, make_run

from reinforcepp.commands import cli
from reinforcepp.commands.report import read_report
from reinforcepp.runtime.terminal import printable

PAINTED = """() => [...document.querySelectorAll("figure.chart canvas")].map((canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted;
})"""

UNFOLD = "document.querySelectorAll('details').forEach((details) => (details.open = true))"


def hostile_run(folder: Path) -> Path:
    made = make_run(
        folder,
        steps=40,
        logged=40,
        text=HOSTILE,
        skipped=(7,),
        settings={"data": HOSTILE},
        facts={"command": HOSTILE, "heldout_prompts": 8},
        evaluations={
            "before": evaluation_metrics(0.0, 0.4),
            "step 20": evaluation_metrics(1.0, 0.5),
            "after": evaluation_metrics(2.0, 0.3),
        },
    )
    (made / "events.jsonl").write_text(json.dumps({"time": "2026", "event": HOSTILE}) + "\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The report of a run in which every text is hostile."""
    folder = hostile_run(tmp_path_factory.mktemp("one") / "run")
    read_report([folder]).save(folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Two whole runs and one that has only begun, overlaid."""
    base = tmp_path_factory.mktemp("several")
    folders = [
        hostile_run(base / "first"),
        make_run(base / "second", 30, evaluations={}),
        make_run(base / "third", 1, logged=0, evaluations={"before": evaluation_metrics(0.0)}),
    ]
    read_report(folders).save(base / "report.html")
    return base / "report.html"


@pytest.fixture(params=["one", "several"])
def report(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_without_a_complaint_and_with_contrast(window, report, scheme):
    opened = window(scheme=scheme)
    shown = opened.open(report)
    shown.evaluate(UNFOLD)
    shown.wait_for_timeout(300)  # until charts that were folded away have their size
    painted = shown.evaluate(PAINTED)
    assert len(painted) >= 15 and min(painted) > 500
    assert opened.low_contrasts() == []
    shown.get_by_role("button", name="theme").click()
    assert opened.low_contrasts() == []
    assert opened.complaints == []


def test_hostile_text_is_shown_and_never_run(window, one):
    opened = window()
    shown = opened.open(one)
    for button in shown.locator("button.show-more, button.more").all():
        button.click() if button.is_visible() else None
    responses = shown.locator(".pair .model-text").all_text_contents()
    assert f"after says 3. {printable(HOSTILE)}" in responses
    assert shown.locator("main img, main iframe, main a[href^=javascript], main b b").count() == 0
    assert shown.locator("main script:not([type='application/json'])").count() == 0
    assert shown.title() == "Run report: run" and opened.complaints == []
    links = shown.evaluate("[...document.links].map((a) => a.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    assert "<b>length</b>" in shown.locator(".entry-name").all_text_contents()


@pytest.mark.parametrize("width", [360, 768])
def test_the_page_fits_a_phone(window, report, width):
    opened = window(width=width)
    shown = opened.open(report)
    assert opened.overflow() <= 0
    shown.evaluate(UNFOLD)
    shown.wait_for_timeout(200)
    assert opened.overflow() <= 0
    sizes = shown.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.getBoundingClientRect().right)")
    assert max(sizes) <= width


def test_held_out_responses_can_be_searched_sorted_and_unfolded(window, one):
    shown = window().open(one)
    pairs = shown.locator(".pair:visible")
    assert pairs.count() == 6 and "6 of 8 shown" in shown.locator(".shown").text_content()
    shown.get_by_role("button", name="Show more").click()
    assert pairs.count() == 8 and not shown.get_by_role("button", name="Show more").is_visible()
    assert "Held-out 0?" in pairs.first.text_content()
    shown.get_by_label("Order").select_option("loss")
    assert "Held-out 7?" in pairs.first.text_content()
    shown.get_by_label("Search").fill("AFTER held-out 5?")
    assert pairs.count() == 1 and "1 of 1 shown" in shown.locator(".shown").text_content()
    shown.get_by_label("Search").fill("no such words")
    assert pairs.count() == 0


def test_conversations_are_shown_turn_by_turn(window, tmp_path):
    folder = make_run(tmp_path / "run", text="word " * 60, role="assistant")
    read_report([folder]).save(tmp_path / "report.html")
    opened = window()
    first = opened.open(tmp_path / "report.html").locator(".sample").first
    roles = first.locator(".turn .role").all_text_contents()
    assert roles == ["System", "Assistant", "User"]
    assert first.locator(".turn.user .model-text").text_content().startswith("Question 15?  word ")
    start = first.locator("details.turn.system .start")
    assert start.text_content().startswith("Be brief. word ") and start.text_content().endswith("…")
    first.locator("details.turn.system summary").click()
    assert not start.is_visible() and first.locator("details.turn.system .model-text").is_visible()
    assert first.locator(".answer").inner_text().startswith("Answer ")
    assert "Prompt 0?" not in first.text_content() and opened.complaints == []


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_episodes_are_legible_at_each_width(window, tmp_path, width, scheme):
    folder = make_run(tmp_path / "run", steps=2, heldout=2, text=HOSTILE, turns=6)
    failed = {"error": HOSTILE, "prompt": HOSTILE, "turns": episode(2, HOSTILE, HOSTILE)}
    (folder / "failed_episodes.jsonl").write_text(json.dumps(failed) + "\n", encoding="utf-8")
    read_report([folder]).save(tmp_path / "report.html")
    opened = window(width=width, scheme=scheme)
    shown = opened.open(tmp_path / "report.html")
    first = shown.locator(".sample .episode").first
    middle = first.locator("details.turns .wrote")
    assert middle.count() == 6 and not middle.first.is_visible() and opened.overflow() <= 0
    first.locator("details.turns > summary").click()
    marks = [mark.text_content() for mark in first.locator(".mark").all() if mark.is_visible()]
    assert marks == ["trained", "masked"] * 5 + ["trained", "never seen by the policy"]
    assert shown.locator("#failed .episode .mark").all_text_contents()[:2] == ["sampled", "given"]
    shown.evaluate(UNFOLD)
    shown.wait_for_timeout(200)
    assert opened.overflow() <= 0 and opened.low_contrasts() == [] and opened.complaints == []
    assert shown.locator("main img, main b b").count() == 0 and shown.title() == "Run report: run"


def test_a_long_response_folds_and_unfolds(window, tmp_path):
    folder = make_run(tmp_path / "run", text="word " * 300)
    read_report([folder]).save(tmp_path / "report.html")
    shown = window().open(tmp_path / "report.html")
    text, button = shown.locator(".model-text.long").first, shown.locator("button.more").first
    low = text.bounding_box()["height"]
    assert button.get_attribute("aria-expanded") == "false" and button.text_content() == "More"
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true" and button.text_content() == "Less"
    assert text.bounding_box()["height"] > 2 * low


def test_smoothing_and_cursor_work_on_the_report(window, one):
    opened = window()
    shown = opened.open(one)
    picture = "document.querySelectorAll('#curves figure canvas')[2].toDataURL()"
    before = shown.evaluate(picture)
    shown.get_by_label("Smoothing").fill("70")
    shown.wait_for_timeout(100)
    assert shown.evaluate(picture) != before
    shown.locator("#curves .plot").nth(3).focus()
    shown.keyboard.press("End")
    shown.keyboard.press("ArrowLeft")
    positions = set(shown.locator("#curves .at").all_text_contents()) | set(
        shown.locator("#speed .at").all_text_contents()
    )
    assert "step 39" in positions and opened.complaints == []


def test_curves_of_runs_are_overlaid(window, several):
    shown = window().open(several)
    reward = shown.locator("figure.chart", has=shown.locator(".chart-title", has_text="Reward").first).nth(2)
    names = reward.locator(".entry-name").all_text_contents()
    assert names == ["first", "second", "third"]
    assert shown.locator(".verdicts > li").count() == 3
    assert "Reward hacking" in shown.locator(".verdicts > li").first.text_content()
    picture = "(c) => c.toDataURL()"
    canvas = reward.locator("canvas")
    before = canvas.evaluate(picture)
    reward.get_by_role("button", name="second").click()
    shown.wait_for_timeout(100)
    assert canvas.evaluate(picture) != before
    shown.locator("details.run > summary").first.click()
    shown.wait_for_timeout(200)
    inside = shown.locator("details.run").first.locator("figure canvas").first
    assert inside.bounding_box()["width"] > 200


def test_the_keyboard_comes_to_the_contents_first_and_then_to_the_charts(window, one):
    shown = window().open(one)
    reached = []
    for _ in range(16):
        shown.keyboard.press("Tab")
        reached.append(shown.evaluate("document.activeElement.className || document.activeElement.tagName"))
    links = shown.locator("nav a").count()
    assert reached[:1] == ["theme"] and reached[1 : 1 + links] == ["A"] * links
    assert reached[1 + links : 6 + links] == ["INPUT", "BUTTON", "entry", "plot", "SUMMARY"]
    shown.locator("nav a[href='#samples']").press("Enter")
    assert shown.evaluate("location.hash") == "#samples"


def test_headings_and_names_are_in_order(window, report):
    shown = window().open(report)
    levels = shown.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    unnamed = shown.evaluate(
        "[...document.querySelectorAll('button,input,select,[role=img],[role=region]')]"
        ".filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0
    ids = shown.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_a_block_is_copied_or_at_least_selected(window, one):
    shown = window().open(one)
    button = shown.locator("button.copy").nth(1)
    assert button.text_content() == "Copy run.yaml"
    button.click()
    shown.wait_for_timeout(100)
    assert button.text_content().startswith(("Copied", "Selected"))
    assert "model: builtin:tiny" in shown.evaluate("getSelection().toString()")


def test_a_training_from_beginning_to_page(window, tmp_path, model_folder, reward_folder, pairs_csv):
    flags = ["--max_steps", 3, "--batch_size", 4, "--max_prompt_length", 64, "--max_new_tokens", 8, "--eval_every", 1]
    inputs = ["--model", model_folder, "--data", pairs_csv, "--reward_model", reward_folder, "--heldout_fraction", 0.3]
    run = tmp_path / "run"
    assert cli.main(["train", *map(str, [*inputs, *flags]), "--rollout", "transformers", "--output_dir", str(run)]) == 0
    assert cli.main(["report", str(run)]) == 0
    opened = window()
    shown = opened.open(run / "report.html")
    assert "Finished: 3 of 3 steps." in shown.locator("header").text_content()
    assert shown.locator(".pair").count() > 0 and shown.locator(".sample").count() >= 12
    assert shown.locator(".missing").count() == 0
    assert min(shown.evaluate(PAINTED)) > 500 and opened.complaints == []
