"""What each optimisation of the training step is worth: the step with all of them, and with each one taken out.

python benchmarks/ablation.py [--rounds 3]

The work is that of benchmarks/peers.py, in bfloat16. Everything runs in one process, the variants in turns. What was to
be expected from an optimisation is worked out from operations and bytes, at the rates of this machine measured in the
same run. Written to benchmarks/results/ablation_cpu.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from peer_worker import EOS, PROMPT_TOKENS, SHAPES, build_ours, make_models, products, rates
from results import write_result
from torch import nn
from transformers.activations import NewGELUActivation

from reinforcepp import ReinforceTrainer
from reinforcepp.models import token_logprobs
from reinforcepp.monitoring import Clock
from reinforcepp.rollout import running_batch, transformers_engine
from reinforcepp.training.policy_update import rollout_batch, with_advantages, with_rewards

COMPLETIONS, NEW_TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="82m", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="ablation_cpu")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), shape)
        trainer = trainer_in(Path(folder))
        rate = rates(torch.bfloat16)
        for warm_up in range(2):
            one_step(trainer, warm_up)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ["everything", *WITHOUT]}
        for turn in range(arguments.rounds):
            for name, rows in seconds.items():
                with WITHOUT[name][1](trainer) if name in WITHOUT else nullcontext():
                    rows.append(one_step(trainer, turn))
                print(name, {key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
    base = median(row["step_time"] for row in seconds["everything"])
    optimisations = [
        {
            "optimisation": name,
            "phase": WITHOUT[name][0],
            "expected_seconds": WITHOUT[name][2](shape, rate),
            "seconds_saved": median(row["step_time"] for row in seconds[name]) - base,
            "seconds_saved_by_round": [
                row["step_time"] - all_on["step_time"]
                for row, all_on in zip(seconds[name], seconds["everything"], strict=True)
            ],
        }
        for name in WITHOUT
    ]
    result = {"step_seconds": base, "optimisations": optimisations, "machine_rates": rate, "rounds": seconds}
    write_result(arguments.name, {"shape": shape} | result)


def trainer_in(folder: Path) -> ReinforceTrainer:
    """This package's trainer on the models in ``folder``."""
    sizes = {"completions": COMPLETIONS, "new_tokens": NEW_TOKENS, "steps": 7, "warm_up": 0}
    return build_ours({"name": "ours", "setting": "weights"} | sizes, folder, str(folder / "run"))


def one_step(trainer: ReinforceTrainer, step: int) -> dict[str, float]:
    """Seconds of the phases of a step."""
    clock = Clock()
    completions = trainer.rollouts.next(step)
    clock.lap("rollout")
    kept, scores = with_rewards(completions, trainer.rewards, trainer.update)
    rollout = rollout_batch(kept, scores, trainer.rewards, trainer.update, trainer.reference)
    work = with_advantages(rollout, scores, trainer.update, trainer.run.state.kl_coef)
    clock.lap("score")
    trainer.update.run(work, step, trainer.run.state.kl_coef)
    clock.lap("update")
    assert all(len(c.ids) == NEW_TOKENS and EOS not in c.ids for c in completions)
    return clock.seconds()


# --- each optimisation taken out ------------------------------------------------------------------------------------


@contextmanager
def twice_scored(trainer: ReinforceTrainer) -> Iterator[None]:
    trainer.update.on_policy = False
    yield
    trainer.update.on_policy = True


@contextmanager
def unpacked(_: ReinforceTrainer) -> Iterator[None]:
    with patch.object(transformers_engine, "packed", lambda *_: nullcontext()):
        yield


@contextmanager
def drawn_token_by_token(_: ReinforceTrainer) -> Iterator[None]:
    def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_BV = logits_BV.float().log_softmax(-1)
        sums_BV = logprobs_BV.exp().double().cumsum(-1)
        ids_B1 = torch.searchsorted(sums_BV, uniforms_B[:, None] * sums_BV[:, -1:], right=True)
        ids_B1 = ids_B1.clamp_max(logits_BV.shape[-1] - 1)
        return ids_B1.squeeze(-1), logprobs_BV.gather(-1, ids_B1).squeeze(-1)

    with patch.object(running_batch, "draw", draw):
        yield


@contextmanager
def by_autograd(_: ReinforceTrainer) -> Iterator[None]:
    def plainly(
        logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float, *, entropy_gradient: bool, overwrite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled_NV = logits_NV.float() / temperature
        log_z_N = scaled_NV.logsumexp(-1)
        with torch.set_grad_enabled(entropy_gradient):
            entropy_N = log_z_N - ((scaled_NV - log_z_N[:, None]).exp() * scaled_NV).sum(-1)
        return scaled_NV.gather(-1, ids_N[:, None]).squeeze(-1) - log_z_N, entropy_N

    with patch.object(token_logprobs, "token_logprobs", plainly):
        yield


@contextmanager
def recomputed(_: ReinforceTrainer) -> Iterator[None]:
    with patch.object(token_logprobs, "CHUNK_BYTES", {"cpu": 32 << 20}):
        yield


@contextmanager
def eight_passes(trainer: ReinforceTrainer) -> Iterator[None]:
    places = [
        (module, name)
        for model in (trainer.policy, trainer.reference)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.GELU)
    ]
    with ExitStack() as stack:
        for module, name in places:
            fused = getattr(module, name)
            setattr(module, name, NewGELUActivation())
            stack.callback(setattr, module, name, fused)
        yield


@contextmanager
def many_passes(trainer: ReinforceTrainer) -> Iterator[None]:
    groups = trainer.update.policy._masters.param_groups
    for group in groups:
        group["fused"], group["foreach"] = False, True
    yield
    for group in groups:
        group["fused"], group["foreach"] = True, None


def body(shape: dict[str, int]) -> int:
    return products(shape)[0]


def head(shape: dict[str, int]) -> int:
    return products(shape)[1]


TOKENS = COMPLETIONS * (PROMPT_TOKENS + NEW_TOKENS)
SAMPLED = COMPLETIONS * NEW_TOKENS

Expected = Callable[[dict[str, int], dict[str, float]], float]
WITHOUT: dict[str, tuple[str, Callable[[ReinforceTrainer], Any], Expected]] = {
    "the update's pass gives the old log-probabilities": (
        "score",
        twice_scored,
        lambda s, r: 2 * (body(s) * TOKENS + head(s) * SAMPLED) / r["flops"],
    ),
    "weights packed once for a rollout": (  # else read, written in blocks and read again for every product
        "rollout",
        unpacked,
        lambda s, r: NEW_TOKENS * 2 * (body(s) + head(s)) * 2 / r["bytes"],
    ),
    "tokens drawn by blocks": (  # else log-probabilities, probabilities, doubles and their sums: 40 bytes a logit
        "rollout",
        drawn_token_by_token,
        lambda s, r: SAMPLED * s["vocab_size"] * 40 / r["bytes"],
    ),
    "softmax and its gradient in blocks": (  # else ten float32 passes over all logits
        "update, score",
        by_autograd,
        lambda s, r: SAMPLED * s["vocab_size"] * 40 / r["bytes"],
    ),
    "logits kept up to 128 MiB": (  # else computed again for the gradient
        "update",
        recomputed,
        lambda s, r: 2 * head(s) * SAMPLED / r["flops"],
    ),
    "activation in one pass": (  # else eight forward, eight back, and eight for the reference, of two bytes each way
        "update, score, rollout",
        eight_passes,
        lambda s, r: 3 * 7 * 4 * s["n_layer"] * 4 * s["n_embd"] * TOKENS / r["bytes"],
    ),
    "AdamW in one pass": (  # else about twelve reads and writes of four bytes more
        "update",
        many_passes,
        lambda s, r: 48 * (body(s) + head(s)) / r["bytes"],
    ),
}


if __name__ == "__main__":
    main()
