"""Sharded tensors: gather them, shard them, and write and read them as safetensors through torch.distributed.

Each rank writes one file with its own shards; the file's header records their offsets in the full tensors.
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
"""Maps a tensor's name and shape to a tensor that is sharded as the result must be; None for an unsharded result."""


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, and any other tensor unchanged. Every rank must call this."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def shard_like(tensor: Tensor, template: Tensor) -> Tensor:
    """Return this rank's shard of a ``tensor`` that all ranks hold, sharded as ``template`` is.

    Returns ``tensor`` unchanged if it is already sharded, ``template`` isn't sharded, or the shapes differ.
    """
    if isinstance(tensor, DTensor) or not isinstance(template, DTensor) or tensor.shape != template.shape:
        return tensor
    return distribute_tensor(tensor.to(template.device), template.device_mesh, template.placements, src_data_rank=None)


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this rank's shards into ``folder``. Every rank must call this.

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


def read_shards(folder: Path, template_of: Template) -> dict[str, Tensor]:
    """Read tensors that any number of ranks wrote with :func:`write_shards`.

    Args:
        folder: the folder with the files.
        template_of: decides how each tensor is sharded. If it shards any, every rank must call this function.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, metadata in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(metadata, TensorStorageMetadata)  # Safetensors files hold only tensors.
        template = template_of(name, metadata.size)
        dtype = metadata.properties.dtype
        tensors[name] = (
            torch.empty(metadata.size, dtype=dtype) if template is None else torch.empty_like(template, dtype=dtype)
        )
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch warns that only one process loads.
        load(tensors, storage_reader=reader, no_dist=not sharded)
    return tensors
