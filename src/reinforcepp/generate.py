"""Answer prompts with a model: one prompt, a file of them, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from reinforcepp.config import GenerateConfig
from reinforcepp.data import PromptRow, read_prompt_lines
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.models import check_context, load_config, load_policy, load_tokenizer
from reinforcepp.observe import printable, say
from reinforcepp.rollout.choose import choose_engine, start_engine
from reinforcepp.tokens import encode_prompts
from reinforcepp.types import Completion, Sampling


def generate(config: GenerateConfig) -> list[Completion]:
    """Answer every prompt of ``config`` and write the answers out; returns them in order.

    Raises:
        ReinforceError: for a missing file, no prompt, or a model that can't be loaded.
    """
    texts = _read_prompts(config)
    output = check_output_file(config.output) if config.output is not None else None
    model_config = load_config(config.model)
    check_context(model_config, config.max_prompt_length, config.max_new_tokens)
    choice = choose_engine(config.engine, model_config, torch.float32)
    tokenizer = load_tokenizer(config.model)
    rows = [PromptRow(text, {}, i) for i, text in enumerate(texts)]
    prompts, long = encode_prompts(tokenizer, rows, max_prompt_length=config.max_prompt_length)
    if long:
        say(
            f"{len(long)} of {len(texts)} prompts are longer than {config.max_prompt_length} tokens and were cut from "
            "the left.",
            "yellow",
        )
    if config.engine == "auto":
        say(f"Completions come from {choice.name}: {choice.reason}.")
    model = load_policy(config.model)
    if choice.name == "transformers" and torch.cuda.is_available():
        model.to("cuda")  # vLLM places its own copy
    max_length = config.max_prompt_length + config.max_new_tokens
    engine = start_engine(choice, model, tokenizer, max_length=max_length)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        num_samples=config.num_samples,
        seed=config.seed,
    )
    if output is None and len(prompts) == config.num_samples == 1:
        completions = [_stream(engine.stream(prompts[0], sampling))]
    else:
        completions = engine.generate(prompts, sampling)
        with _sink(output) as sink:
            _write(completions, sink, as_json=output is not None, with_prompt=len(completions) > 1)
    engine.close()
    return completions


def _stream(growing: Iterator[Completion]) -> Completion:
    """Print an answer while it grows; a character that is only half there waits for its other half."""
    shown = ""
    for completion in growing:
        text = completion.text.removesuffix("\ufffd")
        if text.startswith(shown):
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
    print(printable(completion.text[len(shown) :]), flush=True)
    return completion


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts_file is None and sys.stdin.isatty():
        say("Type one prompt per line, then Ctrl-D.")
    return read_prompt_lines(config.prompts_file)


@contextmanager
def _sink(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        sys.stdout.flush()  # so that a reader that has gone shows here, not when Python ends
        return
    with whole_file(output) as file:
        yield file
    say(f"Wrote {output}", "green")


def _write(completions: Sequence[Completion], sink: TextIO, *, as_json: bool, with_prompt: bool) -> None:
    for completion in completions:
        if as_json:
            record = {
                "prompt": completion.prompt.text,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
            }
            sink.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            prompt = f"> {completion.prompt.text}\n" if with_prompt else ""
            sink.write(printable(prompt + completion.text) + "\n")
