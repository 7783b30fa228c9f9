"""Weight transfer to a vLLM server: as files on a disk that both sides see, or in HTTP messages.

Both use the ``/collective_rpc`` endpoint of a server in development mode. Messages need our worker extension there.
"""

from __future__ import annotations

import base64
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from reinforcepp.errors import RolloutError, setting
from reinforcepp.files import appearing_folder
from reinforcepp.models import loading as models
from reinforcepp.models.lora import full_weights
from reinforcepp.rollout.vllm.client import RequestFailed, VllmClient
from reinforcepp.rollout.vllm.compat import has_output_layer
from reinforcepp.rollout.weight_transfer import WeightTransfer, in_chunks, weights_without_tied_head
from reinforcepp.run_dir import HANDED_OVER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 1 << 30
MESSAGE_BYTES = 32 << 20
EXTENSION = "reinforcepp.rollout.vllm.worker_extension.Worker"
RESTART_HINT = " while loading weights. Restart the server with this run's model"


def weights_for_server(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights under the names that vLLM takes, a tied output layer too: a plain server on a CPU doesn't tie it."""
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and has_output_layer(models.architecture(model.config)):
        return full_weights(model)
    return weights_without_tied_head(model)


class FileTransfer(WeightTransfer[VllmClient]):
    """Weights in files below ``parent``, which stay there until the next update or until the engine is closed.

    vLLM's ``reload_weights`` breaks the served model if it doesn't find the files. So each server first loads a file without
    weights, in a mode that changes nothing.
    """

    def __init__(self, parent: Path) -> None:
        self.path = parent.absolute() / HANDED_OVER
        shutil.rmtree(self.path, ignore_errors=True)  # a killed run can leave files behind
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._current: Path | None = None

    def invalidate(self) -> None:
        """Remove the files, because the policy has changed."""
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
        self._current = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Write the weights unless their files exist; the start of a run empties its folder.

        Raises:
            RolloutError: The disk is full, or the folder isn't writable.
        """
        if self._current is not None and self._current.is_dir():
            return
        try:
            if self.path.is_symlink():  # in a shared folder, another user can place one
                self.path.unlink()
            self._empty.mkdir(parents=True, exist_ok=True)
            (self._empty / "model.safetensors").write_bytes(_as_safetensors([]))
            self._current = self.path / f"weights-{secrets.token_hex(4)}"
            with appearing_folder(self._current) as folder:
                for number, chunk in enumerate(in_chunks(weights_for_server(model), FILE_BYTES)):
                    (folder / f"model-{number:05}.safetensors").write_bytes(_as_safetensors(chunk))
        except OSError as error:
            raise RolloutError(
                f"{setting('output_dir')}: the weights for the vLLM servers can't be written to {self.path} "
                f"({error.strerror}). Free some space, or choose another output_dir."
            ) from error

    def push(self, receiver: VllmClient) -> None:
        """Have the server load the files.

        Raises:
            RolloutError: The server doesn't see them.
        """
        assert self._current is not None, "the files are written first"
        try:
            self._load(receiver, self._empty, {"is_checkpoint_format": False})
        except RequestFailed as failed:
            raise RolloutError(
                f"{setting('rollout')}: the vLLM server {receiver.url} can't read the weight folder {self.path} "
                f"({failed}). Put output_dir on a disk that both nodes mount under this path and that the server can "
                f"read, or install reinforcepp there and start the server with --worker-extension-cls {EXTENSION}."
            ) from failed
        try:
            self._load(receiver, self._current, {})
        except RequestFailed as failed:
            raise RequestFailed(f"{failed}{RESTART_HINT}") from failed

    def close(self) -> None:
        """Remove the files."""
        self._remove()

    @property
    def _empty(self) -> Path:
        return self.path / "empty"

    def _load(self, server: VllmClient, folder: Path, options: dict[str, bool]) -> None:
        arguments = {"weights_path": str(folder), **options}
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})


class MessageTransfer(WeightTransfer[VllmClient]):
    """Weights in messages of some megabytes, for a server with our worker extension."""

    def push(self, receiver: VllmClient) -> None:
        """Send all weights, then activate them."""
        try:
            for number, chunk in enumerate(in_chunks(weights_for_server(self.model), MESSAGE_BYTES)):
                part = base64.b64encode(_as_safetensors(chunk)).decode("ascii")
                body = {"method": "keep_weights", "args": [part], "kwargs": {"first": number == 0}}
                receiver.post("/collective_rpc", body)
            receiver.post("/collective_rpc", {"method": "use_kept_weights"})
        except RequestFailed as failed:
            raise RequestFailed(f"{failed}{RESTART_HINT}") from failed


def _as_safetensors(weights: Iterable[tuple[str, Tensor]]) -> bytes:
    """Serialize ``weights``; they are cloned because safetensors refuses tensors that share memory."""
    return save({name: weight.detach().cpu().contiguous().clone() for name, weight in weights})
