"""The labeler's pages in Chromium: every task by keyboard, a server that fails, light and dark, wide and on a phone."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import pytest

pytest.importorskip("sqlalchemy")

from reinforcepp.commands.http_server import Server
from reinforcepp.data.feedback import Answer, Choice, Edit, NewUnit, Ranking, Ratings, Skip, Store
from reinforcepp.data.feedback.preferences import all_votes
from reinforcepp.labeling.access import Access
from reinforcepp.labeling.app import LabelApp, Options
from reinforcepp.labeling.queue import Queue

MARKDOWN = (
    f"Use `ip route`:\n\n```bash\nip route show default with a very long line {'x' * 200}\n```\n\n"
    "| a | b |\n|-|-|\n| 1 | 2 |"
)
BAD = "<script>document.title = 'run'</script> <img src=x onerror=\"document.title='run'\"> [l](javascript:alert(1))"
TALK = [{"role": role, "content": f"Turn {i}"} for i, role in enumerate(["system", *["user", "assistant"] * 4, "user"])]
UNITS = [
    NewUnit("pair", TALK, [Answer(MARKDOWN), Answer(BAD, truncated=True)]),
    NewUnit("pair", "second", [Answer("x"), Answer("y")]),
    NewUnit("rank", "third", [Answer(text) for text in ("x", "y", "z")]),
    NewUnit("rate", "fourth", [Answer("x"), Answer("y")]),
    NewUnit("edit", "fifth", [Answer("teh x"), Answer("y")]),
    NewUnit("pair", "sixth", [Answer("x"), Answer("y")]),
]


@pytest.fixture
def served(tmp_path):
    """A running server: its URL, its store, and its queue."""
    store = Store(tmp_path / "f.db")
    store.add_units([replace(unit, priority=float(i)) for i, unit in enumerate(UNITS)])
    queue = Queue(store, gold_every=0, repeat_every=0)
    access = Access(store, open_to_all=True)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(LabelApp(queue, access, Options(guidelines="Be **fair**.")).starlette(), listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", queue, access
    server.stop()
    thread.join()
    listener.close()
    store.close()


def log_in(window, url, **settings):
    opened = window(**settings)
    page = opened.page
    page.set_default_timeout(10_000)
    page.goto(url)
    page.keyboard.type("ann")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote")
    return opened, page


def problems(opened, url):
    return [
        each for each in opened.complaints if not each.startswith(f"request: {url}") and "Failed to load" not in each
    ]


def votes(queue):
    return [casts[0] for _, casts in all_votes(queue.store)]


@pytest.mark.full
def test_every_task_by_keyboard(served, window):
    url, queue, _ = served
    opened, page = log_in(window, url)
    seen = []

    def press(*keys, left):
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_function(f"() => document.querySelector('.progress').textContent.includes('{left} left')")
        seen.append(page.locator("#prompt").inner_text() if left else "")

    assert "7 earlier messages" in page.locator("#prompt").inner_text()
    press("Shift+Digit1", left=5)
    press("s", left=4)
    press("u", left=5)
    assert page.locator("button.previous").get_attribute("value") == "skip"
    press("4", left=4)
    press("2", "3", "Backspace", "1", "3", "Enter", left=3)
    press("5", "4", "3", "3", "Backspace", "1", "2", "2", "Enter", left=2)
    page.keyboard.press("1")
    page.wait_for_function("() => document.activeElement.tagName === 'TEXTAREA'")
    page.keyboard.press("Control+End")
    press(*" 1u", "Control+Enter", left=1)
    press("s", left=0)
    page.wait_for_selector(".empty-queue")
    assert seen[0] == "second"
    cast = votes(queue)
    shown = [each.order for each in cast]
    assert cast[0].vote == Choice(shown[0][0], strength=2)
    assert cast[1].vote == Choice(None, tie="bad")
    ranks = {shown[2][0]: 2, shown[2][1]: 1, shown[2][2]: 3}
    assert cast[2].vote == Ranking(tuple(ranks[i] for i in range(3)))
    ratings = [{"helpful": 5, "correct": 4, "safe": 3}, {"helpful": 1, "correct": 2, "safe": 2}]
    assert cast[3].vote == Ratings(tuple(ratings[shown[3].index(i)] for i in range(2)))
    first = cast[4].order[0]
    assert cast[4].vote == Edit(first, f"{('teh x', 'y')[first]} 1u", 2)
    assert cast[5].vote == Skip()
    assert all(0 < each.seconds < 60 for each in cast)
    assert page.title() == "Label responses"
    assert problems(opened, url) == []


@pytest.mark.full
def test_a_vote_is_sent_until_the_server_has_it(served, window):
    url, queue, _ = served
    _, page = log_in(window, url)
    page.route("**/vote", lambda route: route.abort())
    page.keyboard.press("1")
    page.wait_for_selector("#problem:not([hidden])")
    assert "Not saved yet" in page.locator("#problem").inner_text()
    page.keyboard.press("2")  # is ignored while the first vote is being sent
    page.unroute("**/vote")
    page.wait_for_function("() => document.querySelector('.progress').textContent.includes('1 done')")
    assert not page.locator("#problem").is_visible()
    (cast,) = votes(queue)
    assert cast.vote == Choice(cast.order[0])


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_pages_fit_and_are_readable(served, window, width, scheme):
    url, _, access = served
    opened, page = log_in(window, url, width=width, scheme=scheme)
    for key in ("1", "s", "s", "s", "s", "s"):
        assert opened.overflow() <= 0
        assert opened.low_contrasts() == []
        assert page.locator("button[value=skip]").is_visible()
        text = page.locator("#prompt").inner_text()
        page.keyboard.press(key)
        page.wait_for_function("text => document.querySelector('#prompt')?.innerText !== text", arg=text)
    page.goto(f"{url}/admin?token={access.admin_token}")
    page.wait_for_selector("canvas, .missing, table")
    assert "token" not in page.url
    assert opened.overflow() <= 0
    assert opened.low_contrasts() == []
    assert problems(opened, url) == []


@pytest.mark.full
def test_the_key_m_shows_texts_as_they_are(served, window):
    url, _, _ = served
    opened, page = log_in(window, url)
    assert page.locator(".response pre code").is_visible()
    page.keyboard.press("m")
    assert MARKDOWN in page.locator(".response > .raw").all_inner_texts()
    assert not page.locator(".response .prose").first.is_visible()
    assert opened.overflow() <= 0
    page.locator("#raw").focus()
    page.keyboard.press("1")  # The switch takes no key but the space bar.
    page.wait_for_function("() => document.querySelector('.progress').textContent.includes('1 done')")
    assert page.locator(".response > .raw").first.is_visible(), "also on the next unit"
    page.keyboard.press("m")
    assert page.locator(".response .prose").first.is_visible()


@pytest.mark.full
def test_what_the_labeler_filled_in_survives_the_browser(served, window):
    url, queue, _ = served
    _, page = log_in(window, url)
    for left, key in ((5, "1"), (4, "1"), (3, "s")):
        page.keyboard.press(key)
        page.wait_for_function(f"() => document.querySelector('.progress').textContent.includes('{left} left')")
    page.keyboard.press("5")
    page.keyboard.press("4")
    page.reload()
    assert page.locator("input:checked[type=radio]").evaluate_all("all => all.map((each) => each.value)") == ["5", "4"]
    page.keyboard.press("s")
    page.wait_for_function("() => document.querySelector('.progress').textContent.includes('2 left')")
    for number in (1, 2):  # Both texts can be open. The focused one is saved.
        page.locator("details.edit > summary").nth(number - 1).click()
    page.locator("textarea").nth(1).fill("mine")
    page.reload()
    assert page.locator("textarea").nth(1).is_visible()
    assert page.locator("textarea").nth(1).input_value() == "mine"
    page.locator("details.edit > summary").nth(0).click()
    page.locator("textarea").nth(1).focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelector('.progress').textContent.includes('1 left')")
    (edited,) = [cast for cast in votes(queue) if isinstance(cast.vote, Edit)]
    assert edited.vote == Edit(edited.order[1], "mine", 2)
    assert page.evaluate("localStorage.length") == 0


@pytest.mark.full
def test_only_the_time_during_which_the_page_is_visible_counts(served, window):
    url, queue, _ = served
    _, page = log_in(window, url)
    turn = """(state) => {
      Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.wait_for_timeout(400)
    page.evaluate(turn, "hidden")
    page.wait_for_timeout(1500)
    page.evaluate(turn, "visible")
    page.keyboard.press("1")
    page.wait_for_function("() => document.querySelector('.progress').textContent.includes('1 done')")
    (cast,) = votes(queue)
    assert 0.4 <= cast.seconds < 1.5
