"""The worker extension of a vLLM server: ``--worker-extension-cls reinforcepp.rollout.vllm.worker_extension.Worker``.

vLLM imports this module in each process that holds a part of the model. With it the server takes weights over the network,
so it needs no disk in common with the trainer. On a CPU it also samples the same tokens as the other engines of this package.
"""

from __future__ import annotations

import base64
from typing import Any

from safetensors.torch import load
from torch import Tensor
from vllm.platforms import current_platform

from reinforcepp.rollout.vllm.cpu_patches import patch_vllm

if current_platform.is_cpu():
    patch_vllm()


class Worker:
    """Methods that are mixed into vLLM's own worker."""

    reload_weights: Any
    """Method of vLLM's own worker."""
    _kept: dict[str, Tensor]

    def keep_weights(self, part: str, *, first: bool) -> None:
        """Keep a part of the next weights: safetensors in base64, because messages are text."""
        kept: dict[str, Tensor] = {} if first else self._kept
        self._kept = kept | load(base64.b64decode(part))

    def use_kept_weights(self) -> None:
        """Generate with the kept weights."""
        kept, self._kept = self._kept, {}
        self.reload_weights(weights_iterator=iter(kept.items()))
