"""The command ``push``: upload a model and its card to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from reinforcepp.commands.export.command import write_folder
from reinforcepp.commands.export.source import find_source
from reinforcepp.config import PushConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.monitoring import echo

# Connections fail with errors of the HTTP library of huggingface_hub, which differs by version.
UNREACHABLE: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
REASONS = {
    401: "the token is invalid. Log in again (hf auth login), or set HF_TOKEN to a valid token",
    403: "the token can't write to this repo. Use a token with write access, or a repo of your own",
}


def run_push(config: PushConfig) -> None:
    """Export to a temporary folder and upload it.

    Raises:
        ConfigError: If there is no token, or the repository is public and ``private`` is set.
        ModelError: If the model can't be loaded, or the Hub can't be reached or refuses the upload.
    """
    source = find_source(config.model)
    if get_token() is None:
        raise ConfigError(
            "HF_TOKEN: no token for the Hub found. Log in with `hf auth login`, or set HF_TOKEN to your token."
        )
    api = HfApi()
    with _hub_errors():
        owner = str(api.whoami()["name"])
    repo = config.repository if "/" in config.repository else f"{owner}/{config.repository}"
    with tempfile.TemporaryDirectory(prefix="reinforcepp-push-") as name:
        write_folder(source, config.dtype, Path(name), repo)
        with _hub_errors():
            api.create_repo(repo, private=config.private, exist_ok=True)
            if config.private and not api.model_info(repo).private:
                raise ConfigError(
                    f"repo: {repo} already exists and is public. Make it private on the Hub, or give another repo."
                )
            api.upload_folder(repo_id=repo, folder_path=name, commit_message="Upload by reinforcepp")
    echo(f"Uploaded to {constants.ENDPOINT}/{repo}", "green")


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Convert errors of the Hub and of the connection to ModelError. None of these errors contains the token."""
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        reason = REASONS.get(code, f"status {code}, {error.server_message or 'no reason given'}. Try again later")
        raise ModelError(f"{constants.ENDPOINT}: the Hub refused the request: {reason}.") from error
    except UNREACHABLE as error:
        raise ModelError(f"{constants.ENDPOINT}: the Hub can't be reached. Check the network connection.") from error
