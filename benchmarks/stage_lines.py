"""Reads the lines that fedlens writes with FEDLENS_LOG=debug: where a round's time goes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

_PREFIX = "fedlens DEBUG "
PARTS = ("arguments", "packing", "computing", "writing", "server")


def rounds(lines: Iterable[str]) -> list[dict[str, float]]:
    """Seconds by part of each call that had clients; a call starts with the line of its arguments.

    Returns:
      For each call: `arguments`, what it takes to bind them; `packing`, `computing` and `writing` of its client stages,
      `writing` with what ends a ledger's round; `server`, all of its server stages; `compiling`, in any stage.
    """
    found: list[dict[str, float]] = []
    under_way = False
    for line in lines:
        if not line.startswith(_PREFIX + "stage="):
            continue
        fields = dict(word.split("=", 1) for word in line.removeprefix(_PREFIX).split())
        if fields["stage"] == "arguments":
            under_way = int(fields["clients"]) > 0
            if under_way:
                found.append(dict.fromkeys((*PARTS, "compiling"), 0.0))
        if not under_way:
            continue
        of_round = found[-1]
        of_round["compiling"] += float(fields["compiling"])
        if fields["stage"] == "clients":
            for part in ("packing", "computing", "writing"):
                of_round[part] += float(fields[part])
        else:
            part = "writing" if fields["stage"] == "ledger" else fields["stage"]
            of_round[part] += float(fields["seconds"]) - float(fields["compiling"])
    return found


def medians(calls: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each part over some calls; nothing without calls."""
    return {part: statistics.median(call[part] for call in calls) for part in PARTS} if calls else {}
