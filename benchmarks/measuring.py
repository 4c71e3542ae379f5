"""How every benchmark times its rounds and says what it found: one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workloads import TextWorkload, Workload, choose

_STATUS = Path("/proc/self/status")
_PROCESSORS = Path("/proc/stat")


def measure(run_round: Callable[[int], object], rounds: int, warmup: int = 2) -> list[float]:
    """Seconds of each of `rounds` calls of `run_round(number)`, which returns when all is done, after warming up."""
    seconds = []
    for number in range(warmup + rounds):
        start = time.perf_counter()
        run_round(number)
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def arguments(description: str | None, workloads: Sequence[str], rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every script has: --workload, --scale, --capture, --rounds, --warmup."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=workloads, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="run this fraction of the clients (default: 1)")
    parser.add_argument(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write every client's local model to disk (W5 does unless told not to)",
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default: {rounds})")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    return parser


def chosen(options: argparse.Namespace) -> Workload | TextWorkload:
    """The workload that the options name; settles whether it captures."""
    workload = choose(options.workload, options.scale)
    if options.capture is None:
        options.capture = workload.captured
    return workload


def report(
    workload: Workload | TextWorkload,
    engine: str,
    seconds: Sequence[float],
    *,
    capture: bool,
    packages: Sequence[str],
    **more: Any,
) -> Mapping[str, Any]:
    """Prints one line of JSON: what ran, how fast, and in which versions of `packages`. Returns what it printed."""
    median = statistics.median(seconds)
    line = {
        "workload": workload.name,
        "engine": engine,
        "capture": capture,
        "clients": workload.clients,
        "rounds": len(seconds),
        "median_s_per_round": round(median, 5),
        "min_s_per_round": round(min(seconds), 5),
        "clients_per_s": round(workload.clients / median, 1),
        "peak_rss_mb": peak_rss_mb(),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
        **more,
    }
    print(json.dumps(line), flush=True)
    return line


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # found on PYTHONPATH, not installed
        return str(sys.modules[package].__version__)


def peak_rss_mb() -> int:
    """The most memory that was resident in this process, pages of mapped files included; MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024))


@contextmanager
def watched_memory(every: float = 0.1) -> Iterator[dict[str, int]]:
    """Looks at this process's memory every so many seconds; Linux only, elsewhere it finds nothing.

    Yields:
      At the end the peaks in MB of `anonymous` memory, which is the process's own, and of `mapped` pages of files,
      which the kernel takes back when others need the memory.
    """
    peaks: dict[str, int] = {}
    over = threading.Event()

    def look() -> None:
        for name, kilobytes in _resident().items():
            peaks[name] = max(peaks.get(name, 0), round(kilobytes / 1024))

    def watch() -> None:
        while not over.wait(every):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()
        look()


def _resident() -> dict[str, int]:
    """Kilobytes by kind, as Linux counts them."""
    if not _STATUS.exists():
        return {}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    wanted = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: int(fields[field].split()[0]) for name, field in wanted.items() if field in fields}


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def watched_cores() -> Iterator[dict[str, float]]:
    """Watches what the machine does besides this process and its children; Linux only, elsewhere it finds nothing.

    Yields:
      At the end, under `others`, how many cores other processes kept busy, on average. Children count once they ended.
    """
    found: dict[str, float] = {}
    start, before, own_before = time.perf_counter(), _busy_seconds(), _own_seconds()
    try:
        yield found
    finally:
        seconds, after = time.perf_counter() - start, _busy_seconds()
        if before is not None and after is not None:
            others = after - before - (_own_seconds() - own_before)
            found["others"] = round(max(others, 0.0) / seconds, 2)


def _busy_seconds() -> float | None:
    """Seconds that all cores were busy since the machine started, those that its host took away included."""
    if not _PROCESSORS.exists():
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, _PROCESSORS.read_text().split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def machine() -> dict[str, Any]:
    """What figures are measured on: processor, usable cores, system."""
    model = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        named = [line.split(":", 1)[1].strip() for line in processors.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    return {"processor": model, "cores": cores(), "system": f"{platform.system()} {platform.release()}"}
