"""A type checker sees a real type for every public name, as a user's script would use it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import reinforcepp
from scripts import SOURCE

# mypy's defaults, as in a new project. Libraries that no public name mentions are skipped, because reading them takes long.
SETTINGS = """\
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-accelerate.*,datasets.*,deepspeed.*,matplotlib.*,peft.*,ray.*,trl.*,vllm.*]
follow_imports = skip
"""
SCRIPT = """\
import reinforcepp
from reinforcepp import {names}

{reveals}
config = ReinforceConfig(micro_batch_size=4)
reveal_type(config.micro_batch_size)
reveal_type(SftConfig().learning_rate)
"""


def revealed(folder) -> list[str]:
    """Types that mypy reveals for every public name and for two settings, with the settings of a new project."""
    names = [name for name in reinforcepp.__all__ if name != "__version__"]
    reveals = "\n".join(f"reveal_type({name})" for name in ["reinforcepp.__version__", *names])
    script = folder / "script.py"
    script.write_text(SCRIPT.format(names=", ".join(names), reveals=reveals), encoding="utf-8")
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), str(script)]
    environment = os.environ | {"MYPYPATH": str(SOURCE)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r'Revealed type is "(.*)"', done.stdout)


@pytest.mark.full  # mypy reads torch and transformers, which takes most of a minute
def test_a_user_script_sees_real_types(tmp_path):
    types = revealed(tmp_path)
    assert len(types) == len(reinforcepp.__all__) + 2
    assert [found for found in types if found == "Any" or found.endswith("-> Any")] == []
    assert types[-2:] in (["int | None", "float | None"], ["builtins.int | None", "builtins.float | None"])
