"""Data-parallel ranks through Accelerate: process group, failure reports, devices, trackers, and collectives.

With several ranks, code that can fail on only some of them must run inside :meth:`Ranks.run_or_raise_all`. Between two
collectives, all ranks must run the same code.
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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from reinforcepp.distributed.backends import AccelerateBackend, TrainingBackend
from reinforcepp.distributed.deepspeed import (
    DeepSpeedBackend,
    complete_config,
    deepspeed_requested,
    launcher_plugin,
    prepare_deepspeed,
)
from reinforcepp.errors import ConfigError, ReinforceError, first_line, option
from reinforcepp.models.devices import quiet_deepspeed
from reinforcepp.models.master_weights import MasterWeights
from reinforcepp.runtime.process import is_first_here, is_main, own_version, started
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import print_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
TRACKERS = "trackers"
PROJECT = "reinforcepp"
RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
"""Argument with the name of a run, by tracker."""
NO_TIMEOUT = timedelta(days=365)
FAILED, REPORTED, VERSION = "reinforcepp/failed", "reinforcepp/reported", "reinforcepp/version"
"""Keys in the store of the process group."""
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Texts of gloo's errors about a rank that exited."""
PEER_SILENT = (
    "Timed out waiting",
    "Application timeout",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
)
"""Texts of gloo's errors about a rank that doesn't answer."""
SUM_BUCKET_BYTES = 64 << 20
"""Most bytes of small tensors that are summed over ranks at a time."""
STORE_TIMEOUT_SECONDS = 5
"""Time in which the store of the process group answers if its node is reachable."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of the trackers ``names`` are installed.

    Raises:
        ConfigError: one is missing.
    """
    available = {str(tracker.value) for tracker in get_available_trackers()} if names else set()
    for name in names:
        if name not in available:
            package = {"comet_ml": "comet-ml"}.get(name, name)
            raise ConfigError(f"report_to: {name} isn't installed. Run pip install {package}.")


def init_process_group(timeout_seconds: float) -> None:
    """Connect to the other ranks if a launcher has started several. Call this before anything that can fail on one alone.

    Args:
        timeout_seconds: raise an error after waiting this long for other ranks; 0 disables the timeout.

    Raises:
        ConfigError: the ranks can't connect, or run different versions of this package.
    """
    # Otherwise transformers would load each model's weights on rank 0 alone, but every rank scores with all of them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if started() == 1:
        return
    # Ranks exchange pickles by gloo without authentication, so on a single node no other node should reach them.
    if sys.platform == "linux" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not is_main():  # Libraries log and warn once, on rank 0.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        _process_state(timedelta(seconds=timeout_seconds) if timeout_seconds else NO_TIMEOUT)
    except distributed.DistError as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"Rank {os.environ.get('RANK', '?')} can't connect to the other ranks at {address} ({first_line(error)}). Check "
            "that the node of rank 0 has this address, that the port is free there, that all ranks were started, and that "
            "every node can connect to the others."
        ) from error
    sys.excepthook = _report_uncaught
    _compare_versions()


def _compare_versions() -> None:
    """Raise a ConfigError if this rank runs another version of this package than rank 0."""
    store, local = distributed.distributed_c10d._get_default_store(), own_version()
    if is_main():
        store.set(VERSION, local)
    version = store.get(VERSION).decode()
    if version != local:
        raise ConfigError(
            f"Rank 0 runs reinforcepp {version}, but {socket.gethostname()} runs {local}. Install the same version on all nodes."
        )


def from_rank_zero(key: str, function: Callable[[], str]) -> str:
    """Return the text that ``function`` returns on rank 0, which alone calls it; ``key`` names it and its arguments."""
    if started() == 1 or not distributed.is_initialized():
        return function()
    store = distributed.distributed_c10d._get_default_store()
    if is_main():
        store.set(key, function())
    return str(store.get(key).decode())


def exit_process(code: int) -> None:
    """End this process with ``code`` if it belongs to a process group; otherwise return.

    This skips Python's finalization except for the functions of atexit. With a busy CPU, finalization can abort the process
    while a thread of gloo frees a tensor of the last message.
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


def report_failure(problem: str | BaseException) -> None:
    """Print why this process ends. If several ranks fail, only the first one prints."""
    # A single process can have a process group, too: that of vLLM.
    if started() == 1 or not (distributed.is_available() and distributed.is_initialized()):
        if is_first_here():
            print_error(problem)
        return
    # The launcher ends all ranks when one has ended, and could otherwise end this one before it prints.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # This needs a thread because the store blocks forever if its node is unreachable.
    reporting = threading.Thread(target=_report_once, args=(problem,), daemon=True)
    reporting.start()
    reporting.join(STORE_TIMEOUT_SECONDS if is_first_here() else 2 * STORE_TIMEOUT_SECONDS)
    if reporting.is_alive() and is_first_here():
        print_error(problem)


def _report_once(problem: str | BaseException) -> None:
    store = distributed.distributed_c10d._get_default_store()
    try:
        if store.add(FAILED, 1) == 1:
            print_error(problem)
            store.set(REPORTED, "yes")
        else:  # The launcher ends all ranks when one has ended, so this one waits until the first one has printed.
            store.wait([REPORTED], timedelta(seconds=2 * STORE_TIMEOUT_SECONDS))
    except distributed.DistError:  # The rank that hosts the store has exited, and its launcher reports that.
        return


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an uncaught exception, as ``sys.excepthook``. For a lost connection to other ranks, omit the traceback."""
    message = str(error)
    if any(text in message for text in PEER_SILENT):
        waited = re.search(r"Timed out waiting (\d+)ms", message)
        since = f" since {time.strftime('%X', time.localtime(time.time() - int(waited[1]) / 1000))}" if waited else ""
        report_failure(
            f"error: No answer from other ranks{since}. They hang, or their nodes are unreachable. Resume from the last "
            f"checkpoint with {option('resume')}. If the ranks are only slow, raise watchdog_seconds."
        )
    elif any(text in message for text in PEER_LOST):
        report_failure(
            "error: Another rank exited without an error message. It was killed, possibly for lack of memory, or its node is "
            f"unreachable. The launcher's report names the rank. Resume from the last checkpoint with {option('resume')}."
        )
    else:
        report_failure(error.with_traceback(trace))


def _process_state(timeout: timedelta | None = None) -> PartialState:
    """Return Accelerate's process state; the first call creates the process group."""
    cpu = not torch.accelerator.is_available()  # Accelerate doesn't choose CPUs by itself.
    quiet_deepspeed()
    if deepspeed_requested():
        prepare_deepspeed(cpu=cpu)
    options = {} if timeout is None or started() == 1 else {"timeout": timeout}
    return PartialState(cpu=cpu, **options)


def sum_buckets(tensors: Iterable[Tensor], limit: int = SUM_BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Yield ``tensors`` in lists of one dtype and up to ``limit`` bytes; a larger tensor is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


class Ranks:
    """The ranks that train together, seen from this one. With a single rank, every collective is the identity."""

    def __init__(self, report_to: Sequence[str] = (), folder: Path | None = None) -> None:
        project = ProjectConfiguration(logging_dir=str(folder / TRACKERS)) if report_to and folder else None
        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            AcceleratorState._reset_state()  # A TRL trainer in this process has left its precision there.
        state = _process_state()
        known = "deepspeed_plugins" in AcceleratorState._shared_state  # Accelerate accepts the plugin only once.
        plugin = launcher_plugin() if deepspeed_requested() and not known else None
        self.accelerator = Accelerator(
            mixed_precision="no",  # This package handles precision, whatever the launcher or environment set.
            cpu=state.device.type == "cpu",
            log_with=list(report_to) or None,
            project_config=project,
            deepspeed_plugin=plugin,
        )
        if self.accelerator.distributed_type != DistributedType.NO:
            self._check_launch(plugin)

    def _check_launch(self, plugin: DeepSpeedPlugin | None) -> None:
        """Raise a ConfigError for unsupported launcher settings. On CPUs, also set the type of sharding in Accelerate."""
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # Accelerate sometimes copies one of the two states to the other.
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        if state.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins = {"default": plugin}
            PartialState().distributed_type = state.distributed_type = DistributedType.DEEPSPEED
        if state.distributed_type == DistributedType.DEEPSPEED:
            unset_hf_deepspeed_config()  # Otherwise transformers would partition every model it loads.
        if state.distributed_type == DistributedType.FSDP and not self.sharded:
            raise ConfigError("The launcher is configured for FSDP version 1. Set fsdp_version to 2.")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def index(self) -> int:
        """Index of this rank."""
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        """Number of ranks."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.accelerator.device

    def start_trackers(self, settings: Mapping[str, Any], step: int) -> None:
        """Start the trackers of a run that begins or resumes after ``step``."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        # Steps after the checkpoint run again, so TensorBoard must hide what the stopped run logged for them.
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}} if step else {}
        if settings.get("run_name"):
            options |= {tracker: {name: settings["run_name"]} for tracker, name in RUN_NAMES.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Trackers warn about their own internals.
            arguments, sys.argv = sys.argv, [redacted(argument) for argument in sys.argv]  # W&B records them.
            try:
                self.accelerator.init_trackers(PROJECT, config=plain, init_kwargs=options)
            finally:
                sys.argv = arguments

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step to the trackers."""
        self.accelerator.log(dict(values), step=step)

    def track_table(self, name: str, columns: Mapping[str, Sequence[Any]], step: int) -> None:
        """Log a table to those trackers that TRL gives tables: W&B and trackio, and to MLflow. Only rank 0 logs it."""
        trackers = {tracker.name: tracker for tracker in self.accelerator.trackers if self.is_main}
        if not trackers.keys() & {"wandb", "trackio", "mlflow"}:
            return
        import pandas

        table = pandas.DataFrame(columns)
        if "wandb" in trackers:
            trackers["wandb"].log_table(name, dataframe=table, step=step)
        if "trackio" in trackers:
            import trackio

            trackers["trackio"].log({name: trackio.Table(dataframe=table)}, step=step)
        if "mlflow" in trackers:
            import mlflow

            mlflow.log_table(table, f"{name}.json", run_id=trackers["mlflow"].tracker.info.run_id)

    def end_trackers(self) -> None:
        """Flush and close the trackers. Accelerate's ``end_training`` would also destroy the process group vLLM uses."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # --- models and gradients ---

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of every weight (FSDP2, DeepSpeed) instead of all weights."""
        return bool(self.accelerator.is_fsdp2) or self.uses_deepspeed

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the training backend is DeepSpeed."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def prepare(
        self, model: PreTrainedModel, masters: MasterWeights, dtype: torch.dtype, weights: Iterable[Tensor]
    ) -> TrainingBackend:
        """Return the training backend of a model. A sharded model keeps float32 weights and computes in ``dtype``.

        Args:
            model: the model to train.
            masters: the model's parameters and their optimizer.
            dtype: the compute dtype of a sharded model.
            weights: the model's weights at full precision.
        """
        if self.uses_deepspeed:
            complete_config(self.accelerator.state.deepspeed_plugin.deepspeed_config, dtype)
            self.accelerator.deepspeed_engine_wrapped = None  # It belongs to the model that was prepared before.
            prepared, _ = self.accelerator.prepare(model, masters.optimizer)
            unset_hf_deepspeed_config()
            return DeepSpeedBackend(prepared, masters, weights, self.index, self.count)
        if self.sharded:
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # The warning is about in-place operations on a model's output, which this package doesn't make.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
            prepared, wrapped = self.accelerator.prepare(model, masters.optimizer)
            masters.use_shards()
        else:
            # Gradients of separate masters are summed over ranks without DDP, see ``Learner.clip``.
            prepared = self.accelerator.prepare_model(model, evaluation_mode=masters.has_separate_masters)
            # The optimizer's tensors stay on their device, which can be the CPU.
            wrapped = self.accelerator.prepare_optimizer(masters.optimizer, device_placement=False)
        return AccelerateBackend(self.accelerator, prepared, wrapped, masters)

    # --- communication between ranks ---

    def local_slice(self, items: Sequence[T]) -> list[T]:
        """Return this rank's contiguous slice of ``items``; the slices of all ranks in order are all items."""
        return self.slice_of(items, self.index)

    def slice_of(self, items: Sequence[T], index: int) -> list[T]:
        """Return the slice of another rank."""
        begin, end = (len(items) * i // self.count for i in (index, index + 1))
        return list(items[begin:end])

    def run_or_raise_all(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank and return its result. If it raises on one rank, raise that error on all ranks.

        ``function`` must not contain a collective, except for calls of :class:`RankZero` before anything in it can fail on
        one rank alone. The errors shared between ranks are :class:`ReinforceError` and running out of GPU memory.
        """
        if self.count == 1:
            return function()
        result: T | None = None
        failure: ReinforceError | None = None
        try:
            result = function()
        except torch.OutOfMemoryError as error:
            failure = ConfigError(
                f"Out of memory on rank {self.index} of {self.count} ({first_line(error)}). Lower rollout_batch_size, "
                "max_tokens_per_micro_batch, or max_new_tokens."
            )
        except ReinforceError as error:
            failure = error
        for shared in self.gather(failure):
            if shared is not None:
                raise shared
        return cast(T, result)

    def gather(self, item: T) -> list[T]:
        """Return the items of all ranks in rank order; tensors in them must be on the CPU."""
        gathered: list[T] = gather_object([item]) if self.count > 1 else [item]
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""
        return self.accelerator.reduce(values, reduction="sum")

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, on any device, by its sum over ranks. All ranks must pass tensors of the same shapes.

        Small tensors are joined, because each sum over ranks has a latency, and an adapter has hundreds of tensors.
        """
        for bucket in sum_buckets(tensors):
            parts = [tensor.to(self.device) for tensor in bucket]
            joined = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
            distributed.all_reduce(joined)
            if len(parts) > 1:
                sizes = [part.numel() for part in parts]
                parts = [
                    part.view(tensor.shape) for part, tensor in zip(torch.split(joined, sizes), bucket, strict=True)
                ]
            for tensor, part in zip(bucket, parts, strict=True):
                if part is not tensor:
                    tensor.copy_(part)

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum over ranks."""
        gathered: Tensor = self.accelerator.gather(values[None])
        return gathered.amax(0)

    def any(self, condition: bool) -> bool:
        """Return whether ``condition`` holds on any rank."""
        return bool(self.sum(torch.tensor(float(condition), device=self.device)))

    def barrier(self) -> None:
        """Block until all ranks have reached this call."""
        self.accelerator.wait_for_everyone()
