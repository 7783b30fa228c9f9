"""Pages in the system's Chromium, headless: visible text, scripts, and console errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

# For each element with text: the text and its contrast with the background (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const channels = (color) => {
    const numbers = color.match(/[\\d.]+/g).map(Number);
    return numbers.length === 3 ? [...numbers, 1] : numbers;
  };
  const over = (top, under) => top.slice(0, 3).map((value, i) => value * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.background = "Canvas";
  const canvas = channels(getComputedStyle(probe).backgroundColor);
  probe.remove();
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(channels(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), canvas);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own.length || !element.checkVisibility() || element.matches("script, style, noscript")) continue;
    const back = behind(element);
    const text = over(channels(getComputedStyle(element).color), back);
    const [low, high] = [light(text), light(back)].sort((a, b) => a - b);
    found.push([own[0].textContent.trim().slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""


class Window:
    """An open page, and the errors that the browser reported since it was opened."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda told: self.complaints.append(f"{told.type}: {told.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"request: {request.url}")

    def open(self, path: Path) -> Any:
        """Load a file and return Playwright's page."""
        self.page.goto(path.resolve().as_uri())
        return self.page

    def low_contrasts(self, least: float = 4.5) -> list[tuple[str, float]]:
        """Return the beginnings of visible texts whose contrast with the background is below ``least``."""
        seen = self.page.evaluate(CONTRASTS)
        assert seen, "no text was seen"
        return [(text, round(contrast, 2)) for text, contrast in seen if contrast < least]

    def overflow(self) -> int:
        """Return the pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. Without Chromium or Playwright, tests that need it are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: Any) -> Iterator[Any]:
    """Return a function: ``window(width=..., scheme=...)`` opens an empty :class:`Window`, closed after the test."""
    contexts = []

    def make(width: int = 1100, height: int = 800, scheme: str = "light") -> Window:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        return Window(contexts[-1])

    yield make
    for context in contexts:
        context.close()
