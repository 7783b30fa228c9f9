"""Bytes of each part of a training on one device, in each phase of a step: arithmetic on shapes and settings.

A phase holds what stands all the time (weights, AdamW's moments, reference, reward model, critic) and what it needs for
itself. The peak of a training is that of its largest phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforcepp.config import ReinforceConfig
from reinforcepp.models.logprobs import BLOCK_BYTES, CHUNK_BYTES
from reinforcepp.plan.shapes import Body, Pass, Shape, Size
from reinforcepp.rewards.trained import SCORING_BATCH_SIZE
from reinforcepp.rollout.kv_cache import SPARE_TOKENS
from reinforcepp.rollout.selection import EngineName
from reinforcepp.rollout.vllm.memory import CPU_CACHE_CAP, cache_budget
from reinforcepp.training.evaluation import BATCH as EVALUATION_ROWS

MIB = 1 << 20
LIBRARIES = {"cpu": 480 * MIB, "gpu": 600 * MIB}
"""Python, torch, transformers and the rest before any model; on a GPU the context and the libraries' own buffers."""
VLLM = {"cpu": 220 * MIB, "gpu": 0}
"""What vLLM adds to them."""
ALLOCATOR = {"cpu": 0.3, "gpu": 0.05}
"""Of what is made and freed in every step, the share that is held beside it because freed blocks have the wrong size.

On a CPU glibc's allocator can't give a freed block to a request of the same size where it has to be aligned, as tensors
are, before 2.38; benchmarks/planner.py fits the share. On a GPU it is a guess.
"""
UNBOUNDED = 1 << 62
FLOAT = 4
MOMENTS = 2 * FLOAT  # AdamW's two, for each weight

Parts = Mapping[str, float]
"""Bytes by the name of what takes them."""


@dataclass(frozen=True)
class Job:
    """A training, as far as its memory and its time depend on anything but the settings of its batches."""

    policy: Shape
    reward: Body
    critic: Shape | None
    judge: Body | None
    size: Size
    dtype: torch.dtype
    engine: EngineName
    gpus: int
    """Of all machines; 0 for a CPU."""
    offload: bool = False
    """What AdamW needs is in main memory, and the policy's on a GPU."""
    ahead: int = 0
    """Copies of the policy for steps whose completions are generated while others are trained on."""
    ranks: int = 1
    """Devices that train together."""
    sharded: bool = False
    """Each has a part of what is learnt, and all of what is only asked."""

    @property
    def place(self) -> str:
        """Which of the constants above hold."""
        return "gpu" if self.gpus else "cpu"

    @property
    def narrow(self) -> bool:
        """Whether weights are learnt in float32 beside those that the model computes with."""
        return self.dtype != torch.float32

    @property
    def learners(self) -> list[Shape]:
        """The policy, and the critic if there is one."""
        return [self.policy] + ([self.critic] if self.critic is not None else [])

    @property
    def shards(self) -> int:
        """Devices that one weight that learns is spread over."""
        return self.ranks if self.sharded else 1

    @property
    def gradient(self) -> float:
        """Bytes of a weight's gradient between two passes."""
        return 0 if self.offload else FLOAT / self.shards

    @property
    def master(self) -> float:
        """Bytes of what a weight is learnt in beside what it computes in; shards are beside a whole copy, see ``Learner``."""
        return FLOAT / self.shards * (self.narrow or self.sharded) * (not self.offload)

    @property
    def moments(self) -> float:
        """Bytes of AdamW's two for each weight."""
        return 0 if self.offload else MOMENTS / self.shards


@dataclass(frozen=True)
class Rows:
    """Completions on one device."""

    step: int
    """Of a training step."""
    prompts: int
    """Different prompts among them."""
    evaluated: int
    """Of an evaluation."""
    at_a_time: int
    """Generated together, at most."""
    micro: int
    """Per forward and backward pass."""
    passes: int
    """Forward and backward passes of an optimiser step."""

    @staticmethod
    def of(config: ReinforceConfig, ranks: int) -> Rows:
        """What one of ``ranks`` devices gets of the batches that ``config`` describes."""
        ranks = max(1, ranks)
        prompts = -(-config.batch_size // ranks)
        step = prompts * config.num_generations
        micro = min(config.effective_micro_batch_size, step)
        update = min(-(-config.optimizer_batch_size // ranks), step)
        return Rows(step, prompts, config.eval_prompts, config.rollout_batch_size, micro, -(-update // micro))


# --- what stands all the time ---------------------------------------------------------------------------------------


def standing(job: Job) -> dict[str, float]:
    """What is there from the first optimiser step on."""
    item, policy = job.dtype.itemsize, job.policy
    parts: dict[str, float] = {"policy": policy.stored}
    if job.master:
        # who cuts weights up cuts those up that don't learn, too
        parts["float32 weights"] = job.master * (policy.parameters if job.sharded else policy.trained)
    if job.moments:
        parts["AdamW's moments"] = job.moments * policy.trained
    if job.ahead:
        parts["copies to sample"] = job.ahead * item * policy.trained
    if not policy.adapted:  # else it is the policy without its adapter
        parts["reference"] = policy.stored
    parts["reward model"] = item * job.reward.parameters
    if job.judge is not None:
        parts["judge"] = item * job.judge.parameters
    if job.critic is not None:
        parts["critic"] = job.critic.stored + (job.master + job.moments) * job.critic.trained
    if job.ranks > 1 and not job.sharded:
        parts["gradient buckets"] = item * sum(learner.trained for learner in job.learners)
    return parts


def loading(job: Job) -> dict[str, float]:
    """When the models are there and the policy is about to be cast; reward model first, reference last.

    Before weights are cut up every device has them twice, whole and in float32.
    """
    policy = job.policy
    whole = FLOAT if job.sharded else job.master
    parts: dict[str, float] = {"reward model": job.dtype.itemsize * job.reward.parameters}
    if job.critic is not None:
        parts["critic"] = job.critic.stored + whole * job.critic.trained
    if job.sharded:
        parts |= {"policy": FLOAT * policy.parameters, "float32 weights": whole * policy.parameters}
    elif policy.adapted:
        parts |= {"policy": policy.stored}
    elif job.narrow:
        parts |= {"policy": FLOAT * policy.parameters, "float32 weights": whole * policy.parameters}
    else:
        parts |= {"policy": policy.stored, "reference": policy.stored}
    return parts


# --- what a phase needs for itself ----------------------------------------------------------------------------------


def generating(job: Job, rows: Rows) -> dict[str, float]:
    """Rollouts of a step or of an evaluation, whichever takes more."""
    if job.engine == "vllm":
        return by_vllm(job, rows) if job.gpus else {}
    if job.engine == "servers":
        return {}
    if job.engine == "ray":
        return {} if job.gpus else {"weights handed out": float(job.dtype.itemsize * job.policy.parameters)}
    sets = [(min(rows.step, rows.at_a_time), rows.prompts)]
    if rows.evaluated:
        sets.append((min(rows.evaluated, rows.at_a_time), rows.evaluated))
    moments = [_prefill(job, number, prompts) for number, prompts in sets]
    moments += [_decoding(job, number) for number, _ in sets]
    parts = max(moments, key=total)
    if not job.gpus:
        parts["packed weights"] = job.dtype.itemsize * job.policy.packed
    return parts


def _prefill(job: Job, rows: int, prompts: int) -> dict[str, float]:
    prompts = min(rows, prompts)
    cache = prompts * (job.size.prompt + SPARE_TOKENS) * job.policy.cache_per_token
    return {"activations": job.policy.prefill.peak.at(prompts).other, "key-value cache": cache}


def _decoding(job: Job, rows: int) -> dict[str, float]:
    """At the last token. The cache grows, or loses rows that have ended, a layer at a time, and that layer is held twice."""
    policy = job.policy
    cache = rows * cache_room(job.size) * policy.cache_per_token
    return {"key-value cache": cache * (1 + 1 / policy.layers), "logits": rows * drawing_bytes(job)}


def cache_room(size: Size) -> int:
    """Tokens for which the transformers engine's cache has room at the end: it grows in strides."""
    room = size.prompt + SPARE_TOKENS
    while room < size.length - 1:  # the last token is drawn and not looked back at
        room += SPARE_TOKENS + 1
    return room


def drawing_bytes(job: Job) -> int:
    """For each row that a token is drawn for: logits before and after the temperature, and which tokens occurred."""
    copies = 2 * FLOAT + (job.dtype.itemsize if job.narrow else 0) + 1
    return copies * job.policy.vocabulary


def by_vllm(job: Job, rows: Rows) -> dict[str, float]:
    """The engine's own weights and its cache.

    On a CPU the output layer has a packed copy beside it, the cache has a limit, and both are there all the time; on a GPU
    they are only there while completions are generated.
    """
    policy = job.policy
    sequences = policy.cache_per_token, job.size.length, rows.at_a_time
    cache = cache_budget(*sequences, UNBOUNDED, None if job.gpus else CPU_CACHE_CAP)
    weights = policy.parameters + (0 if job.gpus else policy.head)
    return {"vLLM's weights": job.dtype.itemsize * weights, "key-value cache": cache}


def scoring(job: Job, rows: Rows) -> dict[str, float]:
    """The reward model, then the reference, without gradients."""
    texts = min(SCORING_BATCH_SIZE, max(rows.step, rows.evaluated))
    asked = max(rows.micro, min(EVALUATION_ROWS, rows.evaluated))
    moments = [{"activations": float(job.reward.score.peak.at(texts).other)}]
    if job.judge is not None:
        moments.append({"activations": float(job.judge.score.peak.at(min(SCORING_BATCH_SIZE, rows.evaluated)).other)})
    for learner in job.learners:
        moments.append({"activations": float(learner.score.peak.at(asked).other)})
        kept = learner.score.at_head.at(asked)
        moments.append(
            {"activations": kept, "logits": chunk_bytes(job, learner, asked) + block_bytes(job, learner, asked)}
        )
    return max(moments, key=total)


def training(job: Job, rows: Rows) -> dict[str, float]:
    """The forward and backward pass with the most alive: policy first, then the critic, over each micro-batch."""
    moments = []
    whole = [job.gradient * learner.trained for learner in job.learners]
    for place, learner in enumerate(job.learners):
        before, others = sum(whole[:place]), sum(whole) - whole[place]
        moments.append(_with_gradients(job, learner, learner.first, rows.micro, before))
        if rows.passes > 1:
            moments.append(_with_gradients(job, learner, learner.later, rows.micro, others))
    return max(moments, key=total) | gathered(job)


def gathered(job: Job) -> dict[str, float]:
    """Shards of which a pass needs the whole: a layer at work and the next, embeddings and output, and a layer's gradient.

    The gradient is there as the model computes it and, to be added up, in float32.
    """
    if not job.sharded:
        return {}
    item = job.dtype.itemsize
    sizes = []
    for learner in job.learners:
        outside = learner.head * (1 if learner.tied else 2)
        layer = (learner.parameters - outside) / learner.layers
        sizes.append(item * (2 * layer + outside) + (item + FLOAT) * layer)
    return {"gathered weights": max(sizes)}


def _with_gradients(job: Job, learner: Shape, one: Pass, rows: int, others: float) -> dict[str, float]:
    """A pass of ``learner`` while the other learner has ``others`` bytes of gradients."""
    gradients, other = one.peak.at(rows)
    alive = {"gradients": gradients + others, "activations": float(other), "logits": 0.0}
    if not learner.logits_apart:  # they are among the activations, but for a critic, which has none
        return alive | {"logits": float(block_bytes(job, learner, rows)) if learner.vocabulary > 1 else 0.0}
    logits, head = logits_bytes(job, learner, rows)
    kept = one.at_head.at(rows) + head
    at_head = {"gradients": one.at_head.gradients + others, "activations": kept, "logits": logits}
    return max(alive, at_head, key=total)


def logits_bytes(job: Job, learner: Shape, rows: int) -> tuple[float, float]:
    """At the most: bytes of logits and their gradients in the backward pass, and of the output layer's gradient.

    Logits that fit into a chunk are kept; else they are computed again chunk by chunk, and the output layer's gradient of
    one chunk is added to that of those before. Either logits, gradient and blocks in float32 are there, or the gradient
    and what becomes of it.
    """
    chunk = chunk_bytes(job, learner, rows)
    chunks = -(-rows * job.size.new * learner.vocabulary * job.dtype.itemsize // chunk) if chunk else 1
    head = learner.head * job.dtype.itemsize
    softmax = (2.0 * chunk + block_bytes(job, learner, rows), float(head * (chunks > 1)))
    product = (float(chunk), float(head * min(chunks, 2)))
    return max(softmax, product, key=sum)


def chunk_bytes(job: Job, learner: Shape, rows: int) -> int:
    """Logits that are there at a time, in the model's own dtype."""
    if not learner.logits_apart:
        return 0
    row = learner.vocabulary * job.dtype.itemsize
    return min(rows * job.size.new, max(1, CHUNK_BYTES // row)) * row


def block_bytes(job: Job, learner: Shape, rows: int) -> int:
    """Probabilities, and logits where they aren't there already, in float32 that softmax works on at a time."""
    row = FLOAT * learner.vocabulary
    limit = CHUNK_BYTES if job.gpus else BLOCK_BYTES["cpu"]
    return (1 + job.narrow) * min(rows * job.size.new, max(1, limit // row)) * row


def stepping(job: Job) -> dict[str, float]:
    """AdamW has all gradients and works in place."""
    return {"gradients": float(job.gradient * sum(learner.trained for learner in job.learners))}


def saving(job: Job) -> dict[str, float]:
    """A checkpoint copies one learner's optimiser to main memory before it is written; of a GPU it takes nothing."""
    if job.gpus:
        return {}
    copied = MOMENTS + FLOAT * job.narrow
    return {"checkpoint copies": float(copied * max(learner.trained for learner in job.learners))}


def batch_bytes(job: Job, rows: Rows) -> float:
    """The rollout batch: five tensors, advantages and returns, their float64 steps, and on a CPU Python's own numbers."""
    per_token = 7 * FLOAT + 3 * 8
    if not job.gpus:
        per_token += 2 * 8 + 32 + 24  # two tuples of pointers to an int and a float
    return float(rows.step * job.size.new * per_token)


PHASES = ("load", "rollout", "score", "update", "adamw", "save")
PARTS = (
    "policy",
    "float32 weights",
    "AdamW's moments",
    "copies to sample",
    "reference",
    "reward model",
    "judge",
    "critic",
    "gradients",
    "gradient buckets",
    "gathered weights",
    "activations",
    "logits",
    "key-value cache",
    "packed weights",
    "vLLM's weights",
    "weights handed out",
    "rollout batch",
    "checkpoint copies",
    "allocator",
    "libraries",
)
"""In the order in which they are told."""


def phases(job: Job, rows: Rows) -> dict[str, dict[str, float]]:
    """The parts of each phase. What generates ahead of time has its own all the time."""
    libraries = {"libraries": float(LIBRARIES[job.place] + (VLLM[job.place] if job.engine == "vllm" else 0))}
    engine = by_vllm(job, rows) if job.engine == "vllm" and not job.gpus else {}
    stands = libraries | standing(job) | engine | {"rollout batch": batch_bytes(job, rows)}
    rollout = generating(job, rows)
    trainer = (scoring(job, rows), training(job, rows), stepping(job), saving(job))
    own = (rollout, *(_together(rollout, parts) if job.ahead else parts for parts in trainer))
    share = ALLOCATOR[job.place]
    later = [stands | parts | {"allocator": share * total(parts)} for parts in own]
    return dict(zip(PHASES, [libraries | loading(job) | engine, *later], strict=True))


def _together(one: Parts, other: Parts) -> dict[str, float]:
    """The parts of two phases at the same time."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one.keys() | other.keys()}


def total(parts: Parts) -> float:
    """Bytes of all parts."""
    return sum(parts.values())
