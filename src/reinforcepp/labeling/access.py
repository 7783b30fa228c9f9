"""Who may do what: sessions in signed cookies, links with tokens, and defenses against requests of other pages.

All tokens derive from one secret in the database, so they survive a restart and need no storage.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from reinforcepp.data.feedback.store import Store

COOKIE = "reinforcepp_label"
SESSION_SECONDS = 30 * 86_400
LOGINS_PER_MINUTE = 10
"""Failed logins per client address."""
MAX_CLIENTS = 10_000
"""Client addresses whose failures are remembered."""
MAX_NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Session:
    """A browser that logged in: as a labeler, as an administrator, or as both."""

    nonce: str
    labeler: int | None = None
    name: str = ""
    admin: bool = False


class Access:
    """Sessions and tokens of a database.

    Args:
        store: The database, which holds the secret.
        open_to_all: Whether a name is enough to log in, as on this computer; otherwise it takes a token.
    """

    def __init__(self, store: Store, *, open_to_all: bool) -> None:
        self._secret = str(store.setting("secret", secrets.token_hex(32)))
        self._cookies = URLSafeTimedSerializer(self._secret, salt="session")
        self.open_to_all = open_to_all
        self._failures: dict[str, deque[float]] = {}

    @property
    def admin_token(self) -> str:
        """The token of the administrator's link."""
        return self._derived("admin")

    @property
    def team_token(self) -> str:
        """The token with which any new labeler can log in."""
        return self._derived("team")

    def labeler_token(self, name: str) -> str:
        """Return the token of one labeler's own link."""
        return self._derived(f"labeler/{name}")

    def may_log_in(self, name: str, token: str, *, is_new: bool) -> bool:
        """Return whether a token lets a labeler in; that of the team only under a new name."""
        return self.open_to_all or same(token, self.labeler_token(name)) or (is_new and same(token, self.team_token))

    def session(self, request: Request) -> Session | None:
        """Return the session of a request, if its cookie is valid."""
        try:
            found = self._cookies.loads(request.cookies.get(COOKIE, ""), max_age=SESSION_SECONDS)
            return Session(**found)
        except (BadSignature, TypeError):
            return None

    def start(self, response: Response, request: Request, **changes: Any) -> None:
        """Give the browser a session with ``changes`` to the present one."""
        before = self.session(request)
        kept = {"labeler": before.labeler, "name": before.name, "admin": before.admin} if before else {}
        values = {**kept, **changes, "nonce": secrets.token_hex(16)}
        response.set_cookie(
            COOKIE,
            str(self._cookies.dumps(values)),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="lax",  # A link in a mail must find the session; forms have a token of their own.
            secure=request.url.scheme == "https",
        )

    def form_token(self, session: Session | None) -> str:
        """Return the token that forms of a session must send (CSRF)."""
        return self._derived(f"form/{session.nonce if session else 'login'}")

    def is_from_own_page(self, request: Request, fields: dict[str, str]) -> bool:
        """Return whether a form was sent by a page of this server, to this session."""
        origin = request.headers.get("origin")
        try:
            own_origin = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        except ValueError:
            own_origin = False
        own_site = request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        expected = self.form_token(self.session(request))
        return own_origin and own_site and same(fields.get("form_token", ""), expected)

    def too_many_failures(self, request: Request, *, failed: bool = False) -> bool:
        """Count a failed login, and return whether the client must wait."""
        now, client = time.monotonic(), request.client.host if request.client else ""
        if len(self._failures) > MAX_CLIENTS:
            self._failures.clear()
        times = self._failures.setdefault(client, deque(maxlen=LOGINS_PER_MINUTE))
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) == LOGINS_PER_MINUTE:
            return True
        if failed:
            times.append(now)
        return False

    def _derived(self, purpose: str) -> str:
        return hmac.new(self._secret.encode(), purpose.encode(), hashlib.sha256).hexdigest()[:32]


def same(given: str, expected: str) -> bool:
    """Compare two tokens in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


def usable_name(text: str) -> str | None:
    """Return a labeler's name in its normal form, or None if it can't be one."""
    name = " ".join(text.split())
    return name if 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable() else None
