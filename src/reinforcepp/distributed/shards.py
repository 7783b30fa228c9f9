"""Tensors of which each process holds a part: made whole, cut, written and read, by torch.distributed.

Files are safetensors: each process writes one with its own parts, and says in its header where in the whole they belong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

Template = Callable[[str, torch.Size], Tensor | None]
"""For the name and the shape of a tensor, one that is cut as it is to be; None for the whole."""


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank holds a part; any other one as it is. Every rank has to ask."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This rank's part of a ``tensor`` that every rank holds, cut as ``model`` is, if it is."""
    if isinstance(tensor, DTensor) or not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write into ``folder``, each rank its own parts; every rank has to call it.

    Raises:
        OSError: on all ranks, if one of them can't write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from error
        raise


def read_shards(folder: Path, like: Template) -> dict[str, Tensor]:
    """What :func:`write_shards` wrote, by any number of ranks.

    Args:
        folder: with the files.
        like: says how each tensor is to be cut. If it cuts any, every rank has to call this.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, told in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata)  # safetensors hold nothing else
        model = like(name, told.size)
        dtype = told.properties.dtype
        tensors[name] = torch.empty(told.size, dtype=dtype) if model is None else torch.empty_like(model, dtype=dtype)
    cut = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process alone reads
        load(tensors, storage_reader=reader, no_dist=not cut)
    return tensors
