"""The targets that compare fedlens with itself: devices, first rounds, checks, taps, ragged cohorts, a million clients.

    python benchmarks/claims.py [--only devices,first,cache,nonfinite,tap,ragged,million] [--repeats 3]

Each claim runs a script in processes of their own, the two sides of a ratio in turn, and takes medians over them.
`million` writes a data set of 5 GB to `.bench/` and removes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import machine

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Claim:
    """What was found and what was to reach.

    Attributes:
      what: in words.
      found: the figure.
      limit: what it should be at most, or at least.
      at_least: which of the two.
    """

    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def describe(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.what}: {self.found:.4g}, {bound} {self.limit:g}: {'met' if self.met else 'NOT MET'}"


def run(*arguments: str, script: str = "run.py") -> dict[str, Any]:
    """The last line that a script prints."""
    command = [sys.executable, str(_HERE / script), *arguments]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"Expected it to end well, found:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(repeats: int, *sides: Sequence[str]) -> list[float]:
    """For each side the median over processes of the median round, the sides in turn."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for of_side, arguments in zip(seconds, sides, strict=True):
            of_side.append(run(*arguments)["median_s_per_round"])
    return [statistics.median(of_side) for of_side in seconds]


def devices(repeats: int) -> list[Claim]:
    one, two = medians(repeats, *(("--workload", "W2", "--devices", count) for count in "12"))
    return [Claim("W2, one device's time over that of two", one / two, 1.8, at_least=True)]


def first(repeats: int) -> list[Claim]:
    seconds = [run("--workload", "W1", "--rounds", "1", "--warmup", "1")["first_round_s"] for _ in range(repeats)]
    return [Claim("W1, seconds of the first round, compilation included", statistics.median(seconds), 12)]


def cache(repeats: int) -> list[Claim]:
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        arguments = ("--workload", "W1", "--rounds", "1", "--warmup", "1", "--cache", folder)
        run(*arguments)
        seconds = [run(*arguments)["first_round_s"] for _ in range(repeats)]
    return [Claim("W1, seconds of a later process's first round, with JAX's cache", statistics.median(seconds), 3)]


def nonfinite(repeats: int) -> list[Claim]:
    claims = []
    for workload, rounds in (("W1", "10"), ("W2", "40")):
        arguments = ("--workload", workload, "--rounds", rounds)
        found = [run(*arguments, script="nonfinite.py") for _ in range(repeats)]
        ratio = statistics.median(one["ratio"] for one in found)
        claims.append(Claim(f"{workload}, time with the check for infinities over that without", ratio, 1.02))
    return claims


def tap(repeats: int) -> list[Claim]:
    claims = []
    for what, more in (("all local models", ()), ("one bias", ("--leaf", "Dense_0/bias"))):
        ratio = statistics.median(run(*more, script="tapping.py")["ratio"] for _ in range(repeats))
        claims.append(Claim(f"W2, time with {what} tapped over that without", ratio, 1.10))
    return claims


def ragged(repeats: int) -> list[Claim]:
    found = run("--repeats", str(2 + repeats), script="ragged.py")
    return [Claim("ragged cohorts, largest distance from proportional", found["worst_deviation"], found["limit"])]


def million(repeats: int) -> list[Claim]:
    """One process each, whatever the repeats: memory does not vary, and a round of a million is long enough."""
    common = ("--workload", "W4", "--mapped", "--warmup", "1")
    few = run(*common, "--clients", "100000", "--rounds", "3")
    many = run(*common, "--clients", "1000000", "--rounds", "1")
    claims = [Claim("W4, a million clients, microseconds each", 1e6 / many["clients_per_s"], 10)]
    if few["peak_memory_mb"] and many["peak_memory_mb"]:
        for kind in ("anonymous", "mapped"):
            print(
                f"peak of {kind} memory: {few['peak_memory_mb'][kind]} MB at 100,000 clients, "
                f"{many['peak_memory_mb'][kind]} MB at 1,000,000"
            )
        grown = many["peak_memory_mb"]["anonymous"] - few["peak_memory_mb"]["anonymous"]
        # An id, a key and two offsets of a client take some 250 bytes; the client's data take 5 kB.
        claims.append(Claim("W4, bytes of own memory that a further client takes", grown * 2**20 / 900_000, 500))
    return claims


CLAIMS: dict[str, Callable[[int], list[Claim]]] = {
    claim.__name__: claim for claim in (devices, first, cache, nonfinite, tap, ragged, million)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CLAIMS), help=f"comma-separated, out of {', '.join(CLAIMS)}")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        parser.error(f"expected claims out of {', '.join(CLAIMS)}, found {unknown[0]}")
    found: list[Claim] = []
    for name in names:
        claims = CLAIMS[name](options.repeats)
        found += claims
        print("\n".join(claim.describe() for claim in claims), flush=True)
    if options.json:
        kept = [{**asdict(claim), "met": claim.met} for claim in found]
        options.json.write_text(json.dumps({"machine": machine(), "claims": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
