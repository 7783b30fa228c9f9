"""Folders that appear whole or not at all, and the manifest that proves what is in them."""

import json
import os

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


def test_files_and_folders_get_the_permissions_of_the_users_umask(tmp_path):
    before = os.umask(0o002)
    try:
        with whole_folder(tmp_path / "whole") as partial:
            write_json(partial / "a.json", {})
    finally:
        os.umask(before)
    modes = [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("whole", "whole/a.json")]
    assert modes == ["0o775", "0o664"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / "a.json.partial").mkdir()
    (tmp_path / "a.json.partial" / "x").write_text("")
    (tmp_path / "whole.partial").write_text("")
    write_json(tmp_path / "a.json", {})
    with whole_folder(tmp_path / "whole"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "whole"]


def test_links_are_replaced_not_followed(tmp_path):
    """Of a folder that is a link, of the place of the older one, and of a file."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("whole", "whole.partial", "whole.older.partial", "a.json", "a.json.partial"):
        (tmp_path / name).symlink_to(victim)
    with whole_folder(tmp_path / "whole") as partial:
        (partial / "a.txt").write_text("")
    write_json(tmp_path / "a.json", {})
    assert list(victim.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "victim", "whole"]
    assert not (tmp_path / "whole").is_symlink() and not (tmp_path / "a.json").is_symlink()


def test_a_name_that_somebody_creates_again_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("reinforcepp.files.remove", lambda path: None)
    (tmp_path / "a.json.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", {})
    assert not (tmp_path / "victim").exists()


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
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.txt": 5}}'), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text('{"files": {}}'), "a.txt isn't in manifest.json"),
        (lambda f: (f / MANIFEST).write_text('{"files": {}, "files": {}}'), "manifest.json is damaged"),
        (lambda f: (f / "c.txt").write_text("added"), "c.txt isn't in manifest.json"),
        (lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).symlink_to("/dev/zero")), "manifest.json is missing"),
    ],
)
def test_damage_is_named(folder, harm, named):
    harm(folder)
    assert damage(folder) == named


def test_hidden_files_of_the_system_are_no_damage(folder):
    (folder / ".nfs0000000001").write_text("open file")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("")
    assert damage(folder) is None


def test_a_needed_file_that_the_manifest_lacks_is_damage(folder):
    assert damage(folder, "a.*") is None
    assert damage(folder, "a.txt", "*.safetensors") == "*.safetensors is missing"


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
