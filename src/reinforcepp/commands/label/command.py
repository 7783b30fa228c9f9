"""The command ``label``: prepare units and serve the pages until a signal stops it."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlencode

from starlette.middleware import Middleware

from reinforcepp.commands.access import RefuseWebPages
from reinforcepp.commands.http_server import Server, listen
from reinforcepp.commands.label.preparation import prepared
from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import Store
from reinforcepp.errors import ConfigError
from reinforcepp.labeling.access import Access
from reinforcepp.labeling.app import LabelApp, Options
from reinforcepp.labeling.queue import Queue
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.terminal import echo, print_output

MAX_GUIDELINES_BYTES = 200_000


def run_label(config: LabelConfig) -> int:
    """Serve the labelers' pages until SIGINT or SIGTERM, or let a judge label; return the exit code.

    Raises:
        ReinforceError: The address, the database, the data, a model or the judge can't be used.
    """
    if config.judge is not None:
        from reinforcepp.commands.label.judging import label_by_judge  # loads HTTP libraries

        return label_by_judge(config)
    guidelines = _guidelines(config.guidelines)
    with (
        closing(listen(config.host, config.port)) as listener,
        Store.opened(config.database) as store,
        prepared(config, store) as background,
    ):
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
        _announce(config, access, listener.getsockname()[1])
        server.run_until_signal()
    echo(f"Stopped. The votes are in {store.name}.")
    return 0


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
