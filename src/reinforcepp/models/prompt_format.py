"""The prompt formats of models without a chat template, as chat templates, which are saved with the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from reinforcepp.models.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_ANSWER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}Answer: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% if messages[0]['role'] == 'user' and (messages | length == 1 or "
    "(messages | length == 2 and messages[1]['role'] == 'assistant')) %}"
    "{% if space is defined and not messages[0]['content'].startswith(' ') %}{{ space }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if messages | length == 2 %}{{ eos_token }}{% endif %}"
    "{% else %}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% elif m['role'] == 'tool' %}Tool: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}Answer: {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}{% endif %}"
)
"""Writes a prompt and its answer as they are, and a conversation with labels, because its turns would run together."""

PromptForm = Literal["chat template", "plain", "question_answer"]


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return ``PLAIN_TEMPLATE`` after the special tokens that ``tokenizer`` puts before a text, such as BOS.

    A tokenizer such as that of Llama 2 also puts a space before a text, but not after BOS in a formatted one.
    """
    special = special_tokens(tokenizer)
    space = "{% set space = ' ' %}" if special.prefix and special.adds_space_once else ""
    return _after_prefix(tokenizer, space + PLAIN_TEMPLATE)


def question_answer_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return ``QUESTION_ANSWER_TEMPLATE`` after the special tokens that ``tokenizer`` puts before a text."""
    return _after_prefix(tokenizer, QUESTION_ANSWER_TEMPLATE)


def prompt_form(tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """Return the form in which the tokenizer's template writes prompts; a system prompt can precede the template."""
    template = str(tokenizer.chat_template)
    if template.endswith(PLAIN_TEMPLATE):
        return "plain"
    return "question_answer" if template.endswith(QUESTION_ANSWER_TEMPLATE) else "chat template"


def _after_prefix(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    prefix = str(tokenizer.decode(list(special_tokens(tokenizer).prefix)))
    return "{{ '" + prefix.replace("'", "\\'") + "' }}" + template if prefix else template
