"""The command ``generate``: generate responses to one prompt, a file of prompts, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from reinforcepp.config import GenerateConfig, SamplingConfig
from reinforcepp.data import PromptRow, is_data_file, read_prompt_lines, read_prompts
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.locks import file_lock
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer, prompt_limit
from reinforcepp.models.tokenization import encode_prompts
from reinforcepp.monitoring import echo, printable
from reinforcepp.monitoring.turns import turn_lines
from reinforcepp.rewards.functions import score_all
from reinforcepp.rewards.trained import check_reward_folder, load_reward_model
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(config: GenerateConfig) -> list[Completion]:
    """Generate a response to every prompt of ``config``, write them, and return them in order.

    Raises:
        ReinforceError: For a missing file, no prompt, or a model that can't be loaded.
    """
    rows = _read_prompts(config)
    output = check_output_file(config.output) if config.output is not None else None
    with file_lock(output) if output is not None else nullcontext():
        return _generate(config, rows, output)


def _generate(config: GenerateConfig, rows: Sequence[PromptRow], output: Path | None) -> list[Completion]:
    if config.reward_model is not None:
        check_reward_folder(config.reward_model)
    model_config = load_config(config.model)
    limit = prompt_limit(model_config, config.max_prompt_length, config.max_new_tokens)
    choice = choose_engine(config.engine, model_config, torch.float32)
    tokenizer = load_tokenizer(config.model)
    prompts, long = encode_prompts(tokenizer, rows, max_prompt_length=limit)
    if long:
        echo(
            f"{len(long)} of {len(rows)} prompts are longer than {limit} tokens. They lost their oldest turns or the "
            "beginning of their text.",
            "yellow",
        )
    reward = load_reward_model(config.reward_model) if config.reward_model is not None else None
    engine = load_engine(config, choice, tokenizer, max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens)
    sampling = sampling_of(config, config.best_of or config.num_samples)
    if output is None and reward is None and len(prompts) == sampling.num_samples == 1:
        completions = [show_growing(engine.stream(prompts[0], sampling))]
    else:
        completions = engine.generate(prompts, sampling)
        rewards = score_all(reward, completions) if reward is not None else None
        if config.best_of is not None and rewards is not None:
            kept = best_indices(rewards, config.best_of)
            completions, rewards = [completions[i] for i in kept], [rewards[i] for i in kept]
        with _sink(output) as sink:
            _write(completions, rewards, sink, as_json=output is not None, with_prompt=len(completions) > 1)
    engine.close()
    return completions


def load_engine(
    config: SamplingConfig, choice: EngineChoice, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> RolloutEngine:
    """Start the chosen engine with the model's weights, for sequences of up to ``max_length`` tokens."""
    if config.engine == "auto":
        echo(f"Completions come from {choice.name}: {choice.reason}.")
    model = load_policy(config.model)
    if choice.name == "transformers" and torch.cuda.is_available():
        model.to("cuda")  # vLLM places its own copy of the weights.
    return start_engine(choice, model, tokenizer, max_length=max_length)


def sampling_of(config: SamplingConfig, num_samples: int = 1) -> Sampling:
    """Return the sampling parameters in a command's settings."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        num_samples=num_samples,
        seed=config.seed,
    )


def best_indices(rewards: Sequence[float], group: int) -> list[int]:
    """Return the index of the highest reward in each ``group`` of consecutive rewards, the first of equal ones."""
    starts = range(0, len(rewards), group)
    return [max(range(start, start + group), key=lambda i: rewards[i]) for start in starts]


def show_growing(growing: Iterator[Completion], stopped: Callable[[], bool] = lambda: False) -> Completion:
    """Print a response while it is generated, until it is finished or ``stopped``, and return it.

    An incomplete character is held back until it is complete.
    """
    shown = ""
    for completion in growing:
        text = completion.text.removesuffix("\ufffd").strip()
        if text.startswith(shown):
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
        if stopped():
            break
    print(printable(completion.text.strip()[len(shown) :]), flush=True)
    return completion


def _read_prompts(config: GenerateConfig) -> Sequence[PromptRow]:
    """Return the prompts: the rows of a data file, or the lines of a text file or of standard input."""
    if config.prompt is not None:
        return [PromptRow(config.prompt, {})]
    if config.prompts_file is not None and is_data_file(config.prompts_file):
        data = read_prompts(config.prompts_file)
        echo(data.summary())
        return data.prompts
    if config.prompts_file is None and sys.stdin.isatty():
        echo("Type one prompt per line. To finish, press Ctrl-D.")
    return [PromptRow(text, {}, i) for i, text in enumerate(read_prompt_lines(config.prompts_file))]


@contextmanager
def _sink(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        sys.stdout.flush()  # A closed pipe must raise here, not when Python exits.
        return
    with whole_file(output) as file:
        yield file
    echo(f"Wrote {output}", "green")


def _write(
    completions: Sequence[Completion],
    rewards: Sequence[float] | None,
    sink: TextIO,
    *,
    as_json: bool,
    with_prompt: bool,
) -> None:
    for i, completion in enumerate(completions):
        if as_json:
            score = {"reward": rewards[i]} if rewards is not None else {}
            sink.write(json.dumps({**_record(completion), **score}, ensure_ascii=False) + "\n")
        else:
            prompt = "".join(f"> {line}\n" for line in _prompt_lines(completion.prompt)) if with_prompt else ""
            written = f"\n({format_reward(rewards[i])})" if rewards is not None else ""
            sink.write(printable(prompt + completion.text.strip()) + written + "\n")


def _record(completion: Completion) -> dict[str, Any]:
    """Return a line of the output, in TRL's format: conversational if the prompt is a list of messages."""
    text, cells = completion.text, completion.prompt.cells
    conversational = bool(completion.prompt.messages)
    return {
        "prompt": cells.pop("prompt"),
        "completion": [{"role": "assistant", "content": text}] if conversational else text,
        "finish_reason": completion.finish_reason,
        **cells,
    }


def _prompt_lines(prompt: Prompt) -> list[str]:
    return turn_lines(prompt.messages) if prompt.messages else [prompt.text]


def format_reward(reward: float) -> str:
    """Return a reward model's score as text."""
    return f"reward {reward:+.3f}"
