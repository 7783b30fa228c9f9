"""One trainer's steps in a separate process, for benchmarks/peers.py; also makes the models they all start from."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)

if TYPE_CHECKING:
    from reinforcepp import ReinforceTrainer

SHAPES = {
    "82m": {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "20m": {"n_layer": 4, "n_embd": 320, "n_head": 5, "vocab_size": 50257},
    "124m": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 320},
    # Qwen2's, for a GPU
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "tiny_qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
for name in ("0.5b", "1.5b", "tiny_qwen2"):
    vocabulary = 320 if name.startswith("tiny") else 151_936
    SHAPES[name] |= {"num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": True}
PROMPT_TOKENS = 32
MINI_BATCH = 16  # completions at a time, for every trainer
EOS = 0
KL = 0.05


# --- what all start from --------------------------------------------------------------------------------------------


def make_models(folder: Path, shape: dict[str, int]) -> None:
    """``policy`` and ``reward`` with random weights, and a tokenizer whose tokens are words, so texts come back as they were."""
    torch.manual_seed(0)
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, shape["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS, "num_labels": 1}
    policy, reward = _qwen2(shape, ends) if "hidden_size" in shape else _gpt2(shape, ends)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _gpt2(shape: dict[str, int], ends: dict[str, int]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """EOS can't be sampled, so every completion has exactly as many tokens as it may have.

    The first coordinate of what goes into the output layer is always 1, and EOS alone has a weight there, a large
    negative one.
    """
    config = GPT2Config(**shape, **ends)
    policy = GPT2LMHeadModel(config)
    with torch.no_grad():
        policy.transformer.ln_f.weight[0] = 0
        policy.transformer.ln_f.bias[0] = 1
        policy.transformer.wte.weight[:, 0] = 0
        policy.transformer.wte.weight[EOS, 0] = -1e4
    return policy, GPT2ForSequenceClassification(config)


def _qwen2(shape: dict[str, int], ends: dict[str, int]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """With random weights every token is about as likely as any other: EOS comes once in 152,000."""
    config = Qwen2Config(**shape, **ends)
    return Qwen2ForCausalLM(config), Qwen2ForSequenceClassification(config)


def prompts(count: int, vocabulary: int) -> list[str]:
    """Random words; no two prompts begin alike."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, vocabulary, (count, PROMPT_TOKENS), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in row) for row in rows]


# --- the trainers ---------------------------------------------------------------------------------------------------


class Phases:
    """Seconds spent in chosen methods, step by step."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Count the time in ``owner.method`` as ``phase``."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.now[phase] = self.now.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)

    def end_step(self) -> None:
        """The step that ends now."""
        self.steps.append(self.now)
        self.now = {}


class StepTimes(TrainerCallback):
    """When training began and each optimiser step of a transformers trainer ended."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step begins."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        self.phases.end_step()


def build_ours(job: dict[str, Any], folder: Path, output: str) -> ReinforceTrainer:
    """This package's trainer, with either rollout engine, or as PPO; what it imports, the peers' processes do without."""
    from reinforcepp import ReinforceConfig, ReinforceTrainer
    from reinforcepp.models.loading import load_config, prepare_tokenizer
    from reinforcepp.rewards.trained import TrainedReward

    name = str(folder / "policy")
    tokenizer = prepare_tokenizer(PreTrainedTokenizerFast.from_pretrained(name), load_config(name), name)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    dtype = torch.float32 if job["setting"] == "float32" else torch.bfloat16
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype, num_labels=1)
    steps = job["warm_up"] + job["steps"]
    config = ReinforceConfig(
        output_dir=output,
        overwrite=True,
        batch_size=job["completions"],
        micro_batch_size=min(MINI_BATCH, job["completions"]),
        max_steps=steps,
        max_prompt_length=PROMPT_TOKENS,
        max_new_tokens=job["new_tokens"],
        max_length=PROMPT_TOKENS + job["new_tokens"],
        kl_coef=KL,
        estimator="ppo" if job["name"] == "ours_ppo" else "reinforce_plus_plus",
        rollout="vllm" if job["name"] == "ours_vllm" else "transformers",
        mixed_precision="no" if job["setting"] == "float32" else "bf16",
        sync_check_every=1000,
        eval_prompts=0,
    )
    rows = [{"prompt": text} for text in prompts(job["completions"] * steps, tokenizer.vocab_size)]
    rewards = TrainedReward(reward.eval(), tokenizer)
    return ReinforceTrainer(str(folder / "policy"), rewards, config, rows, processing_class=tokenizer)


def run_ours(job: dict[str, Any], folder: Path, output: str) -> tuple[list[float], dict[str, list[float]]]:
    """This package's trainer."""
    trainer = build_ours(job, folder, output)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry][job["warm_up"] :]
    lengths = [m["completions/mean_length"] for m in log]
    assert min(lengths) > 0.99 * job["new_tokens"], f"completions of other lengths: {lengths}"
    phases = {phase: [m[f"time/{phase}"] for m in log] for phase in ("rollout", "score", "update", "sync")}
    return [m["step_time"] for m in log], phases


def run_trl_group(job: dict[str, Any], folder: Path, output: str) -> tuple[list[float], dict[str, list[float]]]:
    """TRL's RLOOTrainer or GRPOTrainer."""
    import trl
    from datasets import Dataset

    kind = {"trl_rloo": "RLOO", "trl_grpo": "GRPO"}[job["name"]]
    steps = job["warm_up"] + job["steps"]
    settings = trl_settings(job, output) | {
        "max_completion_length": job["new_tokens"],
        "num_generations": 2,
        "beta": KL,
        "max_steps": steps,
        "temperature": 1.0,
    }
    policy, reward, tokenizer = load_all(folder, job["setting"])
    trainer = getattr(trl, f"{kind}Trainer")(
        model=policy,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_dict({"prompt": prompts(job["completions"] * steps, tokenizer.vocab_size)}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )
    phases = Phases()
    phases.watch(trainer, "_generate", "rollout")
    phases.watch(trainer, "_generate_and_score_completions", "rollout and score")
    return trained(trainer, phases, job["warm_up"])


def run_trl_ppo(job: dict[str, Any], folder: Path, output: str) -> tuple[list[float], dict[str, list[float]]]:
    """TRL's PPOTrainer, one epoch over each batch."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    steps = job["warm_up"] + job["steps"]
    policy, reward, tokenizer = load_all(folder, job["setting"])
    reference, _, _ = load_all(folder, job["setting"])
    _, value, _ = load_all(folder, job["setting"])
    settings = trl_settings(job, output) | {
        "response_length": job["new_tokens"],
        "total_episodes": job["completions"] * steps,
        "num_ppo_epochs": 1,
        "num_sample_generations": 0,
        "kl_coef": KL,
        "temperature": 1.0,
        "local_rollout_forward_batch_size": min(MINI_BATCH, job["completions"]),
    }
    texts = prompts(job["completions"] * steps, tokenizer.vocab_size)
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    trainer = PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
    )
    phases = Phases()
    phases.watch(module, "batch_generation", "rollout")
    return trained(trainer, phases, job["warm_up"])


def trl_settings(job: dict[str, Any], output: str) -> dict[str, Any]:
    return {
        "output_dir": output,
        "per_device_train_batch_size": min(MINI_BATCH, job["completions"]),
        "gradient_accumulation_steps": max(1, job["completions"] // MINI_BATCH),
        "bf16": job["setting"] == "autocast",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "learning_rate": 1e-5,
    }


def load_all(folder: Path, setting: str) -> tuple[Any, Any, Any]:
    dtype = torch.bfloat16 if setting == "weights" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype, num_labels=1)
    return policy, reward, PreTrainedTokenizerFast.from_pretrained(folder / "policy", padding_side="left")


def trained(trainer: Any, phases: Phases, warm_up: int) -> tuple[list[float], dict[str, list[float]]]:
    """Train; seconds between the ends of steps, the warm-up left out."""
    callback = StepTimes(phases)
    trainer.add_callback(callback)
    trainer.train()
    seconds = [b - a for a, b in zip(callback.ends, callback.ends[1:], strict=False)][warm_up:]
    steps = phases.steps[warm_up:]
    return seconds, {name: [step[name] for step in steps] for name in (steps[0] if steps else {})}


RUN: dict[str, Callable[..., tuple[list[float], dict[str, list[float]]]]] = {
    "ours": run_ours,
    "ours_vllm": run_ours,
    "ours_ppo": run_ours,
    "trl_rloo": run_trl_group,
    "trl_grpo": run_trl_group,
    "trl_ppo": run_trl_ppo,
}


# --- the machine's limits -------------------------------------------------------------------------------------------


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rates(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a large matrix product, and bytes a second read from memory."""
    size = 8192 if DEVICE == "cuda" else 2048
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    block = torch.ones(1 << (30 if DEVICE == "cuda" else 26), device=DEVICE)
    product = min(timed(lambda: a @ a) for _ in range(5))
    read = min(timed(lambda: block.sum()) for _ in range(5))
    return {"flops": 2 * size**3 / product, "bytes": block.numel() * 4 / read}


def peak_mib() -> float:
    """The process's largest resident memory; on a GPU, that of tensors there."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products(shape: dict[str, int]) -> tuple[int, int]:
    """Weights that tokens are multiplied with: in the layers, and in the output layer."""
    if "n_embd" in shape:
        return 12 * shape["n_layer"] * shape["n_embd"] ** 2, shape["vocab_size"] * shape["n_embd"]
    width, keys = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = width**2 * (2 + 2 * keys) + 3 * width * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer), shape["vocab_size"] * width


def bounds(folder: Path, job: dict[str, Any], dtype: torch.dtype, rate: dict[str, float]) -> dict[str, float]:
    """Least seconds of each phase: operations over the rate of products, or bytes over that of reading, if more.

    Counted are products with weights (attention and everything element by element are left out): two operations a
    weight and token forward, four backward; the output layer for response tokens only.
    """
    body, head = products(AutoConfig.from_pretrained(folder / "policy").to_dict())
    rows, new = job["completions"], job["new_tokens"]
    tokens = rows * (PROMPT_TOKENS + new)
    decode = max(2 * (body + head) * rows / rate["flops"], (body + head) * dtype.itemsize / rate["bytes"])
    forward = 2 * (body * tokens + head * rows * new) / rate["flops"]
    adam = (body + head) * 28 / rate["bytes"]  # read weight, gradient and two moments, write all but the gradient
    return {
        "rollout": 2 * body * rows * PROMPT_TOKENS / rate["flops"] + new * decode,
        "score": forward + 2 * body * tokens / rate["flops"],
        "update": 3 * forward + adam,
    }


def utilisation(folder: Path, job: dict[str, Any], dtype: torch.dtype, rate: dict[str, float]) -> dict[str, float]:
    """Seconds that the update's products and the reading of the weights for every new token take by themselves.

    Over the seconds that were taken, they are the update's MFU, against the rate of products measured here, and the share
    of the memory's bandwidth that decoding uses.
    """
    body, head = products(AutoConfig.from_pretrained(folder / "policy").to_dict())
    rows, new = job["completions"], job["new_tokens"]
    products_of_update = 6 * (body * rows * (PROMPT_TOKENS + new) + head * rows * new)
    return {
        "update_products": products_of_update / rate["flops"],
        "decode_reads": new * (body + head) * dtype.itemsize / rate["bytes"],
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    with tempfile.TemporaryDirectory() as output:
        seconds, phases = RUN[job["name"]](job, folder, output)
    peak = peak_mib()
    dtype = torch.float32 if job["setting"] == "float32" else torch.bfloat16
    rate = rates(dtype)
    result = {
        "seconds": seconds,
        "phases": phases,
        "peak_rss_mib": peak,
        "rates": rate,
        "bounds": bounds(folder, job, dtype, rate),
        "utilisation": utilisation(folder, job, dtype, rate),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
