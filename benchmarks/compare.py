"""fedlens, the hand-written reference and the peers on the workloads, in turn, in one run: a table, and JSON.

    python benchmarks/compare.py                                 # fedlens and the reference: make bench
    python benchmarks/compare.py --peers                         # and the peers: make bench-peers
    python benchmarks/compare.py --workloads W2,W3 --repeats 5 --json w.json
    python benchmarks/compare.py --workloads W1 --peer-python pfl=/path/to/python

Every contestant is a process of its own. They take turns, and each takes so many: what else the machine does meanwhile
hits all of them. The figure of a contestant is the median over its processes of each process's median round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contestants import Contestant, contestants
from environments import PEERS, build
from measuring import cores, machine, watched_cores
from verdict import judge, summarize, table
from workloads import WORKLOADS, texts

_HERE = Path(__file__).resolve().parent
_QUIET = 0.1  # cores that others may use before the figures say little


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help="comma-separated (default: W1,W2,W3,W4)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contestant (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a process that count (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of W5: 0.2 runs a fifth of its clients")
    parser.add_argument("--capture", action="store_true", help="write every client's local model to disk")
    parser.add_argument("--only", help="comma-separated contestants (default: all that there are)")
    parser.add_argument("--peers", action="store_true", help="run the peers too; builds their environments in .bench/")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"an environment that is there already, for one of {', '.join(PEERS)}; runs that peer",
    )
    parser.add_argument("--json", type=Path, default=_HERE / "results.json", help="default: benchmarks/results.json")
    options = parser.parse_args()
    options.workloads = options.workloads.split(",")
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"expected workloads out of {', '.join(WORKLOADS)}, found {unknown[0]}")
    named = [pair.partition("=") for pair in options.peer_python]
    wrong = [peer for peer, _, path in named if peer not in PEERS or not path]
    if wrong:
        parser.error(f"expected --peer-python PEER=PYTHON with one of {', '.join(PEERS)}, found {wrong[0]}")
    options.peer_python = {peer: path for peer, _, path in named}
    return options


def everybody(options: argparse.Namespace) -> list[Contestant]:
    """Who runs, workload by workload."""
    pythons = dict(options.peer_python)
    if options.peers:
        pythons |= build([peer for peer in PEERS if peer not in pythons])
    common = ("--rounds", str(options.rounds), "--warmup", str(options.warmup))
    if options.capture:
        common += ("--capture",)
    chosen = []
    for workload in options.workloads:
        scale = ("--scale", str(options.scale)) if workload == "W5" else ()
        chosen += contestants(workload, pythons, common + scale)
    if options.only:
        names = options.only.split(",")
        chosen = [contestant for contestant in chosen if contestant.name in names]
    if not chosen:
        raise SystemExit("Expected somebody to run, found nobody. See --only and --workloads.")
    return chosen


def run(contestant: Contestant) -> Mapping[str, Any] | None:
    """Runs a contestant once; None, and why on standard error, if it fails."""
    with watched_cores() as busy:
        done = subprocess.run(contestant.command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"workload"')]
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{contestant.workload} {contestant.name} failed: {reason}", file=sys.stderr, flush=True)
        print(f"  {' '.join(contestant.command)}", file=sys.stderr, flush=True)
        return None
    return {"contestant": contestant.name, **json.loads(lines[-1]), "cores_busy_with_others": busy.get("others")}


def main() -> None:
    options = parse()
    if "W3" in options.workloads:
        texts()  # here, where fedlens can read them; the peers find what it left
    chosen = everybody(options)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    runs: list[Mapping[str, Any]] = []
    failed: set[Contestant] = set()
    for workload in options.workloads:
        in_turn = [contestant for contestant in chosen if contestant.workload == workload]
        for repeat in range(options.repeats):
            for contestant in in_turn:
                if contestant in failed:
                    continue
                found = run(contestant)
                if found is None:
                    failed.add(contestant)
                    continue
                runs.append(found)
                print(
                    f"{workload} {contestant.name}, {repeat + 1} of {options.repeats}: "
                    f"{found['median_s_per_round']:.4g} s a round",
                    file=sys.stderr,
                    flush=True,
                )
    rows = summarize(runs)
    verdicts = [] if options.capture else judge(rows)
    print()
    print(table(rows))
    if verdicts:
        print()
        print("\n".join(verdict.describe() for verdict in verdicts))
    others = max((found["cores_busy_with_others"] or 0.0 for found in runs), default=0.0)
    if others > _QUIET:
        print(
            f"\nOther processes kept up to {others} of {cores()} cores busy meanwhile: repeat this on a quiet machine."
        )
    kept = {
        "started": started,
        "machine": machine(),
        "rows": [{**asdict(row), "per_client": row.per_client} for row in rows],
        "targets": [{**asdict(verdict.target), "found": verdict.found, "met": verdict.met} for verdict in verdicts],
        "failed": [f"{contestant.workload} {contestant.name}" for contestant in failed],
        "runs": runs,
    }
    options.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\nWritten to {options.json}", file=sys.stderr)
    if not runs:
        raise SystemExit("Expected a run that ends well, found none.")


if __name__ == "__main__":
    main()
