"""A person at the pages of ``reinforcepp label``, over HTTP, and the server as a process."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from typing import Any

import httpx2

from reinforcepp.data.builtin.judge import GoldJudge

HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="(\w*)">')
PROMPT = re.compile(r'<section aria-label="Prompt".*?</section>', re.DOTALL)
ARTICLE = re.compile(r"<article.*?</article>", re.DOTALL)
PROSE = re.compile(r'<div class="prose" dir="auto">(.*?)</div>', re.DOTALL)
GENERATED = "Responded to all"
"""Begin of the line that the server prints after it has generated all responses."""


def text_of(html: str) -> str:
    """Return the last text in a part of a page."""
    return unescape(re.sub(r"<[^>]+>", "", PROSE.findall(html)[-1])).strip()


def label(url: str, name: str, choose: Callable[[str, list[str]], str], most: int | None = None) -> int:
    """Vote until nothing is left and nothing is being generated; return the number of votes.

    Args:
        url: Address of the server.
        name: The labeler.
        choose: Function from the prompt and the responses on the page to the value of a button.
        most: Number of votes after which the person stops.
    """
    votes = 0
    with httpx2.Client(base_url=url, headers={"origin": url}, follow_redirects=True, timeout=60) as http:

        def hidden(page: Any) -> dict[str, str]:
            return dict(HIDDEN.findall(page.text))

        page = http.get("/login")
        page = http.post("/login", data={**hidden(page), "name": name})
        while votes != most:
            fields = hidden(page)
            if "unit" in fields:
                choice = choose(text_of(PROMPT.search(page.text)[0]), [*map(text_of, ARTICLE.findall(page.text))])
                page = http.post("/vote", data={**fields, "choice": choice, "seconds": "1"})
                assert page.status_code == 200, page.text
                votes += 1
            elif 'class="waiting"' in page.text:
                time.sleep(0.2)
                page = http.get("/")
            else:
                break
    return votes


class NoisyJudge:
    """Choices by the gold judge of the built-in data, of which a share is wrong.

    The response with the higher score is better. Equal scores are a tie. A wrong vote is for the other response, or, instead of
    a tie, for a random one.

    Args:
        noise: Share of wrong votes.
        seed: Seed of the noise.
    """

    def __init__(self, noise: float, seed: str) -> None:
        self.noise, self._judge, self._dice = noise, GoldJudge(), random.Random(seed)

    def __call__(self, prompt: str, responses: Sequence[str]) -> str:
        """Return the value of a button."""
        one, two = (self._judge.score(prompt, text) for text in responses)
        wrong = self._dice.random() < self.noise
        if one == two:
            return self._dice.choice("12") if wrong else "good" if one >= 0.5 else "bad"
        return "1" if (one > two) != wrong else "2"


@contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """Run ``reinforcepp label *words`` and yield its address when all responses are generated; Ctrl-C ends it."""
    command = [sys.executable, "-P", "-m", "reinforcepp", "label", *words, "--port", "0", "--no_open_browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if GENERATED in line:
                break
        else:
            sys.exit("The server failed:\n" + "".join(lines))
        try:
            yield server.stdout.readline().removeprefix("Label at ").strip()
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
