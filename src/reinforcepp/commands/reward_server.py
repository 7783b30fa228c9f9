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

import asyncio
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from reinforcepp.commands.access import RefuseWebPages, RequireKey
from reinforcepp.commands.http_server import SHOWN_CHARACTERS, Server, listen
from reinforcepp.config import ServeRewardConfig
from reinforcepp.config.reward_spec import TOKEN_VARIABLE, parse_model
from reinforcepp.errors import ReinforceError
from reinforcepp.models.conversations import PROBE_PROMPT, turn_format
from reinforcepp.models.loading import context_length
from reinforcepp.models.micro_batches import MicroBatchLimit
from reinforcepp.models.reward_texts import encode_formatted
from reinforcepp.models.special_tokens import special_tokens
from reinforcepp.models.tokenization import encode, encode_prompt, encode_text, end_token_id
from reinforcepp.rewards.endpoint import authorization
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.terminal import echo

MAX_REQUEST_BYTES = 64 * 2**20
MAX_BUFFERED_BYTES = 4 * MAX_REQUEST_BYTES
"""Bytes of all requests that wait to be scored."""
MAX_QUERIES = 4096


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
    if len(queries) > MAX_QUERIES:
        raise BadRequest(
            413,
            f"'query' has {len(queries)} texts, more than {MAX_QUERIES}. Send fewer, with a smaller --reward_batch_size.",
        )
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


class RewardServer:
    """A server that listens at once, and answers requests while ``run`` runs; it scores one request at a time.

    Args:
        host: address to listen on.
        port: port to listen on; 0 chooses a free one.
        title: the model's name.

    Raises:
        ConfigError: the server can't listen on the address.
    """

    def __init__(self, host: str, port: int, title: str) -> None:
        self.token = authorization(TOKEN_VARIABLE).get("Authorization", "").removeprefix("Bearer ")
        self._listener = listen(host, port)
        self.port: int = self._listener.getsockname()[1]
        self.title = title
        self.reward: TrainedReward | None = None
        self._buffered = 0
        self._scoring = asyncio.Lock()
        access: list[Middleware] = []
        if self.token:
            access = [Middleware(RequireKey, key=self.token, word="token", error=_error)]
        elif is_loopback(host):
            access = [Middleware(RefuseWebPages, word="token", error=_error)]
        routes = [
            Route("/health", self._health, methods=["GET"]),
            *(Route(path, self._score, methods=["POST"]) for path in ("/", "/get_reward")),
        ]
        handlers: dict[Any, Any] = {HTTPException: _unknown_path, BadRequest: _refuse, Exception: self._fail}
        app = Starlette(routes=routes, middleware=access, exception_handlers=handlers)
        app.router.redirect_slashes = False
        self._server = Server(app, self._listener)

    def run(self) -> None:
        """Answer requests until ``stop``, SIGINT or SIGTERM; then finish the responses in progress."""
        self._server.run_until_signal()

    def stop(self) -> None:
        """End ``run``, from any thread."""
        self._server.stop()

    def close(self) -> None:
        """Stop to listen."""
        self._listener.close()

    def _fail(self, request: Request, error: Exception) -> Response:
        self._server.refusals.log(request.client, "the request failed", error)
        return _json(500, _error(500, "The server failed. Read its log."))

    async def _health(self, request: Request) -> Response:
        return _json(200, {"status": "ok", "model": self.title})

    async def _score(self, request: Request) -> Response:
        """Return the scores of the queries."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest(415, "Content-Type: isn't application/json. Send a JSON object with this header.")
        body = bytearray()
        try:
            await self._read(request, body)
            async with self._scoring:
                if await request.is_disconnected():  # A client that has given up sends the request again.
                    return Response()
                scores = await run_in_threadpool(self._scores_of, bytes(body))
        except ClientDisconnect:
            return Response()
        finally:
            self._buffered -= len(body)
        return _json(200, {"rewards": scores, "scores": scores})

    async def _read(self, request: Request, body: bytearray) -> None:
        """Append the body of a request to ``body``."""
        too_long = BadRequest(
            413, f"The request is over {MAX_REQUEST_BYTES // 2**20} MiB. Send fewer texts per request."
        )
        if int(request.headers.get("Content-Length", 0)) > MAX_REQUEST_BYTES:
            raise too_long
        async for chunk in request.stream():
            body += chunk
            self._buffered += len(chunk)
            if len(body) > MAX_REQUEST_BYTES:  # a request in chunks has no Content-Length
                raise too_long
            if self._buffered > MAX_BUFFERED_BYTES:
                raise BadRequest(503, "The server is busy with other requests. Send the request again later.")

    def _scores_of(self, body: bytes) -> list[float]:
        assert self.reward is not None
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequest(400, "The request isn't valid JSON. Send a JSON object.") from None
        try:
            return score_request(self.reward, request)
        except torch.OutOfMemoryError:
            raise BadRequest(500, "The server ran out of memory. Restart it with a smaller --batch_size.") from None
        except RecursionError:
            raise BadRequest(400, "The request is nested too deeply. Send flat messages.") from None
        except ReinforceError as error:  # such as a conversation that the chat template rejects
            raise BadRequest(400, str(error)) from None


def _json(status: int, content: object) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


def _error(status: int, message: str) -> object:
    return {"error": message}


def _refuse(request: Request, refusal: BadRequest) -> Response:
    return _json(refusal.status, _error(refusal.status, str(refusal)))


def _unknown_path(request: Request, error: HTTPException) -> Response:
    path = request.scope["path"][:SHOWN_CHARACTERS]
    return _json(404, _error(404, f"{path}: path not found. Use POST /get_reward or GET /health."))


def serve(config: ServeRewardConfig) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Raises:
        ModelError: If the model can't be loaded.
        ConfigError: If the server can't listen on the address.
    """
    check_reward_folder(config.model)
    title = Path(parse_model(config.model).name).resolve().name
    with closing(RewardServer(config.host, config.port, title)) as server:
        reward = load_reward_model(config.model)
        if config.reward_normalize:
            reward.normalize()
        if torch.cuda.is_available():
            reward.model.to("cuda")
        default = MicroBatchLimit.default(reward.model.device.type, packed=True).for_scoring
        reward.limit = replace(default, rows=config.batch_size)
        server.reward = reward
        if not is_loopback(config.host) and not server.token:
            echo(
                f"Every client that reaches this address can use the server. To require a token, set {TOKEN_VARIABLE}.",
                "yellow",
            )
        host = f"[{config.host}]" if ":" in config.host else config.host
        echo(f"Serving {config.model} at http://{host}:{server.port}/get_reward. To stop, press Ctrl-C.")
        server.run()
    echo("Stopped.")
