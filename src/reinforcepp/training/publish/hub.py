"""Upload a model to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from reinforcepp.config.hub import HubConfig, check_repository
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.runtime.terminal import echo

# Connections fail with errors of the HTTP library of huggingface_hub, which differs by version.
UNREACHABLE: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
REASONS = {
    401: "the token is invalid. Log in again (hf auth login), or set HF_TOKEN to a valid token",
    403: "the token can't write to this repo. Use a token with write access, or a repo of your own",
}


def open_repository(name: str, private: bool | None = None, token: str | None = None) -> tuple[HfApi, str]:
    """Create a repository of models, unless it exists; return a client and the repository's name with its owner.

    Args:
        name: USER/NAME, or NAME for the token's owner.
        private: whether the repository must be private; None leaves it to the settings of the account.
        token: default: that of the environment, or of ``hf auth login``.

    Raises:
        ConfigError: there is no token, ``name`` isn't valid, or the repository is public and ``private`` is set.
        ModelError: the Hub can't be reached, or it refuses the request.
    """
    check_repository("hub_model_id", name)
    if token is None and get_token() is None:
        raise ConfigError(
            "HF_TOKEN: no token for the Hub found. Log in with `hf auth login`, or set HF_TOKEN to your token."
        )
    api = HfApi(token=token)
    with _hub_errors():
        name = name if "/" in name else f"{api.whoami()['name']}/{name}"
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ConfigError(
                f"{name}: the repository exists and is public. Make it private on the Hub, or give another name."
            )
    return api, name


def push(
    write: Callable[[Path, str], None],
    name: str,
    message: str | None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Upload the files that ``write`` writes into a temporary folder, as one commit.

    Args:
        write: gets the folder and the repository's name with its owner.
        name: as for :func:`open_repository`.
        message: of the commit.
        private: as for :func:`open_repository`.
        token: as for :func:`open_repository`.
        revision: branch; default: main.
        blocking: if False, return a future as soon as the files are written.

    Raises:
        ReinforceError: see :func:`open_repository`.
    """
    api, repository = open_repository(name, private, token)
    scratch = TemporaryDirectory(prefix="reinforcepp-push-")

    def upload() -> CommitInfo:
        with scratch as folder, _hub_errors():
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, revision=revision
            )
        echo(f"Uploaded to {constants.ENDPOINT}/{repository}", "green")
        return commit

    try:
        write(Path(scratch.name), repository)
    except BaseException:
        scratch.cleanup()
        raise
    return upload() if blocking else api.run_as_future(upload)


def create_for(config: HubConfig, ranks: Ranks, token: str | None = None) -> None:
    """Create the repository for the model of a run; every rank must call this, and rank 0 creates it."""

    def create() -> None:
        if ranks.is_main:
            open_repository(config.repository, config.hub_private_repo, token)

    ranks.run_or_raise_all(create)


def push_for(
    config: HubConfig,
    ranks: Ranks,
    write: Callable[[Path, str], None],
    message: str | None,
    blocking: bool,
    token: str | None,
    revision: str | None,
) -> CommitInfo | Future[CommitInfo] | None:
    """Upload the model of a run as :func:`push` does; every rank must call this, and rank 0 uploads."""

    def upload() -> CommitInfo | Future[CommitInfo] | None:
        if not ranks.is_main:
            return None
        private = config.hub_private_repo
        return push(
            write, config.repository, message, private=private, token=token, revision=revision, blocking=blocking
        )

    return ranks.run_or_raise_all(upload)


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
