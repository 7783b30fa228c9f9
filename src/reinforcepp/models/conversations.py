"""Render prompts and answers as text by the tokenizer's chat template.

A prompt is a list of messages or a text, which is a user message. Special tokens in the contents are marked, see
:mod:`reinforcepp.models.special_tokens`; the functions without an underscore remove the marks.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from reinforcepp.errors import ModelError, first_line
from reinforcepp.models.special_tokens import encode, marked, unmarked
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_PROMPT, PROBE_ANSWER = "How do I see my routes?", "Run ip route."
"""A question and its answer, by which the chat template shows how it writes a turn."""
PROBE_SYSTEM = "Be brief."
STAND_IN = "\ufdd2\ufdd3"
"""Noncharacters in place of an earlier answer."""
STAND_INS: tuple[Mapping[str, Any], ...] = (
    {"role": "assistant", "content": STAND_IN},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "standinid", "type": "function", "function": {"name": "call", "arguments": {"value": STAND_IN}}}
        ],
    },
)
"""An answer, and a call for templates that accept the result of a tool only after one."""
TEMPLATE_TIMEOUT_SECONDS = 30.0
"""Time in which a chat template must format one conversation."""
OPEN_TAG = re.compile(r"<([\w-]+)>\s*\Z")
THOUGHT = re.compile(r"\s*<([\w-]+)>")

Variables = Mapping[str, Any]
"""Variables of the chat template, such as ``enable_thinking``, and ``tools``."""
_ARGUMENTS = {
    *("conversation", "chat_template", "tokenize", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Arguments of ``apply_chat_template`` that aren't variables. Data must not set them: ``chat_template`` replaces the template."""

log = logger(__name__)


def as_messages(prompt: Conversation) -> list[Mapping[str, Any]]:
    """Return the messages of a prompt; a text is a user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


# --- prompts ----------------------------------------------------------------------------------------------------------


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, **variables: Any) -> str:
    """Return ``prompt`` in the chat template, with the generation prompt at the end.

    If the template doesn't support a system message, its text is put before the first user message.

    Raises:
        ModelError: the template rejects the conversation, or a variable is an argument of ``apply_chat_template``.
    """
    return unmarked(marked_prompt(tokenizer, prompt, variables))


def marked_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, variables: Variables) -> str:
    """Return the text of :func:`format_prompt` with marks."""
    _check_variables(variables)
    messages = _with_system(tokenizer, as_messages(prompt))
    if any(message.get("role") == "tool" or message.get("tool_calls") for message in messages):
        _cached(tokenizer, "tools", _warn_of_lost_tools)
    return _render_or_raise(tokenizer, messages, {"add_generation_prompt": True, **variables})


def _check_variables(variables: Variables) -> None:
    for name in sorted(_ARGUMENTS & variables.keys()):
        raise ModelError(f"chat_template_kwargs: {name!r} isn't a variable of the chat template. Remove it.")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], variables: Variables) -> str:
    """Return ``messages`` in the chat template; special tokens in their contents are marked.

    Raises:
        TemplateError, TypeError: the template rejects the conversation, raises anything else, or needs too long.
    """
    from jinja2 import TemplateRuntimeError

    conversation = [
        {key: value if key == "role" else _marked(tokenizer, value) for key, value in message.items()}
        for message in messages
    ]
    try:
        with _time_limit():
            return str(tokenizer.apply_chat_template(conversation, **{"tokenize": False, **variables}))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError) as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _time_limit() -> Iterator[None]:
    """End a template of an untrusted folder that loops for too long.

    Only the main thread can be interrupted, and only if nobody else has set a timer.
    """
    from jinja2 import TemplateRuntimeError

    def stop(number: int, frame: FrameType | None) -> None:
        raise TemplateRuntimeError(f"it needs more than {TEMPLATE_TIMEOUT_SECONDS:g} seconds")

    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not here or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _marked(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    if isinstance(value, str):
        return marked(tokenizer, value)
    if isinstance(value, Mapping):
        return {key: _marked(tokenizer, each) for key, each in value.items()}
    return [_marked(tokenizer, each) for each in value] if isinstance(value, list | tuple) else value


def _render_or_raise(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], variables: Variables
) -> str:
    from jinja2 import TemplateError

    try:
        return _render(tokenizer, messages, variables)
    except (TemplateError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ModelError(
            f"The chat template can't format the conversation of the roles {roles} ({reason}). Correct its messages, or set "
            "another chat_template."
        ) from error


def _with_system(tokenizer: PreTrainedTokenizerBase, messages: list[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return ``messages``; a system message moves into the first user message if the template can't write it."""
    if not messages or messages[0].get("role") != "system" or _cached(tokenizer, "system", _writes_system):
        return messages
    system, *rest = messages
    if not rest:
        return [{**system, "role": "user"}]
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _writes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": PROBE_SYSTEM}, {"role": "user", "content": PROBE_PROMPT}]
    try:
        return PROBE_SYSTEM in _render(tokenizer, messages, {"add_generation_prompt": True})
    except (TemplateError, TypeError):  # some templates reject a system message
        return False


def _warn_of_lost_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    from jinja2 import TemplateError

    call = {"type": "function", "function": {"name": "read_routes", "arguments": {"note": PROBE_SYSTEM}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": PROBE_PROMPT},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": PROBE_ANSWER},
    ]
    try:
        text = _render(tokenizer, messages, {"add_generation_prompt": True})
    except (TemplateError, TypeError):  # the template is strict about tools, so it writes them
        return
    lost = [
        name for name, part in (("tool calls", PROBE_SYSTEM), ("results of tools", PROBE_ANSWER)) if part not in text
    ]
    if lost:
        log.warning(
            "The chat template omits %s of conversations. Set a chat_template that writes them.", " and ".join(lost)
        )


T = TypeVar("T")
_CACHE: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str], Any]] = WeakKeyDictionary()
MAX_CACHED = 1024
"""Cached values per tokenizer, because variables can differ per row."""


def _cached(tokenizer: PreTrainedTokenizerBase, name: str, find: Callable[[PreTrainedTokenizerBase], T]) -> T:
    """Return what ``find`` found for the tokenizer's present chat template."""
    known = _CACHE.setdefault(tokenizer, {})
    key = (str(tokenizer.chat_template), name)
    if key not in known:
        if len(known) >= MAX_CACHED:
            known.clear()
        known[key] = find(tokenizer)
    found: T = known[key]
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """How a chat template writes an answer after the generation prompt.

    Attributes:
        before: text between the generation prompt and the answer, such as a space or an empty ``<think></think>``.
        after: text between the answer and its end token.
        end: text of the token that ends an answer; EOS if the template writes none.
        dropped: end of the generation prompt that isn't part of a whole conversation, such as ``<think>``.
        prefill: start of the answer that the generation prompt writes: an open tag such as ``<think>``.
    """

    before: str
    after: str
    end: str
    dropped: str
    prefill: str


def turn_format(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> Turn:
    """Return how the tokenizer's chat template writes an answer.

    Raises:
        ModelError: the template omits the answer, or formats a prompt differently if an answer follows.
    """
    variables = variables or {}
    _check_variables(variables)
    name = sha256(json.dumps(variables, sort_keys=True, default=str).encode()).hexdigest()
    return _cached(tokenizer, f"turn {name}", lambda tokenizer: _turn_format(tokenizer, variables))


def _turn_format(tokenizer: PreTrainedTokenizerBase, variables: Variables) -> Turn:
    messages = [{"role": "user", "content": PROBE_PROMPT}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        start = marked_prompt(tokenizer, PROBE_PROMPT, variables)
        whole = _render_or_raise(tokenizer, messages, variables)
    except ModelError as error:
        reason = str(error.__cause__).strip().splitlines()[0].rstrip(".")
        raise ModelError(f"The chat template can't format a prompt and an answer ({reason}). Fix it.") from error
    if PROBE_ANSWER not in whole:
        raise ModelError("The chat template omits the message of the role assistant. Write it in the template.")
    context = _common_start(start, whole)
    if PROBE_PROMPT in start and PROBE_PROMPT not in context:
        raise ModelError(
            "The chat template formats a prompt differently if a completion follows it, so training and inference would "
            "differ. Use a template that writes both alike up to the end of the prompt."
        )
    before, _, tail = whole[len(context) :].rpartition(PROBE_ANSWER)
    end = _end_token(tokenizer, tail)
    after = tail.partition(end)[0]
    dropped, prefill = start[len(context) :], ""
    if (tag := OPEN_TAG.search(start)) is not None:
        name, is_thought = tag[1], bool(dropped) or f"</{tag[1]}>" in before
        prefill = tag[0] if (is_thought or name.startswith(("think", "reason"))) and f"</{name}>" not in tail else ""
    return Turn(before, after, end, dropped, prefill)


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _end_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """Return the first special token in the text after an answer, or any other added token, otherwise EOS."""
    added = [tokenizer.added_tokens_decoder[i] for i in encode(tokenizer, tail) if i in tokenizer.added_tokens_decoder]
    added = sorted((token for token in added if token.content.strip()), key=lambda token: not token.special)
    return added[0].content if added else str(tokenizer.eos_token)


def format_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: str, *, finished: bool = True, **variables: Any
) -> tuple[str, str]:
    """Return the formatted prompt, and the text that follows it for ``answer``, without its end token.

    The template writes the answer of a finished turn. If it would omit a part of the answer, as templates do that remove
    the reasoning, the answer follows the generation prompt as it is, as does one that was truncated. If the generation
    prompt opens a tag such as ``<think>`` that the answer doesn't have, the formatted prompt ends before the tag. If the
    template writes the prompt differently once an answer follows, the prompt ends where the two begin to differ.

    Raises:
        ModelError: the template rejects the conversation or omits every answer.
    """
    context, target = marked_example(tokenizer, prompt, answer, finished, variables)
    return unmarked(context), unmarked(target)


def marked_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    answer: str,
    finished: bool,
    variables: Variables,
    start: str | None = None,
) -> tuple[str, str]:
    """Return the texts of :func:`format_example` with marks; ``start`` is the formatted prompt, if it is known."""
    turn = turn_format(tokenizer, variables)
    start = marked_prompt(tokenizer, prompt, variables) if start is None else start
    marked_answer = marked(tokenizer, answer)
    if finished:
        whole = marked_conversation(tokenizer, prompt, answer, variables)
        context = _context(tokenizer, turn, start, whole)
        written = whole[len(context) :]
        written = written.rpartition(turn.end)[0] if turn.end in written else written
        if _contains(written, marked_answer) and not _adds_thought(turn, written, marked_answer):
            return context, written
    after = turn.after if finished else ""
    tag = turn.prefill.strip()
    if tag and marked_answer.lstrip().startswith(tag):
        return start, marked_answer.lstrip().removeprefix(tag).lstrip("\n") + after
    if tag and tag.replace("<", "</") in marked_answer:
        return start, marked_answer + after
    before = turn.before if not turn.before.strip() else ""
    return start.removesuffix(turn.dropped), before + marked_answer + after


def marked_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: str, variables: Variables
) -> str:
    """Return a prompt and its answer as the template writes them, with what it writes after the answer, with marks."""
    messages = [*_with_system(tokenizer, as_messages(prompt)), {"role": "assistant", "content": answer}]
    return _render_or_raise(tokenizer, messages, variables)


def _context(tokenizer: PreTrainedTokenizerBase, turn: Turn, start: str, whole: str) -> str:
    """Return the part of the formatted prompt ``start`` with which the whole conversation begins."""
    for context in (start, start.removesuffix(turn.dropped)):
        if whole.startswith(context):
            return context
    _cached(tokenizer, "unstable", _warn_of_unstable_template)
    return _common_start(start, whole)


def _warn_of_unstable_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    log.warning(
        "The chat template writes some prompts differently once an answer follows. Such a prompt ends where the two texts "
        "begin to differ."
    )
    return True


def _contains(text: str, answer: str) -> bool:
    return answer.strip() in text or "".join(answer.split()) in "".join(text.split())


def _adds_thought(turn: Turn, written: str, answer: str) -> bool:
    """Return whether the template put an empty thought before an answer that begins with one."""
    tag = THOUGHT.match(answer)
    return bool(tag and f"<{tag[1]}>" in turn.before and written.startswith(turn.before))


def format_completion(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, answer: str) -> str:
    """Return the text after the formatted prompt for the answer ``answer``, without its end token; errors as above."""
    return format_example(tokenizer, prompt, answer)[1]


def marked_turn(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Conversation,
    observation: Sequence[Mapping[str, Any]],
    variables: Variables,
) -> str:
    """Return the text that the template writes from the end of an answer's end token to the start of the next answer.

    ``observation`` are the messages between the two answers. The text begins with what follows the end token, such as a line
    break, and ends with the generation prompt; special tokens in the messages have marks. What the template does with earlier
    answers, such as removing their reasoning, doesn't matter: a stand-in is the answer before ``observation``.

    Raises:
        ModelError: the template rejects such a conversation, or omits the answer or a message of ``observation``.
    """
    end = turn_format(tokenizer, variables).end
    variables = {"add_generation_prompt": True, **variables}
    problem: ModelError | None = None
    for answer in STAND_INS:
        start = [*_with_system(tokenizer, as_messages(prompt)), answer]
        try:
            whole = _render_or_raise(tokenizer, [*start, *observation], variables)
        except ModelError as error:
            problem = problem or error
            continue
        if STAND_IN in whole:
            after = whole.rpartition(STAND_IN)[2]
            for number, message in enumerate(observation):
                if not _contains(after, marked(tokenizer, str(message["content"]))):
                    _check_written(tokenizer, start, observation, number, variables)
            return after.partition(end)[2] if end in after else after
    raise problem or ModelError(
        "The chat template omits the messages of the role assistant before the last one, so it can't format several turns. "
        "Set another chat_template."
    )


def _check_written(
    tokenizer: PreTrainedTokenizerBase,
    start: Sequence[Mapping[str, Any]],
    observation: Sequence[Mapping[str, Any]],
    number: int,
    variables: Variables,
) -> None:
    """Raise a ModelError if the template omits a message of ``observation``, instead of changing its text, as JSON does."""
    message = {**observation[number], "content": STAND_IN}
    messages = [*start, *observation[:number], message, *observation[number + 1 :]]
    if _render_or_raise(tokenizer, messages, variables).count(STAND_IN) < 2:
        raise ModelError(
            f"The chat template omits messages of the role {message['role']} after an answer. Use a role that it writes, such "
            "as user or tool."
        )


def prefill(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> str:
    """Return the start of an answer that the generation prompt writes, such as ``<think>``; usually empty."""
    try:
        return turn_format(tokenizer, variables).prefill
    except ModelError:  # generation works with a template that can't format whole conversations
        return ""


def answer_text(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool, variables: Variables) -> str:
    """Return the text of a sampled answer without the whitespace that the chat template writes around an answer."""
    if tokenizer.chat_template is None:
        return text
    try:
        turn = turn_format(tokenizer, variables)
    except ModelError:  # as for prefill
        return text
    text = text if turn.before.strip() else text.removeprefix(turn.before)
    return text if turn.after.strip() or not finished else text.removesuffix(turn.after)
