"""The word check finds each banned word in comments, strings, and identifiers, and passes other text."""

import importlib.util
import sys

import pytest

import scripts

spec = importlib.util.spec_from_file_location("check_words", scripts.ROOT / "scripts" / "check_words.py")
check_words = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = check_words
spec.loader.exec_module(check_words)

BANNED = [
    "The user is told so.",
    "Rows are left out.",
    "Leave it out.",
    "leaves fsdp out",
    "leaving out",
    "What became of it",
    "what becomes of it",
    "Whoever is free",
    "learnt weights",
    "learned by heart",
    "the policy runs off",
    "has run off",
    "prompts are dealt out",
    "deals prompts out",
    "This is no model.",
    "They are no models.",
    "a copy beside it",
    "the optimiser",
    "normalised rewards",
    "tokenisation",
    "reinitialises",
    "the behaviour",
    "colours",
]
CLEAN = [
    "There is no file, and this is no longer a model.",
    "Lay out the layers, and leave the rest.",
    "Besides, the optimizer normalizes and tokenizes otherwise.",
    "An optimistic organism practises its exercise precisely.",
    "Runs offline, turned off, untold, color",
    "Skip a row, omit an option.",
]


def found(tmp_path, source, name="example.py"):
    path = tmp_path / name
    path.write_text(source)
    return [finding.line for finding in check_words.findings_in(path)]


@pytest.mark.parametrize("text", BANNED)
def test_each_banned_word_is_found(tmp_path, text):
    assert found(tmp_path, f"x = 1\n# {text}\n") == [2]
    assert found(tmp_path, f'x = 1\n"""{text}"""\n') == [2]
    assert found(tmp_path, f"x = f'{text}'\n") == [1]
    assert found(tmp_path, f"\n{text}\n", "page.md") == [2]


@pytest.mark.parametrize("text", CLEAN)
def test_other_text_passes(tmp_path, text):
    assert not found(tmp_path, f'# {text}\nx = "{text}"\n')
    assert not found(tmp_path, text, "page.md")


@pytest.mark.parametrize("name", ["told", "_told_once", "toldOnce", "BESIDE", "leave_out", "Learnt", "optimiser"])
def test_identifiers_are_split_into_words(tmp_path, name):
    assert found(tmp_path, f"x = 1\n{name} = 2\n") == [2]


def test_a_phrase_is_found_across_lines(tmp_path):
    assert found(tmp_path, '"""It is left\n    out here."""\n') == [1]
    assert found(tmp_path, "# It is left\n# out here.\n") == [1]
    assert found(tmp_path, 'f(\n    "It is left "\n    f"out here."\n)\n') == [2]


def test_separate_strings_are_not_joined(tmp_path):
    assert not found(tmp_path, 'f("left ", "out")\n')
    assert not found(tmp_path, '# left\nx = "out"\n')
    assert not found(tmp_path, 'left = "left "\n"""out"""\n')


def test_a_comment_exempts_a_line_or_a_string(tmp_path):
    assert found(tmp_path, "told = 1  # words: ok\ntold = 2\n") == [2]
    assert not found(tmp_path, '"""told\nand told"""  # words: ok\n')
    assert found(tmp_path, "told <!-- words: ok -->\ntold\n", "page.html") == [2]


def test_findings_are_printed_with_file_line_and_advice(tmp_path, capsys):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "file.py").write_text("x = 1\ntold = 2\n")
    assert check_words.main([str(tmp_path)]) == 1
    assert (
        capsys.readouterr().out == f"{tmp_path}/room/file.py:2: 'told'. Use report, print, or log; metrics as a name.\n"
    )
    (tmp_path / "room" / "file.py").write_text("metrics = 2\n")
    assert check_words.main([str(tmp_path)]) == 0 and capsys.readouterr().out == ""
    assert check_words.main([str(tmp_path / "none")]) == 2
