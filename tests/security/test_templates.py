"""L1: chat templates of a model folder that never end, or fail in another way than templates do."""

from __future__ import annotations

import pytest
import tiny  # noqa: F401  (loaded once, before the forks)
from forks import attacked

import reinforcepp.models.chat_template  # noqa: F401

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LOOP = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(template, reason, marks=pytest.mark.attack("L1", f"a chat template {attack}"), id=attack)
        for template, reason, attack in [
            (LOOP, "more than 0.2 seconds", "with nested loops of 10^9 rounds"),
            ("{{ 1 / 0 }}", "ZeroDivisionError", "that divides by zero"),
            ("{{ 'a' * 10 ** 16 }}", "MemoryError", "that writes 10^16 characters"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", "with a macro that calls itself"),
            ("{{ 2.0 ** 9999 }}", "OverflowError", "with a power that overflows"),
        ]
    ],
)
def test_a_template_is_refused_with_one_sentence(template, reason, outcome):
    found = attacked(f"""
import tiny
from reinforcepp.config import ChatTemplateConfig
from reinforcepp.models import conversations
from reinforcepp.models.chat_template import with_chat_template
conversations.TEMPLATE_TIMEOUT_SECONDS = 0.2
with_chat_template(tiny.tokenizer(), ChatTemplateConfig(chat_template={template + CHAT!r}))
""")
    outcome(found)
    assert found.startswith("ConfigError: chat_template: ") and reason in found
