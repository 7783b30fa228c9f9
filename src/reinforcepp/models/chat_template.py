"""Give a tokenizer another chat template, or one that begins with a system prompt, and see that it can be worked with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from reinforcepp.config import ChatTemplateConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.tokenization import format_completion, format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "How do I see my routes?", "Run ip route."


def with_chat_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> PreTrainedTokenizerBase:
    """``tokenizer`` with the frame that ``settings`` ask for, which is saved with it.

    Raises:
        ConfigError: the template's file is missing, or the template can't frame a prompt and an answer.
    """
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    if settings.system_prompt is not None:
        tokenizer.chat_template = with_system_prompt(str(tokenizer.chat_template), settings.system_prompt)
    if settings.chat_template is not None or settings.system_prompt is not None:
        _try_out(tokenizer, settings)
    return tokenizer


def with_system_prompt(template: str, text: str) -> str:
    """A template that writes what ``template`` does of a conversation that begins with ``text``, unless it has its own."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    first = f"[{{'role': 'system', 'content': '{escaped}'}}]"
    return f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}{template}"


def _template(given: str) -> str:
    if "{%" in given or "{{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template: there is no file {given}, and it is no Jinja template either.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template: {given} isn't UTF-8 text.") from error


def _try_out(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> None:
    """Frame a prompt and an answer; both, and the system prompt, have to be there."""
    prompt, answer = PROBE
    name = "chat_template" if settings.chat_template is not None else "system_prompt"
    try:
        start, end = format_prompt(tokenizer, prompt), format_completion(tokenizer, prompt, answer)
    except (TemplateError, TypeError, ModelError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{name}: the template can't frame a prompt and its answer: {reason}") from error
    if prompt not in start or answer not in end:
        raise ConfigError(f"{name}: the template leaves out the prompt or the answer, of the roles user and assistant.")
    if settings.system_prompt is not None and settings.system_prompt.strip() not in start:
        raise ConfigError(
            "system_prompt: the model's template writes no message of the role system; give one that does with "
            "--chat_template, or leave system_prompt out."
        )
