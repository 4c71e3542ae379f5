"""From the runs of a comparison to its table: medians, ratios, and whether the targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a contestant should take at most.

    Attributes:
      workload: on which.
      name: which contestant.
      at_most: times the time of `over`; without one, seconds a client.
      over: whose time.
    """

    workload: str
    name: str
    at_most: float
    over: str | None = None


TARGETS = (
    Target("W1", "fedlens", 0.75, "pfl"),
    Target("W1", "fedlens", 1.0, "torch loop"),
    Target("W1", "fedlens", 1.10, "reference"),
    Target("W2", "fedlens", 0.25, "pfl"),
    Target("W2", "fedlens", 1.10, "reference"),
    Target("W3", "fedlens", 1.0, "pfl"),
    Target("W3", "fedlens with Flax's LSTM", 1.0, "naive reference"),
    Target("W4", "fedlens", 1.10, "reference"),
    Target("W4", "fedlens", 10e-6),
)


@dataclass(frozen=True)
class Row:
    """What a contestant took on a workload, over all its processes.

    Attributes:
      workload: on which.
      name: who.
      clients: in a round.
      seconds: a round: the median over processes of each one's median.
      least: the least of the processes' medians.
      most: the greatest of them.
      processes: how many there were.
      peak_rss_mb: the median of their peaks.
    """

    workload: str
    name: str
    clients: int
    seconds: float
    least: float
    most: float
    processes: int
    peak_rss_mb: float

    @property
    def per_client(self) -> float:
        """Seconds a client: what contestants are compared by, as some run fewer clients."""
        return self.seconds / self.clients


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of some runs, in order of first appearance; each run is a script's line with its `contestant`."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["workload"], run["contestant"]), []).append(run)
    rows = []
    for (workload, name), of_both in grouped.items():
        medians = [run["median_s_per_round"] for run in of_both]
        rows.append(
            Row(
                workload,
                name,
                of_both[0]["clients"],
                statistics.median(medians),
                min(medians),
                max(medians),
                len(medians),
                statistics.median(run["peak_rss_mb"] for run in of_both),
            )
        )
    return rows


@dataclass(frozen=True)
class Verdict:
    """A target, what was found, and whether that is good enough."""

    target: Target
    found: float

    @property
    def met(self) -> bool:
        return self.found <= self.target.at_most

    def describe(self) -> str:
        unit, factor = ("x", 1.0) if self.target.over else (" us a client", 1e6)
        over = f" the time of {self.target.over}" if self.target.over else ""
        found, limit = (f"{value * factor:.3g}{unit}" for value in (self.found, self.target.at_most))
        verdict = "met" if self.met else "NOT MET"
        return f"{self.target.workload} {self.target.name}: {found}{over}, at most {limit}: {verdict}"


def judge(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """The targets that these rows say something about."""
    per_client = {(row.workload, row.name): row.per_client for row in rows}
    verdicts = []
    for target in targets:
        own = per_client.get((target.workload, target.name))
        other = 1.0 if target.over is None else per_client.get((target.workload, target.over))
        if own is not None and other is not None:
            verdicts.append(Verdict(target, own / other))
    return verdicts


def table(rows: Sequence[Row]) -> str:
    """The rows as text; ratios are fedlens's time over the contestant's, client for client."""
    own = {row.workload: row.per_client for row in rows if row.name == "fedlens"}
    cells = [("", "", "s a round", "from - to", "a client", "fedlens / it", "peak MB")]
    before = None
    for row in rows:
        ratio = f"{own[row.workload] / row.per_client:.2f}" if row.workload in own and row.name != "fedlens" else ""
        cells.append(
            (
                row.workload if row.workload != before else "",
                row.name + ("" if row.processes > 1 else " (one process)"),
                f"{row.seconds:.4g}",
                f"{row.least:.4g} - {row.most:.4g}",
                _readable(row.per_client),
                ratio,
                f"{row.peak_rss_mb:.0f}",
            )
        )
        before = row.workload
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for line in cells:
        texts = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    return "\n".join(lines)


def _readable(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
