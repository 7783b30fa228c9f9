"""How a vLLM server gets the trainer's weights: as files on a disk that both see, or in messages.

Both go through ``/collective_rpc`` of a server in development mode. Messages need a server that has our worker extension.
"""

from __future__ import annotations

import base64
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors.torch import save
from torch import Tensor

from reinforcepp.errors import RolloutError
from reinforcepp.files import appearing_folder
from reinforcepp.models import loading as models
from reinforcepp.models.lora import full_weights
from reinforcepp.rollout.transfer import CHUNK_BYTES, in_chunks
from reinforcepp.rollout.vllm.client import Failed, VllmClient
from reinforcepp.rollout.vllm.compat import has_output_layer
from reinforcepp.run_dir import HANDED_OVER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MESSAGE_BYTES = 32 << 20
BROKEN = "; a server that couldn't take weights has to be started again, with this training's model"


class Way(Protocol):
    """How weights get to a server."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Called where the model doesn't change, before ``send``; also if nothing is new."""

    def send(self, server: VllmClient) -> None:
        """Give ``server`` the weights; called in a thread of its own."""

    def close(self) -> None:
        """Leave nothing behind."""


def weights_for_vllm(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights under the names that vLLM takes, tied ones under both."""
    tied = model.config.get_text_config().tie_word_embeddings
    named = not tied or has_output_layer(models.architecture(model.config))
    return ((name, weight) for name, weight in full_weights(model) if named or not name.startswith("lm_head."))


class InFiles:
    """Weights in files below ``parent``, there until the next ones are or the engine is closed.

    ``reload_weights`` of vLLM breaks the model that is served where it can't find the files. So a server is first asked to
    load a file without weights, in a way that leaves everything as it is.
    """

    def __init__(self, parent: Path) -> None:
        self.path = parent.absolute() / HANDED_OVER
        shutil.rmtree(self.path, ignore_errors=True)  # of a run that was killed
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._present: Path | None = None

    def forget(self) -> None:
        """The weights have changed."""
        if self._present is not None:
            shutil.rmtree(self._present, ignore_errors=True)
        self._present = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Write the weights if they aren't there; a run's folder is emptied when it begins.

        Raises:
            RolloutError: the disk is full, or the folder can't be written to.
        """
        if self._present is None or not self._present.is_dir():
            try:
                self._write(model)
            except OSError as error:
                raise RolloutError(
                    f"The weights for vLLM's servers can't be written to {self.path} ({error.strerror}): free some space, or "
                    "give another output_dir."
                ) from error

    def _write(self, model: PreTrainedModel) -> None:
        self._empty.mkdir(parents=True, exist_ok=True)
        (self._empty / "model.safetensors").write_bytes(_packed([]))
        self._present = self.path / f"weights-{secrets.token_hex(4)}"
        with appearing_folder(self._present) as folder:
            for number, chunk in enumerate(in_chunks(weights_for_vllm(model), CHUNK_BYTES)):
                (folder / f"model-{number:05}.safetensors").write_bytes(_packed(chunk))

    def send(self, server: VllmClient) -> None:
        """Have ``server`` load the files.

        Raises:
            RolloutError: it doesn't see them.
        """
        assert self._present is not None, "the files are written first"
        try:
            self._load(server, self._empty, {"is_checkpoint_format": False})
        except Failed as failed:
            raise RolloutError(
                f"The vLLM server {server.url} doesn't see the folder {self.path}, through which it gets weights ({failed}): put "
                "output_dir on a disk that both machines have under this name and that the server may read, or install "
                f"reinforcepp there and start the server with --worker-extension-cls {EXTENSION}."
            ) from failed
        try:
            self._load(server, self._present, {})
        except Failed as failed:
            raise Failed(f"{failed}{BROKEN}") from failed

    def close(self) -> None:
        """Remove the files."""
        self._remove()

    @property
    def _empty(self) -> Path:
        return self.path / "empty"

    def _load(self, server: VllmClient, folder: Path, how: dict[str, bool]) -> None:
        arguments = {"weights_path": str(folder), **how}
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})


EXTENSION = "reinforcepp.rollout.vllm.worker_extension.Worker"


class InMessages:
    """Weights in messages of some megabytes, for a server with our worker extension."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def prepare(self, model: PreTrainedModel) -> None:
        """Nothing is written."""
        self._model = model

    def send(self, server: VllmClient) -> None:
        """Send all weights, then have them used."""
        assert self._model is not None, "the model is given first"
        try:
            for number, chunk in enumerate(in_chunks(weights_for_vllm(self._model), MESSAGE_BYTES)):
                part = base64.b64encode(_packed(chunk)).decode("ascii")
                body = {"method": "keep_weights", "args": [part], "kwargs": {"first": number == 0}}
                server.post("/collective_rpc", body)
            server.post("/collective_rpc", {"method": "use_kept_weights"})
        except Failed as failed:
            raise Failed(f"{failed}{BROKEN}") from failed

    def close(self) -> None:
        """Nothing is there."""


def _packed(weights: Iterable[tuple[str, Tensor]]) -> bytes:
    """Safetensors, of which no two may share memory."""
    return save({name: weight.detach().cpu().contiguous().clone() for name, weight in weights})
