"""`fedlens taps`: lists where the clients' values can be taken in a computation of a user's module."""

from __future__ import annotations

from collections.abc import Sequence

from fedlens.cli.finding import find_computation
from fedlens.cli.printing import print_json
from fedlens.compiler.levels import Level
from fedlens.compiler.taps import Tap
from fedlens.compiler.taps import taps as taps_of
from fedlens.language.type_summaries import summarize

_HEADINGS = ("name", "function", "type", "feeds", "calls", "level", "bypasses")
_RAW = "clients' raw data, which is never handed out."
_BYPASS = "bypasses a protection, and is handed out with allow_bypass=True alone."


def taps(target: str, *, as_json: bool) -> None:
    """Prints the taps of the computation at `target`, or of the round of the learning process there.

    Args:
      target: MODULE:NAME, as in `studies.rounds:average`, or FILE.py:NAME.
      as_json: whether to print JSON.

    Raises:
      ConfigError: there is no such module or name, importing it fails, or what it names is no computation.
      UnsupportedError: the computation has an intrinsic that fedlens does not execute.
    """
    found = taps_of(find_computation(target))
    if as_json:
        print_json([_to_dict(tap) for tap in found])
    else:
        print("\n".join(_lines(found)))  # noqa: T201


def _to_dict(tap: Tap) -> dict[str, object]:
    return {
        "name": tap.name,
        "function": tap.function,
        "type": summarize(tap.type),
        "full_type": str(tap.type),
        "feeds": list(tap.feeds),
        "calls": tap.calls,
        "level": tap.level.value,
        "bypasses": list(tap.bypasses),
    }


def _lines(found: Sequence[Tap]) -> list[str]:
    if not found:
        return ["no taps: no client computes a value of its own"]
    rows = [
        (
            tap.name,
            tap.function,
            summarize(tap.type),
            ", ".join(tap.feeds) or "nothing",
            str(tap.calls),
            tap.level.value,
            ", ".join(tap.bypasses),
        )
        for tap in found
    ]
    widths = [max(len(row[column]) for row in (_HEADINGS, *rows)) for column in range(len(_HEADINGS))]
    lines = [_count(len(found)), ""]
    for mark, row in zip([" ", *map(_mark, found)], (_HEADINGS, *rows), strict=True):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{mark} {'  '.join(cells)}".rstrip())
    legends = {"x": _RAW, "!": _BYPASS}
    used = [f"{mark} {legend}" for mark, legend in legends.items() if mark in map(_mark, found)]
    return [*lines, *([""] if used else []), *used]


def _mark(tap: Tap) -> str:
    """Of what is not handed out just so; ASCII, as not every terminal and log shows other signs."""
    if tap.level is Level.RAW:
        return "x"
    return "!" if tap.bypasses else " "


def _count(number: int) -> str:
    return f"{number} tap{'s' * (number != 1)}"
