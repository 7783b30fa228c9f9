"""Charts and their page: downsampling, descriptions, colors, and the result in a browser."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from reinforcepp.reports import charts
from reinforcepp.reports.charts import describe, downsample, palette
from reinforcepp.reports.html import COLORS, embedded, render
from reinforcepp.reports.numbers import correlation, number
from scripts import SOURCE

CHARTS = SOURCE / "reinforcepp" / "reports"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028"

# --- downsampling -----------------------------------------------------------------------------------------------------------


def long_curve(length: int = 20_000) -> tuple[list[int], list[float | None]]:
    draw = random.Random(5)
    return list(range(1, length + 1)), [draw.gauss(0, 1) for _ in range(length)]


def test_a_spike_in_a_long_curve_stays():
    x, y = long_curve()
    y[12_345], y[777] = 50.0, -40.0
    curve = downsample(x, y, limit=1500)
    assert 1000 < len(curve.x) <= 1510
    points = dict(zip(curve.x, curve.y, strict=True))
    assert points[12_346] == 50 and points[778] == -40
    assert (curve.x[0], curve.x[-1]) == (1, 20_000)
    assert list(curve.x) == sorted(set(curve.x))
    assert all(value == pytest.approx(y[place - 1], rel=1e-5) for place, value in points.items())


def test_smoothing_starts_from_the_mean_of_all_values():
    x, y = long_curve(10_000)
    y = [
        value + 5 * (i % 7 == 0) for i, value in enumerate(y)
    ]  # skewed, so that the middle of low and high isn't the mean
    curve = downsample(x, y, limit=200)
    means = [value for value in curve.mean if value is not None]
    assert 98 <= len(means) <= 102
    assert sum(means[1:-1]) / len(means[1:-1]) == pytest.approx(sum(y) / len(y), abs=0.01)


def test_short_curves_stay_as_they_are():
    curve = downsample([1, 2, 3], [0.5, math.nan, None], limit=10)
    assert (curve.x, curve.y, curve.mean) == ([1, 2, 3], [0.5, None, None], None)
    assert downsample([], [], limit=10).x == []


def test_gaps_stay_gaps_and_bands_keep_their_mean():
    x, y = long_curve(1000)
    y[300:500] = [None] * 200
    curve = downsample(x, y, [-2.0] * 1000, [v if v is None else 3.0 for v in y], limit=100)
    inside = [value for place, value in zip(curve.x, curve.y, strict=True) if 320 < place < 480]
    assert inside and set(inside) == {None}
    assert set(curve.low) == {-2} and set(curve.high) == {3, None}
    assert len(curve.low) == len(curve.high) == len(curve.x) == len(curve.mean)


# --- descriptions --------------------------------------------------------------------------------------------------------------


def test_a_chart_has_a_description():
    html = charts.line_chart(
        "Reward", [charts.Line("reward", [1, 2, 3, 4, 5], [1, -1.5, 2.25, None, 0.5])], limits={"kl_limit": 5.0}
    )
    description = re.search(r'aria-label="(Reward\.[^"]*)"', html)[1]
    assert description == (
        "Reward. Line chart. reward from 1 to 0.5, lowest -1.5 at step 2, highest 2.25 at step 3. kl_limit is 5."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (-0.0, "0"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1e-5, "1.00e-05"),
        (2.5e6, "2.50e+06"),
    ],
)
def test_numbers_are_formatted(value, text):
    assert number(value) == text


def test_empty_and_flat_curves_are_described():
    assert describe.line("kl", [1, 2], [None, None], "step") == "kl has no values"
    assert describe.line("kl", [1, 2], [3.0, 3.0], "step") == "kl is 3 throughout"
    assert describe.joined([str(i) for i in range(10)]).endswith("7; and 2 more.")


def test_the_table_has_a_dozen_rows_from_the_first_to_the_last():
    rows = describe.table_rows([(list(range(1, 1001)), list(range(1000))), ([1, 500], [7.0, 8.0])])
    assert len(rows) == 12 and rows[0] == ["1", "0", "7"] and rows[-1] == ["1000", "999", "-"]
    assert {row[2] for row in rows} == {"7", "-"}


def test_a_histogram_counts_every_value_once():
    html = charts.histogram("Scores", {"a": [0.0, 1.0, 2.0, 2.0], "b": []}, x_name="score", bins=2)
    spec = spec_of(html)
    assert spec["edges"] == [0, 1, 2]
    assert [series["y"] for series in spec["series"]] == [[0.25, 0.75], [0, 0]]
    assert spec_of(charts.histogram("One", {"a": [3.0]}, x_name="score"))["series"][0]["y"][0] == 1


def spec_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])


# --- colors ------------------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    def light(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_have_contrast(scheme):
    colors = {name: pair[scheme] for name, pair in COLORS.items()}
    for ground in (colors["ground"], colors["raised"]):
        for name in ("text", "quiet", "accent", "good", "bad", "warn"):
            assert contrast(colors[name], ground) >= 4.5, name
        assert contrast(colors["edge"], ground) >= 3
    assert all(contrast(pair[scheme], colors["ground"]) >= 3 for pair in palette.SERIES)


def test_no_two_of_sixteen_series_look_the_same():
    assert len({palette.color_and_dash(place) for place in range(16)}) == 16
    assert (
        palette.color_and_dash(0) == (0, 0)
        and palette.color_and_dash(4) == (4, 1)
        and palette.color_and_dash(16) == (0, 0)
    )


# --- the page and the vendored library ---------------------------------------------------------------------------------------


def test_the_vendored_library_matches_its_readme():
    folder = CHARTS / "vendor" / "uplot"
    digests = dict(re.findall(r"\| `(.*?)` \| `([0-9a-f]{64})` \|", (folder / "README.md").read_text(encoding="utf-8")))
    assert set(digests) == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in digests.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert "Permission is hereby granted" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_no_text_ends_the_data():
    block = embedded("x", {"text": HOSTILE, "more": [math.inf, math.nan, 1.5]})
    assert block.count("<") == 2 and "&" not in block and "\u2028" not in block
    inner = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert json.loads(inner) == {"text": HOSTILE, "more": [None, None, 1.5]}


def page(*scripts: str) -> str:
    return render("base.html", title="t", scripts=scripts, body=Markup("<p>b</p>"))


def test_a_page_allows_its_own_scripts_only():
    import base64

    bare = page()
    assert "<script" not in bare and "script-src 'none'" in bare
    text = page("let a = 1;")
    for source in re.findall(r"<script>(.*?)</script>", text, re.DOTALL):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in text
    assert text.count("<script>") == 2 == text.count("sha256-")
    assert "default-src 'none'" in text and "unsafe-eval" not in text
    with pytest.raises(AssertionError):
        page("'</script>'")


# --- in a browser ---------------------------------------------------------------------------------------------------------


def test_values_are_escaped_and_control_characters_replaced():
    shown = render("base.html", title="\x1b<b>", body="<i>\u202e")
    assert "<title>\ufffd&lt;b&gt;</title>" in shown and "&lt;i&gt;\ufffd" in shown


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)
    assert correlation([1, 1], [1, 2]) is None and correlation([1], [1]) is None


def gallery() -> str:
    """One chart of each kind and several awkward ones."""
    draw = random.Random(1)
    steps = list(range(1, 121))
    wave: list[float | None] = [math.sin(x / 9) + draw.gauss(0, 0.4) for x in steps]
    wave[50] = None
    band = [[v if v is None else v + by for v in wave] for by in (-0.5, 0.5)]
    runs = [
        charts.Line(f"run {i}", steps[: 120 - 30 * i], [x * i / 40 for x in steps[: 120 - 30 * i]]) for i in range(3)
    ]
    cloud = [
        charts.Points(n, [draw.gauss(30, 5) for _ in range(99)], [draw.gauss(k, 1) for _ in range(99)])
        for k, n in enumerate("ab")
    ]
    figures = [
        charts.line_chart("Wave", [charts.Line("wave", steps, wave, *band)], note="unit"),
        charts.line_chart("Runs", [*runs, charts.Line(HOSTILE, steps, wave)], limits={"limit": 2.0}),
        charts.line_chart("Log", [charts.Line("decay", steps, [0.9**x for x in steps])], log="offered"),
        charts.line_chart("One point", [charts.Line("one", [1], [3.0])]),
        charts.line_chart("Nothing", [charts.Line("none", [], [])]),
        charts.scatter_chart(HOSTILE, cloud, x_name="length", y_name="reward"),
        charts.bar_chart("Bars", ["rollout", HOSTILE], [charts.Bars("a", [1.0, 2.0]), charts.Bars("b", [None, 3.0])]),
        charts.histogram("Scores", {"a": cloud[0].x, "b": cloud[1].x}, x_name="score"),
        charts.calibration_chart("Calibration", {"m": [charts.Bin(0.1, 0.2, 5), charts.Bin(0.9, 0.8, 9)]}),
    ]
    body = f"<main><h1>Charts</h1>{charts.controls()}<div class='charts'>{''.join(figures)}</div></main>"
    return render("base.html", title="Charts", style=charts.STYLE, scripts=charts.SCRIPTS, body=Markup(body))


@pytest.fixture(scope="module")
def gallery_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("charts") / "gallery.html"
    path.write_text(gallery(), encoding="utf-8")
    return path


# Painted pixels of each canvas; the ground is transparent.
PAINTED = """() => [...document.querySelectorAll("figure.chart canvas")].map((canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted;
})"""
# The image of a canvas.
PRINT = """(place) => document.querySelectorAll("figure.chart canvas")[place].toDataURL()"""


def test_every_chart_is_drawn_without_complaints(window, gallery_file):
    opened = window()
    shown = opened.open(gallery_file)
    painted = shown.evaluate(PAINTED)
    assert len(painted) == 9 and min(painted) > 500
    assert opened.complaints == []
    assert shown.title() == "Charts"
    names = shown.locator(".entry-name").all_text_contents()
    assert HOSTILE in names and HOSTILE in shown.locator(".chart-title").all_text_contents()
    assert shown.locator("figure.chart img").count() == 0


def test_without_the_hash_a_script_would_not_run(window, tmp_path, gallery_file):
    text = gallery_file.read_text(encoding="utf-8")
    path = tmp_path / "injected.html"
    path.write_text(text.replace("<h1>", "<script>document.title='owned'</script><h1>"), encoding="utf-8")
    opened = window()
    assert opened.open(path).title() == "Charts"
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(window, gallery_file, scheme):
    opened = window(scheme=scheme)
    shown = opened.open(gallery_file)
    assert opened.low_contrasts() == []
    other = "dark" if scheme == "light" else "light"
    before = [shown.evaluate(PRINT, place) for place in range(9)]
    shown.get_by_role("button", name=f"{other} theme", exact=False).click()
    shown.wait_for_timeout(100)
    assert opened.low_contrasts() == []
    after = [shown.evaluate(PRINT, place) for place in range(9)]
    assert all(a != b for a, b in zip(before, after, strict=True)), "a chart kept its colors"
    assert opened.complaints == []


def test_smoothing_changes_the_curve(window, gallery_file):
    shown = window().open(gallery_file)
    slider = shown.get_by_label("Smoothing")
    seen = []
    for value in ("0", "30", "80"):
        slider.fill(value)
        shown.wait_for_timeout(50)
        seen.append((shown.evaluate(PRINT, 0), shown.locator("figure.chart").first.locator(".value").text_content()))
    assert len({picture for picture, _ in seen}) == 3
    assert len({value for _, value in seen}) == 3
    assert shown.locator("output").text_content().endswith(" steps")
    slider.fill("0")
    assert shown.locator("output").text_content() == "off"


def test_the_average_is_the_naive_one(window, gallery_file):
    """Against a loop in Python: at the beginning, right after the gap at step 51, and at the end."""
    shown = window().open(gallery_file)
    shown.get_by_label("Smoothing").fill("30")
    chart = shown.locator("figure.chart").first
    (line,) = json.loads(chart.locator("script").text_content())["series"]
    weight = 1 - 1 / 500**0.3
    total = norm = last = 0.0
    expected = {}
    for x, y in zip(line["x"], line["y"], strict=True):
        if y is not None:
            keep, last = weight ** (x - last), x
            total, norm = keep * total + (1 - keep) * y, keep * norm + (1 - keep)
            expected[x] = total / norm
    chart.locator(".plot").focus()
    for keys, step in ((["Home", "ArrowRight"], 2), (["Home", *["PageDown"] * 5, "ArrowRight"], 52), (["End"], 120)):
        for key in keys:
            shown.keyboard.press(key)
        assert chart.locator(".at").text_content() == f"step {step}"
        assert float(chart.locator(".value").text_content().split()[0]) == pytest.approx(expected[step], rel=1e-3)


def test_a_legend_switches_a_curve_off_and_on(window, gallery_file):
    shown = window().open(gallery_file)
    chart = shown.locator("figure.chart").nth(1)
    button = chart.get_by_role("button", name="run 2")
    before = shown.evaluate(PRINT, 1)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    shown.wait_for_timeout(50)
    without = shown.evaluate(PRINT, 1)
    button.press("Enter")
    shown.wait_for_timeout(50)
    assert button.get_attribute("aria-pressed") == "true"
    assert without != before == shown.evaluate(PRINT, 1)


def test_the_cursor_follows_the_arrow_keys_in_all_charts_over_steps(window, gallery_file):
    opened = window()
    shown = opened.open(gallery_file)
    shown.get_by_label("Smoothing").fill("0")
    first, second = shown.locator("figure.chart").nth(0), shown.locator("figure.chart").nth(1)
    first.locator(".plot").focus()
    shown.keyboard.press("ArrowRight")
    assert first.locator(".at").text_content() == "step 1"
    for _ in range(3):
        shown.keyboard.press("ArrowRight")
    assert first.locator(".at").text_content() == "step 4" == second.locator(".at").text_content()
    assert second.locator(".value").nth(2).text_content() == "0.2"  # 4 * 2 / 40
    shown.keyboard.press("ArrowLeft")
    assert "step 3: wave" in shown.locator("[aria-live]").text_content()
    shown.keyboard.press("End")
    assert first.locator(".at").text_content() == "step 120"
    assert second.locator(".value").nth(2).text_content() == "-"  # that run has ended
    shown.keyboard.press("Escape")
    assert first.locator(".at").text_content() == "last step"
    assert opened.complaints == []


@pytest.mark.parametrize(("place", "at"), [(5, "length"), (6, "rollout"), (7, "score"), (8, "predicted")])
def test_the_arrow_keys_move_in_every_kind_of_chart(window, gallery_file, place, at):
    shown = window().open(gallery_file)
    chart = shown.locator("figure.chart").nth(place)
    chart.locator(".plot").focus()
    shown.keyboard.press("Home")
    first = chart.locator(".at").text_content()
    shown.keyboard.press("ArrowRight")
    assert at in first and first != chart.locator(".at").text_content()
    assert any(chart.locator(".value").all_text_contents())


def test_zoom_by_drag_by_key_and_back(window, gallery_file):
    shown = window(width=700).open(gallery_file)
    whole = [shown.evaluate(PRINT, place) for place in (0, 1)]
    box = shown.locator("figure.chart").first.locator(".u-over").bounding_box()
    shown.mouse.move(box["x"] + 50, box["y"] + 50)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 150, box["y"] + 60, steps=5)
    shown.mouse.up()
    shown.mouse.move(1, 1)
    shown.wait_for_timeout(100)
    zoomed = [shown.evaluate(PRINT, place) for place in (0, 1)]
    assert all(a != b for a, b in zip(whole, zoomed, strict=True))
    shown.get_by_role("button", name="Reset zoom").click()
    shown.wait_for_timeout(100)
    assert [shown.evaluate(PRINT, place) for place in (0, 1)] == whole
    shown.locator("figure.chart").first.locator(".plot").focus()
    shown.keyboard.press("+")
    shown.wait_for_timeout(100)
    assert shown.evaluate(PRINT, 1) != whole[1]
    shown.keyboard.press("0")
    shown.wait_for_timeout(100)
    assert [shown.evaluate(PRINT, place) for place in (0, 1)] == whole


def test_the_log_scale_is_a_button_where_all_values_are_positive(window, gallery_file):
    shown = window().open(gallery_file)
    buttons = shown.get_by_role("button", name="log scale")
    assert buttons.count() == 1
    before = shown.evaluate(PRINT, 2)
    buttons.click()
    assert buttons.get_attribute("aria-pressed") == "true" and shown.evaluate(PRINT, 2) != before


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_charts_fit_the_window(window, gallery_file, width):
    opened = window(width=width)
    shown = opened.open(gallery_file)
    assert opened.overflow() <= 0
    shown.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert opened.overflow() <= 0
    shown.set_viewport_size({"width": 330, "height": 700})
    shown.wait_for_timeout(200)
    widths = shown.evaluate(
        "[...document.querySelectorAll('figure canvas')].map((c) => c.getBoundingClientRect().width)"
    )
    assert max(widths) <= 330 and opened.overflow() <= 0


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(window, gallery_file):
    shown = window().open(gallery_file)
    reached = []
    for _ in range(9):
        shown.keyboard.press("Tab")
        reached.append(shown.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert reached == ["theme", "INPUT", "BUTTON", "entry", "plot", "SUMMARY", "entry", "entry", "entry"]
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_pairs_of_colors_do_not_repeat():
    assert all(a != b for a, b in itertools.combinations(palette.SERIES, 2))
