"""Tiny models, tokenizers and data files for the entries, and functions that run the real commands on them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reinforcepp.commands.cli import main
from reinforcepp.errors import ReinforceError

FIXED, REFUSED = "fixed", "refused"
transformers.logging.disable_progress_bar()
TEXTS = [
    "How long does rice cook?",
    "Bring water to a boil, add salt, and wait twelve minutes.",
    "Ask: why? Answer: because.",
]
END = "<|end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y') + '\n' }}" + CHATML
PREFILLED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PAIRS = [
    {"prompt": f"How long does dish {i} cook?", "chosen": f"It cooks {i + 5} minutes.", "rejected": "No idea."}
    for i in range(8)
]


class Entry(NamedTuple):
    """One kind of fault: its input, the right behavior, and a function that returns the verdict or raises."""

    id: str
    given: str
    right: str
    check: Callable[[Path], str]


ENTRIES: list[Entry] = []


def entry(name: str, given: str, right: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Register a check, which gets an empty folder."""

    def register(check: Callable[[Path], str]) -> Callable[[Path], str]:
        ENTRIES.append(Entry(name, given, right, check))
        return check

    return register


# --- tokenizers and models ----------------------------------------------------------------------------------------------


@cache
def _backend(special: tuple[str, ...]) -> str:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(TEXTS, trainer)
    return built.to_str()


def tokenizer(
    template: str | None = None, *, bos: str | None = None, eos: str = END, special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer; it adds ``bos`` to texts, if given."""
    names = tuple(dict.fromkeys((END, "<pad>", eos, *special, *([bos] if bos else []))))
    backend = Tokenizer.from_str(_backend(names))
    if bos:
        pair = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    built = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token="<pad>")
    built.chat_template = template
    return built


def model(family: str = "Llama", vocab: int = 400, **changes: Any) -> PreTrainedModel:
    """Return a causal language model with two small layers and random weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    settings |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True} | changes
    config = getattr(transformers, f"{family}Config")(**settings)
    built = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # larger weights make distributions uneven, so that wrong positions or caches show
        for name, weight in built.named_parameters():
            if weight.ndim > 1 and "A_log" not in name:
                weight.mul_(3)
    return built.eval()


def saved(folder: Path, tok: PreTrainedTokenizerBase | None = None, family: str = "Llama", **changes: Any) -> Path:
    """Save a model and a tokenizer in ``folder`` and return it."""
    model(family, **changes).save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return folder


def edited(folder: Path, file: str, **settings: Any) -> Path:
    """Change settings of a JSON file in a model folder, and return the folder."""
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | settings))
    return folder


# --- data and commands ----------------------------------------------------------------------------------------------


def rows_file(path: Path, rows: Iterable[Mapping[str, Any]] = PAIRS) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Ran(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def clean(self) -> bool:
        """Whether the command refused its input in one sentence."""
        return self.code == 2 and "error: " in self.err and "Traceback" not in self.err


def command(*words: object) -> Ran:
    """Run ``reinforcepp WORDS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def train(
    policy: Path, folder: Path, *words: object, data: Path | None = None, rewards: str = "rule:length?max=8"
) -> Ran:
    """Train two steps of a policy on the pairs' prompts, into ``folder``/run."""
    given = data or rows_file(folder / "data.jsonl")
    short = ("--max_new_tokens", 6, "--max_prompt_length", 64, "--batch_size", 2, "--eval_prompts", 0, "--max_steps", 2)
    usual = ("--rollout", "transformers", *short, "--output_dir", folder / "run", "--rewards", rewards)
    return command("train", "--model", policy, "--data", given, *usual, *words)


def supervised(task: str, base: Path, folder: Path, *words: object, data: Path | None = None) -> Ran:
    """Run ``sft`` or ``reward`` for one epoch, into ``folder``/TASK."""
    given = data or rows_file(folder / "data.jsonl")
    usual = ("--num_train_epochs", 1, "--batch_size", 4, "--max_length", 256, "--heldout_fraction", 0)
    return command(task, "--model", base, "--data", given, "--output_dir", folder / task, *usual, *words)


def expect(condition: object, problem: object = "") -> str:
    """Return ``fixed`` if ``condition`` holds; otherwise raise an AssertionError with ``problem``."""
    if not condition:
        raise AssertionError(str(problem)[-300:])
    return FIXED


def accepted(ran: Ran) -> str:
    """Return ``fixed`` if the command succeeded; otherwise raise with the end of its errors."""
    return expect(ran.code == 0, ran.err)


def refused(ran: Ran, *words: str) -> str:
    """Return ``refused`` if the command ended with one sentence that has ``words``; otherwise raise."""
    expect(ran.clean and all(word in ran.err for word in words), f"exit code {ran.code}: {ran.err}")
    return REFUSED


def error_of(work: Callable[[], object]) -> str:
    """Return the sentence with which ``work`` fails; raise if it succeeds or fails otherwise."""
    try:
        work()
    except ReinforceError as error:
        return str(error)
    raise AssertionError("no error")


def copied(source: Path, target: Path) -> Path:
    """Copy a folder and return the copy."""
    return Path(shutil.copytree(source, target))
