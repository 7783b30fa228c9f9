"""Episodes with tools: results, errors as results, worker processes that hang or end, and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from reinforcepp.environments.protocol import checked_step
from reinforcepp.environments.tools.environment import ToolEnvironments, tool_environments, tool_metrics
from reinforcepp.environments.tools.parsing import FORMATS, format_parser
from reinforcepp.environments.tools.pool import MAX_RESULT_CHARACTERS, ToolPool
from reinforcepp.environments.tools.schemas import load_tools
from reinforcepp.environments.tools.worker import result_of
from reinforcepp.errors import ConfigError
from scripts import SOURCE

FUNCTIONS = """
import os, subprocess, sys, time

def _tool(text):
    def mark(function):
        function.__doc__ = text + "\\n\\nArgs:\\n    x: A number."
        return function
    return mark

@_tool("Add one.")
def add_one(x: int):
    return x + 1

@_tool("Fail.")
def fail(x: int):
    raise KeyError(x)

@_tool("Print.")
def chatter(x: int):
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr)
    os.write(1, b'{"content": "forged", "failed": false}\\n')
    return input() if x else "printed"

@_tool("Hang.")
def hang(x: int):
    subprocess.Popen(["sleep", str(x)])
    time.sleep(x)

@_tool("End the process.")
def end(x: int):
    os._exit(x)

@_tool("Fork.")
def fork(x: int):
    return "the copy" if os.fork() == 0 else x

@_tool("Return the number of the process.")
def process(x: int):
    time.sleep(x / 10)
    return os.getpid()
"""
NAMES = ["add_one", "fail", "chatter", "hang", "end", "process", "fork"]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    file = tmp_path_factory.mktemp("tools") / "mine.py"
    file.write_text(FUNCTIONS)
    return load_tools([f"{file}:{name}" for name in NAMES])


@pytest.fixture(scope="module")
def environments(tools):
    made = ToolEnvironments(tools, format_parser(FORMATS["hermes"], tools), timeout=30)
    yield made
    made.close()


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def step(environment, text: str):
    return checked_step(environment.step({"role": "assistant", "content": text}))


# --- episodes ---------------------------------------------------------------------------------------------------------


def test_an_episode(environments):
    environment = environments()
    assert environment.reset({"prompt": "Add."}) is None
    first = step(environment, call("add_one", x=1) + call("add_one", x=2))
    assert [(m["role"], m["name"], m["content"]) for m in first.observation] == [
        ("tool", "add_one", "2"),
        ("tool", "add_one", "3"),
    ]
    assert (first.reward, first.done) == (None, False)
    second = step(environment, call("add_one", x=3))
    ids = [m["tool_call_id"] for m in (*first.observation, *second.observation)]
    assert len(set(ids)) == 3
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    last = step(environment, "It is 4.")
    assert (last.observation, last.reward, last.done) == ((), None, True)


def test_the_ids_of_calls_depend_on_their_place_alone(environments):
    one, other = environments(), environments()
    assert step(one, call("add_one", x=1)) == step(other, call("add_one", x=1))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (call("fail", x=7), "Error: KeyError: 7"),
        (call("chatter", x=0), "printed"),
        (call("chatter", x=1), "Error: EOFError: EOF when reading a line"),
        (
            call("add_on", x=7),
            "Error: unknown tool 'add_on'; the tools are add_one, fail, chatter, hang, end, process, fork. Did",
        ),
        (call("add_one", y=7), "Error: unknown argument 'y'; the arguments are x"),
        (call("add_one", x="7"), """Error: the argument 'x' must be {"type": "integer"}, not '7'"""),
        ("<tool_call>{</tool_call>", "Error: the call isn't valid JSON"),
    ],
)
def test_errors_are_results(environments, text, content):
    (message,) = step(environments(), text).observation
    assert message["content"].startswith(content)


def test_a_tool_that_ends_its_process_fails_alone(environments):
    result = step(environments(), call("end", x=3) + call("add_one", x=1))
    assert [m["content"] for m in result.observation] == ["Error: end ended its process", "2"]


def test_a_tool_that_forks_gives_one_result_per_call(tools):
    pool = ToolPool(tools, 5.0)
    try:
        assert [pool.call("fork", {"x": i}).content for i in range(4)] == ["0", "1", "2", "3"]
    finally:
        pool.close()


def test_schemas_are_those_of_the_tools(environments, tools):
    assert environments.schemas == [tool.schema for tool in tools]


def test_a_tool_that_the_worker_cannot_import_is_an_error(tmp_path):
    file = tmp_path / "once.py"
    file.write_text(f'{FUNCTIONS}\nopen(__file__, "w").write("1 / 0")\n')
    with pytest.raises(ConfigError, match=r"a worker process can't import them: .*ZeroDivisionError"):
        ToolPool(load_tools([f"{file}:add_one"]), timeout=30)


# --- results ----------------------------------------------------------------------------------------------------------


async def later(x):
    return x


@pytest.mark.parametrize(
    ("function", "content"),
    [
        (lambda: "text", "text"),
        (lambda: None, "null"),
        (lambda: 1.5, "1.5"),
        (lambda: {"a": ["é"]}, '{"a": ["é"]}'),
        (lambda: {1: object}, """{"1": "<class 'object'>"}"""),
        (lambda: later([1]), "[1]"),
        (lambda: "\ud800", "?"),
        (lambda: "x" * 12, "xxxxxxxxxx ... (2 more characters)"),
    ],
)
def test_results_become_text(function, content):
    assert result_of(function, {}, 10 if content.startswith("x") else 1000) == (content, False)


def test_an_exception_becomes_text():
    def leave():
        raise SystemExit(3)

    assert result_of(leave, {}, 1000) == ("SystemExit: 3", True)
    assert result_of(lambda: [].pop(), {}, 12) == ("IndexError:  ... (19 more characters)", True)
    assert MAX_RESULT_CHARACTERS == 4000


# --- processes --------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.full
def test_a_call_that_hangs_is_ended_and_the_next_one_works(tools):
    pool = ToolPool(tools, timeout=1.0)
    before = int(pool.call("process", {"x": 0}).content)
    begin = time.monotonic()
    result = pool.call("hang", {"x": 7654321})
    assert (result.content, result.failed) == ("hang took longer than 1 seconds", True)
    assert time.monotonic() - begin < 30
    assert gone(before)
    assert "7654321" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert pool.call("add_one", {"x": 1}).content == "2"
    assert int(pool.call("process", {"x": 0}).content) != before
    pool.close()


@pytest.mark.full
def test_calls_of_threads_run_at_the_same_time_and_processes_are_used_again(tools):
    pool = ToolPool(tools, timeout=30)
    first = [pool.call("process", {"x": 0}).content for _ in range(3)]
    assert len(set(first)) == 1
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(pool.call("process", {"x": 5}).content)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) > 1
    pool.close()
    assert all(gone(int(pid)) for pid in found)


@pytest.mark.full
def test_workers_end_with_the_process_that_started_them(tools, tmp_path):
    code = (
        "import os, signal, threading, time\n"
        "from reinforcepp.environments.tools.pool import ToolPool\n"
        "from reinforcepp.environments.tools.schemas import Tool\n"
        f"pool = ToolPool([Tool(n, s, {{}}) for n, s in {[(tool.name, tool.source) for tool in tools]!r}], 60)\n"
        "print(pool.call('process', {'x': 0}).content, flush=True)\n"
        "threading.Thread(target=pool.call, args=('hang', {'x': 8765432}), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert gone(int(done.stdout))
    assert "8765432" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_trl():
    def episode(*contents: str):
        return SimpleNamespace(messages=[{"role": "tool", "content": text} for text in contents])

    # 3 calls in 2 episodes are 1.5 per episode; 1 of 3 calls failed.
    found = tool_metrics([episode("1", "Error: KeyError"), episode("No Error: here")])
    assert found == {"tools/call_frequency": 1.5, "tools/failure_frequency": pytest.approx(1 / 3)}
    assert tool_metrics([episode()]) == {"tools/call_frequency": 0.0, "tools/failure_frequency": 0.0}


def test_the_factory_of_a_training():
    import tiny
    from environments.test_tool_calls import HERMES

    made = tool_environments(["reinforcepp.environments.examples:calculator"], tiny.chat_tokenizer(HERMES), 10)
    (message,) = step(made(), call("calculator", expression="6 * 7")).observation
    assert message["content"] == "42"
    made.close()
