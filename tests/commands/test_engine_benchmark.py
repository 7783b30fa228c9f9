import json
import sys

import pytest
import tiny
from warm import warm_python

from reinforcepp.commands.engine_benchmark import cli as engine_cli
from reinforcepp.commands.engine_benchmark import run as comparing
from reinforcepp.commands.engine_benchmark.cli import main
from reinforcepp.errors import ConfigError
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.types import Sampling

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


# --- figures --------------------------------------------------------------------------------------------------------


def measured(way, size, turn, seconds, tokens, longest=None):
    return {
        "way": way,
        "batch_size": size,
        "round": turn,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "latency_median": seconds,
        "latency_p95": seconds,
        "longest_answer": longest or tokens // size,
        "peak_rss_mib": 100.0 + turn,
    }


def test_medians_spread_and_bandwidth():
    rounds = [measured("one_by_one", 4, turn, seconds, 40) for turn, seconds in enumerate([4.0, 2.0, 8.0])]
    rounds += [measured("vllm", 4, turn, seconds, 36, longest=10) for turn, seconds in enumerate([1.0, 0.5, 2.0])]
    plain, vllm = comparing._summary(rounds, {"weight_bytes": 100, "bytes_per_second": 4000.0})
    assert (plain["way"], vllm["way"]) == ("one_by_one", "vllm")
    assert plain["tokens_per_second"] == 10
    assert (plain["tokens_per_second_min"], plain["tokens_per_second_max"]) == (5, 20)
    assert plain["bandwidth_fraction"] == 10 * 100 / 4000  # one by one, each token is a step
    assert vllm["tokens_per_second"] == 36
    assert vllm["bandwidth_fraction"] == 10 * 100 / 4000  # in a batch, as many steps as the longest answer has tokens
    assert vllm["peak_rss_mib"] == 102


def test_headline_compares_the_set_or_the_largest_batch_of_one_prompt():
    rows = comparing._summary(
        [
            measured("one_by_one", 1, 0, 1.0, 10),
            measured("batched", 1, 0, 1.0, 10),
            measured("batched", 8, 0, 1.0, 50),
            measured("vllm", 1, 0, 1.0, 20),
            measured("vllm", 8, 0, 1.0, 150),
        ],
        {"weight_bytes": 1, "bytes_per_second": 100.0},
    )
    quality = {"vllm": {"greedy_agreement": 1.0, "max_logprob_gap": 0.0}}
    one_prompt = comparing.Comparison("m", [[1, 2]], Sampling(10), batch_sizes=[1, 8])
    headline = comparing._headline(rows, one_prompt, quality)
    assert headline["vllm_over_one_by_one"] == 15
    assert headline["vllm_over_batched"] == 3
    assert headline["bandwidth_fraction"] == 0.2
    assert one_prompt.batch(3) == [[1, 2]] * 3
    assert comparing._headline(rows[:3], one_prompt, quality)["vllm_over_one_by_one"] is None


def test_only_tokens_before_the_first_difference_agree():
    assert comparing._common([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert comparing._common([1, 2], [1, 2, 3]) == 2
    assert comparing._common([], []) == 0


# --- the whole thing ------------------------------------------------------------------------------------------------


@needs_vllm
def test_compare_performance(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", warm_python())
    output = tmp_path / "result.json"
    flags = ["--model_name", "unused/name", "--rlhf_model_path", model, "--prompt", "How do I check the IP address?"]
    flags += ["--max_new_tokens", "8", "--batch_sizes", "1", "3", "--rounds", "2", "--output", str(output)]
    assert main(["--mode", "compare_performance", *flags]) == 0
    result = json.loads(output.read_text())
    assert result["greedy_agreement"] == 1
    assert result["max_logprob_gap"] < 1e-4
    assert {row["way"] for row in result["summary"]} == set(comparing.WAYS)
    assert [r["batch_size"] for r in result["rounds"] if r["way"] == "vllm"] == [1, 3, 1, 3]
    assert result["headline_batch_size"] == 3
    assert all(result[key] > 0 for key in ("vllm_over_one_by_one", "vllm_over_batched", "bandwidth_fraction"))
    assert all(0 < mib < 20_000 for mib in result["peak_rss_mib"].values())
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "vLLM is" in capsys.readouterr().out


def test_test_generation_shows_both_models(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ping?\n\nWhich host?\n", encoding="utf-8")
    flags = ["--model_name", model, "--rlhf_model_path", model, "--prompts_file", str(prompts), "--max_new_tokens", "4"]
    assert main(["--mode", "test_generation", *flags]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("> ")] == ["> ping?", "> Which host?"]
    assert sum(line.startswith(f"[{model}]") for line in shown) == 4


@needs_vllm
def test_test_vllm_checks_itself(model, capsys):
    flags = ["--model_name", model, "--prompt", "ping?", "--max_new_tokens", "4", "--temperature", "0"]
    assert main(["--mode", "test_vllm", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("> ping?")
    assert "agrees with" in captured.err.replace("\n", " ")


# --- wrong input ----------------------------------------------------------------------------------------------------

GOOD = {"--mode": "test_generation", "--model_name": "MODEL", "--prompt": "ping?", "--max_new_tokens": "4"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--mode": "compare_perfromance"}, "Did you mean 'compare_performance'"),
        ({"--mode": None}, "--mode"),
        ({"--model_name": None}, "--model_name or --rlhf_model_path"),
        ({"--model_name": "/no/such/model"}, "/no/such/model: model folder not found"),
        ({"--prompt": None}, "either --prompt or --prompts_file"),
        ({"--prompts_file": "/no/such/file"}, "either --prompt or --prompts_file"),
        ({"--prompt": None, "--prompts_file": "/no/such/file"}, "/no/such/file"),
        ({"--max_new_tokens": "0"}, "max_new_tokens must be at least 1"),
        ({"--max_new_tokens": "many"}, "invalid int value: 'many'"),
        ({"--max_new_tokens": "9999"}, "exceed the model's context of 256"),
        ({"--temperature": "-1"}, "temperature must be 0"),
        ({"--top_p": "0"}, "top_p must be above 0"),
        ({"--batch_sizes": "0"}, "batch_sizes must be 1 or more"),
        ({"--gpu_memory_utilization": "2"}, "gpu_memory_utilization must be"),
        ({"--output": "/no/such/folder/x.json"}, "folder of /no/such/folder/x.json doesn't exist"),
        ({"--temprature": "1"}, "Did you mean '--temperature'"),
    ],
)
def test_wrong_input_is_a_one_line_error_with_exit_code_2(model, capsys, changes, complaint):
    flags = [text for pair in (GOOD | changes).items() if pair[1] is not None for text in pair]
    assert main([model if text == "MODEL" else text for text in flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("mode", ["compare_performance", "test_generation", "test_vllm"])
def test_an_unusable_gpu_stops_every_mode_unless_the_cpu_is_chosen(model, capsys, monkeypatch, mode):
    def chosen(use_cpu):
        raise ConfigError(f"use_cpu={use_cpu}")

    monkeypatch.setattr(engine_cli, "choose_device", chosen)
    flags = ["--mode", mode, "--model_name", model, "--prompt", "ping?"]
    assert main(flags) == main([*flags, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: use_cpu=False\nerror: use_cpu=True\n"


def test_the_error_of_a_dead_process_has_its_last_output(monkeypatch):
    monkeypatch.setattr(comparing.sys, "executable", "/bin/false")
    with pytest.raises(comparing.RolloutError, match=r"process for vLLM ended with code 1"):
        comparing.Process("vllm", comparing.Comparison("m", [[1]], Sampling(4)))
