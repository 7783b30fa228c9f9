"""The page of a comparison, in a browser: what it hides and shows, votes by mouse and keyboard, hostile text, light and dark."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from markupsafe import Markup

from reinforcepp.config import CompareConfig, as_dict
from reinforcepp.reports.comparison.page import as_page
from reinforcepp.reports.comparison.result import ModelComparison, ModelMetrics, Pair
from reinforcepp.reports.comparison.statistics import Outcome, Rate
from reinforcepp.reports.html import embedded, render
from reinforcepp.types import Conversation

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "]]>--></style></textarea><svg onload=\"document.title = 'owned'\">",
    "\x1b[2J\x1b]0;owned\x07 and \u202egnp.exe",
    "line\u2028separator\u2029 & &lt;b&gt; {left_out} %s \\u003c \ud800",
    "x" * 2000,
    "مرحبا <b>",
)


def pair(prompt: Conversation, a: str, b: str, scores: tuple[float, float] = (0.25, 0.75)) -> Pair:
    better = "tie" if scores[0] == scores[1] else "AB"[scores[0] < scores[1]]
    return Pair(prompt, 0, a, b, *scores, better, "stop", "length")


def comparison(pairs: list[Pair], model_b: str = "runs/b", notes: tuple[str, ...] = ("Take care.",)) -> ModelComparison:
    metrics = ModelMetrics(0.5, 0.05, 20.0, 80.0, 0.0, 1.0, 0.3, 0.7, None, None, 1.5)
    rate = Rate(0.66, 0.6, 0.71)
    return ModelComparison(
        settings=as_dict(CompareConfig(model_b=model_b)),
        judge="builtin:judge",
        reference="A",
        chosen_answers=3,
        outcome=Outcome(len(pairs), 5, 1, 1, 6, rate, rate, 0.5, 0.4),
        metrics={"A": metrics, "B": metrics},
        notes=notes,
        pairs=tuple(pairs),
    )


FIVE = [
    pair(f"Question {i}?", f"alpha {i}", f"beta {i}", ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))[i % 3]) for i in range(5)
]


@pytest.fixture
def opened(window, tmp_path):
    """``opened(comparison, ...)`` is the :class:`browser.Window` that shows it."""

    def show(found: ModelComparison, **settings):
        path = tmp_path / "compare.html"
        path.write_text(as_page(found), encoding="utf-8")
        shown = window(**settings)
        shown.open(path)
        return shown

    return show


def texts(shown) -> dict[str, str]:
    """What stands in the parts of the page that change, by id; the text is the page's, not its source."""
    ids = (
        "position",
        "prompt",
        "text-1",
        "text-2",
        "truncated-1",
        "truncated-2",
        "name-1",
        "name-2",
        "result",
        "tally",
    )
    return {name: shown.page.locator(f"#{name}").inner_text() for name in ids}


def side(text: str) -> str:
    return "A" if text.startswith("alpha") else "B"


# --- blind ------------------------------------------------------------------------------------------------------------


def test_names_and_scores_are_hidden_until_the_reader_chooses(opened):
    shown = opened(comparison(FIVE))
    before = texts(shown)
    assert before["name-1"] == before["name-2"] == before["result"] == "" and before["tally"] == "No votes yet."
    section = shown.page.locator("#voting").inner_text()
    assert "runs/b" not in section and "score" not in section.replace("Show all names and scores", "")
    shown.page.get_by_role("button", name="Response 1").click()
    after = texts(shown)
    names = {"A": "A: builtin:tiny, judge score 0", "B": "B: runs/b, judge score 1"}
    for i in "12":
        assert after[f"text-{i}"] == before[f"text-{i}"]
        assert after[f"name-{i}"] == names[side(after[f"text-{i}"])]
    chosen = side(before["text-1"])
    assert after["result"] == f"You chose response 1, by {chosen}" + (
        ", and the judge agrees." if chosen == "B" else ". The judge prefers B."
    )
    assert shown.complaints == []


def test_either_order_occurs_and_the_seed_decides_it():
    many = comparison([pair(f"Question {i}?", f"alpha {i}", f"beta {i}") for i in range(40)])

    def order(found: ModelComparison) -> list[str]:
        data = as_page(found).partition('id="data">')[2].partition("</script>")[0]
        return [shown["responses"][0]["side"] for shown in json.loads(data)["pairs"]]

    assert 8 < order(many).count("A") < 32
    assert order(many) == order(many)
    many.settings["seed"] = 1
    assert order(many) != order(comparison(list(many.pairs)))


def test_votes_by_mouse(opened):
    shown = opened(comparison(FIVE))
    wins = {"A": 0, "B": 0, "tie": 0}
    agreed = 0
    for place, choice in enumerate(("Response 1", "Response 2", "Tie", "Response 2", "Response 1")):
        now = texts(shown)
        assert (now["position"], now["prompt"]) == (f"Prompt {place + 1} of 5", f"Question {place}?")
        shown.page.get_by_role("button", name=choice).click()
        own = "tie" if choice == "Tie" else side(now[f"text-{choice[-1]}"])
        wins[own] += 1
        agreed += own == FIVE[place].better
        assert shown.page.get_by_role(
            "button", name="Response 1"
        ).is_disabled()  # a vote is not taken back: it was blind
        if place < 4:
            shown.page.get_by_role("button", name="Next").click()
    rate = (wins["B"] + wins["tie"] / 2) / 5
    assert texts(shown)["tally"] == (
        f"You voted on 5 of 5: A {wins['A']}, B {wins['B']}, ties {wins['tie']}; win rate of B {rate:.2f}. "
        f"The judge agrees with {agreed} of your votes."
    )
    assert shown.page.get_by_role("button", name="Next").is_disabled()
    assert shown.complaints == []


def test_votes_by_keyboard(opened):
    shown = opened(comparison(FIVE))
    keyboard = shown.page.keyboard
    keyboard.press("ArrowLeft")  # there is nothing before the first
    keyboard.press("2")
    keyboard.press("1")  # too late
    assert "You chose response 2" in texts(shown)["result"]
    keyboard.press("Enter")  # the focus is on Next
    assert texts(shown)["prompt"] == "Question 1?"
    assert shown.page.evaluate("document.activeElement.id") == "prompt"
    keyboard.press("Control+1")  # the browser's own
    assert texts(shown)["result"] == ""
    keyboard.press("0")
    assert "You called it a tie" in texts(shown)["result"]
    keyboard.press("ArrowRight")
    keyboard.press("ArrowRight")
    assert texts(shown)["prompt"] == "Question 3?"
    keyboard.press("ArrowLeft")
    keyboard.press("Tab")  # from the prompt to the first of the choices
    assert shown.page.evaluate("document.activeElement.dataset.vote") == "1"
    keyboard.press("Space")
    assert "You voted on 3 of 5" in texts(shown)["tally"]
    assert shown.complaints == []


def test_votes_are_saved_for_the_import(opened):
    """The lines have the responses of both models in the order of the models, whatever the page's order."""
    shown = opened(comparison([*FIVE, pair(({"role": "user", "content": "Hi"},), "alpha", "beta")]))
    page = shown.page
    assert not page.locator("#save").is_visible()
    for key in ("1", "ArrowRight", "0", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "2"):
        page.keyboard.press(key)
    with page.expect_download() as download:
        page.click("#save")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert download.value.suggested_filename == "votes.jsonl"
    assert [row["prompt"] for row in rows] == ["Question 0?", "Question 1?", [{"role": "user", "content": "Hi"}]]
    assert [row["answer_a"] for row in rows] == ["alpha 0", "alpha 1", "alpha"]
    assert [row["answer_b"] for row in rows] == ["beta 0", "beta 1", "beta"]
    assert {(row["model_a"], row["model_b"]) for row in rows} == {("builtin:tiny", "runs/b")}
    assert {row["temperature"] for row in rows} == {comparison(FIVE).settings["temperature"]}
    assert rows[0]["vote"] in ("A", "B")
    assert rows[1]["vote"] == "tie"


def test_showing_all_names_ends_the_voting_as_long_as_it_lasts(opened):
    shown = opened(comparison(FIVE))
    shown.page.get_by_label("Show all names and scores").check()
    now = texts(shown)
    assert (
        "builtin:tiny" in now["name-1"] + now["name-2"] and "Votes count only while names are hidden" in now["result"]
    )
    shown.page.keyboard.press("1")
    assert shown.page.get_by_role("button", name="Tie").is_disabled() and texts(shown)["tally"] == "No votes yet."
    shown.page.keyboard.press("ArrowRight")
    assert "runs/b" in shown.page.locator("#responses").inner_text()
    shown.page.get_by_label("Show all names and scores").uncheck()
    assert "runs/b" not in shown.page.locator("#responses").inner_text()
    shown.page.keyboard.press("1")
    assert "You voted on 1 of 5" in texts(shown)["tally"]


def reload(shown, tally):
    """Until the page has this tally, for ten seconds: on a busy machine the browser may give it its storage a moment late."""
    end = time.monotonic() + 10
    shown.page.reload()
    while tally not in texts(shown)["tally"] and time.monotonic() < end:
        shown.page.wait_for_timeout(100)
        shown.page.reload()


def test_votes_survive_a_reload_but_not_other_responses(opened, tmp_path):
    shown = opened(comparison(FIVE))
    shown.page.keyboard.press("1")
    assert "You voted on 1 of 5" in texts(shown)["tally"]
    reload(shown, "You voted on 1 of 5")
    assert "You voted on 1 of 5" in texts(shown)["tally"] and texts(shown)["prompt"] == "Question 1?"
    (tmp_path / "compare.html").write_text(as_page(comparison([*FIVE[:4], pair("New?", "alpha", "beta")])))
    reload(shown, "No votes yet.")
    assert texts(shown)["tally"] == "No votes yet."
    (tmp_path / "compare.html").write_text(as_page(comparison(FIVE)))
    reload(shown, "You voted on 1 of 5")
    shown.page.get_by_role("button", name="Delete my votes").click()
    assert texts(shown)["tally"] == "No votes yet." and shown.page.locator("#forget").is_hidden()
    reload(shown, "No votes yet.")
    assert texts(shown)["tally"] == "No votes yet."


@pytest.mark.parametrize("kept", ["[9, 9, 9, 9, 9]", "[1]", "{", "null", '"x"'])
def test_votes_that_make_no_sense_are_none(opened, kept):
    shown = opened(comparison(FIVE))
    shown.page.keyboard.press("1")
    shown.page.evaluate("(kept) => localStorage.setItem(Object.keys(localStorage)[0], kept)", kept)
    reload(shown, "No votes yet.")
    assert texts(shown)["tally"] == "No votes yet." and shown.complaints == []


def test_equal_responses_are_skipped(opened):
    shown = opened(comparison([pair("Same?", "one", "one", (1.0, 1.0)), *FIVE]))
    assert (
        texts(shown)["position"] == "Prompt 1 of 5" and "1 pair of equal responses is skipped." in shown.page.content()
    )
    shown = opened(comparison([pair("Same?", "one", "one", (1.0, 1.0))] * 2))
    assert "gave the same responses" in shown.page.locator("body").inner_text()
    assert shown.page.locator("script").count() == 0 and shown.complaints == []


def test_empty_and_truncated_responses_are_marked(opened):
    shown = opened(comparison([pair("Why?", "", "beta and on")]))
    now = texts(shown)
    empty, cut = ("1", "2") if now["text-1"] == "(empty)" else ("2", "1")
    assert now[f"text-{empty}"] == "(empty)" and now[f"truncated-{empty}"] == ""
    assert now[f"text-{cut}"] == "beta and on" and now[f"truncated-{cut}"] == "truncated at the length limit"


LONG = [
    {"role": "system", "content": "Be  brief.\nAlways."},
    *({"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")),
    {"role": "user", "content": "word " * 100},
    {"role": "assistant", "content": "More " * 100},
    {"role": "user", "content": "Last?"},
]


def test_a_conversation_is_shown_turn_by_turn(opened):
    shown = opened(comparison([pair(LONG, "alpha", "beta"), pair("Plain?", "alpha", "beta")]))
    prompt = shown.page.locator("#prompt")
    seen = prompt.inner_text().split("\n")
    assert seen[:4] == ["System", "Be  brief.", "Always.", "8 earlier turns"]
    assert seen[-2:] == ["User", "Last?"] and "assistant 3" not in seen
    assert seen[4].startswith("▸") is False and prompt.locator("details.turn:visible").count() == 2
    prompt.get_by_text("8 earlier turns").click()
    assert "assistant 3" in prompt.inner_text()
    assert "More " * 100 not in prompt.inner_text()
    prompt.locator("details.turn.assistant > summary").click()
    assert "More " * 99 in prompt.inner_text()
    shown.page.keyboard.press("ArrowRight")
    assert prompt.inner_text() == "Plain?" and shown.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_fits_a_phone_and_has_contrast(opened, scheme):
    prompt = [*LONG[:-1], {"role": "x" * 300, "content": "y" * 300}, LONG[-1]]
    shown = opened(comparison([pair(prompt, "alpha", "beta")]), width=360, scheme=scheme)
    shown.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert shown.overflow() <= 0 and shown.low_contrasts() == []


def test_without_scripts_the_metrics_are_shown(chromium, tmp_path):
    (tmp_path / "compare.html").write_text(as_page(comparison(FIVE)), encoding="utf-8")
    context = chromium.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto((tmp_path / "compare.html").as_uri())
    text = shown.locator("body").inner_text()
    context.close()
    assert "Verdict: B is better" in text and "turned off" in text and "Response 1" not in text


# --- hostile text -----------------------------------------------------------------------------------------------------


def test_hostile_text_is_shown_as_text_and_never_runs(opened):
    found = comparison(
        [pair(text, f"alpha {text}", f"beta {text}") for text in HOSTILE], model_b=HOSTILE[0], notes=HOSTILE
    )
    shown = opened(found)
    for text in HOSTILE:
        plain = "".join("\ufffd" if c in "\x1b\x07\u202e\ud800" else c for c in text)
        assert shown.page.locator("#prompt > :not([hidden]) .model-text").text_content() == plain
        shown.page.keyboard.press("1")
        responses = {shown.page.locator(f"#text-{i}").text_content() for i in "12"}
        assert responses == {f"alpha {plain}", f"beta {plain}"}
        assert HOSTILE[0] in shown.page.locator("#responses").inner_text()
        shown.page.keyboard.press("ArrowRight")
    assert shown.page.title() == "Two models compared"
    assert shown.page.locator("img, svg, textarea").count() == 0
    assert shown.page.locator("script").count() == opened(comparison(FIVE)).page.locator("script").count()
    body = shown.page.locator("body").inner_text()
    assert HOSTILE[0] in body and HOSTILE[2] in body
    assert shown.complaints == []


def test_hostile_messages_are_shown_as_text_and_never_run(opened):
    conversations = [
        [
            {"role": text, "content": text, "name": text},
            {"role": "assistant", "content": None, "tool_calls": [text]},
            {"role": "tool", "content": text * 9},
            {"role": "user", "content": text},
        ]
        for text in HOSTILE
    ]
    shown = opened(comparison([pair(prompt, "alpha", "beta") for prompt in conversations]))
    for text in HOSTILE:
        plain = "".join("\ufffd" if c in "\x1b\x07\u202e\ud800" else c for c in text)
        visible = shown.page.locator("#prompt > :not([hidden])")
        assert visible.locator(".model-text").last.text_content() == plain
        assert " ".join(plain.split())[:30] in visible.locator(".role").first.text_content()
        assert visible.locator(".turn").count() == 4
        shown.page.keyboard.press("ArrowRight")
    assert shown.page.title() == "Two models compared" and shown.complaints == []
    assert shown.page.locator("img, svg, textarea").count() == 0
    assert shown.page.locator("script").count() == opened(comparison(FIVE)).page.locator("script").count()


def test_only_the_scripts_of_the_page_run(window, tmp_path):
    """The second defence: were some text to get into the page as markup, the browser would refuse to run it."""
    body = "<p id=x>safe</p><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    body += (
        "<a href=\"javascript:document.title = 'owned'\">link</a><link rel=stylesheet href=https://example.org/x.css>"
    )
    path = tmp_path / "page.html"
    for script, expected in (("", "safe"), ("document.getElementById('x').textContent = 'ran';", "ran")):
        scripts = (script,) if script else ()
        path.write_text(render("base.html", title="Mine", scripts=scripts, body=Markup(body)), encoding="utf-8")
        shown = window()
        opened = shown.open(path)
        opened.locator("a").click()
        assert opened.title() == "Mine" and opened.locator("#x").inner_text() == expected
        # the script, the picture and its handler, the style sheet and the link
        assert " ".join(shown.complaints).count("violates the following Content Security Policy directive") == 5


def test_embedded_data_comes_back_as_it_was():
    value = {"texts": list(HOSTILE), "number": 1.5, "none": None}
    element = embedded("data", value)
    inner = element.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert json.loads(inner) == value
    assert inner.isascii() and not set("<>&") & set(inner)


# --- looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_can_be_read_everywhere(opened, scheme, width):
    long = pair("How " * 80 + "x" * 300, "y" * 400, "z " * 300, (1 / 3, 2 / 3))
    shown = opened(comparison([long, *FIVE], model_b="/a/very/long/path/" * 12), scheme=scheme, width=width)
    for key in ("", "1", "ArrowRight", "2"):
        if key:
            shown.page.keyboard.press(key)
        assert shown.low_contrasts() == []
        assert shown.overflow() == 0
    dark = shown.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    columns = shown.page.locator("#responses").evaluate("(grid) => getComputedStyle(grid).gridTemplateColumns")
    assert len(columns.split()) == (1 if width == 360 else 2)
    assert shown.complaints == []


def test_the_check_for_contrast_sees(window, tmp_path):
    path = tmp_path / "grey.html"
    body = Markup("<p style='color:#888'>faint</p><p style='color:#666'>clear</p>")
    path.write_text(render("base.html", title="Gray", body=body), encoding="utf-8")
    shown = window()
    shown.open(path)
    assert [text for text, _ in shown.low_contrasts()] == ["faint"]
    wide = Markup("<div style='width: 2000px'>wide</div>")
    path.write_text(render("base.html", title="Wide", body=wide), encoding="utf-8")
    shown.open(path)
    assert shown.overflow() > 500


def test_all_controls_are_buttons_with_a_name(opened):
    shown = opened(comparison(FIVE))
    names = [button.inner_text() for button in shown.page.locator("#voting").get_by_role("button").all()]
    assert names == ["Response 1 1", "Tie 0", "Response 2 2", "Previous", "Next"]
    assert shown.page.locator("[onclick], [onload]").count() == 0
    assert shown.page.get_by_role("status").count() == 1
    assert Path(shown.page.url.removeprefix("file://")).stat().st_size < 60_000
