"""The command ``serve-reward``: a reward model behind HTTP, for ``rewards/remote.py`` and other clients of the protocol.

    POST /get_reward  {"query": [...], "prompts": [...], "finish_reason": [...], "messages": [...],
                       "chat_template_kwargs": [...]}
                      -> {"rewards": [...], "scores": [...]}
    GET /health       {"status": "ok", "model": ...}

A ``query`` is the prompt followed by the completion, in plain text; the server applies the model's chat template. Without
``prompts``, each query must be formatted already. ``messages`` are the prompts as lists of messages, if they are
conversations, and ``chat_template_kwargs`` their variables of the chat template. Errors are {"error": message} with an HTTP
status of 4xx or 500.
"""

from __future__ import annotations

import errno
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import torch

from reinforcepp.config import ServeRewardConfig
from reinforcepp.config.reward_spec import TOKEN_VARIABLE
from reinforcepp.errors import ConfigError
from reinforcepp.models.conversations import PROBE_PROMPT, turn_format
from reinforcepp.models.loading import context_length
from reinforcepp.models.reward_texts import encode_formatted
from reinforcepp.models.special_tokens import special_tokens
from reinforcepp.models.tokenization import encode, encode_prompt, encode_text, end_token_id
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.rewards.remote import authorization
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.terminal import echo

MAX_REQUEST_BYTES = 64 * 2**20
REQUEST_TIMEOUT_SECONDS = 60.0


class BadRequest(Exception):
    """An invalid request, with the HTTP status of the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def score_request(reward: TrainedReward, request: Any) -> list[float]:
    """Return the scores of the queries in a request.

    Raises:
        BadRequest: If the request doesn't follow the protocol.
    """
    queries = _texts(request, "query")
    if queries is None:
        raise BadRequest(400, "'query' is missing in the request. Send a list of texts.")
    prompts, reasons = _texts(request, "prompts", len(queries)), _texts(request, "finish_reason", len(queries))
    if not queries:
        return []
    if prompts is None:
        return reward.scaled(reward.score_rows([_encode_formatted(reward, query) for query in queries]))
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if not query.startswith(prompt):
            raise BadRequest(
                400, f"query {i}: it doesn't begin with prompt {i}. Send the prompt followed by the completion."
            )
    completions = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    return reward(
        prompts,
        completions,
        finish_reason=reasons,
        conversations=_conversations(request, len(queries)),
        chat_template_kwargs=_variables(request, len(queries)),
    )


def _variables(request: Any, count: int) -> list[dict[str, Any]] | None:
    """Return each prompt's variables of the chat template, if the request has them."""
    values: Any = request.get("chat_template_kwargs")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(each, dict) for each in values):
        raise BadRequest(400, f"'chat_template_kwargs' isn't a list of {count} objects. Send an object per query.")
    variables: list[dict[str, Any]] = values
    return variables


def _conversations(request: Any, count: int) -> list[list[dict[str, Any]]] | None:
    """Return the prompts as messages, if the request has them."""
    values: Any = request.get("messages")
    if values is None:
        return None
    valid = isinstance(values, list) and len(values) == count
    if not valid or not all(isinstance(each, list) and each and all(map(_is_message, each)) for each in values):
        raise BadRequest(
            400,
            f"'messages' isn't a list of {count} conversations. Send a list of messages with role and content per query.",
        )
    conversations: list[list[dict[str, Any]]] = values
    return conversations


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _encode_formatted(reward: TrainedReward, query: str) -> list[int]:
    """Return the token ids of a formatted conversation, which can lack BOS and the end token.

    A classifier of other origin gets the text as it is.
    """
    tokenizer = reward.tokenizer
    if reward.form != "answer":
        return encode_formatted(tokenizer, query, reward.form, context_length(reward.model.config))
    bos = special_tokens(tokenizer).prefix
    has_bos = tuple(encode_prompt(tokenizer, PROBE_PROMPT)[: len(bos)]) == bos
    text = query.removesuffix(turn_format(tokenizer).end)
    return [*(encode_text if has_bos else encode)(tokenizer, text), end_token_id(tokenizer)]


def _texts(request: Any, name: str, count: int | None = None) -> list[str] | None:
    values = request.get(name) if isinstance(request, dict) else None
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRequest(400, f"{name!r} isn't a list of texts. Send a list of strings.")
    if count is not None and len(values) != count:
        raise BadRequest(400, f"{name!r} has {len(values)} texts for {count} queries. Send one text per query.")
    return values


class RewardServer(ThreadingHTTPServer):
    """A server that listens at once and can answer when ``reward`` is set; it scores one request at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, title: str) -> None:
        super().__init__((host, port), Handler)
        self.title = title
        self.authorization = authorization().get("Authorization")
        self.reward: TrainedReward | None = None
        self.scoring = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed its connection."""


class Handler(BaseHTTPRequestHandler):
    """The handler of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT_SECONDS
    server: RewardServer

    def do_GET(self) -> None:
        """Return the status of the server."""
        if self.path != "/health":
            return self._refuse(BadRequest(404, f"{self.path}: path not found. Use POST /get_reward or GET /health."))
        self._answer(200, {"status": "ok", "model": self.server.title})

    def do_POST(self) -> None:
        """Return the scores of the queries."""
        try:
            body = self._body()
            reward = self.server.reward
            assert reward is not None
            with self.server.scoring:
                scores = score_request(reward, body)
        except BadRequest as refusal:
            return self._refuse(refusal)
        except torch.OutOfMemoryError:
            return self._refuse(
                BadRequest(500, "The server ran out of memory. Restart it with a smaller --batch_size.")
            )
        self._answer(200, {"rewards": scores, "scores": scores})

    def _body(self) -> Any:
        """Read the body of a request after checking its path, token and length."""
        if self.path not in ("/", "/get_reward"):
            raise BadRequest(404, f"{self.path}: path not found. Use POST /get_reward or GET /health.")
        expected = self.server.authorization
        if expected and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), expected.encode()):
            raise BadRequest(
                401,
                f"Authorization: the token is missing or wrong. Send the server's {TOKEN_VARIABLE} as a bearer token.",
            )
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise BadRequest(411, "Content-Length: the length of the body is missing. Send it in bytes.")
        if int(length) > MAX_REQUEST_BYTES:
            raise BadRequest(
                413, f"The request is over {MAX_REQUEST_BYTES // 2**20} MiB. Send fewer texts per request."
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise BadRequest(400, "The request isn't valid JSON. Send a JSON object.") from None

    def _refuse(self, refusal: BadRequest) -> None:
        self.close_connection = True  # The body of the request might be unread.
        self._answer(refusal.status, {"error": str(refusal)})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def serve(config: ServeRewardConfig) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Raises:
        ModelError: If the model can't be loaded.
        ConfigError: If the server can't listen on the address.
    """
    check_reward_folder(config.model)
    with _listening(config) as server:
        reward = load_reward_model(config.model)
        reward.batch_size = config.batch_size
        if config.reward_normalize:
            reward.normalize()
        if torch.cuda.is_available():
            reward.model.to("cuda")
        server.reward = reward
        if server.server_address[0] not in ("127.0.0.1", "::1") and server.authorization is None:
            echo(
                f"Every client that reaches this address can use the server. To require a token, set {TOKEN_VARIABLE}.",
                "yellow",
            )
        echo(f"Serving {config.model} at http://{config.host}:{server.server_port}/get_reward. To stop, press Ctrl-C.")
        with _until_signal(server):
            server.serve_forever(poll_interval=0.1)
    echo("Stopped.")


def _listening(config: ServeRewardConfig) -> RewardServer:
    try:
        return RewardServer(config.host, config.port, config.model)
    except OSError as error:
        fix = "Choose another --host, an address of this computer."
        if error.errno == errno.EADDRINUSE:
            fix = "Choose another --port, or 0 for a free one."
        if error.errno == errno.EACCES:
            fix = "Choose a --port of 1024 or above."
        raise ConfigError(
            f"{config.host} port {config.port}: can't listen on this address ({error.strerror}). {fix}"
        ) from error


@contextmanager
def _until_signal(server: RewardServer) -> Iterator[None]:
    """End ``serve_forever`` at the first signal in this block."""

    def stop(number: int, frame: FrameType | None) -> None:
        # shutdown waits for the loop of serve_forever, which runs in this thread.
        threading.Thread(target=server.shutdown).start()

    with handle_signals(stop):
        yield
