"""Progress of a policy training: the live view or plain lines, the trackers, and the doctor's findings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from math import nan
from types import TracebackType
from typing import Any

from rich.console import RenderableType
from rich.live import Live

from reinforcepp.distributed.ranks import Ranks
from reinforcepp.monitoring import Progress, read_metrics
from reinforcepp.monitoring.completion_tables import completion_panel, completion_table
from reinforcepp.monitoring.doctor import Diagnosis, diagnose
from reinforcepp.monitoring.live_view import Sample, Snapshot, duration, judge_counts, view
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.runtime.terminal import console, echo
from reinforcepp.training.batches import UpdateBatch
from reinforcepp.training.policy_run import RunState

CHECK_EVERY_STEPS = 5
FIRST_STEPS, LAST_STEPS = 20, 250  # the steps kept, because the doctor compares early steps with late ones


class Monitor:
    """``with Monitor(...) as monitor: monitor.step(...)`` after each step; only rank 0 prints.

    Args:
        record: the run's folder, settings and facts.
        state: the run's current step and evaluations.
        ranks: logs to the trackers.
        num_steps: steps of the run.
    """

    def __init__(self, record: RunRecord, state: RunState, ranks: Ranks, num_steps: int) -> None:
        self.record = record
        self.state = state
        self.ranks = ranks
        self.num_steps = num_steps
        self._reported: set[str] = set()
        self._diagnosis = Diagnosis((), state.step, num_steps)
        self._history = self._logged()
        self._begin, self._first = time.monotonic(), state.step
        self._sample: Sample | None = None
        self._live: Live | None = None
        self._lines: Progress | None = None

    def __enter__(self) -> Monitor:
        """Start the view and the trackers."""
        self.ranks.start_trackers(self.record.settings, self.state.step)
        if self.ranks.is_main and console.is_terminal:
            self._live = Live(self._view(), console=console, refresh_per_second=4)
            self._live.start()
        elif self.ranks.is_main:
            self._lines = Progress("training", self.num_steps, self.state.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the view and close the trackers."""
        if self._live:
            self._live.stop()
        self.ranks.end_trackers()

    def step(
        self,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        batch: UpdateBatch | None,
        logs: Mapping[str, Any],
    ) -> None:
        """Show a finished step: its metrics, and one completion of its batch; trackers get the ``logs`` that are due, if any."""
        step, values = int(metrics["step"]), {**metrics, **timings}
        if logs:
            self.ranks.track({name: value for name, value in logs.items() if isinstance(value, (int, float))}, step)
        if not self.ranks.is_main:
            return
        if batch is not None and logs:
            self._log_completions(batch, step)
        if batch is not None and "reward" in metrics:
            before = self._history[-1].get("num_tokens", 0.0) if self._history else 0.0
            values["step_tokens"] = metrics["num_tokens"] - before  # of prompts and completions on all ranks
            first = batch.rollout.completions[0]
            self._sample = Sample(first.context, first.text, batch.scores.known[0])
        self._history.append(values)
        del self._history[FIRST_STEPS:-LAST_STEPS]
        if step % CHECK_EVERY_STEPS == 0 or step == self.num_steps:
            self._check(step)
        if self._lines:
            kl = f"  kl {metrics['kl']:.4f}" if "kl" in metrics else ""
            judged = f"  {counts}" if (counts := judge_counts(metrics)) else ""
            self._lines.step(f"reward {metrics.get('reward', nan):+.3f}{kl}{judged}")
        if self._live:
            self._live.update(self._view(step))

    def _log_completions(self, batch: UpdateBatch, step: int) -> None:
        """Log the table of completions to the trackers, and print it above the live view if the settings ask for it."""
        settings = self.record.settings
        printed = settings.get("num_completions_to_print")
        if not settings.get("log_completions") or not (printed or settings.get("report_to")):
            return
        unique = bool(settings.get("log_unique_prompts"))
        table = completion_table(batch.rollout, batch.scores, batch.advantages_BT, step, unique_prompts=unique)
        self.ranks.track_table("completions", table, step)
        if printed:
            console.print(completion_panel(table, int(printed)))

    def rolled_back(self) -> None:
        """Show that the run has rolled back to an earlier step."""
        self._history = self._logged()
        self._begin, self._first = time.monotonic(), self.state.step
        if self._lines:
            self._lines.done = self.state.step

    def _check(self, step: int) -> None:
        """Run the doctor, and print each of its warnings and errors once."""
        record = replace(self.record, metrics=self._history, evaluations=self.state.evaluations)
        self._diagnosis = diagnose(record)
        for finding in self._diagnosis.findings:
            if finding.severity != "info" and finding.rule not in self._reported:
                self._reported.add(finding.rule)
                echo(f"Step {step}: {finding.title}. {finding.evidence} {finding.fix}", "yellow")

    def _logged(self) -> list[Mapping[str, float]]:
        logged = read_metrics(self.record.folder) if self.ranks.is_main else []
        return [*logged[:FIRST_STEPS], *logged[max(FIRST_STEPS, len(logged) - LAST_STEPS) :]]

    def _view(self, step: int | None = None) -> RenderableType:
        step, s = self.state.step if step is None else step, self.record.settings
        done = step - self._first
        left = (time.monotonic() - self._begin) / done * (self.num_steps - step) if done else nan
        return view(
            Snapshot(
                title="  ·  ".join(str(s[name]) for name in ("model", "estimator") if name in s),
                step=step,
                num_steps=self.num_steps,
                left=duration(left) if done else "-",
                history=self._history,
                kl_limit=self.record.settings.get("kl_limit"),
                health=(self._diagnosis.sentence, self._diagnosis.worst),
                sample=self._sample,
            ),
            console.width,
        )
