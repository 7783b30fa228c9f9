"""Chat templates and system prompts: validated, saved with the model and used in inference."""

from datetime import date, datetime

import pytest
import tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reinforcepp import run_dir
from reinforcepp.commands.cli import main, parse
from reinforcepp.config import ChatTemplateConfig, ReinforceConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models.chat_template import with_chat_template, with_system_prompt
from reinforcepp.models.conversations import format_completion, format_prompt
from reinforcepp.models.loading import load_tokenizer, prepare_tokenizer
from reinforcepp.monitoring.completion_log import COMPLETIONS
from reinforcepp.run_dir import describe_run

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = CHAT.replace("in messages", "in messages if m['role'] != 'system'")


def tokenizer(**settings):
    return with_chat_template(
        prepare_tokenizer(tiny.tokenizer(), tiny.model().config, "tiny"), ChatTemplateConfig(**settings)
    )


def test_a_system_prompt_comes_first_unless_the_conversation_has_one():
    plain = tokenizer(system_prompt="Be short.")
    assert format_prompt(plain, "Why?") == "Be short.\n\nQuestion: Why?\nAnswer:"
    chat = tokenizer(chat_template=CHAT, system_prompt="Be short.")
    assert format_prompt(chat, "Why?") == "<system>Be short.<user>Why?<assistant>"
    assert format_completion(chat, "Why?", "So.") == "So."
    system_first = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Why?"}]
    assert chat.apply_chat_template(system_first, tokenize=False) == "<system>Be long.<user>Why?"


@hypothesis_settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_text_can_be_a_system_prompt(text):
    tokenizer_ = tiny.tokenizer()
    tokenizer_.chat_template = with_system_prompt(CHAT, text)
    written = tokenizer_.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert written == f"<system>{text}<user>Why?"


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT, encoding="utf-8")
    assert format_prompt(tokenizer(chat_template=str(path)), "Why?") == "<user>Why?<assistant>"


def test_a_template_from_the_folder_of_a_tokenizer(tmp_path):
    other = tiny.tokenizer()
    other.chat_template = CHAT
    other.save_pretrained(tmp_path / "chat")
    assert format_prompt(tokenizer(chat_template=str(tmp_path / "chat")), "Why?") == "<user>Why?<assistant>"
    other.chat_template = None
    other.save_pretrained(tmp_path / "plain")
    for folder in ("plain", ""):
        with pytest.raises(ConfigError, match="holds no tokenizer with a chat template"):
            tokenizer(chat_template=str(tmp_path / folder))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"chat_template": "no/such.jinja"}, "chat_template: 'no/such.jinja'"),
        ({"chat_template": "{% for %}"}, "can't format"),
        ({"chat_template": "{{ messages[0]['content'] }}!"}, "can't format|omits"),
        ({"chat_template": "{{ 'x' }}"}, "omits the message"),
        ({"chat_template": "{{ raise_exception('only pairs') }}"}, "can't format.*only pairs"),
        (
            {"chat_template": NO_SYSTEM, "system_prompt": "Be short."},
            "omits messages of the role system",
        ),
    ],
)
def test_unusable_templates_raise(settings, named):
    with pytest.raises(ConfigError, match=named):
        tokenizer(**settings)


def test_variables_of_a_template_are_saved_with_it(tmp_path):
    settings = ChatTemplateConfig(chat_template_kwargs={"enable_thinking": False})
    assert settings == ChatTemplateConfig(chat_template_kwargs='{"enable_thinking": false}')
    with_chat_template(tiny.chat_tokenizer(tiny.THINKING), settings).save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert format_prompt(saved, "Why?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    messages = [{"role": "user", "content": "Why?"}]
    thinking = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{", "isn't a JSON object"),
        ("[1]", "isn't a JSON object"),
        ('{"a b": 1}', "isn't a JSON object"),
        ('{"enable_thnking": false}', "no variable 'enable_thnking'"),
    ],
)
def test_unusable_variables_raise(given, named):
    with pytest.raises(ConfigError, match=f"chat_template_kwargs: .*{named}"):
        with_chat_template(tiny.chat_tokenizer(tiny.THINKING), ChatTemplateConfig(chat_template_kwargs=given))


def test_variables_can_be_a_mapping_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("chat_template_kwargs: {enable_thinking: false}\n")
    written = '{"enable_thinking": false}'
    from_file = parse("train", ["--config", str(tmp_path / "run.yaml")])
    assert from_file.chat_template_kwargs == written
    assert from_file == parse("train", ["--chat_template_kwargs", written])


LATER = (  # the parts of Llama 3.2 and others: a test for the function, a variable with the format, and a macro
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}{% set today = 'never' %}{% endif %}"
    "{% set format = '%Y-%m-%d' %}{% macro written() %}{{ strftime_now(format) }}{% endmacro %}"
    "{{ today + ' ' + written() }}" + CHAT
)


@pytest.mark.parametrize("template", [tiny.DATED, LATER])
def test_a_date_is_that_of_the_run_from_then_on(template, tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2040, 1, 2)

    tokenizer_ = with_chat_template(tiny.chat_tokenizer(template), ChatTemplateConfig(system_prompt="Be short."))
    today = format_prompt(tokenizer_, "Why?")
    assert date.today().strftime("%d %b %Y") in today
    tokenizer_.save_pretrained(tmp_path)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert format_prompt(saved, "Why?") == today
    assert format_prompt(with_chat_template(saved, ChatTemplateConfig()), "Why?") == today


def test_a_resumed_run_keeps_the_date_of_its_start(tmp_path, monkeypatch):
    run, later = tmp_path / "run", tmp_path / "later"
    monkeypatch.setattr(run_dir, "today", lambda: date(2026, 1, 5))
    describe_run(run, {"output_dir": str(run), "resume": False}, {})
    monkeypatch.setattr(run_dir, "today", lambda: date(2026, 2, 6))
    checkpoint = str(run / "checkpoints" / "step-000001")
    describe_run(later, {"output_dir": str(later), "resume": checkpoint}, {})
    for folder, resume, day in [(run, True, "05 Jan 2026"), (later, True, "05 Jan 2026"), (run, False, "06 Feb 2026")]:
        settings = ReinforceConfig(output_dir=str(folder), resume=resume)
        assert day in format_prompt(with_chat_template(tiny.chat_tokenizer(tiny.DATED), settings), "Why?")


def test_a_template_without_the_bos_of_its_tokenizer_is_reported(caplog):
    with_chat_template(tiny.chat_tokenizer(None, bos="<s>"), ChatTemplateConfig(chat_template=CHAT))
    assert "doesn't begin with '<s>'" in caplog.text


@pytest.mark.parametrize("name", ["chat_template", "system_prompt"])
def test_an_empty_setting_raises(name, capsys):
    assert main(["train", f"--{name}", " "]) == 2
    assert f"{name} is empty" in capsys.readouterr().err


def test_the_template_is_saved_with_policy_and_reward_model(model_folder, pairs_csv, tmp_path):
    import pyarrow.parquet as pq

    usual = ["--model", str(model_folder), "--data", str(pairs_csv), "--system_prompt", "Be 'short'.\nAlways."]
    assert main(["reward", *usual, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "rm")]) == 0
    short = ["--max_new_tokens", "4", "--max_steps", "1", "--batch_size", "2", "--rollout", "transformers"]
    train = ["train", *usual, *short, "--reward_model", str(tmp_path / "rm"), "--output_dir", str(tmp_path / "run")]
    assert main(train) == 0
    for folder in ("rm", "run"):
        assert format_prompt(load_tokenizer(str(tmp_path / folder)), "Why?").startswith("Be 'short'.\nAlways.")
    seen = pq.read_table(tmp_path / "run" / COMPLETIONS / "step-000001.parquet").to_pylist()
    assert seen and all("Be 'short'" not in row["prompt"] for row in seen)  # the data has no chat template
