"""Bytes of each part of a training on one device, by phase of a step: arithmetic on shapes and settings.

A phase holds the static memory (weights, AdamW's moments, reference, reward model, critic) and its own tensors. The peak of a
training is that of its largest phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reinforcepp.config import ReinforceConfig
from reinforcepp.models.micro_batches import SCORING_FACTOR, MicroBatchLimit
from reinforcepp.models.token_logprobs import BLOCK_BYTES, CHUNK_BYTES
from reinforcepp.planner.model_costs import FrozenModel, Pass, RowSize, TrainedModel
from reinforcepp.rollout.kv_cache import SPARE_TOKENS
from reinforcepp.rollout.selection import EngineName
from reinforcepp.rollout.vllm.memory import CPU_CACHE_CAP, cache_budget
from reinforcepp.training.evaluation import SCORING_BATCH_SIZE as EVALUATION_ROWS

MIB = 1 << 20
LIBRARIES = {"cpu": 480 * MIB, "gpu": 600 * MIB}
"""Python, torch, transformers and others before any model; on a GPU the CUDA context and the libraries' buffers."""
VLLM = {"cpu": 220 * MIB, "gpu": 0}
"""Bytes that vLLM adds to the libraries."""
ALLOCATOR = {"cpu": 0.3, "gpu": 0.05}
"""Overhead of the allocator: a fraction of the bytes that every step allocates and frees.

Before version 2.38, glibc can't reuse a freed block for an aligned request of the same size, and tensors are aligned.
benchmarks/planner.py fits the fraction for CPUs. The one for GPUs is a guess.
"""
UNBOUNDED = 1 << 62
FLOAT = 4
MOMENTS = 2 * FLOAT  # AdamW has two float32 moments per weight.

Parts = Mapping[str, float]
"""Bytes by the name of the part."""


@dataclass(frozen=True)
class Job:
    """Everything that memory and time of a training depend on except its batch settings."""

    policy: TrainedModel
    reward: FrozenModel
    critic: TrainedModel | None
    judge: FrozenModel | None
    size: RowSize
    dtype: torch.dtype
    engine: EngineName
    gpus: int
    """GPUs of all nodes; 0 for a CPU."""
    offload: bool = False
    """Whether the optimizer's tensors are in CPU memory while the policy is on a GPU."""
    sums_on_cpu: bool = False
    """Whether an offloaded optimizer's gradients are summed in CPU memory, too."""
    rollout_copies: int = 0
    """Copies of the policy for asynchronous rollouts."""
    ranks: int = 1
    """Data-parallel ranks."""
    sharded: bool = False
    """Whether ranks shard everything that is trained. Frozen models are whole on every rank."""

    @property
    def device_kind(self) -> str:
        """Key of the constants above."""
        return "gpu" if self.gpus else "cpu"

    @property
    def vllm_on_gpu(self) -> bool:
        """Whether each rank's vLLM generates on its GPU."""
        return self.engine == "vllm" and self.gpus > 0

    @property
    def has_masters(self) -> bool:
        """Whether float32 masters are separate from the weights that the model computes with."""
        return self.dtype != torch.float32

    @property
    def cache_per_token(self) -> int:
        """Bytes of the KV cache per token."""
        widens = self.engine == "transformers" and not self.gpus
        return self.policy.cache_per_token + (self.policy.widened_cache if widens else 0)

    @property
    def learners(self) -> list[TrainedModel]:
        """The policy, and the critic if there is one."""
        return [self.policy] + ([self.critic] if self.critic is not None else [])

    @property
    def shards(self) -> int:
        """Number of ranks that share a trainable weight."""
        return self.ranks if self.sharded else 1

    @property
    def gradient_bytes(self) -> float:
        """Bytes per weight of a gradient between two passes."""
        return 0 if self.sums_on_cpu else FLOAT / self.shards

    @property
    def master_bytes(self) -> float:
        """Bytes per weight of the masters; a sharded training also has a full copy of the model, see ``Learner``."""
        return FLOAT / self.shards * (self.has_masters or self.sharded) * (not self.offload)

    @property
    def moment_bytes(self) -> float:
        """Bytes per weight of AdamW's moments."""
        return 0 if self.offload else MOMENTS / self.shards


@dataclass(frozen=True)
class Rows:
    """Completions on one device."""

    step: int
    """Per training step."""
    prompts: int
    """Distinct prompts per training step."""
    evaluated: int
    """Per evaluation."""
    concurrent: int
    """Upper limit of completions generated at the same time."""
    micro: int
    """Per forward and backward pass."""
    passes: int
    """Forward and backward passes per optimizer step."""

    @property
    def scored(self) -> int:
        """Per forward pass without gradients."""
        return min(self.step, SCORING_FACTOR * self.micro)

    @staticmethod
    def of(config: ReinforceConfig, job: Job) -> Rows:
        """Return the rows of one device of a job."""
        prompts = -(-config.batch_size // job.ranks)
        step = prompts * config.num_generations
        micro = min(longest_rows(config, job), step)
        update = min(-(-config.optimizer_batch_size // job.ranks), step)
        concurrent = config.vllm_batch_size(job.ranks, on_gpu=job.vllm_on_gpu)
        return Rows(step, prompts, config.eval_prompts, concurrent, micro, -(-update // micro))


def longest_rows(config: ReinforceConfig, job: Job) -> int:
    """Return the completions of full length per forward and backward pass."""
    return MicroBatchLimit.of(config, job.device_kind).rows_of(job.size.length)


# --- static memory --------------------------------------------------------------------------------------------------


def static(job: Job) -> dict[str, float]:
    """Return the memory in use from the first optimizer step on."""
    item, policy = job.dtype.itemsize, job.policy
    parts: dict[str, float] = {"policy": policy.stored}
    if job.master_bytes:
        # A sharding backend also shards the frozen weights of the model.
        parts["float32 weights"] = job.master_bytes * (policy.parameters if job.sharded else policy.trained)
    if job.moment_bytes:
        parts["AdamW's moments"] = job.moment_bytes * policy.trained
    if job.rollout_copies:
        parts["copies to sample"] = job.rollout_copies * item * policy.trained
    if not policy.adapted:  # With an adapter, the reference is the policy without it.
        parts["reference"] = policy.stored
    parts["reward model"] = item * job.reward.parameters
    if job.judge is not None:
        parts["judge"] = item * job.judge.parameters
    if job.critic is not None:
        parts["critic"] = job.critic.stored + (job.master_bytes + job.moment_bytes) * job.critic.trained
    if job.ranks > 1 and not (job.sharded or job.has_masters or job.offload):  # Without DDP, there are none.
        parts["gradient buckets"] = item * sum(learner.trained for learner in job.learners)
    return parts


def loading(job: Job) -> dict[str, float]:
    """Return the memory when the models are loaded and the policy is about to be cast.

    The reward model loads first, the reference last. Before weights are sharded, every device holds them twice in float32.
    """
    policy = job.policy
    master_bytes = FLOAT if job.sharded else job.master_bytes
    parts: dict[str, float] = {"reward model": job.dtype.itemsize * job.reward.parameters}
    if job.critic is not None:
        parts["critic"] = job.critic.stored + master_bytes * job.critic.trained
    if job.sharded:
        parts |= {"policy": FLOAT * policy.parameters, "float32 weights": master_bytes * policy.parameters}
    elif policy.adapted:
        parts |= {"policy": policy.stored}
    elif job.has_masters:
        parts |= {"policy": FLOAT * policy.parameters, "float32 weights": master_bytes * policy.parameters}
    else:
        parts |= {"policy": policy.stored, "reference": policy.stored}
    return parts


# --- memory of single phases ----------------------------------------------------------------------------------------


def generating(job: Job, rows: Rows) -> dict[str, float]:
    """Return the memory of a step's or an evaluation's rollouts, whichever is larger."""
    if job.engine == "vllm":
        return vllm_memory(job, rows) if job.gpus else {}
    if job.engine == "servers":
        return {}
    if job.engine == "ray":
        return {} if job.gpus else {"weights handed out": float(job.dtype.itemsize * job.policy.parameters)}
    sets = [(min(rows.step, rows.concurrent), rows.prompts)]
    if rows.evaluated:
        sets.append((min(rows.evaluated, rows.concurrent), rows.evaluated))
    moments = [_prefill(job, number, prompts) for number, prompts in sets]
    moments += [_decoding(job, number) for number, _ in sets]
    parts = max(moments, key=total)
    if not job.gpus:
        parts["packed weights"] = job.dtype.itemsize * job.policy.packed
    return parts


def _prefill(job: Job, rows: int, prompts: int) -> dict[str, float]:
    prompts = min(rows, prompts)
    cache = prompts * (job.size.prompt + SPARE_TOKENS) * job.cache_per_token
    return {"activations": job.policy.prefill.peak.at(prompts).other, "key-value cache": cache}


def _decoding(job: Job, rows: int) -> dict[str, float]:
    """Return the memory at the last token. The cache grows and drops rows layer by layer, so one layer exists twice."""
    policy = job.policy
    cache = rows * cache_length(job.size) * job.cache_per_token
    return {"key-value cache": cache * (1 + 1 / policy.layers), "logits": rows * sampling_bytes(job)}


def cache_length(size: RowSize) -> int:
    """Return the tokens that the transformers engine's cache has space for at the end; it grows in strides."""
    length = size.prompt + SPARE_TOKENS
    while length < size.length - 1:  # The last token is sampled, but never attended to.
        length += SPARE_TOKENS + 1
    return length


def sampling_bytes(job: Job) -> int:
    """Return the bytes per sampled row: logits before and after the temperature, and a mask of the tokens seen."""
    copies = 2 * FLOAT + (job.dtype.itemsize if job.has_masters else 0) + 1
    return copies * job.policy.vocabulary


def vllm_memory(job: Job, rows: Rows) -> dict[str, float]:
    """Return the memory of vLLM's own weights, cache and, on a GPU, activations, for which it reserves memory when it starts.

    On a CPU, the output layer has an additional packed copy, the cache is limited, and both stay all the time. On a GPU, they
    exist only during rollouts.
    """
    policy = job.policy
    sequences = policy.cache_per_token, job.size.length, rows.concurrent
    cache = cache_budget(*sequences, UNBOUNDED, None if job.gpus else CPU_CACHE_CAP)
    weights = policy.parameters + (0 if job.gpus else policy.head)
    parts: dict[str, float] = {"vLLM's weights": job.dtype.itemsize * weights, "key-value cache": cache}
    if job.gpus:
        parts["activations"] = policy.vllm_activations.peak(rows.concurrent)
    return parts


def scoring(job: Job, rows: Rows) -> dict[str, float]:
    """Return the memory of the forward passes of reward model and reference."""
    texts = min(SCORING_FACTOR * rows.micro, max(rows.step, rows.evaluated))
    batch = max(rows.scored, min(EVALUATION_ROWS, rows.evaluated))
    moments = [{"activations": float(job.reward.score.peak.at(texts).other)}]
    if job.judge is not None:
        moments.append({"activations": float(job.judge.score.peak.at(min(texts, rows.evaluated)).other)})
    for learner in job.learners:
        moments.append({"activations": float(learner.score.peak.at(batch).other)})
        at_head = learner.score.at_head.at(batch)
        moments.append(
            {"activations": at_head, "logits": chunk_bytes(job, learner, batch) + block_bytes(job, learner, batch)}
        )
    return max(moments, key=total)


def training(job: Job, rows: Rows) -> dict[str, float]:
    """Return the largest memory of a forward and backward pass: policy first, then critic, for each micro-batch."""
    moments = []
    gradients = [job.gradient_bytes * learner.trained for learner in job.learners]
    for index, learner in enumerate(job.learners):
        before, others = sum(gradients[:index]), sum(gradients) - gradients[index]
        moments.append(_with_gradients(job, learner, learner.first, rows.micro, before))
        if rows.passes > 1:
            moments.append(_with_gradients(job, learner, learner.later, rows.micro, others))
    return max(moments, key=total) | gathered(job)


def gathered(job: Job) -> dict[str, float]:
    """Return the memory of weights that a sharded pass gathers.

    These are the current layer and the next one, embeddings and output layer, and one layer's gradient in the compute dtype and
    in float32.
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


def _with_gradients(job: Job, learner: TrainedModel, one: Pass, rows: int, others: float) -> dict[str, float]:
    """Return the memory of a pass of ``learner`` while the other learner has ``others`` bytes of gradients."""
    gradients, other = one.peak.at(rows)
    alive = {"gradients": gradients + others, "activations": float(other), "logits": 0.0}
    if not learner.separate_logits:  # The activations include the logits. A critic has none.
        return alive | {"logits": float(block_bytes(job, learner, rows)) if learner.vocabulary > 1 else 0.0}
    logits, head = logits_bytes(job, learner, rows)
    activations = one.at_head.at(rows) + head
    at_head = {"gradients": one.at_head.gradients + others, "activations": activations, "logits": logits}
    return max(alive, at_head, key=total)


def logits_bytes(job: Job, learner: TrainedModel, rows: int) -> tuple[float, float]:
    """Return the largest bytes of logits with their gradients in the backward pass, and of the output layer's gradient.

    Logits that fit into one chunk are kept. Otherwise the backward pass recomputes them chunk by chunk, and adds a chunk's
    gradient of the output layer to that of the chunks before. The gradient of the logits overwrites them.
    """
    chunk = chunk_bytes(job, learner, rows)
    chunks = -(-rows * job.size.new * learner.vocabulary * job.dtype.itemsize // chunk) if chunk else 1
    head = learner.head * job.dtype.itemsize
    softmax = (float(chunk) + block_bytes(job, learner, rows), float(head * (chunks > 1)))
    product = (float(chunk), float(head * min(chunks, 2)))
    return max(softmax, product, key=sum)


def chunk_bytes(job: Job, learner: TrainedModel, rows: int) -> int:
    """Return the bytes of a chunk of logits in the compute dtype."""
    if not learner.separate_logits:
        return 0
    row = learner.vocabulary * job.dtype.itemsize
    return min(rows * job.size.new, max(1, CHUNK_BYTES["cuda" if job.gpus else "cpu"] // row)) * row


def block_bytes(job: Job, learner: TrainedModel, rows: int) -> int:
    """Return the bytes of float32 blocks of softmax.

    These are probabilities, their products with logits, and logits unless they are float32 already.
    """
    row = FLOAT * learner.vocabulary
    limit = BLOCK_BYTES["cuda" if job.gpus else "cpu"]
    return (2 + job.has_masters) * min(rows * job.size.new, max(1, limit // row)) * row


def stepping(job: Job) -> dict[str, float]:
    """Return the memory of AdamW's step, which holds all gradients and works in place."""
    return {"gradients": float(job.gradient_bytes * sum(learner.trained for learner in job.learners))}


def saving(job: Job) -> dict[str, float]:
    """Return the memory of a checkpoint, which first copies one learner's optimizer to CPU memory."""
    if job.gpus:
        return {}
    copied = MOMENTS + FLOAT * job.has_masters
    return {"checkpoint copies": float(copied * max(learner.trained for learner in job.learners))}


def batch_bytes(job: Job, rows: Rows) -> float:
    """Return the bytes of the rollout batch.

    It holds five tensors, advantages and returns with their float64 intermediates, and on a CPU also Python's numbers.
    """
    per_token = 7 * FLOAT + 3 * 8
    if not job.gpus:
        per_token += 2 * 8 + 32 + 24  # Two tuples of pointers, to an int and to a float.
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
"""Names of the parts in the order of the report, and keys of its JSON."""


def phases(job: Job, rows: Rows) -> dict[str, dict[str, float]]:
    """Return the parts of each phase. Asynchronous rollouts add those of the rollout to every other phase."""
    libraries = {
        "libraries": float(LIBRARIES[job.device_kind] + (VLLM[job.device_kind] if job.engine == "vllm" else 0))
    }
    engine = vllm_memory(job, rows) if job.engine == "vllm" and not job.gpus else {}
    always = libraries | static(job) | engine | {"rollout batch": batch_bytes(job, rows)}
    rollout = generating(job, rows)
    trainer = (scoring(job, rows), training(job, rows), stepping(job), saving(job))
    own = (rollout, *(_sum(rollout, parts) if job.rollout_copies else parts for parts in trainer))
    overhead = ALLOCATOR[job.device_kind]
    later = [always | parts | {"allocator": overhead * total(parts)} for parts in own]
    return dict(zip(PHASES, [libraries | loading(job) | engine, *later], strict=True))


def _sum(one: Parts, other: Parts) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one.keys() | other.keys()}


def total(parts: Parts) -> float:
    """Return the bytes of all parts."""
    return sum(parts.values())
