"""Two settings of one process that take turns, round by round: what else the machine does meanwhile hits both."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

from measuring import machine

_WARMUP = 3  # rounds that do not count: they compile, and find their memory


def in_turns(sides: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each side's rounds; who goes first changes from round to round.

    Args:
      sides: name -> what runs the round of a number.
      rounds: how many of each side count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_WARMUP + rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            sides[name](number)
            if number >= _WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(workload: str, what: str, seconds: Mapping[str, list[float]], limit: float) -> None:
    """Prints the medians, and as the last line JSON with the ratio of the first side to the second.

    The ratio is the median over rounds of one side's time over the other's.
    """
    for name, of_rounds in seconds.items():
        print(f"{name:16}{statistics.median(of_rounds):.4f} s a round")
    ratio = statistics.median(one / other for one, other in zip(*seconds.values(), strict=True))
    verdict = "met" if ratio <= limit else "NOT MET"
    print(f"{workload}, {what}: {ratio:.3f}, to reach: {limit}: {verdict}")
    print(json.dumps({"workload": workload, "ratio": ratio, "limit": limit, "machine": machine()}))


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser of the options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("W1", "W2"), default="W2")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of each side (default: {rounds})")
    return parser
