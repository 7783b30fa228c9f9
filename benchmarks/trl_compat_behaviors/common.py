"""What behaviors share: their registration, the two libraries, and tiny models, prompts and rewards."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import tiny

Check = Callable[["Library", Path], None]


@dataclass(frozen=True)
class Library:
    """The classes that user code names: TRL's, or ours."""

    name: str
    Trainer: Any
    Config: Any
    RewardTrainer: Any
    RewardConfig: Any
    group: Library | None = None

    @property
    def grpo(self) -> Library:
        """The classes for settings that only TRL's GRPO has; ours are the same as for RLOO."""
        return self.group or self


def trl_library() -> Library:
    import trl

    reward = trl.RewardTrainer, trl.RewardConfig
    group = Library("trl", trl.GRPOTrainer, trl.GRPOConfig, *reward)
    return Library("trl", trl.RLOOTrainer, trl.RLOOConfig, *reward, group)


def our_library() -> Library:
    import reinforcepp as ours

    reward = getattr(ours, "RewardTrainer", None), ours.RewardModelConfig
    return Library("reinforcepp", ours.ReinforceTrainer, ours.ReinforceConfig, *reward)


def with_estimator(lib: Library, estimator: str) -> Library:
    """Return the library with ``estimator=`` given to the settings; ours has one trainer for all estimators."""
    return replace(lib, Config=partial(lib.Config, estimator=estimator))


@dataclass
class Behavior:
    """User code with assertions about its effect, and the changed code for ours if the same code doesn't run."""

    id: str
    part: str
    source: str
    check: Check
    not_on_trl: str = ""
    variants: list[tuple[str, str, Check]] = field(default_factory=list)
    reason: str = ""


BEHAVIORS: dict[str, Behavior] = {}


@dataclass(frozen=True)
class Part:
    """A group of behaviors; its methods are decorators for ``check(lib, folder)``."""

    name: str

    def behavior(self, id: str, source: str, *, not_on_trl: str = "") -> Callable[[Check], Check]:
        """Register user code. ``source``: the place in TRL that shows the behavior; ``not_on_trl``: why TRL can't run it here."""

        def register(check: Check) -> Check:
            assert id not in BEHAVIORS, id
            BEHAVIORS[id] = Behavior(id, self.name, source, check, not_on_trl)
            return check

        return register


def variant(id: str, level: str, change: str) -> Callable[[Check], Check]:
    """Register the same behavior with changed code: ``level`` is ``names`` or ``small change``."""
    assert level in ("names", "small change"), level

    def register(check: Check) -> Check:
        BEHAVIORS[id].variants.append((level, change, check))
        return check

    return register


def impossible(id: str, reason: str) -> None:
    """State why a behavior has no equivalent; counts only if its code and all variants fail."""
    BEHAVIORS[id].reason = reason


PROMPTS = [
    "How do I list routes?",
    "Check the gateway",
    "Which port is open on this host?",
    "Restart the resolver",
    "Trace the route",
    "Why is DNS slow?",
    "Show the address",
    "Ping the server twice",
]
SETTINGS = {
    "learning_rate": 0.1,  # as in TRL's tests: small models need it to move
    "per_device_train_batch_size": 3,
    "num_generations": 3,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "report_to": "none",
}


def make(lib: Library, folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Return a trainer of a tiny model with TRL's names for ``settings`` and for the trainer's other ``arguments``."""
    config = lib.Config(**({"output_dir": str(folder / "run")} | SETTINGS | (settings or {})))
    given = {"model": policy(), "reward_funcs": variety, "train_dataset": prompts()} | arguments
    return lib.Trainer(args=config, **given)


def trained(lib: Library, folder: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Return a trainer that has trained; fails if the weights didn't move."""
    return train(make(lib, folder, settings, **arguments))


def train(trainer: Any, share: float = 0.9) -> Any:
    """Train; fails if less than ``share`` of the trainable tensors changed, or a value isn't finite."""
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    same = [name for name in names if torch.equal(before[name], after[name])]
    assert len(same) <= (1 - share) * len(names), f"unchanged: {same}"
    assert all(after[name].isfinite().all() for name in names)
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(before: dict[str, torch.Tensor], model: Any) -> bool:
    return all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in before.items())


def logs(trainer: Any, key: str = "reward") -> list[float]:
    """Return the logged values of a metric, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def prompts(n: int = 4, *, system: str | None = None, conversational: bool = False, **columns: Any) -> Dataset:
    rows: list[Any] = PROMPTS[:n]
    if conversational or system:
        start = [{"role": "system", "content": system}] if system else []
        rows = [[*start, {"role": "user", "content": text}] for text in rows]
    return Dataset.from_dict({"prompt": rows, **columns})


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def variety(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward completions with many distinct characters."""
    return [float(len(set(text_of(completion)))) for completion in completions]


class Recorder:
    """A reward function that keeps what it receives, one entry per call."""

    def __init__(self, reward: Callable[..., list[Any]] = variety) -> None:
        self.reward, self.calls = reward, []
        self.__name__ = "recorder"

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return self.reward(prompts=prompts, completions=completions, **columns)

    def all(self, key: str) -> list[Any]:
        return [value for call in self.calls for value in call[key]]


FAMILIES = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}),
    "llama": ("Llama", {}),
    "cohere2": ("Cohere2", {"sliding_window": 128}),
    "qwen3moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "gptoss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 128},
    ),
    "neox": ("GPTNeoX", {}),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@cache
def shared_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="trl_compat_"))


@cache
def policy(family: str = "llama", template: str | None = tiny.CHATML, head: str = "CausalLM", seed: int = 0) -> str:
    """Return the folder of a tiny model with its tokenizer."""
    folder = shared_folder() / f"{head}-{family}-{seed}-{len(template or '')}"
    tokenizer = tiny.chat_tokenizer(template)
    name, own = FAMILIES[family]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    labels = {"num_labels": 1} if head == "SequenceClassification" else {}
    sizes = own if family == "gpt2" else SIZES | own
    config = getattr(transformers, f"{name}Config")(
        **sizes, **ends, **labels, vocab_size=len(tokenizer), bos_token_id=None
    )
    torch.manual_seed(seed)
    getattr(transformers, f"AutoModelFor{head}").from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def base_policy() -> str:
    """Return the folder of a model without a chat template, for plain prompts."""
    return policy(template=None)


def reward_model(seed: int = 1) -> str:
    """Return the folder of a tiny sequence classification model with one label, as TRL's RewardTrainer writes it."""
    return policy("llama", None, "SequenceClassification", seed)


def load(folder: str | None = None) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder or policy(), dtype=torch.float32)


def load_reward(folder: str) -> Any:
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    return load(folder, num_labels=1, dtype=torch.float32)


def load_tokenizer(folder: str | None = None) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder or policy())


def scores(folder: str, texts: list[str], tokenizer: Any = None) -> list[float]:
    """Return the outputs of a reward model for whole texts, one by one."""
    model, tokenizer = load_reward(folder).eval(), tokenizer or load_tokenizer(folder)
    with torch.no_grad():
        return [
            model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
            for text in texts
        ]


def same_outputs(one: Any, two: Any) -> bool:
    """Tell whether two models compute equal logits."""
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return torch.allclose(one.eval()(input_ids=ids).logits, two.eval()(input_ids=ids).logits, atol=1e-5)


@contextmanager
def inputs_of(model: Any) -> Iterator[list[list[int]]]:
    """Collect the sequences of token ids that a model reads, without the padding in front; packed ones have one row."""
    rows: list[list[int]] = []
    pad = load_tokenizer().pad_token_id

    def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        found = [] if ids is None else ids.tolist()
        if len(found) == 1 and (positions := kwargs.get("position_ids")) is not None:
            starts = [i for i, position in enumerate(positions[0].tolist()) if position == 0]
            ends = [*starts[1:], len(found[0])][: len(starts)]
            found = [found[0][start:end] for start, end in zip(starts, ends, strict=True)]
        for row in found:
            while row and row[0] == pad:
                row = row[1:]
            rows.append(row)

    handle = model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def reads_prompts(
    lib: Library, folder: Path, data: Dataset, expected: list[list[int]], settings: dict | None = None, **given: Any
) -> None:
    """Train, and check that the model reads exactly ``expected`` token ids in front of each completion."""
    recorder = Recorder()
    trainer = make(
        lib, folder, {"max_steps": len(data)} | (settings or {}), train_dataset=data, reward_funcs=recorder, **given
    )
    with inputs_of(trainer.model) as rows:
        trainer.train()
    ids = {str(prompt): wanted for prompt, wanted in zip(data["prompt"], expected, strict=True)}
    for prompt, completion in zip(recorder.all("prompts"), recorder.all("completion_ids"), strict=True):
        wanted = [*ids[str(prompt)], *completion]
        assert any(row[: len(wanted)] == wanted for row in rows), (wanted, rows[:3])


@contextmanager
def printed() -> Iterator[io.StringIO]:
    """Collect what the terminal shows."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        yield out


@contextmanager
def optimizer_steps() -> Iterator[list[str]]:
    """Count the steps of all optimizers, of which a scheduler's or a library's wrapper is none."""
    steps: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *args: steps.append(type(args[0]).__name__))
    try:
        yield steps
    finally:
        handle.remove()


def error_of(run: Callable[[], Any]) -> str:
    """Return the message of the error that ``run`` raises."""
    try:
        run()
    except Exception as error:
        return str(error)
    raise AssertionError("no error was raised")
