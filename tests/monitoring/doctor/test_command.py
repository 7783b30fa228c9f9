"""The command ``doctor``: its output for a real run's folder, and its exit code."""

from __future__ import annotations

import json
import shutil

import pytest

from reinforcepp.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder, reward_folder, pairs_csv):
    """Return the folder of a finished run that is too short and has too few prompts."""
    output = tmp_path_factory.mktemp("runs") / "policy"
    arguments = ["--model", model_folder, "--data", pairs_csv, "--reward_model", reward_folder, "--output_dir", output]
    limits = ["--max_new_tokens", 8, "--batch_size", 4, "--max_steps", 9, "--rollout", "transformers"]
    assert main(["train", *map(str, arguments + limits)]) == 0
    return output


def test_it_prints_its_findings(folder, capsys):
    capsys.readouterr()
    assert main(["doctor", str(folder)]) == 0  # warnings and infos only
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: Many completions are truncated" in output and "max_new_tokens 8" in output
    assert "info: Few prompts" in output and "Fix Raise max_new_tokens" in output


def test_json_is_for_programs(folder, capsys):
    capsys.readouterr()
    assert main(["doctor", "--run", str(folder), "--format", "json", "--fail_on", "warning"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert "truncation" in [finding["rule"] for finding in values["findings"]]
    assert set(values["findings"][0]) == {"rule", "severity", "title", "evidence", "cause", "cure"}


def test_a_sound_run_has_no_problems(folder, tmp_path, capsys):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "kl": 0.05}) + "\n" for i in range(9)))
    values = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(values | {"prompts": 500}))
    capsys.readouterr()
    assert main(["doctor", str(run), "--fail_on", "warning"]) == 0
    assert capsys.readouterr().out == "No problems found in 9 of 9 steps.\n"


def test_a_demos_folder_means_the_policy_in_it(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "demo" / "policy")
    assert main(["doctor", str(tmp_path / "demo")]) == 0


@pytest.mark.parametrize("broken", ["run.json", "metrics.jsonl", "evaluation.json", "events.jsonl"])
def test_a_damaged_file_is_named(folder, tmp_path, capsys, broken):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "evaluation.json").touch()
    (run / broken).write_text("{\n")
    (run / "evaluation.json").write_text("{}" if broken != "evaluation.json" else "{\n")
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and "damaged" in output and "Traceback" not in output


def test_other_folders_are_refused(reward_folder, tmp_path, capsys):
    for name, reason in ((tmp_path / "none", "folder not found"), (tmp_path, "has no run.json")):
        assert main(["doctor", str(name)]) == 2
        assert reason in capsys.readouterr().err
    assert main(["doctor", ""]) == 2
