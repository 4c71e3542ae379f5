"""Where the time of a round goes: operations, the share of this machine's matrix-product peak, and what the host does.

    python benchmarks/profile_rounds.py [--workloads W1,W2,W3,W4] [--rounds 5]

Prints the tables of PROFILE.md. Each workload runs twice: timed as always, and once more with FEDLENS_LOG=debug, whose
lines split a round's time but cost something themselves, as a timed stage is awaited before the next one starts. What a
round's products take alone, in their own shapes, is measured too: the rest is not a matter of products. (Not called
profile.py: that is a module of Python's own, which others import.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import operations
import products_alone
import stage_lines
from measuring import cores, machine
from workloads import WORKLOADS

_HERE = Path(__file__).resolve().parent


def run(workload: str, rounds: int, logged: bool) -> tuple[dict[str, Any], list[str]]:
    """What run.py reports on a workload, and the lines on its standard error."""
    command = [sys.executable, str(_HERE / "run.py"), "--workload", workload, "--rounds", str(rounds)]
    environment = {**os.environ, **({"FEDLENS_LOG": "debug"} if logged else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"Expected {' '.join(command)} to end well, found:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()


def profile(workload: str, rounds: int) -> dict[str, Any]:
    """A workload's operations a round, seconds a round, and seconds by part."""
    report, _ = run(workload, rounds, logged=False)
    logged, lines = run(workload, rounds, logged=True)
    counted = stage_lines.rounds(lines)[-rounds:]
    # W3's rounds differ: those that count come after two of warming up.
    counting, of = range(2, 2 + rounds), WORKLOADS[workload]
    steps = sum(operations.steps(of, number) for number in counting) / rounds
    return {
        "workload": workload,
        "operations": sum(operations.of_round(of, number) for number in counting) / rounds,
        "products_alone": products_alone.seconds_of_step(operations.of_step(of)) * steps / cores(),
        "seconds": report["median_s_per_round"],
        "logged_seconds": logged["median_s_per_round"],
        "parts": stage_lines.medians(counted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help="comma-separated (default: W1,W2,W3,W4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    highest = products_alone.peak()
    profiles = [profile(workload, options.rounds) for workload in options.workloads.split(",")]

    print(f"Machine: {machine()}. Matrix products at most {highest / 1e9:.0f} GFLOP/s on {cores()} cores.\n")
    print("| | GFLOP a round | s a round | GFLOP/s | share of the peak | its products alone, s | share of the round |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for each in profiles:
        speed = each["operations"] / each["seconds"]
        figures = f"{each['operations'] / 1e9:.3g} | {each['seconds']:.4g} | {speed / 1e9:.3g} | {speed / highest:.0%}"
        alone = each["products_alone"]
        figures += f" | {alone:.3g} | {alone / each['seconds']:.0%}"
        print(f"| {each['workload']} | {figures} |")
    print(f"\n| | {' | '.join(stage_lines.PARTS)} | rest of the round |")
    print("| --- |" + " --- |" * (len(stage_lines.PARTS) + 1))
    for each in profiles:
        if not each["parts"]:
            print(f"| {each['workload']} |" + " - |" * (len(stage_lines.PARTS) + 1))
            continue
        total = each["logged_seconds"]
        seconds = [*each["parts"].values(), total - sum(each["parts"].values())]
        print(f"| {each['workload']} | " + " | ".join(f"{1e3 * s:.3g} ms, {s / total:.0%}" for s in seconds) + " |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "peak": highest, "profiles": profiles}, indent=1))


if __name__ == "__main__":
    main()
