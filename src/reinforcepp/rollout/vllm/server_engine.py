"""Rollouts by ``vllm serve``: one server or several, which others start and may stop.

The prompts of a step are dealt out to the servers that answer (``share_out``). What is sampled depends on seed, prompt and
sample number alone, so it doesn't matter who answers what. A server that is lost is asked again now and then, and has the
present weights before it is used again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from reinforcepp.errors import ConfigError, EngineLost, RolloutError
from reinforcepp.models.loading import context_length, eos_token_ids
from reinforcepp.rollout.dispatch import Answered, Joined, Lost, Tally, share_out
from reinforcepp.rollout.engine import check_prompts, grown
from reinforcepp.rollout.vllm.client import Failed, Fault, Need, Patience, Unfit, VllmClient
from reinforcepp.rollout.vllm.nccl import BACKEND, ByNccl
from reinforcepp.rollout.vllm.server import KEY, environment_key
from reinforcepp.rollout.vllm.weight_transfer import EXTENSION, InFiles, InMessages, Way
from reinforcepp.rollout.weight_sync_check import NEW_TOKENS, PROBE_TOKENS
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["check", "load", "answer"]
LOOK_SECONDS = 0.5
"""How often those who are gone are thought of while others are waited for."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds until a server that is gone is asked again, twice as long each time."""

log = logging.getLogger(__name__)


class VllmServerEngine:
    """Rollouts by vLLM servers; see :class:`~reinforcepp.rollout.engine.RolloutEngine`.

    Args:
        addresses: of the servers, ``http://host:port``.
        model: whose weights they are given.
        tokenizer: its tokenizer.
        max_length: prompt and completion together, in tokens.
        batch_size: completions that each server is asked for at a time.
        folder: on a disk that the servers see under the same name.
        patience: how long they are waited for.

    Raises:
        RolloutError: no server can be reached, or one isn't fit to be trained against.
    """

    name = "vllm"
    shares_trainer_forward = False

    def __init__(
        self,
        addresses: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int = 64,
        folder: Path,
        patience: Patience | None = None,
    ) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.context = context_length(model.config)
        self.eos_ids = eos_token_ids(model, tokenizer)
        self.tallies: list[Tally] = []
        wide = max(max_length, PROBE_TOKENS + NEW_TOKENS)  # the canary's prompts must fit as well
        limit = min(wide, self.context or wide)
        vocabulary = model.get_input_embeddings().num_embeddings
        need = Need(model.config.name_or_path or "MODEL", limit, vocabulary, self.eos_ids)
        self.crew = ServerCrew(addresses, need, tokenizer, folder, patience or Patience())
        try:
            self.crew.load(model)
        except BaseException:
            self.crew.close()
            raise

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of the servers' dtypes."""
        dtypes = [client.facts.dtype for client in self.crew.clients if client.facts is not None]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        check_prompts(prompts, sampling.max_new_tokens, self.context)
        if not prompts:
            return []
        self.crew.ask(prompts, sampling, self.batch_size)
        answers: list[list[Completion]]
        answers, tally = share_out(self.crew, len(prompts), max(1, self.batch_size // sampling.num_samples))
        self.tallies.append(tally)
        return [completion for of_prompt in answers for completion in of_prompt]

    def generate_everywhere(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """What each of the servers answers to all ``prompts``, one after the other: what a check of them all looks at."""
        self.crew.ask(prompts, sampling, self.batch_size)
        return self.crew.each()

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Completion, None, None]:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; it comes when it is whole, and then bit by bit."""
        (whole,) = self.generate([prompt], sampling)
        yield from grown(self.tokenizer, self.eos_ids, whole)

    def load_weights(self, model: PreTrainedModel) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`."""
        self.crew.load(model)

    def close(self) -> None:
        """See :class:`~reinforcepp.rollout.engine.RolloutEngine`; the servers go on, with the last weights."""
        self.crew.close()


@dataclass
class _Absence:
    """A server that is gone."""

    reason: str
    again_at: float
    pause: float
    """How long it was left alone after its last fault, in seconds."""


class ServerCrew:
    """Servers as :func:`~reinforcepp.rollout.dispatch.share_out` needs them.

    Whoever comes, or comes back, is checked, then given the present weights, and only then ready. All is decided in the thread
    that asks; other threads only wait for a server each.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        need: Need,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        patience: Patience,
    ) -> None:
        key = environment_key()
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"{KEY} holds characters that no key has, such as a space or the end of a line.")
        self.clients = [VllmClient(address, key, need, patience) for address in addresses]
        self._tokenizer, self._patience = tokenizer, patience
        self._files, self._messages, self._nccl = InFiles(folder), InMessages(), ByNccl()
        self._model: Any = None
        self._run, self._updates = secrets.token_hex(4), 0
        self._ready: dict[VllmClient, None] = {}
        self._gone: dict[VllmClient, _Absence] = {}
        self._tasks: dict[Future[Any], tuple[VllmClient, Task]] = {}
        self._asked: tuple[Sequence[Prompt], Sampling, int] = (), Sampling(1), 1

    # --- weights ---

    def load(self, model: PreTrainedModel) -> None:
        """Give all servers that are there ``model``'s weights.

        Raises:
            EngineLost: none is there.
            RolloutError: the first time, if one isn't fit to be trained against.
        """
        first = self._model is None
        while self._tasks:  # of a server that was about to come back with older weights
            self._next(look_for_others=False)
        self._model, self._updates = model, self._updates + 1
        self._files.forget()
        for client in self.clients if first else list(self._ready):
            if first:
                self._start(client, "check", client.check)
            else:
                self._start_loading(client)
        while self._tasks:
            self._next(look_for_others=False, strict=first)
        if first and not self._ready:
            raise EngineLost(self._none_left())
        begin = time.monotonic()
        while not self._ready:
            self._next()
            self._check_time(begin)

    def _start_loading(self, client: VllmClient) -> None:
        self._ready.pop(client, None)
        way = self._way(client)
        way.prepare(self._model)
        version = self._version

        def give_weights() -> None:
            client.post("/pause?mode=abort")
            way.send(client)
            if not client.post("/reset_prefix_cache")["success"]:
                raise Failed("keeps what it has cached of older weights")
            client.post("/update_weight_version", {"new_version": version})
            client.post("/resume")

        self._start(client, "load", give_weights)

    def _way(self, client: VllmClient) -> Way:
        """How ``client`` gets weights: as it was started for."""
        assert client.facts is not None, "a server is checked first"
        if client.facts.extension == EXTENSION:
            return self._messages
        if client.facts.weight_transfer == BACKEND and self._model.device.type == "cuda":
            return self._nccl
        return self._files

    @property
    def _version(self) -> str:
        """What servers call the present weights, so that they can be asked whether they still have them."""
        return f"reinforcepp-{self._run}-{self._updates}"

    # --- answers ---

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling, at_a_time: int) -> None:
        """What is asked from now on."""
        while self._answering:  # what was asked before, by somebody who was interrupted
            self._next(look_for_others=False)
        self._asked = prompts, sampling, at_a_time

    def each(self) -> list[Completion]:
        """All answers of each server; of those that are lost meanwhile, none."""
        answers: list[Completion] = []
        while not answers:
            everything = range(len(self._asked[0]))
            for client in list(self._ready):
                self.give(client, everything)
            while self._answering:
                event = self._next(look_for_others=False)
                if isinstance(event, Answered):
                    answers += [completion for of_prompt in event.answers for completion in of_prompt]
            if not answers:
                self.wait()
        return answers

    def ready(self) -> list[VllmClient]:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`."""
        return list(self._ready)

    def give(self, worker: VllmClient, places: Sequence[int]) -> None:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`."""
        prompts, sampling, at_a_time = self._asked
        piece, version = [prompts[place] for place in places], self._version
        self._start(
            worker,
            "answer",
            lambda: worker.answer(self._tokenizer, piece, sampling, at_a_time=at_a_time, version=version),
        )

    def wait(self) -> Any:
        """See :class:`~reinforcepp.rollout.dispatch.Crew`.

        Raises:
            EngineLost: none of the servers comes back.
        """
        begin = time.monotonic()
        while (event := self._next()) is None:
            self._check_time(begin)
        return event

    def close(self) -> None:
        """Leave the servers alone."""
        for way in (self._files, self._messages, self._nccl):
            way.close()

    # --- who is there ---

    def _start(self, client: VllmClient, task: Task, work: Callable[[], Any]) -> None:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # raised again where the future is looked at
                future.set_exception(error)

        self._tasks[future] = client, task
        # a daemon, for nobody waits for it when the training is stopped
        threading.Thread(target=run, daemon=True).start()

    def _next(self, *, look_for_others: bool = True, strict: bool = False) -> Any:
        """What happens within ``LOOK_SECONDS``; None if nothing does that concerns who asks."""
        if look_for_others:
            self._look_for_others()
        if not self._tasks:
            time.sleep(LOOK_SECONDS)
            return None
        done, _ = wait_for(self._tasks, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
        if not done:
            return None
        future = done.pop()
        client, task = self._tasks.pop(future)
        try:
            result = future.result()
        except Fault as fault:
            return self._lose(client, str(fault), task)
        except RolloutError as error:
            if strict or (task == "answer" and not isinstance(error, Unfit)):
                raise
            return self._lose(client, f"can't be used any more: {error}", task)
        if task == "answer":
            return Answered(client, result)
        if task == "check":
            self._start_loading(client)
            return None
        self._ready[client] = None
        if self._gone.pop(client, None) is not None:
            log.warning("The vLLM server %s is back, with the present weights.", client.url)
        return Joined(client)

    def _lose(self, client: VllmClient, reason: str, task: Task) -> Lost[VllmClient] | None:
        """Note that ``client`` is gone; whoever had given it something to answer is told."""
        before = self._gone.get(client)
        self._ready.pop(client, None)
        pause = min(2 * before.pause, LONGEST_PAUSE) if before else FIRST_PAUSE
        self._gone[client] = _Absence(reason, time.monotonic() + pause, pause)
        if before is None:
            log.warning("The vLLM server %s %s; it is asked again from time to time.", client.url, reason)
        return Lost(client, f"{client.url} {reason}") if task == "answer" else None

    @property
    def _answering(self) -> bool:
        return any(task == "answer" for _, task in self._tasks.values())

    def _look_for_others(self) -> None:
        """Ask those who are gone again, if it is time."""
        busy = {client for client, _ in self._tasks.values()}
        for client, absence in self._gone.items():
            if client not in busy and time.monotonic() >= absence.again_at:
                self._start(client, "check", client.check)

    def _check_time(self, begin: float) -> None:
        """Raises an EngineLost if there has been nobody since ``begin``, which is too long ago."""
        if self._ready or self._answering:
            return
        coming_back = self._patience.work if self._tasks else 0.0  # with a large model that takes its time
        if time.monotonic() - begin > self._patience.gone + coming_back:
            raise EngineLost(self._none_left())

    def _none_left(self) -> str:
        listed = "; ".join(f"{client.url} {absence.reason}" for client, absence in self._gone.items())
        return f"No vLLM server is left to generate: {listed}. Start one at its address again, or use --rollout auto."
