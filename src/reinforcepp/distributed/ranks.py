"""The processes that train together, by Accelerate: how they meet and fail, on what device, sums over them.

Several ranks hold one rule: whatever only some of them may run into happens inside :meth:`Ranks.agreed`, and between
two collectives all do the same.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    gather_object,
)
from torch import Tensor, distributed
from transformers.integrations import unset_hf_deepspeed_config

from reinforcepp.distributed.backends import AccelerateEngine, Engine
from reinforcepp.distributed.deepspeed import ZeroEngine, asked_for, complete, launched_plugin, prepare_deepspeed
from reinforcepp.errors import ConfigError, ReinforceError
from reinforcepp.models.precision import MasterAdamW
from reinforcepp.runtime import is_first_here, is_main, own_version, started

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
TRACKERS = "trackers"
PROJECT = "reinforcepp"
NEVER = timedelta(days=365)
FAILED, TOLD, VERSION = "reinforcepp/failed", "reinforcepp/told", "reinforcepp/version"
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of a partner that is gone."""
SILENT = (
    "Timed out waiting",
    "Application timeout",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
)
"""What gloo says of one from which nothing comes."""
ANSWER_SECONDS = 5
"""Within this time the store of the process group answers, if its machine can be reached."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that what is to be reported to is installed.

    Raises:
        ConfigError: naming what isn't, and how to install it.
    """
    there = {str(tracker.value) for tracker in get_available_trackers()} if names else set()
    for name in names:
        if name not in there:
            package = {"comet_ml": "comet-ml"}.get(name, name)
            raise ConfigError(f"report_to names {name}, which is not installed: pip install {package}")


# --- meeting and failing --------------------------------------------------------------------------------------------


def join(seconds: float) -> None:
    """Meet the other processes, if a launcher has started several; due before anything that may fail in one alone.

    Args:
        seconds: without an answer of the others, after which waiting for them is an error; 0 is never.
    """
    # Or transformers would give every model's weights to the first process alone: each one scores with all of them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if started() == 1:
        return
    if not is_main():  # what libraries have to say is said once
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        _group(timedelta(seconds=seconds) if seconds else NEVER)
    except distributed.DistError as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"This process and the others of its training don't meet at {place} ({str(error).splitlines()[0]}): look whether the "
            "machine of the first process has this address, the port is free there, all are started and each may connect to "
            "the others."
        ) from error
    sys.excepthook = _tell_unforeseen
    _compare_versions()


def _compare_versions() -> None:
    """Raises a ConfigError where this machine has another version of this package than the first process's."""
    store, own = distributed.distributed_c10d._get_default_store(), own_version()
    if is_main():
        store.set(VERSION, own)
    first = store.get(VERSION).decode()
    if first != own:
        raise ConfigError(
            f"The first process of this training has reinforcepp {first}, and {socket.gethostname()} has {own}: install the same "
            "version on all machines."
        )


def leave(code: int) -> None:
    """End this process with ``code`` if it is one of several that have met; due when nothing is left to do, or nothing happens.

    Python's own end is left out, apart from the functions of atexit: it aborts a process in which a thread of gloo's is just
    about to drop a tensor of the last message, which happens on a busy machine.
    """
    if started() == 1 or not distributed.is_initialized():
        return
    if code == 0:
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def tell_failure(text: str) -> None:
    """Tell the user why this process ends; of several that fail, one after the other or all alike, the first one does."""
    # alone, a process group may be vLLM's
    if started() == 1 or not (distributed.is_available() and distributed.is_initialized()):
        if is_first_here():
            print(text, file=sys.stderr)
        return
    # on a busy machine the launcher, which ends all when one has ended, may else be quicker
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # in a thread of its own: the store waits without end for a machine that can't be reached any more
    telling = threading.Thread(target=_tell_once, args=(text,), daemon=True)
    telling.start()
    telling.join(ANSWER_SECONDS if is_first_here() else 2 * ANSWER_SECONDS)
    if telling.is_alive() and is_first_here():
        print(text, file=sys.stderr, flush=True)


def _tell_once(text: str) -> None:
    store = distributed.distributed_c10d._get_default_store()
    try:
        if store.add(FAILED, 1) == 1:
            print(text, file=sys.stderr, flush=True)
            store.set(TOLD, "yes")
        else:  # the launcher ends all when one has ended, so the first one is given time for its sentence
            store.wait([TOLD], timedelta(seconds=10))
    except distributed.DistError:  # the process that kept the store is gone, and its launcher tells so
        return


def _tell_unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For ``sys.excepthook``: a process that merely lost its partners says so instead of showing a traceback."""
    said = str(error)
    if any(sign in said for sign in SILENT):
        waited = re.search(r"Timed out waiting (\d+)ms", said)
        since = f" since {time.strftime('%X', time.localtime(time.time() - int(waited[1]) / 1000))}" if waited else ""
        tell_failure(
            f"error: No answer from other processes of this training{since}: they hang, or their machines can't be reached any "
            "more. Go on from the last checkpoint with --resume; if they are only slow, set watchdog_seconds higher."
        )
    elif any(sign in said for sign in LOST):
        tell_failure(
            "error: Another process of this training ended without a word: it was killed, perhaps for lack of memory, or its "
            "machine can't be reached any more. The launcher's report names it. Go on from the last checkpoint with --resume."
        )
    else:
        tell_failure("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _group(timeout: timedelta | None = None) -> PartialState:
    """The process group, made by the first call; without an accelerator Accelerate has to be told to use CPUs."""
    cpu = not torch.accelerator.is_available()
    if cpu:  # or DeepSpeed, which others import where it is installed, would warn of that
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if asked_for():
        prepare_deepspeed(cpu=cpu)
    named = {} if timeout is None or started() == 1 else {"timeout": timeout}
    return PartialState(cpu=cpu, **named)


class Ranks:
    """This process among those that train together; alone, everything here is the identity."""

    def __init__(self, report_to: Sequence[str] = (), folder: Path | None = None) -> None:
        places = ProjectConfiguration(logging_dir=str(folder / TRACKERS)) if report_to and folder else None
        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            AcceleratorState._reset_state()  # a trainer of TRL in this process left its own there
        state = _group()
        known = "deepspeed_plugins" in AcceleratorState._shared_state  # which Accelerate won't be told twice
        plugin = launched_plugin() if asked_for() and not known else None
        self._accelerator = Accelerator(
            mixed_precision="no",  # is this package's own affair, whatever a launcher or the environment say
            cpu=state.device.type == "cpu",
            log_with=list(report_to) or None,
            project_config=places,
            deepspeed_plugin=plugin,
        )
        if self._accelerator.distributed_type != DistributedType.NO:
            self._check_launch(plugin)

    def _check_launch(self, plugin: DeepSpeedPlugin | None) -> None:
        """Refuse what the launcher was told and can't be done; on CPUs Accelerate knows no sharding unless told here."""
        state = self._accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # Accelerate copies the one state into the other now and then
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        if state.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins = {"default": plugin}
            PartialState().distributed_type = state.distributed_type = DistributedType.DEEPSPEED
        if state.distributed_type == DistributedType.DEEPSPEED:
            unset_hf_deepspeed_config()  # or transformers would cut up every model that is loaded
        if state.distributed_type == DistributedType.FSDP and not self.sharded:
            raise ConfigError("The launcher is set to FSDP version 1: set fsdp_version to 2.")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return bool(self._accelerator.is_main_process)

    @property
    def index(self) -> int:
        """Which of the processes this is."""
        return int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        """How many processes train together."""
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    def start_trackers(self, settings: Mapping[str, Any], step: int) -> None:
        """Tell the trackers of a run that begins, or goes on, after ``step``."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        # what a stopped run reported of the steps that are done again is not to be shown
        again = {"tensorboard": {"purge_step": step + 1}} if step else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about their own parts
            self._accelerator.init_trackers(PROJECT, config=plain, init_kwargs=again)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Report a step's figures."""
        self._accelerator.log(dict(values), step=step)

    def end_trackers(self) -> None:
        """Have everything written. Accelerate's own end would also end the process group that vLLM goes on to use."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    # --- models and gradients ---

    @property
    def sharded(self) -> bool:
        """Whether each rank keeps a part of every weight (FSDP2, DeepSpeed) instead of all of them."""
        return bool(self._accelerator.is_fsdp2) or self.zero

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed is who does that."""
        return bool(self._accelerator.distributed_type == DistributedType.DEEPSPEED)

    def prepare(
        self, model: PreTrainedModel, optimizer: MasterAdamW, dtype: torch.dtype, weights: Iterable[Tensor]
    ) -> Engine:
        """Model and optimiser as the engine runs them; sharded ones keep their weights in float32 and compute in ``dtype``.

        Args:
            model: to be trained.
            optimizer: of its parameters.
            dtype: what sharded ones compute in.
            weights: the model's, with all digits.
        """
        if self.zero:
            complete(self._accelerator.state.deepspeed_plugin.deepspeed_config, dtype)
            self._accelerator.deepspeed_engine_wrapped = None  # of another model
            prepared, _ = self._accelerator.prepare(model, optimizer)
            unset_hf_deepspeed_config()
            return ZeroEngine(prepared, optimizer, weights, self.index, self.count)
        if self.sharded:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # of operations in place on a model's output, of which there are none
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            self._accelerator.state.fsdp_plugin.mixed_precision_policy = policy
            prepared, wrapped = self._accelerator.prepare(model, optimizer)
            optimizer.take_over()
        else:  # the optimiser's tensors stay where they are, be that in main memory
            prepared, wrapped = self._accelerator.prepare(model, optimizer, device_placement=[None, False])
        return AccelerateEngine(self._accelerator, prepared, wrapped, optimizer)

    # --- between ranks ---

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks hold in common; the parts of all, one after another, are the whole."""
        begin, end = (len(items) * i // self.count for i in (self.index, self.index + 1))
        return list(items[begin:end])

    def agreed(self, part: Callable[[], T]) -> T:
        """What ``part`` gives, once every rank has done it; an error that it raises on one of them is raised on all.

        No collective may be in ``part``, but what all ask a :class:`FirstRank` before anything in it can
        fail on one rank alone. Errors are those that this package raises on purpose, and memory that runs out.
        """
        if self.count == 1:
            return part()
        outcome: T | None = None
        error: ReinforceError | None = None
        try:
            outcome = part()
        except torch.OutOfMemoryError as lack:
            error = ConfigError(
                f"Memory ran out in process {self.index} of {self.count}: lower rollout_batch_size, mini_batch_size or "
                f"max_new_tokens ({str(lack).splitlines()[0]})."
            )
        except ReinforceError as own:
            error = own
        for told in self.gather(error):
            if told is not None:
                raise told
        return cast(T, outcome)

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order; tensors in them have to be on the CPU."""
        gathered: list[T] = gather_object([item]) if self.count > 1 else [item]
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        return self._accelerator.reduce(values, reduction="sum")

    def max(self, values: Tensor) -> Tensor:
        """Largest value over ranks, of single numbers."""
        gathered: Tensor = self._accelerator.gather(values)
        return gathered.max()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor(float(here), device=self.device)))

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self._accelerator.wait_for_everyone()
