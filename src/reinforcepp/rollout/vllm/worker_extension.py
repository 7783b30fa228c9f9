"""What a vLLM server may have of this package: ``--worker-extension-cls reinforcepp.rollout.vllm.worker_extension.Worker``.

vLLM imports this in each process that holds a part of the model. With it the server takes weights from the network, so it
needs no disk in common with the trainer; on a CPU it also draws tokens as every other engine of this package does.
"""

from __future__ import annotations

import base64
from typing import Any

from safetensors.torch import load
from torch import Tensor
from vllm.platforms import current_platform

from reinforcepp.rollout.vllm.cpu_patches import spare_work

if current_platform.is_cpu():
    spare_work()


class Worker:
    """Methods that vLLM's own worker gets."""

    reload_weights: Any
    """Of vLLM's own worker."""
    _kept: dict[str, Tensor]

    def keep_weights(self, part: str, *, first: bool) -> None:
        """Keep a part of the next weights: safetensors in base64, for a message is a text."""
        kept: dict[str, Tensor] = {} if first else self._kept
        self._kept = kept | load(base64.b64decode(part))

    def use_kept_weights(self) -> None:
        """Generate with the weights that were kept."""
        kept, self._kept = self._kept, {}
        self.reload_weights(weights_iterator=iter(kept.items()))
