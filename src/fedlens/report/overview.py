"""One picture of a run: how accurate the global model became, and the clients' local models around its path."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlens.ledger import Ledger, durable
from fedlens.report.labels import Label, along, place_labels, shorten
from fedlens.report.plane import Plane, compute_plane

if TYPE_CHECKING:
    from pathlib import Path

FILE = "overview.png"

_INK, _QUIET, _PALE, _GRID, _PAPER = "#1b1f24", "#6b7480", "#bcc3cc", "#e8ebef", "#ffffff"
_COLOURS = (  # even in lightness, so that no client stands out for its colour alone
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2",
    "#97bbf5", "#9c6b4e", "#c2455a", "#1f9eb5", "#7f8c2a", "#d17c00", "#6f5fb3",
)  # fmt: skip
_LABELS = 7  # clients that are named in the picture, where there is room


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

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A client's name in a script that the font lacks is drawn as boxes; no reason to alarm anybody.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
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
        best = np.nanmax(values, initial=0)
        axes.set_ylim(0, 1 if best > 0.45 else np.ceil(best * 12 + 0.1) / 10)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _draw_plane(axes: Any, plane: Plane) -> None:
    """The path of the global model, and from each of its stations a line to every local model trained from it."""
    from matplotlib.collections import LineCollection

    tips = [(client, drawn.start, tip) for drawn in plane.rounds for client, tip in drawn.local_models.items()]
    starts, ends = np.array([start for _, start, _ in tips]), np.array([tip for _, _, tip in tips])
    path = np.array([drawn.start for drawn in plane.rounds] + ([] if plane.end is None else [plane.end]))
    clients = sorted({client for client, _, _ in tips})
    many = len(clients) > len(_COLOURS)
    colours = dict.fromkeys(clients, _PALE) if many else dict(zip(clients, _COLOURS, strict=False))
    tints = [colours[client] for client, _, _ in tips]
    few = len(tips) < 120
    lines = list(zip(starts, ends, strict=True))
    axes.add_collection(LineCollection(lines, colors=tints, linewidths=0.9, alpha=0.6 if few else 0.5, zorder=2))
    axes.scatter(*ends.T, s=16 if few else 12, c=tints, linewidths=0, zorder=3)
    axes.plot(*path.T, color=_PAPER, linewidth=3.6, zorder=4, solid_joinstyle="round")
    axes.plot(*path.T, color=_INK, linewidth=1.9, zorder=5, solid_joinstyle="round")
    axes.scatter(*path.T, s=13, color=_INK, linewidths=0, zorder=6)
    axes.scatter(*path[0], s=48, facecolor=_PAPER, edgecolor=_INK, linewidths=1.8, zorder=7)
    axes.scatter(*path[-1], s=60, color=_INK, edgecolor=_PAPER, linewidths=1.2, zorder=7)
    axes.set_title("The global model's path, and the local models around it")
    axes.set_xlabel(f"first principal component of all weights, {_share(plane.explained[0])} of their variance")
    axes.set_ylabel(f"second, {_share(plane.explained[1])}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.08)

    # Among many clients only those with a label get a colour of their own.
    wanted = _outermost(plane)
    text_colours = colours
    if many:
        order = dict.fromkeys(client for client, _ in wanted)
        text_colours = {client: _COLOURS[place % len(_COLOURS)] for place, client in enumerate(order)}
    labels = [Label(shorten(client), tip, _darker(text_colours[client])) for client, tip in wanted]
    labels.insert(0, Label("start", path[0], _INK, 9.5))
    obstacles = np.concatenate([along(path[:-1], path[1:], 60), along(starts, ends, 12), ends, path])
    placed = place_labels(axes, labels, obstacles, count=_LABELS + 1)
    if many:
        chosen = {label.name: label for label in placed}
        for client, start, tip in tips:
            if shorten(client) in chosen:
                tint = chosen[shorten(client)].colour
                axes.plot(*np.array([start, tip]).T, color=tint, linewidth=1.1, zorder=3)
                axes.scatter(*tip, s=16, color=tint, linewidths=0, zorder=8)


def _outermost(plane: Plane) -> list[tuple[str, Any]]:
    """Local models with their clients, those first that lie farthest from the others of their round."""
    everything = np.array([tip for drawn in plane.rounds for tip in drawn.local_models.values()])
    extent = np.ptp(everything, axis=0)
    scale = np.where(extent > 0, extent, 1.0)
    candidates = []
    for drawn in plane.rounds:
        middle = np.mean(list(drawn.local_models.values()), axis=0)
        for client, tip in drawn.local_models.items():
            candidates.append((-float(np.hypot(*((tip - middle) / scale))), drawn.number, client, tip))
    return [(client, tip) for *_, client, tip in sorted(candidates, key=lambda candidate: candidate[:3])]


def _darker(colour: str) -> str:
    """The colour with a third less light: text needs more contrast than lines."""
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(part * 0.68):02x}" for part in parts)


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"
