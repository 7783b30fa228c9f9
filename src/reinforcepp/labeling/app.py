"""The web application for labelers. Its pages work without JavaScript; ``label.js`` adds keys and saves a page load.

``/`` shows the labeler's next unit, and the forms on it send to ``/vote`` and ``/undo``. ``/login`` and ``/logout`` begin
and end a session, ``/admin`` shows the progress, agreement and speed of everybody, ``/static`` holds style sheet and scripts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reinforcepp.data.feedback import Choice, Edit, Ranking, Skip, parse_vote
from reinforcepp.data.feedback.votes import MAX_RATING, reordered
from reinforcepp.errors import DataError
from reinforcepp.labeling.access import Access, Session, same, usable_name
from reinforcepp.labeling.admin import admin_values
from reinforcepp.labeling.forms import seconds_of, vote_of
from reinforcepp.labeling.markdown import to_html
from reinforcepp.labeling.quality import measure
from reinforcepp.labeling.queue import Assigned, Queue, UnitGone
from reinforcepp.reports import charts
from reinforcepp.reports.html import STYLE, asset, environment
from reinforcepp.runtime.terminal import logger

FOLDER = Path(__file__).parent
MAX_FORM_BYTES = 4 << 20
"""Room for two edited responses of the most characters, each of which is up to 9 bytes."""
MAX_FORM_FIELDS = 100
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # With no-referrer, forms have no origin.
    "cross-origin-opener-policy": "same-origin",
}
CHART_POLICY = HEADERS["content-security-policy"].replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Policy of the page with charts, whose legends have styles of their own."""
STATIC = {
    "label.css": "text/css",
    **dict.fromkeys(("label.js", "theme.js", "uplot.js", "chart.js"), "text/javascript"),
}

log = logger(__name__)
_templates = environment(FOLDER / "templates")
_templates.filters["markdown"] = to_html
Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A request that can't be answered, with the HTTP status and the sentence for the page."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Options:
    """What the pages show.

    Attributes:
        title: The heading.
        criteria: Criteria of ratings.
        guidelines: Text for labelers, in Markdown.
        is_generating: Function that returns whether more units are on their way.
    """

    title: str = "Label responses"
    criteria: Sequence[str] = ("helpful", "correct", "safe")
    guidelines: str = ""
    is_generating: Callable[[], bool] = lambda: False


class LabelApp:
    """The pages of a queue.

    Args:
        queue: Where units come from and votes go.
        access: Sessions and tokens.
        options: What the pages show.
    """

    def __init__(self, queue: Queue, access: Access, options: Options | None = None) -> None:
        self.queue, self.access, self.options = queue, access, options or Options()

    def starlette(self, middleware: Sequence[Middleware] = ()) -> Starlette:
        """Return the ASGI application; ``middleware`` comes first."""
        routes = [
            Route("/", self._threaded(self.task)),
            Route("/login", self._threaded(self.login)),
            Route("/login", self._form(self.log_in), methods=["POST"]),
            Route("/logout", self._form(self.log_out), methods=["POST"]),
            Route("/vote", self._form(self.vote), methods=["POST"]),
            Route("/undo", self._form(self.undo), methods=["POST"]),
            Route("/admin", self._threaded(self.admin)),
            Route("/admin", self._form(self.invite), methods=["POST"]),
            Route("/static/{name}", self._threaded(self.static)),
            Route("/health", self._threaded(lambda request: Response("ok"))),
        ]
        handlers: dict[Any, Any] = {Refused: self._refused, HTTPException: self._refused, Exception: self._failed}
        app = Starlette(
            routes=routes, middleware=[*middleware, Middleware(SecurityHeaders)], exception_handlers=handlers
        )
        app.router.redirect_slashes = False
        return app

    # --- pages ------------------------------------------------------------------------------------------------------

    def task(self, request: Request) -> Response:
        """Show the labeler's next unit, or that there is none; a link with a token is turned into a session first."""
        session = self.access.session(request)
        if session is None or session.labeler is None:
            return RedirectResponse(f"/login?{request.url.query}" if request.url.query else "/login", 303)
        return self._task_page(request, session)

    def _task_page(self, request: Request, session: Session, message: str = "", status: int = 200) -> Response:
        assert session.labeler is not None
        waiting = self.options.is_generating()  # before the queue, to which the last units can be added in between
        assigned = self.queue.next(session.labeler)
        progress = self.queue.progress(session.labeler)
        values: dict[str, Any] = {"progress": progress, "message": message, "waiting": waiting}
        if assigned is None:
            return self._page(request, "done.html", status, **values)
        answers = [assigned.unit.answers[position] for position in assigned.order]
        return self._page(
            request,
            "task.html",
            status,
            task=assigned.unit.task,
            token=assigned.token,
            prompt=assigned.unit.prompt,
            answers=answers,
            previous=shown_vote(assigned),
            criteria=self.options.criteria,
            ratings=range(1, MAX_RATING + 1),
            guidelines=self.options.guidelines,
            **values,
        )

    def vote(self, request: Request, fields: dict[str, str]) -> Response:
        """Store a vote, then show the next unit."""
        session = self._labeler(request)
        labeler, token = session.labeler or 0, fields.get("unit", "")
        try:
            assigned = self.queue.held(labeler, token)
            vote = vote_of(assigned.unit.task, assigned.order, fields, self.options.criteria)
            self.queue.vote(labeler, token, vote, seconds_of(fields))
        except UnitGone:
            return self._task_page(
                request, session, "Somebody else got this unit, because it was open for too long.", 409
            )
        except DataError as error:
            return self._task_page(request, session, str(error), 422)
        return RedirectResponse("/", 303)

    def undo(self, request: Request, fields: dict[str, str]) -> Response:
        """Take the last vote that the page knows back, and show its unit again."""
        self.queue.undo(self._labeler(request).labeler or 0, fields.get("last", ""))
        return RedirectResponse("/", 303)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def login(self, request: Request) -> Response:
        """Ask for the name; a link brings name and token along."""
        given: dict[str, Any] = {name: request.query_params.get(name, "") for name in ("name", "token")}
        return self._page(request, "login.html", message="", **given)

    def log_in(self, request: Request, fields: dict[str, str]) -> Response:
        """Start the session of a labeler."""
        given: dict[str, Any] = {"name": fields.get("name", ""), "token": fields.get("token", "")}
        if self.access.too_many_failures(request):
            return self._page(request, "login.html", 429, message="Too many failed logins. Wait a minute.", **given)
        name = usable_name(given["name"])
        if name is None:
            return self._page(request, "login.html", 422, message="Enter a name of up to 60 characters.", **given)
        is_new = self.queue.store.find_labeler(name) is None
        if not self.access.may_log_in(name, given["token"], is_new=is_new):
            self.access.too_many_failures(request, failed=True)
            message = "The token is missing or wrong. Open the link that you got, or ask for one."
            return self._page(request, "login.html", 403, message=message, **given)
        try:
            labeler = self.queue.store.labeler(name)
        except DataError as error:
            return self._page(request, "login.html", 422, message=str(error), **given)
        response = RedirectResponse("/", 303)
        self.access.start(response, request, labeler=labeler, name=name)
        return response

    def log_out(self, request: Request, fields: dict[str, str]) -> Response:
        """End the session."""
        response = RedirectResponse("/login", 303)
        self.access.start(response, request, labeler=None, name="", admin=False)
        return response

    def _labeler(self, request: Request) -> Session:
        session = self.access.session(request)
        if session is None or session.labeler is None:
            raise Refused(401, "You are logged out. Log in again; votes that were confirmed are stored.")
        return session

    # --- administration ---------------------------------------------------------------------------------------------

    def admin(self, request: Request) -> Response:
        """Show progress and agreement; the link with the token is turned into a session first."""
        token = request.query_params.get("token", "")
        if token and not self.access.too_many_failures(request) and same(token, self.access.admin_token):
            response = RedirectResponse("/admin", 303)
            self.access.start(response, request, admin=True)
            return response
        if token:
            self.access.too_many_failures(request, failed=True)
        return self._admin_page(request)

    def invite(self, request: Request, fields: dict[str, str]) -> Response:
        """Show the link of one labeler."""
        name = usable_name(fields.get("name", ""))
        if name is None:
            return self._admin_page(request)
        query = urlencode({"name": name, "token": self.access.labeler_token(name)})
        return self._admin_page(request, name, f"{request.base_url}?{query}")

    def _admin_page(self, request: Request, invited: str = "", link: str = "") -> Response:
        session = self.access.session(request)
        if session is None or not session.admin:
            raise Refused(403, "This page is for the administrator. Open the link that reinforcepp label printed.")
        values = admin_values(measure(self.queue.store))
        scripts = ["uplot.js", "chart.js"]
        response = self._page(request, "admin.html", invited=invited, link=link, scripts=scripts, **values)
        response.headers["content-security-policy"] = CHART_POLICY
        return response

    # --- plumbing ---------------------------------------------------------------------------------------------------

    def static(self, request: Request) -> Response:
        """Return a style sheet or a script."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response(static_text(name), media_type=STATIC[name], headers={"cache-control": "max-age=31536000"})

    def _page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        session = self.access.session(request)
        values |= {
            "title": self.options.title,
            "session": session,
            "form_token": self.access.form_token(session),
            "needs_token": not self.access.open_to_all,
            "versions": {name: _version(name) for name in STATIC},
        }
        html = _templates.get_template(template).render(values)
        return HTMLResponse(html, status, headers={"cache-control": "no-store"})

    def _threaded(self, function: Callable[[Request], Response]) -> Handler:
        async def answer(request: Request) -> Response:
            return await run_in_threadpool(function, request)

        return answer

    def _form(self, function: Callable[[Request, dict[str, str]], Response]) -> Handler:
        """Return a handler that reads the form and checks that it comes from a page of this server."""

        async def answer(request: Request) -> Response:
            fields = await _read_form(request)
            if not self.access.is_from_own_page(request, fields):
                raise Refused(403, "This form is out of date or comes from another page. Reload the page.")
            return await run_in_threadpool(function, request, fields)

        return answer

    async def _refused(self, request: Request, error: Refused | HTTPException) -> Response:
        known = {404: "Page not found.", 405: "Page not found."}
        message = error.message if isinstance(error, Refused) else known.get(error.status_code, "The request failed.")
        status = error.status if isinstance(error, Refused) else error.status_code
        return await run_in_threadpool(self._page, request, "error.html", status, message=message)

    async def _failed(self, request: Request, error: Exception) -> Response:
        log.error("A request failed.", exc_info=error)
        message = "The server failed. Votes that were confirmed are stored. Reload the page."
        response = await run_in_threadpool(self._page, request, "error.html", 500, message=message)
        response.headers.update(HEADERS)
        return response


def shown_vote(assigned: Assigned) -> dict[str, str]:
    """Return the vote that was taken back as fields of the form."""
    if assigned.previous is None:
        return {}
    shown = [assigned.order.index(position) for position in range(len(assigned.order))]
    vote = reordered(parse_vote(assigned.unit.task, len(shown), assigned.previous), shown)
    if isinstance(vote, Skip):
        return {"choice": "skip"}
    if isinstance(vote, Choice):
        return {"choice": str(vote.tie if vote.better is None else vote.better + 1) + "+" * (vote.strength - 1)}
    if isinstance(vote, Edit):
        return {"choice": str(vote.better + 1), f"text_{vote.better + 1}": vote.text}
    if isinstance(vote, Ranking):
        return {f"rank_{number}": str(rank) for number, rank in enumerate(vote.ranks, 1)}
    return {
        f"rating_{number}_{name}": str(rating)
        for number, ratings in enumerate(vote.ratings, 1)
        for name, rating in ratings.items()
    }


class SecurityHeaders:
    """ASGI middleware that adds the headers with which browsers protect a page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


async def _read_form(request: Request) -> dict[str, str]:
    """Return the fields of an HTML form; of a repeated one, the last value."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise Refused(415, "The request isn't an HTML form.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise Refused(413, f"The form is over {MAX_FORM_BYTES // 2**20} MiB. Shorten the text.")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS))
    except ValueError:
        raise Refused(400, "The form is malformed. Reload the page.") from None


@cache
def static_text(name: str) -> str:
    """Return the text of a file of ``STATIC``."""
    shared = {"theme.js": asset("static/theme.js"), "uplot.js": charts.SCRIPTS[0], "chart.js": charts.SCRIPTS[1]}
    if name in shared:
        return shared[name]
    text = (FOLDER / "static" / name).read_text(encoding="utf-8")
    return STYLE + charts.STYLE + text if name.endswith(".css") else text


@cache
def _version(name: str) -> str:
    return hashlib.sha256(static_text(name).encode()).hexdigest()[:12]
