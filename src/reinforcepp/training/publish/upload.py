"""The method ``push_to_hub`` of the trainers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import as_dict
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.training.publish.folder import finish_folder
from reinforcepp.training.publish.hub import push_for

if TYPE_CHECKING:
    from concurrent.futures import Future

    from huggingface_hub import CommitInfo


class UploadMethods:
    """What a trainer with a ``config`` inherits to upload its model."""

    config: Any

    def _begin_push(self) -> Ranks:
        """Prepare an upload, on every rank, and return the ranks."""
        raise NotImplementedError

    def _write_public(self, folder: Path) -> None:
        """Write the model and its tokenizer as they are uploaded."""
        raise NotImplementedError

    def _card(
        self,
        repository: str | None,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        """Return the model card; arguments as for ``create_model_card``."""
        raise NotImplementedError

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the model, its tokenizer and its card to ``args.hub_model_id``; other files of the run aren't uploaded.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload.
            token: default: ``HF_TOKEN``, or the token of ``hf auth login``.
            revision: branch of the repository; default: main.
            kwargs: for the card, see ``create_model_card``.

        Returns:
            The commit, or a future of it if not ``blocking``; None on other ranks than 0.

        Raises:
            ConfigError: there is no token, or the repository is public and ``args.hub_private_repo`` is set.
            ModelError: the Hub can't be reached, or it refuses the upload.
        """

        def write(folder: Path, repository: str) -> None:
            self._write_public(folder)
            finish_folder(folder, self._card(repository, **kwargs), as_dict(self.config), uploaded=True)

        return push_for(self.config, self._begin_push(), write, commit_message, blocking, token, revision)
