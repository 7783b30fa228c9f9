"""Whether the Hugging Face hub can be reached, asked once before its libraries ask many times."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def look_for_hub() -> None:
    """Go offline if the hub can't be reached: its library would retry every file for half a minute.

    What was fetched before still loads then. Behind a proxy a look of our own says nothing.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
