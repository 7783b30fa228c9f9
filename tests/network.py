"""Network namespaces for tests, joined by a virtual cable that can be disconnected, if this user can create them."""

from __future__ import annotations

import os
import subprocess
from itertools import count

NUMBERS = count()
NOBODY = "02:00:00:00:00:01"


class Network:
    """A network namespace behind a cable; ``host`` is its address, ``here`` the address of the cable's other end.

    Args:
        apart: the other end has its own namespace, too, so that no route bypasses the cable.
    """

    def __init__(self, apart: bool = False) -> None:
        number = next(NUMBERS)
        self.name, self.near = f"far-{os.getpid()}-{number}", f"near-{os.getpid()}-{number}" if apart else None
        self.cable = f"veth{os.getpid()}-{number}"
        subnet = f"10.{231 + number % 20}.{os.getpid() % 250}"
        self.here, self.host = f"{subnet}.1", f"{subnet}.2"
        self._ip("netns", "add", self.name)
        if self.near:
            self._ip("netns", "add", self.near)
        self._at_home("link", "add", self.cable, "type", "veth", "peer", "name", "inside", "netns", self.name)
        self._at_home("addr", "add", f"{self.here}/24", "dev", self.cable)
        self._ip("-n", self.name, "addr", "add", f"{self.host}/24", "dev", "inside")
        for link in ("lo", "inside"):
            self._ip("-n", self.name, "link", "set", link, "up")
        if self.near:
            self._at_home("link", "set", "lo", "up")
        self.mend()

    def cut(self) -> None:
        """Disconnect the cable; both ends notice it."""
        self._at_home("link", "set", self.cable, "down")

    def lose(self) -> None:
        """Drop all packets; neither end is notified."""
        self._at_home("neigh", "replace", self.host, "lladdr", NOBODY, "nud", "permanent", "dev", self.cable)
        self._ip("-n", self.name, "neigh", "replace", self.here, "lladdr", NOBODY, "nud", "permanent", "dev", "inside")

    def mend(self) -> None:
        self._at_home("link", "set", self.cable, "up")

    def remove(self) -> None:
        self._at_home("link", "del", self.cable)
        for name in filter(None, (self.name, self.near)):
            self._ip("netns", "del", name)

    def command(self, far: bool) -> list[str]:
        """Return the words that run a command at one of the ends."""
        name = self.name if far else self.near
        return ["ip", "netns", "exec", name] if name else []

    def _at_home(self, *words: str) -> None:
        self._ip(*(("-n", self.near) if self.near else ()), *words)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


def network(apart: bool = False) -> Network | None:
    """Return a network, or None if this user or system can't create one."""
    try:
        return Network(apart)
    except (OSError, subprocess.CalledProcessError):
        return None
