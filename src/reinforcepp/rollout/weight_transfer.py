"""How the policy's weights get into a generator: one interface with an implementation per path.

===================  =======================================================  ====================================
receiver             path                                                     implementation
===================  =======================================================  ====================================
vLLM, in process     ``reload_weights`` from the trainer's tensors            ``vllm.local_transfer.ReloadTransfer``
vLLM, in process     the LoRA adapter only                                    ``vllm.local_transfer.AdapterTransfer``
vLLM, several GPUs   CUDA IPC handles of the trainer's tensors                ``vllm.local_transfer.IpcTransfer``
vLLM server          files on a shared disk                                   ``vllm.server_transfer.FileTransfer``
vLLM server          HTTP messages to our worker extension                    ``vllm.server_transfer.MessageTransfer``
vLLM server          NCCL broadcast                                           ``vllm.nccl.NcclServerTransfer``
Ray worker           Ray's object store                                       ``ray.actor_pool.ObjectStoreTransfer``
Ray workers          NCCL broadcast                                           ``vllm.nccl.NcclPoolTransfer``
===================  =======================================================  ====================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from reinforcepp.errors import RolloutError
from reinforcepp.models.lora import base_model, full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Receiver = TypeVar("Receiver")


class WeightsNeeded(RolloutError):
    """An engine must start again and has no copy of the weights in its process; ``load_weights`` starts it."""


class WeightTransfer(Generic[Receiver]):
    """A path for weights. Call ``prepare`` after each update of the policy, then ``push`` once per receiver."""

    model: PreTrainedModel

    def prepare(self, model: PreTrainedModel) -> None:
        """Make ``model``'s current weights available to ``push``; ``model`` must not change until the last ``push``."""
        self.model = model

    def push(self, receiver: Receiver) -> Any:
        """Load the prepared weights into ``receiver``."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files, process groups and memory, if the path uses any."""


def weights_without_tied_head(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights, LoRA merged, but no output layer that is tied to the embeddings.

    vLLM ties it itself: the layer either shares the embeddings' memory or doesn't exist, and loading it again is an error.
    """
    tied = base_model(model).config.get_text_config().tie_word_embeddings
    return ((name, weight) for name, weight in full_weights(model) if not (tied and name.startswith("lm_head.")))


def in_chunks(weights: Iterable[tuple[str, Tensor]], limit_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield ``weights`` in lists of at most ``limit_bytes`` each; a larger weight gets a list of its own."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, weight in weights:
        if chunk and size + weight.nbytes > limit_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, weight))
        size += weight.nbytes
    if chunk:
        yield chunk


def config_with_architecture(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a copy of ``model``'s configuration that names its architecture; one that was built in code doesn't."""
    config = deepcopy(base_model(model).config)
    config.architectures = [type(base_model(model)).__name__]
    return config
