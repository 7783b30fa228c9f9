"""The command and function ``generate``: generate responses to prompts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from reinforcepp.config import GenerateConfig, SamplingConfig
from reinforcepp.config.data_spec import REASONING_GYM
from reinforcepp.config.judge_spec import is_judge
from reinforcepp.data import PromptRow, check_dataset, is_data_file, prompt_rows, read_prompt_lines, read_prompts
from reinforcepp.files import check_output_file, whole_file
from reinforcepp.locks import file_lock
from reinforcepp.models.devices import choose_device
from reinforcepp.models.given import check_loaded, name_of, preserve_modes
from reinforcepp.models.loading import (
    load_config,
    load_policy,
    load_tokenizer,
    prompt_limit,
    tokenizer_for,
)
from reinforcepp.models.lora import is_4bit
from reinforcepp.models.precision import inference_dtype
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.tokenization import encode_prompts
from reinforcepp.monitoring.turns import turn_lines
from reinforcepp.rewards.functions import RewardFunction, function_name, score_with
from reinforcepp.rewards.reasoning_gym import ReasoningGymReward
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.rollout.engine import RolloutEngine, preserve_random_state
from reinforcepp.rollout.factory import start_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import echo, print_output
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Response(Completion):
    """A completion of a trained model, and its reward if a reward model scored it."""

    reward: float | None = None

    def record(self) -> dict[str, Any]:
        """Return a row in TRL's format: conversational if the prompt is a list of messages."""
        cells = self.prompt.cells
        return {
            "prompt": cells.pop("prompt"),
            "completion": [{"role": "assistant", "content": self.text}] if self.prompt.messages else self.text,
            "finish_reason": self.finish_reason,
            **cells,
            **({} if self.reward is None else {"reward": self.reward}),
        }


def generate(
    model: str | Path | PreTrainedModel,
    prompts: str | Path | Dataset | Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = GenerateConfig.max_new_tokens,
    temperature: float = GenerateConfig.temperature,
    top_p: float = GenerateConfig.top_p,
    top_k: int = GenerateConfig.top_k,
    min_p: float = GenerateConfig.min_p,
    repetition_penalty: float = GenerateConfig.repetition_penalty,
    seed: int = GenerateConfig.seed,
    num_samples: int = GenerateConfig.num_samples,
    best_of: int | None = None,
    reward_model: str | Path | RewardFunction | None = None,
    max_prompt_length: int | None = None,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = GenerateConfig.trust_remote_code,
    output: str | Path | None = None,
    use_cpu: bool = GenerateConfig.use_cpu,
    verbose: bool = False,
) -> list[Response]:
    """Generate responses to prompts.

    Example:
        >>> from reinforcepp import generate
        >>> responses = generate("builtin:tiny", ["What is DNS?", "What is NAT?"], num_samples=2, max_new_tokens=8)
        >>> [response.prompt.text for response in responses]
        ['What is DNS?', 'What is DNS?', 'What is NAT?', 'What is NAT?']

    Args:
        model: builtin:tiny, a folder, a Hub name, or a loaded model, which stays as it is.
        prompts: One prompt or several, each a text, a list of messages, or a row with a ``prompt``; a ``Dataset``; or the path
            (``pathlib.Path``) of a file of prompts, or ``Path("reasoning_gym:chain_sum")``. A text is a user message if the
            model has a chat template. The other columns of rows go to a reward function.
        processing_class: The tokenizer; default: the model's.
        max_new_tokens: Maximum length of a response, in tokens.
        temperature: Sampling temperature; 0 is greedy, 1 the model's own distribution.
        top_p: Sample from the likeliest tokens with this total probability; 1 disables.
        top_k: Sample from this many likeliest tokens; 0 disables.
        min_p: Sample tokens above this fraction of the top probability; 0 disables.
        repetition_penalty: Above 1 makes tokens that already occurred less likely.
        seed: Sampling seed; the same seed gives the same responses.
        num_samples: Responses per prompt.
        best_of: Sample this many responses per prompt and keep the highest-reward one.
        reward_model: Folder of a reward model, a language model with its rubric (judge:MODEL?rubric=...), reasoning_gym for
            its tasks, or a reward function, that scores every response.
        max_prompt_length: Most tokens of a formatted prompt. Default: what the context leaves.
        engine: Engine; auto uses vLLM if it is installed and runs the model. For a loaded model, auto is transformers.
        dtype: Data type of the weights; auto: the model's on a GPU, float32 on a CPU. A loaded model keeps its own.
        trust_remote_code: Run code in the model's folder or repository, which can do anything.
        output: File for the responses as JSON lines; default: none is written.
        use_cpu: Compute on the CPU and hide the GPUs from this process.
        verbose: Print progress and notes to standard error.

    Returns:
        The responses, those to a prompt one after another, in the order of the prompts.

    Raises:
        ConfigError: A setting is invalid, or ``model`` isn't a model.
        DataError: A prompt is empty, or a file can't be read.
        ModelError: The model or the reward model can't be loaded.
        RolloutError: vLLM was asked for but can't run the model.
        RewardError: The reward function raised an exception.
    """
    loaded = check_loaded(model, "model")
    reward = None if isinstance(reward_model, (str, Path)) else reward_model
    config = GenerateConfig(
        model=name_of(model),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        num_samples=num_samples,
        best_of=best_of,
        reward_model=None if reward_model is None else str(reward_model) if reward is None else function_name(reward),
        max_prompt_length=max_prompt_length,
        engine=engine,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output=None if output is None else str(output),
        use_cpu=use_cpu,
    )
    choose_device(config.use_cpu)
    with silence(not verbose), preserve_random_state(), preserve_modes(loaded):
        rows = read_prompt_file(str(prompts)) if isinstance(prompts, Path) else _rows_of(prompts)
        return _generate(config, rows, loaded, processing_class, reward) if rows else []


def run_generate(config: GenerateConfig) -> None:
    """Generate a response to every prompt of ``config``, and print or write them.

    Raises:
        ReinforceError: For a missing file, no prompt, or a model that can't be loaded.
    """
    rows = _read_prompts(config)
    if config.output is None and config.reward_model is None and len(rows) == config.num_samples == 1:
        with started(config, rows) as (engine, prompts):
            show_growing(engine.stream(prompts[0], sampling_of(config)))
        return
    responses = _generate(config, rows)
    if config.output is not None:
        echo(f"Wrote {config.output}", "green")
        return
    for response in responses:
        prompt = "".join(f"> {line}\n" for line in _prompt_lines(response.prompt)) if len(responses) > 1 else ""
        reward = f"\n({format_reward(response.reward)})" if response.reward is not None else ""
        print_output(f"{prompt}{response.text.strip()}{reward}")


def _generate(
    config: GenerateConfig,
    rows: Sequence[PromptRow],
    model: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    reward: RewardFunction | None = None,
) -> list[Response]:
    """Return the responses, after writing them to ``config.output``."""
    output = check_output_file(config.output) if config.output is not None else None
    with file_lock(output) if output is not None else nullcontext():
        if is_judge(config.reward_model) or config.reward_model == REASONING_GYM:
            reward = load_reward(str(config.reward_model))
        elif config.reward_model is not None and reward is None:
            check_reward_folder(config.reward_model)
        with started(config, rows, model, processing_class) as (engine, prompts):
            if config.reward_model is not None and reward is None:
                reward = load_reward(config.reward_model)
            completions = engine.generate(prompts, sampling_of(config, config.best_of or config.num_samples))
        rewards = score_with([reward], completions).total if reward is not None else [None] * len(completions)
        responses = [Response(**vars(each), reward=score) for each, score in zip(completions, rewards, strict=True)]
        if config.best_of is not None:
            responses = best_of_each(responses, config.best_of)
        if output is not None:
            with whole_file(output) as file:
                file.writelines(json.dumps(each.record(), ensure_ascii=False) + "\n" for each in responses)
    return responses


@contextmanager
def started(
    config: GenerateConfig,
    rows: Sequence[PromptRow],
    model: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Iterator[tuple[RolloutEngine, list[Prompt]]]:
    """Yield an engine with the given model, or the one that ``config`` names, and the tokenized prompts."""
    if config.trust_remote_code:
        allow_remote_code(config.model)
    model_config = model.config if model is not None else load_config(config.model)
    limit = prompt_limit(model_config, config.max_prompt_length, config.max_new_tokens)
    wanted = "transformers" if model is not None and config.engine == "auto" else config.engine
    dtype = model.dtype if model is not None else inference_dtype(config.dtype, model_config.dtype)
    choice = choose_engine(wanted, model_config, dtype)
    given = model is not None or processing_class is not None
    tokenizer = tokenizer_for(model_config, processing_class) if given else load_tokenizer(config.model)
    prompts, long = encode_prompts(tokenizer, rows, max_prompt_length=limit)
    if long:
        echo(
            f"{len(long)} of {len(rows)} prompts are longer than {limit} tokens. They lost their oldest turns or the "
            "beginning of their text.",
            "yellow",
        )
    max_length = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    if model is None:
        engine = load_engine(config, choice, dtype, tokenizer, max_length)
    else:
        engine = start_engine(choice, model, tokenizer, max_length=max_length)
    try:
        yield engine, prompts
    finally:
        engine.close()


def load_engine(
    config: SamplingConfig,
    choice: EngineChoice,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> RolloutEngine:
    """Start the chosen engine with the model's weights in ``dtype``, for sequences of up to ``max_length`` tokens."""
    if config.engine == "auto":
        echo(f"Completions come from {choice.name}: {choice.reason}.")
    model = load_policy(config.model, dtype)
    if choice.name == "transformers" and torch.cuda.is_available():
        model.to("cuda")  # vLLM places its own copy of the weights.
    return start_engine(choice, model, tokenizer, max_length=max_length)


def load_reward(name: str) -> RewardFunction:
    """Load a judge, the verifiers of reasoning-gym, or a reward model as :func:`load_scorer` does."""
    if name == REASONING_GYM:
        return ReasoningGymReward()
    if is_judge(name):
        from reinforcepp.rewards.judge.judge import load_judge  # loads HTTP libraries

        return load_judge(name)
    return load_scorer(name)


def load_scorer(name: str) -> TrainedReward:
    """Load a reward model, on the GPU if there is one."""
    reward = load_reward_model(name)
    if torch.cuda.is_available() and not is_4bit(reward.model):  # those are on it already
        reward.model.to("cuda")
    return reward


def sampling_of(config: SamplingConfig, num_samples: int = 1) -> Sampling:
    """Return the sampling parameters in a command's settings."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        num_samples=num_samples,
        seed=config.seed,
    )


def best_of_each(responses: Sequence[Response], group: int) -> list[Response]:
    """Return the response with the highest reward of each ``group`` of consecutive ones, the first of equal ones."""

    def reward_of(response: Response) -> float:
        return -math.inf if response.reward is None else response.reward

    starts = range(0, len(responses), group)
    return [max(responses[start : start + group], key=reward_of) for start in starts]


def show_growing(growing: Iterator[Completion], stopped: Callable[[], bool] = lambda: False) -> Completion:
    """Print a response while it is generated, until it is finished or ``stopped``, and return it.

    An incomplete character is held back until it is complete.
    """
    shown = ""
    for completion in growing:
        text = completion.text.removesuffix("\ufffd").strip()
        if text.startswith(shown):
            print_output(text[len(shown) :], end="")
            shown = text
        if stopped():
            break
    print_output(completion.text.strip()[len(shown) :])
    return completion


def _rows_of(prompts: Any) -> Sequence[PromptRow]:
    """Return the prompts of an argument of :func:`generate` as rows."""
    if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and all(map(_is_message, prompts))):
        prompts = [prompts]
    check_dataset(prompts, "prompts")
    return prompt_rows([each if isinstance(each, Mapping) else {"prompt": each} for each in prompts], "prompts")


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item


def _read_prompts(config: GenerateConfig) -> Sequence[PromptRow]:
    """Return the prompts of the settings, or the lines of standard input."""
    if config.prompt is not None:
        return [PromptRow(config.prompt, {})]
    if config.prompts_file is None and sys.stdin.isatty():
        echo("Type one prompt per line. To finish, press Ctrl-D.")
    return read_prompt_file(config.prompts_file)


def read_prompt_file(name: str | None) -> Sequence[PromptRow]:
    """Return the prompts of a data file, or the lines of a text file or, without a name, of standard input."""
    if name is not None and is_data_file(name):
        data = read_prompts(name)
        echo(data.summary())
        return data.prompts
    return [PromptRow(text, {}, i) for i, text in enumerate(read_prompt_lines(name))]


def _prompt_lines(prompt: Prompt) -> list[str]:
    return turn_lines(prompt.messages) if prompt.messages else [prompt.text]


def format_reward(reward: float) -> str:
    """Return a reward model's score as text."""
    return f"reward {reward:+.3f}"
