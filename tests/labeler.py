"""A person at the pages of ``reinforcepp label``, over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from html import unescape
from typing import Any

import httpx2

HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="(\w*)">')
ARTICLE = re.compile(r"<article.*?</article>", re.DOTALL)
RESPONSE = re.compile(r'<div class="prose" dir="auto">(.*?)</div>', re.DOTALL)


def texts_of(page: str) -> list[str]:
    """Return the responses on a page as text, in its order."""
    found = [RESPONSE.search(article)[1] for article in ARTICLE.findall(page)]
    return [unescape(re.sub(r"<[^>]+>", "", html)).strip() for html in found]


def label_everything(url: str, name: str, choose: Callable[[list[str]], str]) -> int:
    """Vote until nothing is left and nothing is being generated; return the number of votes.

    Args:
        url: Address of the server.
        name: The labeler.
        choose: Function from the responses on the page to the value of a button.
    """
    votes = 0
    with httpx2.Client(base_url=url, headers={"origin": url}, follow_redirects=True, timeout=60) as http:

        def hidden(page: Any) -> dict[str, str]:
            return dict(HIDDEN.findall(page.text))

        page = http.get("/login")
        page = http.post("/login", data={**hidden(page), "name": name})
        while True:
            fields = hidden(page)
            if "unit" in fields:
                page = http.post("/vote", data={**fields, "choice": choose(texts_of(page.text)), "seconds": "1"})
                assert page.status_code == 200, page.text
                votes += 1
            elif 'class="waiting"' in page.text:
                time.sleep(0.2)
                page = http.get("/")
            else:
                return votes
