"""Make the screenshots of the labeler's pages in docs/images: wide, on a phone, dark, and the page for administrators.

Run it with ``.venv/bin/python scripts/make_label_screenshots.py``. It needs Chromium, and Playwright from
requirements-dev.txt. It labels pairs of the built-in data with simulated people, in a temporary database.
"""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from make_screenshots import BROWSERS, IMAGES, opened, save
from playwright.sync_api import Browser, Page, sync_playwright

from reinforcepp.commands.http_server import Server
from reinforcepp.data.builtin import data_paths
from reinforcepp.data.feedback import Answer, Choice, NewUnit, Store
from reinforcepp.data.feedback.answer_files import read_answers
from reinforcepp.labeling.access import Access
from reinforcepp.labeling.app import LabelApp, Options
from reinforcepp.labeling.queue import Queue
from reinforcepp.labeling.units import gold_units, make_units

TOPICS = ("routing", "DNS", "Wi-Fi", "cables")
PEOPLE = {"Ada": 0.95, "Grace": 0.9, "Linus": 0.75}
"""How often each person prefers the better response."""
VOTES, SECONDS_PER_CALL = 70, 4.0
"""Votes of each person, and the seconds between two of their requests."""
SHOWN = NewUnit(
    "pair",
    [
        {"role": "system", "content": "You help with Linux networks. Be brief."},
        {"role": "user", "content": "My laptop reaches the router, but no website. What now?"},
        {"role": "assistant", "content": "Check whether names resolve: `dig example.com`."},
        {"role": "user", "content": "That times out."},
    ],
    [
        Answer(
            "Then ask another server directly:\n\n```bash\ndig @9.9.9.9 example.com\nresolvectl status\n```\n\n"
            "- If that **answers**, the configured server is down. Set another one for the link.\n"
            "- If it also times out, port 53 is blocked. Try `dig +tcp`."
        ),
        Answer(
            "DNS is the phone book of the internet. It translates names into addresses, and many things can go wrong "
            "with it. You could restart the laptop or the router, or wait a while, since such problems often vanish."
        ),
    ],
    priority=-1.0,
)
# Name -> width and height of the window, device pixels per page pixel, color scheme.
WINDOWS = {
    "label-wide": (1280, 800, 1, "light"),
    "label-dark": (1280, 800, 1, "dark"),
    "label-phone": (390, 844, 2, "light"),
    "label-admin": (1280, 1330, 1, "light"),
}


def main() -> None:
    """Serve a database and take the screenshots."""
    path = next((found for browser in BROWSERS if (found := shutil.which(browser))), None)
    if path is None:
        raise SystemExit(f"No browser found. Install one of {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        store = Store(Path(folder) / "feedback.db")
        fill(store)
        access = Access(store, open_to_all=True)
        app = LabelApp(Queue(store), access, Options(guidelines="Prefer responses that are **correct** and complete."))
        server = Server(app.starlette(), listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            for picture in WINDOWS:
                page = page_of(browser, picture)
                if picture == "label-admin":
                    page.goto(f"{url}/admin?token={access.admin_token}")
                else:
                    log_in(page, url)
                page.wait_for_timeout(500)
                save([opened(page.screenshot())], IMAGES / f"{picture}.png")
            browser.close()
        server.stop()
        thread.join()
        store.close()


def fill(store: Store) -> None:
    """Add units and let people vote on most of them."""
    answered = read_answers(data_paths()[0])[:150]
    topics = [replace(each, topic=TOPICS[i % len(TOPICS)]) for i, each in enumerate(answered[:120])]
    store.add_units(make_units(topics, "pair", num_answers=2, overlap=2))
    store.add_units(gold_units(answered[120:]))
    better = {str(each.prompt): each.answers[0].text for each in answered}
    calls = 2 * VOTES * len(PEOPLE)  # one for the unit, one for the vote
    clock = iter(time.time() + SECONDS_PER_CALL * (i - calls) for i in range(calls + 10))
    queue, draw = Queue(store, clock=lambda: next(clock)), random.Random(0)
    people = {store.labeler(name): skill for name, skill in PEOPLE.items()}
    for _ in range(VOTES):
        for labeler, skill in people.items():
            if (unit := queue.next(labeler)) is not None:
                texts = [each.text for each in unit.unit.answers]
                right = texts.index(better[str(unit.unit.prompt)])
                choice = right if draw.random() < skill else 1 - right
                queue.vote(labeler, unit.token, Choice(choice, draw.choice([1, 1, 2])), draw.uniform(5, 30))
    store.add_units([replace(SHOWN, overlap=len(WINDOWS))])


def page_of(browser: Browser, picture: str) -> Page:
    """Return an empty page in the window of a screenshot."""
    width, height, scale, scheme = WINDOWS[picture]
    return browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme=scheme)


def log_in(page: Page, url: str) -> None:
    """Show the first unit to Grace, who has voted before."""
    page.goto(url)
    page.fill("input[name=name]", "Grace")
    page.click("button.main-choice")
    page.wait_for_selector("#vote")


if __name__ == "__main__":
    main()
