"""Set a tokenizer's chat template or system prompt, and check that it can format a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from reinforcepp.config import ChatTemplateConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.tokenization import format_completion, format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_PROMPT, PROBE_COMPLETION = "How do I see my routes?", "Run ip route."


def with_chat_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` with the chat template and system prompt of ``settings``, which are saved with it.

    Raises:
        ConfigError: the template file is missing, or the template can't format a prompt and a completion.
    """
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    if settings.system_prompt is not None:
        tokenizer.chat_template = with_system_prompt(str(tokenizer.chat_template), settings.system_prompt)
    if settings.chat_template is not None or settings.system_prompt is not None:
        _check_template(tokenizer, settings)
    return tokenizer


def with_system_prompt(template: str, text: str) -> str:
    """Return ``template`` with the default system message ``text``, for conversations without a system message."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    first = f"[{{'role': 'system', 'content': '{escaped}'}}]"
    return f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}{template}"


def _template(setting: str) -> str:
    if "{%" in setting or "{{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template: {setting!r} is neither a file nor a Jinja template. Give one of the two.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template: {setting} isn't UTF-8 text. Save it as UTF-8.") from error


def _check_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> None:
    """Format a prompt and a completion, and check that both appear in the text, and the system prompt, too."""
    name = "chat_template" if settings.chat_template is not None else "system_prompt"
    try:
        prompt = format_prompt(tokenizer, PROBE_PROMPT)
        completion = format_completion(tokenizer, PROBE_PROMPT, PROBE_COMPLETION)
    except (TemplateError, TypeError, ModelError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{name}: the chat template can't format a prompt and a completion ({reason}). Fix the template."
        ) from error
    if PROBE_PROMPT not in prompt or PROBE_COMPLETION not in completion:
        raise ConfigError(
            f"{name}: the chat template omits the message of the role user or assistant. Write both in the template."
        )
    if settings.system_prompt is not None and settings.system_prompt.strip() not in prompt:
        raise ConfigError(
            "system_prompt: the model's chat template omits messages of the role system. Set chat_template to one that "
            "writes them, or omit system_prompt."
        )
