"""Tasks of the package verifiers (0.4, ``verifiers.v1``) as prompts; ``environments.verifiers`` runs them.

A row's column ``verifiers`` names its task, as in ``my_taskset?limit=50#17``: the taskset, options of its configuration, and the
position. Tasks that need a program, a tool server or a container are refused, because the policy's messages come from the rollout
engine here, and not from the package's harness.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from reinforcepp.config.data_spec import VERIFIERS, DataName
from reinforcepp.errors import ConfigError, first_line, nearest
from reinforcepp.runtime.process import add_to_path

if TYPE_CHECKING:
    from verifiers.v1 import Task, Taskset

TASK = VERIFIERS
"""Column with the name of a row's task."""
HOOKS = ("setup", "finalize")


def taskset_rows(name: DataName) -> list[dict[str, Any]]:
    """Return a row with ``prompt`` for each task of a taskset.

    Raises:
        ConfigError: The package or the taskset isn't installed, an option isn't valid, or a task can't be run here.
    """
    spec = f"{name.taskset}?{urlencode(name.generator)}"
    return [{"prompt": _prompt(task, name), TASK: f"{spec}#{index}"} for index, task in enumerate(tasks_of(spec))]


def task_of(entry: str) -> Task:
    """Return the task that the column ``verifiers`` names.

    Raises:
        ConfigError: It isn't the name of a task.
    """
    spec, _, index = str(entry).rpartition("#")
    tasks = tasks_of(spec) if spec and index.isdecimal() else ()
    if not tasks or int(index) >= len(tasks):
        raise ConfigError(
            f"{TASK}: {entry!r} isn't the name of a task. Use rows of {VERIFIERS}:TASKSET, which have the column."
        )
    return tasks[int(index)]


@lru_cache(maxsize=64)
def tasks_of(spec: str) -> tuple[Task, ...]:
    """Return the tasks of ``TASKSET?OPTION=VALUE&...``, which were checked.

    Raises:
        ConfigError: As :func:`taskset_rows`.
    """
    text = f"{VERIFIERS}:{spec.rstrip('?')}"
    taskset, limit = taskset_of(spec)
    if limit is None and not taskset.bounded:
        raise ConfigError(f"{text}: the taskset never ends. Set limit, as in {VERIFIERS}:NAME?limit=200.")
    if taskset.toolsets(taskset.config):
        raise ConfigError(f"{text}: the taskset has tool servers, which aren't supported. Use tasks without tools.")
    try:
        tasks = tuple(islice(taskset, limit))
    except Exception as error:  # code of users can raise anything
        raise ConfigError(f"{text}: load failed: {type(error).__name__}: {first_line(error)}") from error
    if not tasks:
        raise ConfigError(f"{text}: the taskset has no task. Raise limit, or correct its options.")
    for task in tasks:
        if problem := _problem(task):
            raise ConfigError(
                f"{text}: task {task.data.idx} {problem}, which isn't supported. Use tasks of text whose rewards read the "
                "conversation alone."
            )
    return tasks


def taskset_of(spec: str) -> tuple[Taskset, int | None]:
    """Return the taskset of ``TASKSET?OPTION=VALUE&...``, and its option ``limit``.

    Raises:
        ConfigError: The package or the taskset isn't installed, or an option isn't valid.
    """
    name, _, query = spec.partition("?")
    text = f"{VERIFIERS}:{name}"
    options = dict(parse_qsl(query, keep_blank_values=True))
    limit = options.pop("limit", None)
    if limit is not None and (not limit.isdecimal() or not int(limit)):
        raise ConfigError(f"{text}: limit must be a number of tasks of at least 1, not {limit}.")
    try:
        from pydantic import ValidationError
        from verifiers.v1 import load_taskset, taskset_config_type
    except ImportError as error:
        raise ConfigError(
            f"{text}: needs the package verifiers. Install it in an environment without vLLM, which needs other versions of its "
            "requirements: pip install 'reinforcepp[verifiers]'"
        ) from error
    add_to_path(Path.cwd())
    try:
        config = taskset_config_type(name).model_validate({**options, "id": name})
        taskset: Taskset = load_taskset(config)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{text}: taskset not found: {first_line(error)} Install its package, or run in the folder of its module."
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        reason = first_line(error)
        if isinstance(error, ValidationError):
            found = error.errors()[0]
            option = ".".join(map(str, found["loc"]))
            reason = f"option {option}: {found['msg']}"
            if found["type"] == "extra_forbidden":
                fields = taskset_config_type(name).model_fields
                raise ConfigError(
                    f"{text}: option {option!r} not found.{nearest(option, ['limit', *fields])}"
                ) from error
        raise ConfigError(f"{text}: {reason.rstrip('.')}. Correct the taskset or its options.") from error
    return taskset, int(limit) if limit is not None else None


def _problem(task: Task) -> str | None:
    """Return what a task needs that only the package's own programs and containers give."""
    from verifiers.v1 import Task
    from verifiers.v1.utils.decorators import discover_decorated

    data, kind = task.data, type(task)
    if kind.NEEDS_CONTAINER or data.image or data.skills or data.artifacts:
        return "needs a container"
    if task.toolsets(task.config):
        return "has tool servers"
    if discover_decorated(task, "intercept"):
        return "intercepts requests"
    scored: list[Callable[..., Any]] = [*task.hooks("reward"), *task.hooks("metric"), *task.hooks("stop")]
    scored += [judge.score for judge in task.plugged_judges()]
    scored += [getattr(task, hook) for hook in HOOKS if getattr(kind, hook) is not getattr(Task, hook)]
    for function in scored:
        needed = inspect.signature(function).parameters.get("runtime")
        if needed is not None and needed.default is inspect.Parameter.empty:
            return f"runs programs in {function.__name__}"
    messages = data.prompt if isinstance(data.prompt, list) else []
    if any(not isinstance(message.content, str) for message in messages):
        return "has a prompt that isn't text"
    return None


def _prompt(task: Task, name: DataName) -> Any:
    """Return the prompt of a task; a placeholder if the environment writes it."""
    messages = prompt_messages(task)
    if not messages:
        return f"{name.taskset}: task {task.data.idx}"
    return messages if len(messages) > 1 else messages[0]["content"]


def prompt_messages(task: Task) -> list[dict[str, str]]:
    """Return the messages that a task begins with; none if the environment writes the first one."""
    data = task.data
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if data.prompt is None:
        return []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *({"role": message.role, "content": message.content} for message in data.prompt)]
