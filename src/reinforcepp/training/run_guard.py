"""What surrounds the training loop: watchdog, stop signals, skipped updates, rollbacks, and a saved run if it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import EngineLost, EnvironmentFailed, RewardError, TrainingDiverged, UnusableUpdate, option
from reinforcepp.monitoring import Clock
from reinforcepp.monitoring.signals import Interrupted, Stop, StopRequested, stop_signals
from reinforcepp.monitoring.watchdog import Watchdog
from reinforcepp.training.guardrails import Guardrails, RollBack
from reinforcepp.training.policy_run import PolicyRun


class Heartbeat:
    """Beats the watchdog and checks for stop signals; ``with heartbeat:`` starts both.

    Args:
        folder: where the watchdog writes the stacks of a run that hangs.
        watchdog_seconds: seconds without a beat after which the watchdog ends the process; 0 disables it.
        ranks: several ranks only stop together, between two steps.
    """

    def __init__(self, folder: Path, watchdog_seconds: float, ranks: Ranks) -> None:
        self._folder, self._seconds, self._ranks = folder, watchdog_seconds, ranks
        self._phase = "start"
        self.stop, self._watchdog = Stop(), Watchdog(folder, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the watchdog and catch stop signals."""
        with stop_signals() as self.stop, Watchdog(self._folder, self._seconds) as self._watchdog:
            yield

    def beat(self, phase: str) -> None:
        """Report progress: ``phase`` begins."""
        self._phase = phase
        self._watchdog.beat(phase)

    def safe_point(self) -> None:
        """Report progress within a phase, and stop here if a signal was received, because a stopped run loses nothing here."""
        self._watchdog.beat(self._phase)
        if self._ranks.count == 1:
            self.stop.check()

    def interruptible(self) -> AbstractContextManager[None]:
        """Return a context for work that can be repeated: a signal stops it at once."""
        return self.stop.anywhere() if self._ranks.count == 1 else nullcontext()

    def check_between_steps(self) -> None:
        """Stop if any rank was asked to; every rank must call this.

        Raises:
            StopRequested: a rank has received a signal.
        """
        if self._ranks.any(self.stop.number is not None):
            raise StopRequested


class Step:
    """One step: its index, counted from 0, and the seconds of its phases."""

    def __init__(self, index: int, heartbeat: Heartbeat) -> None:
        self.index = index
        self.clock = Clock()
        self.finished = False
        """Whether the run has advanced to the next step; False after a rollback."""
        self._heartbeat = heartbeat

    @contextmanager
    def phase(self, name: str, *, repeatable: bool = False) -> Iterator[None]:
        """Measure a phase; a signal stops a ``repeatable`` one at once instead of at its next safe point."""
        with self._heartbeat.interruptible() if repeatable else nullcontext():
            self._heartbeat.beat(f"{name} of step {self.index + 1}")
            yield
            self.clock.lap(name)


class RunGuard:
    """Keeps a run within its limits, and saves it if it stops.

    Args:
        run: the run's files and state.
        guardrails: the limits.
        heartbeat: watchdog and stop signals.
        num_steps: steps of the run.
    """

    def __init__(self, run: PolicyRun, guardrails: Guardrails, heartbeat: Heartbeat, num_steps: int) -> None:
        self.run = run
        self.guardrails = guardrails
        self.heartbeat = heartbeat
        self.num_steps = num_steps

    @contextmanager
    def training(self) -> Iterator[None]:
        """Surround a training: save it if it stops, restore the last checkpoint if it diverges, close its files."""
        with self.heartbeat.watching():
            try:
                yield
            except StopRequested as stop:
                raise Interrupted(self._save_stopped(), self.heartbeat.stop.exit_code) from stop
            except (RewardError, EngineLost, EnvironmentFailed) as error:
                raise type(error)(
                    f"{error} Saved the run {self._save_stopped()}. Resume it with {option('resume')}."
                ) from error
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error} {self.run.restore_last_good()}") from error
            finally:
                self.run.close()

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Surround a step: record an update that must be skipped, then check the guardrails and roll back or advance."""
        step = Step(self.run.state.step, self.heartbeat)
        self.run.callbacks.begin_step()
        try:
            yield step
        except UnusableUpdate as problem:  # rewards or log-probabilities aren't finite, or no completion has a reward
            self.guardrails.skip(problem, step.index + 1)
            self.run.record(step.index, None, {"skipped_updates": 1.0}, step.clock.seconds())
        try:
            self.guardrails.check_step(self.run.metrics)
        except RollBack as reason:
            self.run.roll_back(str(reason))
        else:
            self.run.advance()
            step.finished = True

    def save_if_due(self) -> None:
        """Write a checkpoint every ``save_every`` steps, and if a callback asks for one."""
        if self.run.callbacks.control.should_save:
            self.heartbeat.beat("checkpoint")
            self.run.save(self.run.metrics)

    def _save_stopped(self) -> str:
        """Save a run that stops; return its position, for the message."""
        self.heartbeat.beat("checkpoint")
        if self.run.resumed is not None:  # stopped before the checkpoint was restored, so there is nothing new to save
            return f"after step {self.run.resumed.step} of {self.num_steps}"
        self.run.save()
        return f"after step {self.run.state.step} of {self.num_steps}"
