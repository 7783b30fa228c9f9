"""Every command in README and docs exists, with options that exist and values that they accept.

test_tutorials.py and test_tutorial_feedback.py also run the commands of the tutorials; test_legacy_cli.py and
test_engine_benchmark.py run the documented scripts.
"""

from __future__ import annotations

import re
import shlex

import pytest

from reinforcepp.commands import cli
from reinforcepp.commands import legacy_cli as classic
from reinforcepp.commands.engine_benchmark import cli as compare_cli
from reinforcepp.commands.table import COMMANDS, split_command
from scripts import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/cluster/README.md"]
BLOCK = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Return page and line of each command, with continued lines joined."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(reinforcepp|python \S+\.py) ", line):
                    found.append((str(page.relative_to(ROOT)), line))
    return found


def words_of(line: str) -> list[str]:
    """Return the words that the program gets, without shell syntax and placeholders."""
    words = shlex.split(re.sub(r"(\s[|<>&]| 2>).*", "", line), comments=True)
    shown = [word for word in words if word != "..." or words[words.index(word) - 1].startswith("--")]
    if "--config" in shown:
        place = shown.index("--config")
        del shown[place : place + 2]
    return shown


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text.replace("/", "-")[:60])
def test_a_documented_command_parses(page, line, monkeypatch):
    program, *words = words_of(line)
    if program == "reinforcepp":
        verb, rest = split_command(words)
        assert verb in COMMANDS
        if rest not in (["--help"], []):
            cli.parse(verb, rest)
        return
    script, *rest = words
    assert (ROOT / script).is_file()
    if script == "reinforce_cli.py":
        monkeypatch.setattr(cli, "run", lambda verb, config: 0)
        assert classic.main(rest) == 0
    elif script == "test_reinforce.py":
        compare_cli._parser().parse_args(rest)


def test_there_are_commands_of_every_verb():
    shown = {split_command(words_of(line)[1:])[0] for _, line in commands() if line.startswith("reinforcepp ")}
    assert set(COMMANDS) - shown <= {"demo"}, "make demo runs that"


def test_a_documented_training_server_listens_on_a_stated_address():
    """vLLM's default is all addresses, and its endpoints for weights require no key."""
    shown = [block.replace("\\\n", " ") for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    servers = [line for block in shown for line in block.splitlines() if "VLLM_SERVER_DEV_MODE=1 vllm serve" in line]
    assert servers
    for line in servers:
        assert "--host 127.0.0.1" in line or "--middleware reinforcepp.commands.access.RequireKey" in line


# --- the walk through one training step -------------------------------------------------------------------------------

WALK = (ROOT / "docs/training_step.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "reinforcepp"


def test_a_training_step_fits_in_six_files_and_900_lines():
    table = WALK.partition("## Names and shapes")[0]
    files = re.findall(r"^\| `(\S+\.py)` \|", table, re.MULTILINE)
    assert 1 < len(files) <= 6
    assert {"algorithm/advantages.py", "algorithm/losses.py"} <= set(files)
    assert sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in files) <= 900


def test_the_names_in_the_walk_through_a_step_exist():
    files = [PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", WALK)]
    assert len(files) > 10 and all(file.is_file() for file in files)
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    names = {part for span in re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", WALK) for part in span.split(".")}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", source)] == []
