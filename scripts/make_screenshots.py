"""Make the screenshots in docs/images: the report of a run wide, on a phone, and dark, and the live view on the terminal.

Run it with ``.venv/bin/python scripts/make_screenshots.py runs/demo`` (the folder of a training or a demo). It needs
Chromium, and Playwright from requirements-dev.txt. The page is written to a temporary folder.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from reinforcepp.commands.report import read_report
from reinforcepp.monitoring.completion_log import COMPLETIONS, conversation_of, read_completions, step_file
from reinforcepp.monitoring.doctor import diagnose
from reinforcepp.monitoring.live_view import Sample, Snapshot, duration, view
from reinforcepp.monitoring.run_record import RunRecord, find_run, read_run

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MAX_BYTES = 400_000
PALETTE_COLORS = 128  # keeps text and curves readable at a third of the size

TERMINAL_COLUMNS = 104
GAP = 24  # pixels between windows side by side

# Name -> width and height of the window, device pixels per page pixel, color scheme, and the element at the top of the window;
# several elements give several windows side by side.
SCREENSHOTS = {
    "report-wide": (1280, 1440, 1, "light", ["header"]),
    "report-narrow": (390, 1000, 2, "light", ["header", "#curves", "#samples"]),
    "report-dark": (1280, 1240, 1, "dark", ["#responses"]),
}


def main(name: str) -> None:
    """Write the report of the run ``name`` and take its screenshots."""
    browser_path = next((path for browser in BROWSERS if (path := shutil.which(browser))), None)
    if browser_path is None:
        raise SystemExit(f"No browser found. Install one of {', '.join(BROWSERS)}.")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_path = Path(folder) / "report.html"
        read_report([find_run(name)]).save(page_path)
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        for picture, (width, height, scale, scheme, elements) in SCREENSHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme=scheme
            )
            page.goto(page_path.as_uri())
            save([screenshot(page, element) for element in elements], IMAGES / f"{picture}.png")
        page = browser.new_page(device_scale_factor=2)
        page.set_content(terminal(read_run(find_run(name))))
        save([opened(page.locator("pre").screenshot())], IMAGES / "live.png")
        browser.close()


def terminal(record: RunRecord) -> str:
    """Return the live view at two thirds of the run as a page."""
    history = [dict(metrics) for metrics in record.metrics[: len(record.metrics) * 2 // 3]]
    for before, now in pairwise([{"num_tokens": 0.0}, *history]):
        now["step_tokens"] = now["num_tokens"] - before["num_tokens"]
    step = int(history[-1]["step"])
    completions = read_completions(record.folder / COMPLETIONS / step_file(step))
    shown = replace(record, metrics=history, evaluations={"before": record.evaluations["before"]})
    diagnosis = diagnose(shown)
    snapshot = Snapshot(
        title=f"{record.settings['model']}  ·  {record.settings['estimator']}",
        step=step,
        num_steps=record.facts["num_steps"],
        left=duration(fmean(m["step_time"] for m in history) * (record.facts["num_steps"] - step)),
        history=history,
        kl_limit=record.settings["kl_limit"],
        health=(diagnosis.sentence, diagnosis.worst),
        sample=Sample(conversation_of(completions[0]), completions[0]["completion"], completions[0]["reward"]),
    )
    console = Console(record=True, width=TERMINAL_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(view(snapshot, TERMINAL_COLUMNS))
    return console.export_html(theme=MONOKAI)


def screenshot(page: Page, element: str) -> Image.Image:
    """Return the window with ``element`` at its top; for the header, the top of the page."""
    top = (
        0
        if element == "header"
        else page.locator(element).evaluate("(part) => part.getBoundingClientRect().y + scrollY")
    )
    page.evaluate("(top) => scrollTo(0, top)", top)
    page.wait_for_timeout(300)
    return opened(page.screenshot())


def opened(picture: bytes) -> Image.Image:
    """Return a screenshot as an image."""
    return Image.open(io.BytesIO(picture)).convert("RGB")


def save(shots: list[Image.Image], path: Path) -> None:
    """Save images side by side, with a reduced palette."""
    width = sum(shot.width for shot in shots) + GAP * (len(shots) - 1)
    picture = Image.new("RGB", (width, shots[0].height), "#c8ced6")
    for index, shot in enumerate(shots):
        picture.paste(shot, (index * (shot.width + GAP), 0))
    picture.quantize(PALETTE_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{path}: the image has {size:,} bytes, more than {MAX_BYTES:,}. Make its window smaller.")
    print(f"{path.name}: {picture.width} x {picture.height}, {size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: scripts/make_screenshots.py runs/demo")
    main(sys.argv[1])
