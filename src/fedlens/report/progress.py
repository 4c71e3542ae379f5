"""Progress of a run: a bar on a terminal, a plain line a round elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class RoundReport:
    """One finished round, for whoever watches.

    Attributes:
      round: its number, from 0.
      rounds: how many are planned.
      clients: how many clients took part.
      seconds: how long it took, evaluation and hand-over to the ledger included.
      metrics: what was measured.
    """

    round: int
    rounds: int
    clients: int
    seconds: float
    metrics: dict[str, float]

    @property
    def clients_per_second(self) -> float:
        """How many clients were computed in a second."""
        return self.clients / max(self.seconds, 1e-9)

    def describe(self) -> str:
        """Loss, accuracy and speed in one line; held-out figures where there are any."""
        parts = []
        for name in ("loss", "accuracy"):
            where = f"test_{name}" if f"test_{name}" in self.metrics else name
            if where in self.metrics:
                parts.append(f"{where.replace('_', ' ')} {self.metrics[where]:.4f}")
        if self.metrics.get("clients_dropped"):
            parts.append(f"{self.metrics['clients_dropped']:.0f} clients dropped")
        return "  ".join([*parts, f"{self.clients_per_second:,.0f} clients/s"])


class ProgressDisplay:
    """Shows a run's rounds as they finish; a context manager."""

    def __init__(self, rounds: int, done: int = 0, *, enabled: bool = True, console: Console | None = None):
        """Takes the planned rounds, those already done, and where to write; standard error by default."""
        self._rounds = rounds
        self._enabled = enabled
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._bar.add_task("rounds", total=rounds, completed=done, shown="compiling")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def round_done(self, report: RoundReport) -> None:
        """Shows one more finished round."""
        if self._bar is not None:
            self._bar.update(self._task, completed=report.round + 1, shown=report.describe())
        elif self._enabled:
            width = len(str(report.rounds))
            print(
                f"round {report.round + 1:>{width}}/{report.rounds}  {report.describe()}",
                file=self._console.file,
                flush=True,
            )
