"""Labels beside points of a picture, where there is room: over no line, no point and no other label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "points 2"]

_SIDES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
_ALIGNMENTS = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}
_LONGEST = 28  # characters


@dataclass(frozen=True)
class Label:
    """A label that may be placed.

    Attributes:
      name: what it says; only one label of a name is placed.
      point: what it belongs to, in data coordinates.
      colour: of the text, "#rrggbb".
      size: of the text, in points.
    """

    name: str
    point: Float[np.ndarray, "2"]
    colour: str
    size: float = 8.5


def place_labels(axes: Any, labels: Sequence[Label], obstacles: Points, count: int) -> list[Label]:
    """Writes the first `count` labels for which there is room beside their point; leaves out the others.

    Args:
      axes: matplotlib's axes, with everything else drawn and their limits settled.
      labels: what to place, the most wanted first.
      obstacles: points in data coordinates that stay free; lines are given as points along them.
      count: how many labels to place at most.

    Returns:
      The labels that were placed.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # settles the layout: only now is it known what lies where
    renderer = figure.canvas.get_renderer()
    room = axes.get_window_extent(renderer)
    taken = [axes.transData.transform(obstacles)]
    placed: list[Label] = []
    for label in labels:
        if len(placed) == count:
            break
        if any(label.name == other.name for other in placed):
            continue
        for side in _SIDES:
            text = _write(axes, label, side)
            corners = text.get_window_extent(renderer).padded(3).get_points()
            inside = np.all(corners[0] >= room.min) and np.all(corners[1] <= room.max)
            if inside and not any(
                np.any(np.all((points >= corners[0]) & (points <= corners[1]), axis=1)) for points in taken
            ):
                taken.append(_filled(corners))
                placed.append(label)
                break
            text.remove()
    return placed


def along(starts: Points, ends: Points, steps: int) -> Points:
    """Points along straight lines, `steps` of each, the ends included."""
    shares = np.linspace(0, 1, steps)[:, None, None]
    between: Points = (starts + shares * (ends - starts)).reshape(-1, 2)
    return between


def shorten(name: str) -> str:
    """A name as a label can show it: printable, and not too long."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _write(axes: Any, label: Label, side: tuple[int, int]) -> Any:
    right, up = side
    distance = 5 if right and up else 7
    return axes.annotate(
        label.name,
        label.point,
        xytext=(distance * right, distance * up),
        textcoords="offset points",
        ha=_ALIGNMENTS[right][0],
        va=_ALIGNMENTS[up][1],
        color=label.colour,
        fontsize=label.size,
        zorder=9,
        parse_math=False,
    )


def _filled(corners: Float[np.ndarray, "2 2"]) -> Points:
    """Points all over a rectangle, close enough to each other that no label fits between them."""
    (left, bottom), (right, top) = corners
    across, up = np.meshgrid(np.linspace(left, right, 40), np.linspace(bottom, top, 8))
    return np.column_stack([across.ravel(), up.ravel()])
