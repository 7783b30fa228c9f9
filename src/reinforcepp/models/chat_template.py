"""Set a tokenizer's chat template, system prompt, variables and date, and check that it can format a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError

from reinforcepp.config import ChatTemplateConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.conversations import PROBE_ANSWER, PROBE_PROMPT, format_completion, format_prompt
from reinforcepp.models.folder_checks import check_links
from reinforcepp.models.prompt_format import plain_template, prompt_form, question_answer_template
from reinforcepp.models.special_tokens import special_tokens
from reinforcepp.models.tokenization import encode_prompt
from reinforcepp.models.tokenizer_files import choose_template, has_tokenizer, read_tokenizer
from reinforcepp.run_dir import began_without, run_date
from reinforcepp.runtime.terminal import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMATS = {"plain": plain_template, "question_answer": question_answer_template}
PINNED_DATE = "{% macro strftime_now(format) %}"

log = logger(__name__)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` with the chat template or prompt format of ``settings``, which is saved with it.

    The template gets the system prompt, the variables and the date of the run, so that it formats a text alike everywhere.

    Raises:
        ConfigError: the template file is missing, or the template can't format a prompt and a completion.
    """
    prompt_format = settings.prompt_format
    if prompt_form(tokenizer) == "plain" and began_without(settings, "prompt_format"):
        prompt_format = "question_answer"  # of every model without a chat template, when that run began
    if prompt_format != "auto":
        tokenizer.chat_template = FORMATS[prompt_format](tokenizer)
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
        _check_bos(tokenizer)
    template = str(tokenizer.chat_template)
    if settings.system_prompt is not None:
        template = with_system_prompt(template, settings.system_prompt)
    tokenizer.chat_template = with_variables(with_date(template, run_date(settings)), settings.template_variables)
    _check_template(tokenizer, settings)
    return tokenizer


def with_date(template: str, day: date) -> str:
    """Return ``template`` with ``day`` as its date, because a text must not change from one day to the next.

    Templates such as that of Llama 3.2 ask for the date by the function ``strftime_now``. The result defines that function
    for the formats in the template.
    """
    if "strftime_now" not in template or PINNED_DATE in template:
        return template
    try:
        environment = Environment()  # nosec B701  # renders nothing
        strings = [text[1:-1] for _, kind, text in environment.lex(template) if kind == "string"]
    except TemplateError:  # the check of the template reports it
        return template
    moment = datetime.combine(day, time())
    dates = {text: moment.strftime(text) for text in strings if "%" in text}
    return (
        f"{PINNED_DATE}{{% set dates = {dates!r} %}}{{{{ dates[format] if format in dates else "
        f"raise_exception('strftime_now: unknown format') }}}}{{% endmacro %}}{template}"
    )


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """Return ``template`` with values of its variables, such as ``enable_thinking``, for callers that give none.

    Raises:
        ConfigError: the template has no such variable.
    """
    for name in variables:
        if re.search(rf"\b{re.escape(name)}\b", template) is None:
            raise ConfigError(
                f"chat_template_kwargs: the chat template has no variable {name!r}. Omit it, or correct its name."
            )
    values = (
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    return "".join(values) + template


def with_system_prompt(template: str, text: str) -> str:
    """Return ``template`` with the default system message ``text``, for conversations without a system message."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    first = f"[{{'role': 'system', 'content': '{escaped}'}}]"
    return f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}{template}"


def _template(setting: str) -> str:
    if "{%" in setting or "{{" in setting:
        return setting
    path = Path(setting).expanduser()
    if path.is_dir():
        return _template_of(path)
    if not path.is_file():
        raise ConfigError(
            f"chat_template: {setting!r} is neither a file, a tokenizer's folder, nor a Jinja template. Give one of these."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template: {setting} isn't UTF-8 text. Save it as UTF-8.") from error


def _template_of(folder: Path) -> str:
    """Return the chat template of the tokenizer in a folder."""
    check_links(folder, str(folder))
    tokenizer = read_tokenizer(str(folder)) if has_tokenizer(folder) else None
    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigError(
            f"chat_template: {folder} holds no tokenizer with a chat template. Give a file with a template."
        )
    choose_template(tokenizer, str(folder))
    return str(tokenizer.chat_template)


def _check_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn about a template without the special tokens that the tokenizer puts before every text."""
    prefix = special_tokens(tokenizer).prefix
    try:
        written = tuple(encode_prompt(tokenizer, PROBE_PROMPT)[: len(prefix)])
    except ModelError:  # the check of the template reports it
        return
    if written != prefix:
        log.warning(
            "chat_template: the template doesn't begin with %r, which the tokenizer puts before every text. Add it if the "
            "model was pretrained with it: {{ bos_token }}",
            tokenizer.decode(list(prefix)),
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplateConfig) -> None:
    """Format a prompt and a completion, and check that both appear in the text, and the system prompt, too."""
    given = [name for name in ("chat_template", "system_prompt", "chat_template_kwargs") if getattr(settings, name)]
    name = given[0] if given else "chat_template"
    try:
        prompt = format_prompt(tokenizer, PROBE_PROMPT)
        completion = format_completion(tokenizer, PROBE_PROMPT, PROBE_ANSWER)
    except (TemplateError, TypeError, ModelError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(
            f"{name}: the chat template can't format a prompt and a completion ({reason}). Fix the template."
        ) from error
    if PROBE_PROMPT not in prompt or PROBE_ANSWER not in completion:
        raise ConfigError(
            f"{name}: the chat template omits the message of the role user or assistant. Write both in the template."
        )
    if settings.system_prompt is not None and settings.system_prompt.strip() not in prompt:
        raise ConfigError(
            "system_prompt: the model's chat template omits messages of the role system. Set chat_template to one that "
            "writes them, or omit system_prompt."
        )
