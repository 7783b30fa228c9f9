"""What runs in each process of a Ray pool, and how weights get there. Ray itself is not named here."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.errors import RolloutError
from reinforcepp.models.loading import meta_model
from reinforcepp.models.lora import base_model, full_weights
from reinforcepp.rollout.in_process import start_in_process_engine
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.runtime import own_version
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = tuple[str, Any]
"""A tensor's type, and its values in an array that may share memory with others."""


@dataclass(frozen=True)
class Recipe:
    """What a worker starts from; weights come apart."""

    config: Any
    generation_config: Any
    dtype: torch.dtype
    tokenizer: Any
    engine: str
    max_length: int
    batch_size: int
    tensor_parallel_size: int = 1
    """GPUs of each worker."""
    weight_transfer: str = ""
    """Backend of vLLM's own weight transfer, by which a worker of one GPU gets all weights but the first."""


@dataclass(frozen=True)
class Packed:
    """Weights, tied ones under both names, and the buffers that aren't saved with them, such as rotary frequencies."""

    weights: Mapping[str, Values]
    buffers: Mapping[str, Values]
    version: str
    """Of this package, where they were packed."""


class Worker:
    """What runs in each of Ray's processes: an engine of its own, and the weights that all on its machine share."""

    kind = "rollout"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.engine: Any = None

    def load(self, packed: Packed) -> str:
        """Generate with these weights from now on; returns the engine's name."""
        recipe = self.recipe
        model = self._filled(packed)
        if self.engine is None:
            self.engine = start_in_process_engine(
                self.choice.name,
                model,
                recipe.tokenizer,
                max_length=recipe.max_length,
                batch_size=recipe.batch_size,
                tensor_parallel_size=recipe.tensor_parallel_size,
                alone=True,
                weight_transfer=recipe.weight_transfer if recipe.tensor_parallel_size == 1 else "",
            )
        else:
            self.engine.load_weights(model)
        return str(self.engine.name)

    def in_group(self) -> bool | None:
        """Whether it can take weights by vLLM's own transfer at once; False is where it has to join first, None never."""
        return self.engine.in_group if self.engine.name == "vllm" else None

    def join(self, message: dict[str, Any]) -> None:
        """See :meth:`~reinforcepp.rollout.vllm_integration.VllmEngine.join`."""
        self.engine.join(message)

    def transfer(self, step: str, *message: Any) -> None:
        """See :meth:`~reinforcepp.rollout.vllm_integration.VllmEngine.transfer`."""
        self.engine.transfer(step, *message)

    def took_over(self, later: Callable[[], Packed]) -> None:
        """Generate with what was transferred; ``later`` gives the same weights, should they be needed here."""
        self.engine.took_over(lambda: self._filled(later()))

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The completions of each prompt."""
        completions = self.engine.generate(prompts, sampling)
        number = sampling.num_samples
        return [completions[i : i + number] for i in range(0, len(completions), number)]

    @cached_property
    def choice(self) -> EngineChoice:
        """Which engine it is here."""
        recipe = self.recipe
        choice = choose_engine(recipe.engine, recipe.config, recipe.dtype)
        if recipe.tensor_parallel_size > 1 and choice.name != "vllm":
            raise RolloutError(
                f"vllm_tensor_parallel_size is {recipe.tensor_parallel_size}, and on {socket.gethostname()} vLLM can't be used: "
                f"{choice.reason}."
            )
        return choice

    @cached_property
    def model(self) -> PreTrainedModel:
        """For the weights that come packed."""
        model = meta_model(self.recipe.config, self.recipe.dtype)
        model.generation_config = self.recipe.generation_config
        return model

    def _filled(self, packed: Packed) -> PreTrainedModel:
        fill(self.model, packed, on_gpu=self.choice.name == "transformers")  # vLLM has a copy of its own there
        return self.model


def fill(model: PreTrainedModel, packed: Packed, *, on_gpu: bool = True) -> None:
    """Give ``model`` these weights and buffers, in the memory that they are in or, ``on_gpu``, on the GPU if there is one.

    Raises:
        RolloutError: this machine has another version of this package than the one that packed them.
    """
    if packed.version != own_version():
        raise RolloutError(
            f"The trainer has reinforcepp {packed.version}, and {socket.gethostname()}, a machine of the pool, has "
            f"{own_version()}: install the same version on all of them."
        )
    place = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    model.load_state_dict({name: as_tensor(v).to(place) for name, v in packed.weights.items()}, assign=True)
    model.tie_weights()
    for name, values in packed.buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = as_tensor(values).to(place)


def pack(model: PreTrainedModel) -> Packed:
    """What workers need of ``model``; memory that two weights share is one array."""
    arrays: dict[int, Values] = {}

    def shared(weight: Tensor) -> Values:
        values = as_array(weight)
        return arrays.setdefault(values[1].ctypes.data, values)  # which is kept, so its address is nobody else's

    weights = {name: shared(weight) for name, weight in full_weights(model)}
    buffers = {name: as_array(buffer) for name, buffer in base_model(model).named_buffers()}
    return Packed(weights, buffers, own_version())


def as_array(weight: Tensor) -> Values:
    """A tensor as NumPy holds it, which knows no bfloat16, and its type."""
    plain = weight.detach().cpu().contiguous()
    narrow = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    return str(plain.dtype).removeprefix("torch."), narrow.numpy()


def as_tensor(values: Values) -> Tensor:
    """What :func:`as_array` was given; the memory is shared."""
    dtype, array = values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this memory can't be written to: nobody does
        return torch.from_numpy(array).view(getattr(torch, dtype))
