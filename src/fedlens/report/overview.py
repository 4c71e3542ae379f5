"""One picture of a run: how accurate the global model became, and the clients' local models around its path."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlens.ledger import Ledger, durable
from fedlens.report.plane import Plane, compute_plane

if TYPE_CHECKING:
    from pathlib import Path

FILE = "overview.png"

_INK, _QUIET, _PALE, _GRID, _PAPER = "#1b1f24", "#6b7480", "#bcc3cc", "#e8ebef", "#ffffff"
_COLOURS = (  # even in lightness, so that no client stands out for its colour alone
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2",
    "#97bbf5", "#9c6b4e", "#c2455a", "#1f9eb5", "#7f8c2a", "#d17c00", "#6f5fb3",
)  # fmt: skip


def save_overview(ledger: Ledger) -> Path:
    """Draws a run into `overview.png` in its ledger's folder; the same ledger gives the same bytes.

    Returns:
      The path of the picture.

    Raises:
      LedgerError: no round is committed, or the ledger is damaged.
      OSError: the picture cannot be written.
    """
    picture = draw_overview(ledger)
    path = ledger.path / FILE
    durable.replace_file(path, [picture])
    return path


def draw_overview(ledger: Ledger) -> bytes:
    """Draws a run as a PNG: global accuracy by round, and the plane of `compute_plane`.

    Raises:
      LedgerError: no round is committed, or the ledger is damaged.
    """
    plane = compute_plane(ledger)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"backend": "agg"}):
        figure = Figure(figsize=(12, 5.2), layout="constrained", facecolor=_PAPER)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.75))
        _draw_metric(left, ledger)
        _draw_plane(right, plane)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "figure.constrained_layout.w_pad": 0.15,
    "figure.constrained_layout.h_pad": 0.12,
}


def _draw_metric(axes: Any, ledger: Ledger) -> None:
    """The global model's accuracy by round, or its loss where accuracy was not measured."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = ledger.metrics()
    name = next((name for name in ("test_accuracy", "accuracy", "test_loss", "loss") if name in rows[-1]), None)
    if name is None:
        axes.set_title("Global model")
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=_QUIET)
        return
    kind = name.removeprefix("test_")
    numbers = np.array([row["round"] for row in rows])
    values = np.array([row.get(name, np.nan) for row in rows], float)
    axes.set_title(f"{'Held-out' if name.startswith('test_') else 'Training'} {kind} of the global model")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.plot(numbers, values, color=_INK, linewidth=1.8, solid_capstyle="round")
    if np.isfinite(values[-1]):
        last = f"{100 * values[-1]:.1f} %" if kind == "accuracy" else f"{values[-1]:.3f}"
        axes.plot(numbers[-1], values[-1], "o", color=_INK, markersize=5.5, clip_on=False)
        offset, vertical = ((0, -9), "top") if kind == "accuracy" else ((0, 9), "bottom")
        axes.annotate(
            last,
            (numbers[-1], values[-1]),
            xytext=offset,
            textcoords="offset points",
            ha="right",
            va=vertical,
            fontweight="bold",
        )
    if kind == "accuracy":
        axes.set_ylim(0, 1 if not np.nanmax(values) < 0.45 else np.ceil(np.nanmax(values) * 12) / 10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _draw_plane(axes: Any, plane: Plane) -> None:
    """The path of the global model, and from each of its stations a line to every local model trained from it."""
    from matplotlib.collections import LineCollection

    clients = sorted({client for drawn in plane.rounds for client in drawn.local_models})
    tips = [(drawn, client, tip) for drawn in plane.rounds for client, tip in drawn.local_models.items()]
    path = np.array([drawn.start for drawn in plane.rounds] + ([] if plane.end is None else [plane.end]))
    places = np.array([tip for _, _, tip in tips])
    labelled = _outermost(plane, np.ptp(np.concatenate([places, path]), axis=0))
    # A colour for each client; among too many to tell apart, only for those with a label.
    coloured = clients if len(clients) <= len(_COLOURS) else [client for _, client, _ in labelled]
    colours = dict(zip(coloured, _COLOURS, strict=False))
    tints = [colours.get(client, _PALE) for _, client, _ in tips]
    above = [2 + (client in colours) for _, client, _ in tips]
    few = len(tips) < 120
    for level in (2, 3):
        drawn_now = [place for place, height in enumerate(above) if height == level]
        lines = LineCollection(
            [(tips[place][0].start, tips[place][2]) for place in drawn_now],
            colors=[tints[place] for place in drawn_now],
            linewidths=0.9,
            alpha=0.6 if few else 0.45,
            zorder=level,
        )
        axes.add_collection(lines)
        shade = [tints[place] for place in drawn_now]
        axes.scatter(*places[drawn_now].T, s=16 if few else 12, c=shade, linewidths=0, alpha=0.95, zorder=level)
    axes.plot(*path.T, color=_PAPER, linewidth=3.6, zorder=4, solid_joinstyle="round")
    axes.plot(*path.T, color=_INK, linewidth=1.9, zorder=5, solid_joinstyle="round")
    axes.scatter(*path.T, s=13, color=_INK, linewidths=0, zorder=6)
    axes.scatter(*path[0], s=48, facecolor=_PAPER, edgecolor=_INK, linewidths=1.8, zorder=7)
    axes.scatter(*path[-1], s=60, color=_INK, edgecolor=_PAPER, linewidths=1.2, zorder=7)
    for _, client, (tip, direction) in labelled:
        _label(axes, _short(client), tip, direction, colour=colours[client], size=8.5)
    if len(path) > 1:
        _label(axes, "start", path[0], path[0] - path[1], colour=_INK, size=9.5, distance=9)
    axes.set_title("The global model's path, and the local models around it")
    axes.set_xlabel(f"first principal component of all weights, {_share(plane.explained[0])} of their variance")
    axes.set_ylabel(f"second, {_share(plane.explained[1])}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.08)


_Labelled = tuple[int, str, tuple[Any, Any]]  # round, client, (where its local model is, which way is out)


def _outermost(plane: Plane, extent: Any, count: int = 5) -> list[_Labelled]:
    """The local models that lie farthest from those of the same round; of different clients, and apart from each other."""
    scale = np.where(extent > 0, extent, 1.0)
    candidates = []
    for drawn in plane.rounds:
        middle = np.mean(list(drawn.local_models.values()), axis=0)
        for client, tip in drawn.local_models.items():
            out = (tip - middle) / scale
            candidates.append((float(np.hypot(*out)), drawn.number, client, tip, tip - middle))
    candidates.sort(key=lambda candidate: (-candidate[0], candidate[1:3]))
    chosen: list[_Labelled] = []
    for distance, number, client, tip, out in candidates:
        apart = all(np.any(np.abs(tip - other) / scale > (0.16, 0.06)) for _, _, (other, _) in chosen)
        if distance > 0 and apart and all(client != known for _, known, _ in chosen):
            chosen.append((number, client, (tip, out)))
        if len(chosen) == count:
            break
    return chosen


def _label(axes: Any, text: str, place: Any, direction: Any, *, colour: str, size: float, distance: float = 6) -> None:
    """Writes `text` beside a point, on the side of `direction`, over a rim of paper that keeps lines off it."""
    from matplotlib.patheffects import withStroke

    right, up = direction[0] >= 0, direction[1] >= 0
    axes.annotate(
        text,
        place,
        xytext=(distance * (1 if right else -1), distance * 0.7 * (1 if up else -1)),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom" if up else "top",
        color=_darker(colour),
        fontsize=size,
        zorder=8,
        parse_math=False,
        path_effects=[withStroke(linewidth=2.5, foreground=_PAPER)],
    )


def _darker(colour: str) -> str:
    """The colour with a third less light: text needs more contrast than lines."""
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(part * 0.68):02x}" for part in parts)


def _short(client: str) -> str:
    shown = client if client.isprintable() else repr(client)
    return shown if len(shown) <= 26 else f"{shown[:25]}…"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"
