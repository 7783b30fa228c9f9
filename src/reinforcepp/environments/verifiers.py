"""Environments of the package verifiers (0.4, ``verifiers.v1``), with the policy as their agent.

The package's environments call an agent, which calls a model behind an HTTP server. Here, a stand-in for the agent hands each
request to the rollout engine and gets back the text, so that training keeps the sampled tokens. Everything else is the package's
own code: the environment's ``run`` and ``finalize``, the trace, stop conditions, rewards and judges.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from reinforcepp.config.environments import EnvironmentConfig
from reinforcepp.data.verifiers import TASK, prompt_messages, task_of, taskset_of
from reinforcepp.errors import ConfigError

if TYPE_CHECKING:
    from verifiers.v1 import Task, Trace

MAIN = "agent"


class VerifiersEnvironment:
    """One episode of the task that the row's column ``verifiers`` names; see ``data.verifiers`` for the tasks that can be run.

    The taskset's own environment runs it if it has one with a single agent. The reward at the end is that of the trace: the
    weighted sum of the task's rewards, and what the environment's ``finalize`` records.

    Args:
        max_turns: replies after which a conversation stops and is scored, as the package's limit of the same name.

    Raises:
        ConfigError: The row isn't a task, or the environment has several agents.
    """

    def __init__(self, max_turns: int = EnvironmentConfig.max_turns) -> None:
        self.max_turns = max_turns
        self._requests: asyncio.Queue[list[dict[str, str]]] = asyncio.Queue()
        self._replies: asyncio.Queue[str] = asyncio.Queue()
        self._running: asyncio.Task[Trace] | None = None

    async def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Begin the task; return the messages of the agent's first request."""
        entry = row.get(TASK)
        if entry is None:
            raise ConfigError(f"the row has no column {TASK!r}. Use data of {TASK}:TASKSET.")
        self._running = asyncio.create_task(self._run(str(entry)))
        messages = await self._next()
        if messages is None:
            await self._finished()
            raise ConfigError("the environment ended before the agent's first message")
        return messages

    async def step(self, message: Mapping[str, Any]) -> tuple[Any, float | None, bool]:
        """Return the messages that follow the agent's, or the trace's reward if the environment has finished."""
        self._replies.put_nowait(str(message["content"]))
        messages = await self._next()
        if messages is not None:
            return messages, None, False
        trace = await self._finished()
        return None, trace.reward, True

    async def close(self) -> None:
        """Cancel the environment if it hasn't finished."""
        if self._running is not None and not self._running.done():
            self._running.cancel()

    async def _next(self) -> list[dict[str, str]] | None:
        """Return the messages of the agent's next request, None if the environment has finished."""
        assert self._running is not None
        request = asyncio.create_task(self._requests.get())
        try:
            await asyncio.wait({request, self._running}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the time limit of the call
            self._running.cancel()
            raise
        finally:
            if not request.done():
                request.cancel()
        return request.result() if request.done() and not request.cancelled() else None

    async def _finished(self) -> Trace:
        assert self._running is not None
        return await self._running

    async def _run(self, entry: str) -> Trace:
        from verifiers.v1 import Episode, TraceTask

        task = task_of(entry)
        environment, name = environment_of(entry.rpartition("#")[0])
        own = getattr(environment.config, name).max_turns if environment is not None else None
        limit = self.max_turns if own is None else min(own, self.max_turns)
        agent = PolicyAgent(name, limit, self._requests, self._replies)
        if environment is None:
            await agent.run(task)
        else:
            agents = SimpleNamespace(**{name: agent})
            await environment.setup(agents)
            await environment.run(task, agents)
        if len(agent.traces) != 1:
            raise ConfigError(
                f"the environment ran its agent {len(agent.traces)} times, but an episode is one conversation"
            )
        if environment is not None:
            described = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
            await environment.finalize(task, Episode(task=described, traces=agent.traces, ok=True))
        return agent.traces[0]


@lru_cache(maxsize=64)
def environment_of(spec: str) -> tuple[Any, str]:
    """Return the own environment of the taskset ``NAME?OPTION=VALUE&...``, None if it has none, and the name of its agent.

    Raises:
        ConfigError: It has several agents.
    """
    from verifiers.v1 import AgentConfig, SingleAgentEnv, environment_class, resolve_env_config

    name = spec.partition("?")[0]
    environment = environment_class(name)
    if environment is SingleAgentEnv:
        return None, MAIN
    taskset, _ = taskset_of(spec)
    config = resolve_env_config({"taskset": taskset.config.model_dump()})
    agents = [key for key, value in config if isinstance(value, AgentConfig)]
    if len(agents) != 1:
        raise ConfigError(
            f"{TASK}:{name}: the environment has {len(agents)} agents ({', '.join(agents)}), but a policy plays only one. Use "
            "an environment with one agent."
        )
    return environment(config), agents[0]


class PolicyAgent:
    """Stands in for ``verifiers.v1.Agent``: its messages come from the policy.

    Attributes:
        traces: of the finished conversations.
        trainable: as in the package, set by an environment's ``setup``.
    """

    def __init__(
        self, name: str, max_turns: int, requests: asyncio.Queue[list[dict[str, str]]], replies: asyncio.Queue[str]
    ) -> None:
        self.name, self.max_turns = name, max_turns
        self.traces: list[Trace] = []
        self.trainable = True
        self._requests, self._replies = requests, replies

    async def run(self, task: Task, **others: Any) -> Trace:
        """Get one reply to the task's prompt; return the scored trace."""
        async with self.interaction(task, **others) as conversation:
            await conversation.turn()
            if conversation.trace.stop_condition is None:
                conversation.trace.stop("agent_completed")
        return conversation.trace

    @asynccontextmanager
    async def interaction(self, task: Task, **others: Any) -> AsyncIterator[Conversation]:
        """Hold a conversation whose user is the caller; score its trace at the end."""
        from verifiers.v1.utils.decorators import invoke

        if others:
            raise ConfigError(f"the environment uses {', '.join(others)} of its agent, which isn't supported")
        conversation = Conversation(task, self.name, self.max_turns, self._requests, self._replies)
        trace = conversation.trace
        await invoke(task.setup, {"trace": trace, "runtime": None})
        yield conversation
        if trace.stop_condition is None:
            trace.stop("user_closed")
        await invoke(task.finalize, {"trace": trace, "runtime": None})
        await task.score(trace)
        trace.is_completed = trace.ok = True
        self.traces.append(trace)


class Conversation:
    """Stands in for ``verifiers.v1.Interaction``: each turn is one reply of the policy."""

    def __init__(
        self,
        task: Task,
        name: str,
        max_turns: int,
        requests: asyncio.Queue[list[dict[str, str]]],
        replies: asyncio.Queue[str],
    ) -> None:
        from verifiers.v1 import AgentConfig, AgentInfo, Trace, TraceTask
        from verifiers.v1.dialects import parse_message
        from verifiers.v1.state import state_cls

        described = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self.task, self.max_turns = task, max_turns
        self.trace = Trace(
            task=described, state=state_cls(type(task))(), agent=AgentInfo(config=AgentConfig(), name=name)
        )
        self._parse: Any = parse_message
        self._requests, self._replies = requests, replies
        self._messages: list[Any] = [parse_message(message) for message in prompt_messages(task)]
        self._sent = 0

    async def turn(self, message: str | Sequence[Any] | None = None) -> Any:
        """Send the user's message, or take the reply to the task's own prompt; return the package's ``Segment``."""
        from verifiers.v1 import AssistantMessage, Response, Segment
        from verifiers.v1.graph import prepare_turn

        if message is None and not self._messages:
            raise ValueError("the task has no prompt, so the first turn needs a message")
        if isinstance(message, str):
            message = [{"role": "user", "content": message}]
        if message is not None and not self._messages and self.task.data.system_prompt:
            message = [{"role": "system", "content": self.task.data.system_prompt}, *message]
        self._messages += [self._parse(each) if isinstance(each, dict) else each for each in message or ()]
        if await self._is_stopped():
            return Segment(messages=[], terminated=True)
        new = self._messages[self._sent :]
        self._requests.put_nowait([{"role": each.role, "content": _text(each.content)} for each in new])
        reply = AssistantMessage(content=await self._replies.get())
        response = Response(
            id=f"{self.trace.id}-{self.trace.num_turns}",
            created=int(time.time()),
            model="policy",
            message=reply,
            finish_reason="stop",
        )
        prepare_turn(self.trace, self._messages).commit(response)
        self._messages.append(reply)
        self._sent = len(self._messages)
        return Segment(messages=[reply])

    async def _is_stopped(self) -> bool:
        from verifiers.v1.utils.decorators import invoke

        if self.trace.num_turns >= self.max_turns:
            self.trace.stop("max_turns")
            return True
        for stop in self.task.hooks("stop"):
            result = invoke(stop, {type(self.trace): self.trace, "trace": self.trace})
            if await result if asyncio.iscoroutine(result) else result:
                self.trace.stop(stop.__name__)
                return True
        return False


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise ConfigError("the environment sent a message that isn't text, which isn't supported")
    return content
