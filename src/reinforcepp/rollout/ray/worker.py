"""The rollout worker that runs in each process of a Ray pool, and how weights are packed for it. Ray isn't named here."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor

from reinforcepp.errors import RolloutError, setting
from reinforcepp.models.devices import choose_device
from reinforcepp.models.loading import meta_model
from reinforcepp.models.lora import base_model, full_weights
from reinforcepp.models.rotary import fix_frequencies
from reinforcepp.rollout.selection import EngineChoice, choose_engine, start_chosen_engine
from reinforcepp.runtime.process import own_version, versions_of
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_RAY = "2.52"
"""The first version of Ray with authentication; older ones ignore the setting and accept every client."""
PackedTensor = tuple[str, Any]
"""A tensor's dtype, and its values in a NumPy array that can share memory with others."""


@dataclass(frozen=True)
class WorkerSpec:
    """Everything from which a worker starts, except the weights."""

    config: Any
    generation_config: Any
    dtype: torch.dtype
    tokenizer: Any
    engine: str
    max_length: int
    batch_size: int
    tensor_parallel_size: int = 1
    """GPUs per worker."""
    weight_transfer: str = ""
    """Backend of vLLM's weight transfer, by which a worker with one GPU gets all weights but the first."""


@dataclass(frozen=True)
class PackedWeights:
    """Weights, tied ones under both names, and the buffers that aren't saved with them, such as rotary frequencies."""

    weights: Mapping[str, PackedTensor]
    buffers: Mapping[str, PackedTensor]
    version: str
    """The trainer's version of this package."""


class Worker:
    """A process of the pool: it has its own engine, and shares the memory of the packed weights with its node's workers."""

    kind = "rollout"

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.engine: Any = None

    def load(self, packed: PackedWeights) -> str:
        """Generate with these weights from now on; return the engine's name."""
        spec = self.spec
        model = self._unpack(packed)
        if self.engine is None:
            self.engine = start_chosen_engine(
                self.choice,
                model,
                spec.tokenizer,
                max_length=spec.max_length,
                batch_size=spec.batch_size,
                tensor_parallel_size=spec.tensor_parallel_size,
                exclusive_gpu=True,
                weight_transfer=spec.weight_transfer if spec.tensor_parallel_size == 1 else "",
            )
        else:
            self.engine.load_weights(model)
        return str(self.engine.name)

    def process(self, items: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Return the completions of each prompt."""
        completions = self.engine.generate(items, sampling)
        number = sampling.num_samples
        return [completions[i : i + number] for i in range(0, len(completions), number)]

    def in_transfer_group(self) -> bool | None:
        """Return whether the engine is in the group for NCCL weight transfer; None if it never can be."""
        return self.engine.in_transfer_group if self.engine.name == "vllm" else None

    def join_transfer(self, message: dict[str, Any]) -> None:
        """See :meth:`~reinforcepp.rollout.vllm_integration.VllmEngine.join_transfer`."""
        self.engine.join_transfer(message)

    def transfer(self, method: str, *arguments: Any) -> None:
        """See :meth:`~reinforcepp.rollout.vllm_integration.VllmEngine.transfer`."""
        self.engine.transfer(method, *arguments)

    def finish_transfer(self) -> None:
        """See :meth:`~reinforcepp.rollout.vllm_integration.VllmEngine.finish_transfer`."""
        self.engine.finish_transfer()

    @cached_property
    def choice(self) -> EngineChoice:
        """The engine for this node."""
        spec = self.spec
        choice = choose_engine(spec.engine, spec.config, spec.dtype)
        if spec.tensor_parallel_size > 1 and choice.name != "vllm":
            raise RolloutError(
                f"{setting('vllm_tensor_parallel_size')} {spec.tensor_parallel_size}: vLLM can't be used on "
                f"{socket.gethostname()} ({choice.reason}). Install it there, or set 1."
            )
        return choice

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model into which packed weights are loaded."""
        model = meta_model(self.spec.config, self.spec.dtype)
        model.generation_config = self.spec.generation_config
        fix_frequencies(model, self.spec.max_length)
        return model

    def _unpack(self, packed: PackedWeights) -> PreTrainedModel:
        unpack(self.model, packed, on_gpu=self.choice.name == "transformers")  # vLLM has its own copy there
        return self.model


def pack(model: PreTrainedModel) -> PackedWeights:
    """Return the weights and buffers of ``model``; weights that share memory share one array."""
    arrays: dict[int, PackedTensor] = {}

    def shared(weight: Tensor) -> PackedTensor:
        tensor = as_array(weight)
        return arrays.setdefault(tensor[1].ctypes.data, tensor)  # the array is kept, so its address stays unique

    weights = {name: shared(weight) for name, weight in full_weights(model)}
    buffers = {name: as_array(buffer) for name, buffer in base_model(model).named_buffers()}
    return PackedWeights(weights, buffers, own_version())


def unpack(model: PreTrainedModel, packed: PackedWeights, *, on_gpu: bool = True) -> None:
    """Give ``model`` these weights and buffers: in their own memory or, if ``on_gpu``, on the GPU if there is one.

    Raises:
        RolloutError: This node has another version of this package than the trainer, or a Ray without authentication.
    """
    check_ray_version()
    if packed.version != own_version():
        raise RolloutError(
            f"The trainer has reinforcepp {packed.version}, but {socket.gethostname()}, a node of the pool, has "
            f"{own_version()}. Install the same version on all nodes."
        )
    if on_gpu:
        choose_device()
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    weights = {name: as_tensor(packed_tensor).to(device) for name, packed_tensor in packed.weights.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    for name, packed_tensor in packed.buffers.items():
        module, _, buffer = name.rpartition(".")
        model.get_submodule(module)._buffers[buffer] = as_tensor(packed_tensor).to(device)


def check_ray_version() -> None:
    """Check that this node's Ray supports authentication.

    Raises:
        RolloutError: It is older than ``MIN_RAY``.
    """
    version = versions_of(["ray"]).get("ray", "0")
    if Version(version) < Version(MIN_RAY):
        raise RolloutError(
            f"{setting('rollout')} ray://: Ray {version} on {socket.gethostname()} ignores authentication tokens, so anyone who "
            f"can connect to its ports can run programs there. Update Ray on all nodes:\n  pip install 'ray>={MIN_RAY}'"
        )


def as_array(weight: Tensor) -> PackedTensor:
    """Return the dtype and values of ``weight``; bfloat16, which NumPy lacks, is stored as int16."""
    plain = weight.detach().cpu().contiguous()
    storable = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    return str(plain.dtype).removeprefix("torch."), storable.numpy()


def as_tensor(packed: PackedTensor) -> Tensor:
    """Return the tensor that :func:`as_array` packed, in the array's memory."""
    dtype, array = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Ray's memory is read-only, and nothing here writes to it
        return torch.from_numpy(array).view(getattr(torch, dtype))
