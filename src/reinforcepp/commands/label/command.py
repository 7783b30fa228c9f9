"""The command ``label``: prepare units and serve the pages until a signal stops it."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from urllib.parse import urlencode

from starlette.middleware import Middleware

from reinforcepp.commands.access import RefuseWebPages
from reinforcepp.commands.http_server import Server, listen
from reinforcepp.commands.label.files import add_from_file, add_gold, put_uncertain_first
from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import Store
from reinforcepp.errors import ConfigError
from reinforcepp.labeling.access import Access
from reinforcepp.labeling.app import LabelApp, Options
from reinforcepp.labeling.generation import BackgroundGeneration
from reinforcepp.labeling.queue import Queue
from reinforcepp.labeling.units import Score
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.terminal import echo, print_output

MAX_GUIDELINES_BYTES = 200_000


def run_label(config: LabelConfig) -> None:
    """Serve the labelers' pages until SIGINT or SIGTERM.

    Raises:
        ReinforceError: The address, the database, the data or a model can't be used.
    """
    guidelines = _guidelines(config.guidelines)
    with closing(listen(config.host, config.port)) as listener, Store.opened(config.database) as store:
        add_gold(config, store)
        with _responses(config, store) as background:
            access = Access(store, open_to_all=is_loopback(config.host))
            queue = Queue(
                store,
                lease_seconds=60 * config.lease_minutes,
                gold_every=config.gold_every,
                repeat_every=config.repeat_every,
            )
            options = Options(
                config.title or Options.title,
                config.criteria,
                guidelines,
                (lambda: background.is_running) if background else (lambda: False),
            )
            local = [Middleware(RefuseWebPages, word="token")] if access.open_to_all else []
            server = Server(LabelApp(queue, access, options).starlette(local), listener)
            if background:
                background.start()
            _announce(config, access, listener.getsockname()[1])
            server.run_until_signal()
    echo(f"Stopped. The votes are in {store.name}.")


def _responses(config: LabelConfig, store: Store) -> AbstractContextManager[BackgroundGeneration | None]:
    """Add the responses of a file to the database, or return the generation of responses."""
    if not (config.models or config.data is not None or store.has_units()):
        raise ConfigError(
            "models: there is nothing to label. Name models that respond, as in reinforcepp label runs/train --data "
            "prompts.csv, or a file with responses, as in reinforcepp label --data pairs.csv."
        )
    scores: Sequence[Score] = ()
    if config.models or config.reward_model:
        from reinforcepp.commands.label.models import generation, load_scores  # They load torch.

        scores = load_scores(config)
    if config.data is not None and not config.models:
        add_from_file(config, store)
    if scores:
        put_uncertain_first(config, store, scores)
    if config.models:
        return generation(config, store, scores)
    return nullcontext()


def _announce(config: LabelConfig, access: Access, port: int) -> None:
    """Print the links, and open the first one in a browser if there is one."""
    everywhere = ("0.0.0.0", "::")  # nosec B104  # compared only
    host = socket.gethostname() if config.host in everywhere else config.host
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    url = base if access.open_to_all else f"{base}/?{urlencode({'token': access.team_token})}"
    print_output(f"Label at {url}")
    # Not by echo, which hides tokens.
    print_output(f"Progress and agreement: {base}/admin?{urlencode({'token': access.admin_token})}")
    if not access.open_to_all:
        echo(
            "Everybody with the first link can label. The server has no encryption: use a network that you trust.",
            "yellow",
        )
    echo("To stop, press Ctrl-C. Votes are stored at once.")
    has_display = sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if config.open_browser and has_display:
        with suppress(webbrowser.Error):
            webbrowser.open(url)


def _guidelines(name: str | None) -> str:
    if name is None:
        return ""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"guidelines: file {name} not found. Give a Markdown file.")
    return path.read_bytes()[:MAX_GUIDELINES_BYTES].decode(errors="replace")
