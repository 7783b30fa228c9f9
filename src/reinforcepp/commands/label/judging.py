"""The option ``judge`` of the command ``label``: a language model labels the pairs instead of people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from reinforcepp.commands.label.preparation import prepared
from reinforcepp.config import LabelConfig
from reinforcepp.data.feedback import Choice, Skip, Store, Unit, Vote
from reinforcepp.errors import DataError, RewardError, RolloutError
from reinforcepp.labeling.generation import BackgroundGeneration
from reinforcepp.monitoring import Progress
from reinforcepp.monitoring.live_view import judge_counts
from reinforcepp.rewards.judge.judge import Comparison, Judge, Pair, load_judge, position_bias
from reinforcepp.runtime.terminal import echo, print_output

CHUNK_PAIRS = 500
"""Pairs in memory at a time."""
MAX_CHANGED_SHARE = 0.5
"""Share of the verdicts that change with the order above which a judge is of no use."""
WAIT_SECONDS = 1.0
INTERRUPTED = 130
CONTINUE = "To continue, run the same command again."


def label_by_judge(config: LabelConfig) -> int:
    """Store the judge's vote on each pair that it hasn't labeled, print its position bias, and return the exit code.

    Raises:
        ReinforceError: The judge, the database, the data or a model can't be used, or the judge failed. Its votes up to then are
            stored.
    """
    judge = load_judge(str(config.judge))
    with Store.opened(config.database) as store, prepared(config, store) as background:
        if background is None and not store.has_units("pair"):
            raise DataError(
                f"database: {store.name} has no pairs, and judges label nothing else. Add some with --data or models, and "
                "without another task."
            )
        run = _Run(judge, store, background)
        try:
            run.label_all()
        except RewardError as error:
            if not run.pairs:
                raise
            raise RewardError(f"{error} {run.state} {CONTINUE}") from error
        except KeyboardInterrupt:
            echo(f"\nInterrupted. {run.state} {CONTINUE}", "yellow")
            return INTERRUPTED
        if background is not None and background.prompts_left:
            raise RolloutError(f"{background.prompts_left} prompts have no responses. {run.state} {CONTINUE}")
        bias = position_bias(_verdicts(store, judge.labeler))
        print_output(f"{judge.labeler}: {bias}")
        if bias.changed_share > MAX_CHANGED_SHARE:
            echo("Most verdicts follow the order, so they are stored as ties. Use a more capable model.", "yellow")
        database = "" if config.database == LabelConfig.database else f" --database {config.database}"
        echo(f"{run.state} Compare them with people's: reinforcepp label agreement{database}", "green")
    return 0


class _Run:
    """One run of the command, with the number of pairs that it has labeled and what the judge has done."""

    def __init__(self, judge: Judge, store: Store, background: BackgroundGeneration | None) -> None:
        self.judge, self.store, self.background = judge, store, background
        self.pairs = 0
        self._counts: dict[str, float] = {}  # of the judge, over all its calls

    @property
    def state(self) -> str:
        """Sentences for the end of the run."""
        labeled = f"Labeled {self.pairs} pairs with {self._done()}." if self.pairs else "Labeled no further pairs."
        return f"{labeled} The votes are in {self.store.name}."

    def label_all(self) -> None:
        """Label pairs until none is left and none is being generated."""
        with Progress("labeling", self._left()) as progress:
            while True:
                last = self.background is None or not self.background.is_running  # before the query, for the last units
                units = self.store.unjudged(self.judge.labeler, limit=CHUNK_PAIRS)
                if units:
                    progress.total = progress.done + self._left()
                    self._label(units, progress)
                elif last:
                    return
                else:
                    time.sleep(WAIT_SECONDS)

    def _label(self, units: Sequence[Unit], progress: Progress) -> None:
        before, began = self._counts, time.monotonic()

        def count() -> None:
            self._counts = {name: before.get(name, 0.0) + more for name, more in self.judge.request_counts.items()}

        def put(number: int, verdict: Comparison | None) -> None:
            nonlocal began
            now = time.monotonic()
            self.store.add_judgment(
                self.judge.labeler,
                units[number].id,
                _vote(verdict),
                seconds=now - began,
                details=self._details(verdict),
            )
            began = now
            self.pairs += 1
            count()
            progress.step(self._done())

        try:
            self.judge.compare([Pair(unit.prompt, *(answer.text for answer in unit.answers)) for unit in units], put)
        finally:
            count()

    def _details(self, verdict: Comparison | None) -> dict[str, Any]:
        about = {"model": self.judge.spec.model, "rubric": self.judge.spec.rubric}
        return about if verdict is None else {**about, "votes": verdict.votes, "reasons": verdict.reasons}

    def _left(self) -> int:
        """Return the pairs to label, counting a prompt that is without responses as one."""
        coming = self.background.prompts_left if self.background is not None else 0
        return self.store.count_unjudged(self.judge.labeler) + coming

    def _done(self) -> str:
        budget = self.judge.budget
        return judge_counts(self._counts) + (f" (budget: {budget})" if budget else "")


def _vote(verdict: Comparison | None) -> Vote:
    """Return the vote; verdicts that change with the order are a tie, and a pair without a verdict is skipped."""
    if verdict is None:
        return Skip()
    if verdict.winner == "tie":
        return Choice(None, tie="good")
    return Choice(0 if verdict.winner == "first" else 1)


def _verdicts(store: Store, labeler: str) -> Iterator[Comparison]:
    """Yield the verdicts of a judge, also those of earlier runs."""
    for details in store.details(labeler):
        if "votes" in details:
            (first, second), (reason, other) = details["votes"], details["reasons"]
            yield Comparison((first, second), (reason, other))
