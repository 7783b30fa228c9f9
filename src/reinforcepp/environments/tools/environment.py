"""The environment of ``--tools``: it runs the calls of each message, and the episode ends with the first message without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from reinforcepp.environments.tools.arguments import argument_error
from reinforcepp.environments.tools.parsing import Call, Parser, call_parser
from reinforcepp.environments.tools.pool import ToolPool, ToolResult
from reinforcepp.environments.tools.schemas import Tool, ToolFunction, load_tools, schemas
from reinforcepp.errors import nearest, shown
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERROR = "Error: "
"""The start of a result that isn't one of the tool."""
CALL_FREQUENCY, FAILURE_FREQUENCY = "tools/call_frequency", "tools/failure_frequency"
UNREADABLE = "unknown"
"""The name of a call that can't be read, as in TRL."""
ID_CHARACTERS = 9
"""Length of the id of a call, which Mistral's chat templates check."""


class ToolEnvironment:
    """One episode with tools.

    A result is a message ``{"role": "tool", "name": ..., "content": ..., "tool_call_id": ...}``. The content of a call that
    failed begins with ``Error: ``: the call can't be read, the tool is unknown, the arguments don't fit, or the tool raised an
    exception or took too long.
    """

    def __init__(self, tools: Mapping[str, Tool], parse: Parser, pool: ToolPool) -> None:
        self._tools, self._parse, self._pool = tools, parse, pool
        self._turn = 0

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin the episode with the row's own prompt."""

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]] | None, None, bool]:
        """Return the results of the message's calls in order; the episode is done if there are none."""
        calls = self._parse(message["content"])
        results = [self._message(call, f"{self._turn}.{i}") for i, call in enumerate(calls)]
        self._turn += 1
        return results or None, None, not results

    def close(self) -> None:
        """Do nothing: the processes are those of all episodes."""

    def _message(self, call: Call, place: str) -> dict[str, str]:
        result = self._run(call)
        content = f"{ERROR}{result.content}" if result.failed else result.content
        call_id = sha256(place.encode()).hexdigest()[:ID_CHARACTERS]
        return {"role": "tool", "name": call.name or UNREADABLE, "content": content, "tool_call_id": call_id}

    def _run(self, call: Call) -> ToolResult:
        if call.error:
            return ToolResult(call.error, failed=True)
        tool = self._tools.get(call.name)
        if tool is None:
            hint = nearest(call.name, self._tools)
            return ToolResult(
                f"unknown tool {shown(call.name)}; the tools are {', '.join(self._tools)}.{hint}", failed=True
            )
        if problem := argument_error(tool.parameters, call.arguments):
            return ToolResult(problem, failed=True)
        return self._pool.call(call.name, call.arguments)


class ToolEnvironments:
    """Makes the environment of each episode; all of them share the tools' worker processes.

    Attributes:
        tools: the tools.
        schemas: the variable ``tools`` of the chat template, which prompts need.
    """

    def __init__(self, tools: Sequence[Tool], parse: Parser, timeout: float) -> None:
        self.tools = tuple(tools)
        self.schemas = schemas(tools)
        self._by_name = {tool.name: tool for tool in tools}
        self._parse = parse
        self._pool = ToolPool(tools, timeout)

    def __call__(self) -> ToolEnvironment:
        """Return the environment of an episode."""
        return ToolEnvironment(self._by_name, self._parse, self._pool)

    def close(self) -> None:
        """End the worker processes; no episode is in progress."""
        self._pool.close()


def tool_environments(
    tools: Sequence[str | ToolFunction], tokenizer: PreTrainedTokenizerBase, timeout: float
) -> ToolEnvironments:
    """Return a factory of environments with ``tools``.

    Args:
        tools: functions, or ``module:function`` or ``FILE.py:function``.
        tokenizer: of the policy; its chat template chooses the format of calls.
        timeout: seconds for each call.

    Raises:
        ConfigError: a function can't be a tool or can't be imported by a worker process, or the chat template doesn't
            support tools.
    """
    loaded = load_tools(tools)
    return ToolEnvironments(loaded, call_parser(tokenizer, loaded), timeout)


def tool_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Return TRL's metrics: calls per episode, and the share of calls that failed.

    Both are ratios of sums, so that those of several ranks need the completions of all.
    """
    contents = [
        str(message["content"])
        for completion in completions
        for message in completion.messages
        if message["role"] == "tool"
    ]
    failed = sum(content.startswith(ERROR) for content in contents)
    return {
        CALL_FREQUENCY: len(contents) / max(1, len(completions)),
        FAILURE_FREQUENCY: failed / max(1, len(contents)),
    }
