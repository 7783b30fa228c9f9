"""scripts/gpu_check.sh: the runner of the items, and the items themselves on a CPU with tiny shapes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from scripts import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
ON_A_CPU = {"offload": "AdamW's state", "gpu_tests": "need a GPU", "logprobs_v2": "needs Triton"}
"""Items that are skipped on a CPU, and a part of the reason."""


@pytest.fixture
def runner(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def run(runner, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *map(str, words)])
    return runner.main()


def test_items_get_a_limit_and_the_total_time_ends(runner, monkeypatch, tmp_path, capsys):
    limits, now = [], [0.0]

    def start(item, given, environment, limit):
        limits.append(limit)
        now[0] += 100
        status = {"process_state": "fail", "qlora": "skipped"}.get(item.name, "pass")
        return {"item": item.name, "status": status, "seconds": 100.0, "reason": f"because of {item.name}"}

    monkeypatch.setattr(runner, "start", start)
    programs = []

    def python(command, env, check=False):
        programs.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", python)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    only = ["--only", "compile_cache", "process_state", "weights", "close"]
    assert run(runner, monkeypatch, tmp_path, "--seconds", 250, *only) == 1
    assert limits == [200, 90, 50]
    results = json.loads((tmp_path / "summary.json").read_text())
    assert [result["status"] for result in results] == ["pass", "fail", "pass", "not run"]
    out = capsys.readouterr().out
    assert "because of process_state" in out and "2 pass, 1 fail, 1 not run" in out
    assert run(runner, monkeypatch, tmp_path, "--dry-run", "--only", "weights") == 0
    assert limits[3:] == [360]  # a CPU can be busy
    assert set(programs) == {"--check"}
    run(runner, monkeypatch, tmp_path)
    assert programs[-2:] == ["--check", "--keep"]
    assert len(json.loads((tmp_path / "summary.json").read_text())) == len(runner.ITEMS)


def test_a_complete_run_is_kept_with_date_and_hardware(runner, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(results, "machine", lambda: {"gpu": "NVIDIA H200"})
    (tmp_path / "benchmarks").mkdir()
    summary = [{"item": "weights", "status": "pass", "seconds": 20.0, "measured": {"growth_mib": 0.0}}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "benchmarks" / "gpu_check"), str(tmp_path), "--keep"])
    assert runner.main() == 0
    kept, copy = (json.loads((folder / "gpu_check.json").read_text()) for folder in (results.FOLDER, tmp_path))
    assert kept == copy and kept["machine"] == {"gpu": "NVIDIA H200"} and kept["date"].startswith("20")
    assert kept["items"] == {"weights": {"status": "pass", "seconds": 20.0, "measured": {"growth_mib": 0.0}}}
    assert kept["command"] == f"python benchmarks/gpu_check {tmp_path.name}"


def test_variables_are_set_and_removed_for_an_item(runner, monkeypatch, tmp_path):
    program = tmp_path / "__main__.py"
    monkeypatch.setattr(runner, "HERE", program)
    program.write_text("import os; print(os.environ.get('MARK'), os.environ.get('OMP_NUM_THREADS'), flush=True)")
    given = runner.argparse.Namespace(folder=tmp_path, device="cpu")
    item = runner.Item("prints", "none:none", 9, environment=(("MARK", "1"),), without=("OMP_NUM_THREADS",))
    runner.start(item, given, os.environ | {"OMP_NUM_THREADS": "1"}, 60)
    assert (tmp_path / "prints.log").read_text() == "1 None\n"


def test_shares_of_the_peak_rates_of_a_gpu(monkeypatch, tmp_path):
    for folder in ("tests", "benchmarks", "benchmarks/gpu_check"):
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    timings, common = importlib.import_module("timings"), importlib.import_module("common")
    for dtype, tera in ((torch.bfloat16, 989), (torch.float32, 67)):
        cost = timings.Cost(common.Node("cuda", tmp_path), "0.5B", dtype)
        assert cost.of_flops(2.0, tera * 1e12, 8)["mfu"] == pytest.approx(0.5, rel=0.01)
        assert cost.of_bytes(2.0, 4.8e12, 8)["mbu"] == pytest.approx(0.5)


def test_a_process_that_hangs_or_dies_is_a_failure(runner, monkeypatch, tmp_path):
    given = runner.argparse.Namespace(folder=tmp_path, device="cpu")
    item = runner.Item("hangs", "none:none", 1)
    program = tmp_path / "__main__.py"
    monkeypatch.setattr(runner, "HERE", program)
    program.write_text("import time; print('begun', flush=True); time.sleep(60)")
    result = runner.start(item, given, dict(os.environ), 2)
    assert result["status"] == "fail" and "not finished after 2 s" in result["reason"] and result["seconds"] < 20
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    program.write_text("import sys; sys.exit(3)")
    result = runner.start(item, given, dict(os.environ), 20)
    assert "ended with code 3" in result["reason"] == json.loads((tmp_path / "hangs.json").read_text())["reason"]


def test_wheels_are_installed_without_a_network(runner, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(runner, monkeypatch, tmp_path / "out", "--wheels", tmp_path)
    assert "error: --wheels: no .whl file in" in capsys.readouterr().err
    (tmp_path / "some-1.0-py3-none-any.whl").touch()
    commands = []

    def pip(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", pip)
    runner.install(tmp_path, tmp_path / "packages")
    (command,) = commands
    assert {"--no-index", "--no-deps", str(tmp_path / "packages")} <= set(command) and command[-1].endswith("any.whl")
    environment = runner.environment_of(runner.argparse.Namespace(folder=tmp_path, device="cpu"))
    assert (
        environment["PYTHONPATH"].startswith(str(tmp_path / "packages")) and environment["CUDA_VISIBLE_DEVICES"] == ""
    )


@pytest.mark.full
def test_wheels_reach_a_python_that_lacks_them(tmp_path):
    wheels, results = tmp_path / "wheels", tmp_path / "results"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "VALUE = 7")
        about = "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\nRequires-Dist: not-in-the-folder\n"
        wheel.writestr("carried-1.0.dist-info/METADATA", about)
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    command = ["sh", SCRIPT, results, "--device", "cpu", "--wheels", wheels]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHON": str(python)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "wheels installed: 1" in done.stdout
    assert done.stderr == (
        f"error: {python} lacks torch and transformers and accelerate. Run make venv, or set PYTHON to an interpreter with "
        "them.\n"
    )
    code = "import carried; print(carried.VALUE)"
    path = environment | {"PYTHONPATH": str(results / "packages")}
    assert subprocess.run([python, "-c", code], env=path, capture_output=True, text=True).stdout == "7\n"
    (wheels / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.endswith(
        "error: --wheels: pip failed; the lines above give the reason.\n"
    )


def test_without_a_folder_packages_or_a_gpu_no_item_starts(runner, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run(runner, monkeypatch, tmp_path / "file" / "results", "--device", "cpu")
    assert "results: Not a directory. Give a folder that you can write to." in capsys.readouterr().err
    monkeypatch.setattr(runner, "start", None)
    monkeypatch.setattr(runner.subprocess, "run", lambda check, env: subprocess.CompletedProcess(check, 2))
    assert run(runner, monkeypatch, tmp_path, "--device", "cpu") == 2
    assert runner.check_node("cpu") == 0
    with monkeypatch.context() as only_python, pytest.raises(SystemExit, match="2"):
        only_python.setattr(runner, "find_spec", lambda name: None)
        runner.check_node("cpu")
    assert "lacks torch and transformers and accelerate. Run make venv" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("reinforcepp.models.devices.driver_version", lambda: "")
    with pytest.raises(SystemExit, match="2"):
        runner.check_node("cuda")
    assert "no GPU found. To try the code without one, add --device cpu." in capsys.readouterr().err


def test_every_item_has_code_and_an_entry_in_the_list():
    listed = subprocess.run(
        ["sh", SCRIPT, "--list"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for line in listed.splitlines():
        module, _, function = line.split()[-1].partition(":")
        assert f"def {function}(node: Node)" in (ROOT / "benchmarks" / "gpu_check" / f"{module}.py").read_text()
    assert len(listed.splitlines()) >= 15


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_all_items_run_on_a_cpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sh", SCRIPT, tmp_path, "--device", "cpu", "--seconds", "1500"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    results = {result["item"]: result for result in json.loads((tmp_path / "summary.json").read_text())}
    missing = {name for name, result in results.items() if "not installed" in result.get("reason", "")}
    for name, result in results.items():
        expected = "skipped" if name in ON_A_CPU or name in missing else "pass"
        assert result["status"] == expected, (name, result)
        assert ON_A_CPU.get(name, "") in result.get("reason", "") or name in missing
    assert done.returncode == 0, done.stdout
    timings = results["timings_0.5B"]["measured"]["float32"]
    assert (
        timings["head"]["seconds"] > 0
        and timings["update_packed"]["padding"] == 0 < timings["update_padded"]["padding"]
    )
