"""Folders that appear whole or not at all, and the manifest that proves what is in them."""

import json

import pytest

from reinforcepp.files import MANIFEST, damage, whole_folder, write_json


@pytest.fixture
def folder(tmp_path):
    with whole_folder(tmp_path / "whole") as partial:
        (partial / "a.txt").write_text("first")
        (partial / "b.bin").write_bytes(bytes(100))
    return tmp_path / "whole"


def test_text_that_can_not_be_utf8_is_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"folder": "caf\udce9", "text": "café"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"folder": "caf\udce9", "text": "café"}


def test_a_folder_appears_at_the_end(tmp_path):
    with whole_folder(tmp_path / "whole") as partial:
        (partial / "a.txt").write_text("first")
        assert not (tmp_path / "whole").exists()
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["a.txt", MANIFEST]
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "whole") as partial:
        (partial / "a.txt").write_text("first")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_same_name_is_replaced(folder):
    with whole_folder(folder) as partial:
        (partial / "c.txt").write_text("second")
    assert sorted(p.name for p in folder.iterdir()) == ["c.txt", MANIFEST]
    assert [p.name for p in folder.parent.iterdir()] == ["whole"]


def test_nothing_is_wrong_with_a_whole_folder(folder):
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda f: (f / "a.txt").unlink(), "a.txt is missing"),
        (lambda f: (f / "a.txt").write_text("firs"), "a.txt has 4 bytes instead of 5"),
        (lambda f: (f / "b.bin").write_bytes(bytes(99) + b"x"), "the contents of b.bin have changed"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing or damaged"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is missing or damaged"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is missing or damaged"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.txt": 5}}'), "manifest.json is missing or damaged"),
    ],
)
def test_damage_is_named(folder, harm, named):
    harm(folder)
    assert damage(folder) == named


def test_a_manifest_names_nothing_outside_its_folder(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder.parent / "secret").write_text("first")
    manifest["files"]["../secret"] = manifest["files"].pop("a.txt")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) == "../secret is missing"


def test_a_json_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"text": "grün"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "grün"}
    with pytest.raises(TypeError):
        write_json(path, {"text": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "grün"}
