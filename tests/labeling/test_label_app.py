"""The labeler's pages over HTTP: sessions, votes, what they reveal, and what is refused."""

from __future__ import annotations

import re
from html import unescape

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa
from starlette.testclient import TestClient

from reinforcepp.data.feedback import Answer, NewUnit, Store, schema
from reinforcepp.data.feedback.votes import MAX_EDITED_CHARACTERS
from reinforcepp.errors import ConfigError
from reinforcepp.labeling import app as app_module
from reinforcepp.labeling.access import LOGINS_PER_MINUTE, Access
from reinforcepp.labeling.app import LabelApp, Options
from reinforcepp.labeling.markdown import to_html
from reinforcepp.labeling.queue import Queue

HOST = "http://127.0.0.1:8400"
GOOD, BAD = "Run **ip route**.", "Reboot it."


def units(count=3, task="pair"):
    answers = [Answer(GOOD, "secret-model-1", {"temperature": 0.123}), Answer(BAD, "secret-model-2")]
    return [NewUnit(task, f"question {i}", answers, topic="secret-topic", priority=i) for i in range(count)]


@pytest.fixture
def serve(tmp_path):
    stores = []

    def start(added=None, *, open_to_all=True, **options):
        store = Store(tmp_path / "feedback.db")
        stores.append(store)
        store.add_units(units() if added is None else added)
        queue = Queue(store, gold_every=0, repeat_every=0)
        return LabelApp(queue, Access(store, open_to_all=open_to_all), Options(**options))

    yield start
    for store in stores:
        store.close()


class Browser:
    """A client that fills in forms as the page has them."""

    def __init__(self, app, name=None):
        self.client = TestClient(app.starlette(), base_url=HOST, raise_server_exceptions=False)
        self.page = self.client.get("/")
        if name is not None:
            self.submit("/login", name=name)

    def hidden(self):
        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="(\w*)">', self.page.text))

    def submit(self, path, headers=None, **fields):
        self.page = self.client.post(path, data=self.hidden() | fields, headers={"origin": HOST} | (headers or {}))
        return self.page

    def shown(self):
        """Return the first words of the responses in the order of the page."""
        return re.findall(r'<div class="prose" dir="auto"><p>(?:Run|Reboot).*?</div>', self.page.text, re.DOTALL)


def stored(app):
    a, v = schema.assignments, schema.votes
    with app.queue.store.read() as db:
        rows = db.execute(sa.select(v.c.value, v.c.undone, a.c.order).join(a, a.c.id == v.c.assignment_id)).all()
    return [(row.value, row.order) for row in rows if row.undone is None]


def test_a_labeler_logs_in_votes_and_sees_the_next_unit(serve):
    app = serve()
    ann = Browser(app)
    assert ann.page.url == f"{HOST}/login"
    ann.submit("/login", name="  Ann  B ")
    assert "question 0" in ann.page.text
    assert "Ann B" in ann.page.text
    first = ann.shown()[0]
    ann.submit("/vote", choice="1+", seconds="0.01")
    assert "question 1" in ann.page.text
    ((value, order),) = stored(app)
    better = GOOD if "Run" in first else BAD
    assert value == {"better": [GOOD, BAD].index(better), "strength": 2}
    assert order[0] == value["better"]


def test_votes_are_stored_before_the_page_confirms_them(serve, monkeypatch):
    """A database that fails must not look like a stored vote."""
    app = serve()
    ann = Browser(app, "ann")
    monkeypatch.setattr(app.queue, "vote", lambda *given: 1 / 0)
    page = ann.submit("/vote", choice="1")
    assert page.status_code == 500
    assert "Traceback" not in page.text
    assert "ZeroDivisionError" not in page.text
    assert page.headers["content-security-policy"]
    assert stored(app) == []


def test_a_failing_database_is_no_fault_of_the_form(serve, monkeypatch):
    """The page sends the vote again after a 5xx, and the message has no detail of the database."""
    app = serve()
    ann = Browser(app, "ann")
    monkeypatch.setattr(app.queue.store, "write", lambda: (_ for _ in ()).throw(ConfigError("database: secret.db")))
    page = ann.submit("/vote", choice="1")
    assert page.status_code == 500
    assert "secret.db" not in page.text


def test_two_labelers_have_their_own_queues_and_sessions(serve):
    app = serve(units(4))
    ann, ben = Browser(app, "ann"), Browser(app, "ben")
    assert "question 0" in ann.page.text
    assert "question 1" in ben.page.text
    foreign = ben.hidden()["unit"]
    page = ann.submit("/vote", choice="1", unit=foreign)
    assert page.status_code == 409
    assert stored(app) == []
    for browser in (ann, ben, ann, ben):
        browser.submit("/vote", choice="good")
    assert "All done" in ann.page.text
    assert len(stored(app)) == 4


def test_undo_shows_the_last_choice(serve):
    app = serve()
    ann = Browser(app, "ann")
    assert "Undo" not in ann.page.text
    ann.submit("/vote", choice="2")
    ann.submit("/undo")
    assert "question 0" in ann.page.text
    assert re.search(r'value="2" data-key="2" class="previous"', ann.page.text)
    assert stored(app) == []


def test_a_restarted_server_continues_the_session(serve):
    app = serve()
    ann = Browser(app, "ann")
    token = ann.hidden()["unit"]
    again = LabelApp(Queue(app.queue.store), Access(app.queue.store, open_to_all=True))
    ann.client.app = again.starlette()
    restarted = TestClient(again.starlette(), base_url=HOST, cookies=ann.client.cookies)
    assert f'value="{token}"' in restarted.get("/").text


def test_the_page_reveals_neither_models_nor_identities_of_answers(serve):
    """Neither ids of the database, nor models, sampling parameters or topics are in the page or its headers."""
    page = Browser(serve(), "ann").page
    everything = page.text + str(page.headers)
    for secret in ("secret-model", "0.123", "secret-topic", "temperature", "answer_id"):
        assert secret not in everything
    assert len(set(re.findall(r"[0-9a-f]{32}", page.text))) == 2, "the form's token and the assignment's"


@pytest.mark.parametrize("choice", ["", "3", "1++", "good+"])
def test_a_form_without_a_valid_choice_shows_the_unit_again(serve, choice):
    app = serve()
    page = Browser(app, "ann").submit("/vote", choice=choice)
    assert page.status_code == 422
    assert "question 0" in page.text
    assert stored(app) == []


# --- security ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({}, {"form_token": "0" * 32}),
        ({}, {"form_token": ""}),
        ({"origin": "http://evil.example"}, {}),
        ({"origin": "null"}, {}),
        ({"origin": "http://["}, {}),
        ({"origin": "http://127.0.0.1:9999"}, {}),
        ({"sec-fetch-site": "cross-site"}, {}),
    ],
)
@pytest.mark.parametrize("path", ["/vote", "/undo", "/logout", "/login"])
def test_forms_of_other_pages_are_refused(serve, path, headers, fields):
    app = serve()
    ann = Browser(app, "ann")
    page = ann.submit(path, headers, choice="1", name="eve", **fields)
    assert page.status_code == 403
    assert stored(app) == []
    assert app.queue.store.find_labeler("eve") is None


def test_a_form_token_belongs_to_one_session(serve):
    app = serve()
    ann, ben = Browser(app, "ann"), Browser(app, "ben")
    assert ben.submit("/vote", choice="1", form_token=ann.hidden()["form_token"]).status_code == 403


def test_a_changed_cookie_is_no_session(serve):
    app = serve()
    ann = Browser(app, "ann")
    cookie = ann.client.cookies["reinforcepp_label"]
    ann.client.cookies.clear()
    ann.client.cookies.set("reinforcepp_label", cookie[:-2] + "xx")
    assert str(ann.client.get("/").url).endswith("/login")
    assert ann.submit("/vote", choice="1").status_code == 403


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"x=" + b"a" * app_module.MAX_FORM_BYTES, "application/x-www-form-urlencoded", 413),
        (b"&".join(b"a%d=1" % i for i in range(500)), "application/x-www-form-urlencoded", 400),
        (b"\xff\xfe", "application/x-www-form-urlencoded", 400),
        (b"{}", "application/json", 415),
    ],
)
def test_unusable_bodies_are_refused(serve, content, kind, status):
    client = Browser(serve(), "ann").client
    page = client.post("/vote", content=content, headers={"content-type": kind, "origin": HOST})
    assert page.status_code == status


def test_names_are_checked(serve):
    browser = Browser(serve())
    for name in ("", " ", "x" * 61, "a\x1bb"):
        assert browser.submit("/login", name=name).status_code == 422
    assert str(browser.client.get("/").url).endswith("/login")


def test_on_other_addresses_a_token_is_needed_and_failures_are_limited(serve):
    app = serve(open_to_all=False)
    access = app.access
    assert Browser(app, "ann").page.status_code == 403
    new = Browser(app)
    new.submit("/login", name="ann", token=access.team_token)
    assert "question 0" in new.page.text
    thief = Browser(app)
    assert thief.submit("/login", name="ann", token=access.team_token).status_code == 403, "the name is taken"
    assert thief.submit("/login", name="ann", token=access.labeler_token("ben")).status_code == 403
    back = Browser(app)
    assert "question 0" in back.submit("/login", name="ann", token=access.labeler_token("ann")).text
    for _ in range(LOGINS_PER_MINUTE):
        last = thief.submit("/login", name="ann", token="x")
    assert last.status_code == 429
    assert thief.submit("/login", name="new", token=access.team_token).status_code == 429


def test_a_link_fills_in_the_login(serve):
    app = serve(open_to_all=False)
    client = TestClient(app.starlette(), base_url=HOST)
    page = client.get("/", params={"name": "ann", "token": "abc"})
    assert 'value="ann"' in page.text
    assert 'value="abc"' in page.text
    assert page.headers["referrer-policy"] == "same-origin"


def test_only_the_administrator_sees_the_page_of_everybody(serve):
    app = serve(open_to_all=False)
    ann = Browser(app)
    ann.submit("/login", name="ann", token=app.access.team_token)
    ann.submit("/vote", choice="1")
    for query in ("", f"?token={app.access.team_token}", f"?token={app.access.labeler_token('ann')}"):
        assert ann.client.get(f"/admin{query}").status_code == 403
    admin = Browser(app)
    admin.page = admin.client.get(f"/admin?token={app.access.admin_token}")
    assert admin.page.url == f"{HOST}/admin"
    assert "1 of 3" in admin.page.text
    assert "Votes by labeler" in admin.page.text
    link = admin.submit("/admin", name="ben").text.partition('readonly value="')[2].partition('"')[0]
    ben = Browser(app)
    ben.page = ben.client.get(link.replace("&amp;", "&"))
    name, token = (re.search(f'name="{field}" value="([^"]*)"', ben.page.text)[1] for field in ("name", "token"))
    assert "question" in ben.submit("/login", name=name, token=token).text
    assert ann.submit("/admin", name="eve").status_code == 403


def test_the_page_for_administrators_escapes_names(serve):
    app = serve([NewUnit("pair", "q", [Answer("a"), Answer("b")], topic="<script>alert(1)</script>", overlap=2)])
    for name in ("<img src=x>", "ben"):
        Browser(app, name).submit("/vote", choice="1")
    browser = Browser(app)
    page = browser.client.get(f"/admin?token={app.access.admin_token}").text
    assert "&lt;img src=x&gt;" in page
    assert "<img" not in page
    assert "<script>alert" not in page


def test_unknown_paths_and_files(serve):
    client = Browser(serve()).client
    for path in ("/nothing", "/static/app.py", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert client.get(path).status_code == 404
    assert "max-age" in client.get("/static/label.css").headers["cache-control"]
    assert client.get("/").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("<script>alert(1)</script>", "<script"),
        ("[x](javascript:alert(1))", "<a"),
        ("[x](data:text/html;base64,AAAA)", "<a"),
        ("![x](http://evil.example/pixel.png)", "<img"),
        ("<img src=x onerror=alert(1)>", "<img"),
        ('[x](http://a "t\\" onclick=\\"alert(1)")', 'onclick="'),
        ("<style>*{display:none}</style>", "<style"),
        ("<form action=/vote><input name=choice>", "<form"),
        ("a\u202eb\x1b[0m", "\u202e"),
    ],
)
def test_markdown_of_models_is_harmless(text, never):
    assert never not in to_html(text)


def test_markdown_is_formatted():
    html = to_html("**b** `c`\n\n```python\nx < 1\n```\n\n| a |\n|---|\n| 1 |\n\n[l](https://example.com)")
    for part in (
        "<strong>b</strong>",
        "<code>c</code>",
        "x &lt; 1",
        "<td>1</td>",
        'rel="noopener noreferrer nofollow"',
    ):
        assert part in html
    assert to_html("a <b>tag</b>") == "<p>a &lt;b&gt;tag&lt;/b&gt;</p>\n", "HTML is shown, not removed"
    assert "(empty)" in to_html("  ")
    assert to_html("*" * 60_000).startswith("<pre>")


def test_an_undo_form_that_is_out_of_date_does_nothing(serve):
    app = serve()
    ann = Browser(app, "ann")
    ann.submit("/vote", choice="2")
    old = ann.hidden()["last"]
    ann.submit("/vote", choice="2")
    ann.submit("/undo", last=old)
    assert len(stored(app)) == 2
    ann.submit("/undo")
    assert len(stored(app)) == 1


def test_two_edited_texts_of_the_largest_size_fit_into_a_form(serve):
    """The page sends both texts, and a character can have nine bytes."""
    app = serve(units(1, task="edit"))
    long = "\u96ea" * MAX_EDITED_CHARACTERS
    page = Browser(app, "ann").submit("/vote", choice="1", text_1=long, text_2=long)
    assert page.status_code == 200
    assert stored(app)[0][0]["text"] == long


def test_texts_are_also_on_the_page_as_they_are(serve):
    text = "\n# a\n\n<b>*b*</b> &amp;"
    page = Browser(serve([NewUnit("pair", text, [Answer(text), Answer("b")])]), "ann").page.text
    raw = re.findall(r'<pre class="raw" dir="auto">\n(.*?)</pre>', page, re.DOTALL)
    assert unescape(raw[0]) == text
    assert sorted(map(unescape, raw[1:])) == sorted([text, "b"])
