"""For the worker of a vLLM server without a GPU: being imported as its extension is what puts the stand-in in place.

With our own extension beside it a tied output layer has the embeddings' memory, as on a GPU.
"""

from rollout.without_nccl import stand_in

from reinforcepp.rollout.vllm.worker_extension import Worker

__all__ = ["Worker"]

stand_in()
