"""Worker extension of a vLLM server without a GPU: importing it replaces NCCL.

With our own extension a tied output layer shares the embeddings' memory, as on a GPU.
"""

from rollout.without_nccl import stand_in

from reinforcepp.rollout.vllm.worker_extension import Worker

__all__ = ["Worker"]

stand_in()
