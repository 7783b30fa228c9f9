"""One training in a separate process, for benchmarks/planner.py: its peak memory by phase and the time of its steps."""

from __future__ import annotations

import copy
import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reinforcepp.commands.train import train
from reinforcepp.config import TrainConfig
from reinforcepp.models.reward_models import load_reward_weights
from reinforcepp.monitoring import Clock
from reinforcepp.rewards.card import RewardCard
from reinforcepp.rewards.trained import TrainedReward, save_reward_model
from reinforcepp.training import reinforce_trainer
from reinforcepp.training.policy_run import PolicyRun

MIB = 1 << 20
CUDA = torch.cuda.is_available()
EOS = 0
SPARE = 8  # of the vocabulary, for tokens that a family's own tokenizer class brings
FAMILIES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "LlamaForSequenceClassification"),
}


# --- what is trained ------------------------------------------------------------------------------------------------


def make(folder: Path, job: dict[str, Any]) -> None:
    """Policy and reward model with random weights, and prompts of which every fourth has the full length."""
    torch.manual_seed(0)
    policy, tokenizer = fresh(job["policy"], 1)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    vocabulary = policy.config.vocab_size
    del policy
    reward, tokenizer = fresh(job["reward"], 2)
    reward.save_pretrained(folder / "reward")
    del reward
    scorer = TrainedReward(load_reward_weights(folder / "reward"), tokenizer)
    card = RewardCard("random", "random", "", 1, 1, {}, 0.0, 1.0, {}, scorer.fingerprint())
    save_reward_model(scorer, card, folder / "reward")
    draw = random.Random(0)
    longest = job["settings"]["max_prompt_length"]
    with open(folder / "prompts.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt"])
        for i in range(600):
            length = longest if i % 4 == 0 else draw.randint(longest // 2, longest)
            rows.writerow([" ".join(f"w{draw.randrange(1, vocabulary - SPARE)}" for _ in range(length))])


def fresh(shape: dict[str, Any], place: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model of a family, a language model (1) or a classifier (2), and a tokenizer whose tokens are words."""
    settings = {name: value for name, value in shape.items() if name != "family"}
    names = FAMILIES[shape["family"]]
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = getattr(transformers, names[0])(**settings, **ends, num_labels=1)
    model = getattr(transformers, names[place])(config)
    if names[place] == "GPT2LMHeadModel":
        never_ends(model)
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, config.vocab_size - SPARE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return model, tokenizer


@torch.no_grad()
def never_ends(model: Any) -> None:
    """One feature of GPT-2's last layer is made constant and points away from EOS; elsewhere EOS is rare by chance."""
    final, embeddings = model.transformer.ln_f, model.transformer.wte
    final.weight[0], final.bias[0] = 0, 1
    embeddings.weight[:, 0] = 0
    embeddings.weight[EOS, 0] = -1e4


# --- what it takes --------------------------------------------------------------------------------------------------


class Peaks:
    """The most memory in each phase, in MiB: resident on a CPU, of tensors on a GPU."""

    def __init__(self) -> None:
        self.by_phase: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """From now on."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text(
                "5", encoding="utf-8"
            )  # the mark of resident memory falls to what is resident

    def end(self, phase: str) -> None:
        """What was the most since ``begin``; the next phase begins."""
        self.by_phase[phase] = max(self.by_phase.get(phase, 0.0), highest())
        self.begin()


def highest() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / MIB
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def watch(peaks: Peaks) -> None:
    """Have phases and checkpoints end where the trainer says so."""
    lap, begin, save = Clock.lap, PolicyRun.__init__, PolicyRun.save

    def lapped(clock: Clock, phase: str) -> None:
        peaks.end(phase)
        lap(clock, phase)

    def begun(run: PolicyRun, *arguments: Any, **named: Any) -> None:
        begin(run, *arguments, **named)
        peaks.end("load")

    def saved(run: PolicyRun, *arguments: Any) -> None:
        peaks.end("between")
        save(run, *arguments)
        peaks.end("save")

    Clock.lap, PolicyRun.__init__, PolicyRun.save = lapped, begun, saved  # type: ignore[method-assign]


def main() -> None:
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    if job["make"]:
        make(folder, job)
        return
    if job.get("copied_reference"):
        reinforce_trainer.make_reference = lambda policy: copy.deepcopy(policy).requires_grad_(False)
    peaks = Peaks()
    watch(peaks)
    trainer = train(TrainConfig(**job["settings"]))
    peaks.end("end")
    lines = (trainer.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timings = (trainer.folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    result = {
        "peaks": peaks.by_phase,
        "mean_length": min(json.loads(line)["completions/mean_length"] for line in lines),
        "timings": [json.loads(line) for line in timings],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
