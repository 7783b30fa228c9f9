"""The command ``push``: upload a model and its card to the Hugging Face Hub."""

from __future__ import annotations

from reinforcepp.commands.export.command import write_folder
from reinforcepp.config import PushConfig
from reinforcepp.training.publish.hub import push
from reinforcepp.training.publish.source import find_source


def run_push(config: PushConfig) -> None:
    """Export to a temporary folder and upload it.

    Raises:
        ConfigError: If there is no token, or the repository is public and ``private`` is set.
        ModelError: If the model can't be loaded, or the Hub can't be reached or refuses the upload.
    """
    source = find_source(config.model)
    push(
        lambda folder, name: write_folder(source, config.dtype, folder, name),
        config.repository,
        "Upload by reinforcepp",
        private=config.private,
    )
