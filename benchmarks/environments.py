"""One virtual environment per peer under `.bench/`: their pinned requirements exclude each other, and fedlens's.

    python benchmarks/environments.py [pfl fedjax flwr]

Python 3.11 for all of them: the newest that every peer runs on. A peer that cannot be installed here is said to be so,
and left out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from workloads import SCRATCH, scratch

PEERS = ("pfl", "fedjax", "flwr")  # the bare PyTorch loop runs in pfl's
_REQUIREMENTS = Path(__file__).resolve().parent / "peers"
_MINOR = 11


def find_python() -> str | None:
    """A Python 3.11 that can make virtual environments, from PATH or among pyenv's versions; None if there is none."""
    check = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, {_MINOR}))"
    for candidate in _candidates():
        if subprocess.run([candidate, "-c", check], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def _candidates() -> Iterator[str]:
    for name in (f"python3.{_MINOR}", "python3", "python"):
        path = shutil.which(name)
        if path:
            yield path
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from map(str, sorted(versions.glob(f"3.{_MINOR}*/bin/python3.{_MINOR}")))


def build(peers: Iterable[str], python: str | None = None) -> dict[str, str]:
    """Makes the environments that are missing or out of date.

    Args:
      peers: which ones, out of `PEERS`.
      python: the Python 3.11 to make them with; by default the first that is found.

    Returns:
      The interpreter of each peer whose environment is ready.
    """
    python = python or find_python()
    ready: dict[str, str] = {}
    for peer in peers:
        folder = SCRATCH / peer
        interpreter = str(folder / "bin" / "python")
        if _is_ready(peer, folder):
            ready[peer] = interpreter
        elif python is None:
            _say(f"{peer}: left out. Expected Python 3.{_MINOR}, found none on PATH or among pyenv's versions.")
        elif _install(peer, folder, python):
            ready[peer] = interpreter
    return ready


def _install(peer: str, folder: Path, python: str) -> bool:
    scratch()
    _say(f"{peer}: installing into {folder}; this takes minutes the first time")
    requirements = _REQUIREMENTS / f"requirements-{peer}.txt"
    lines = requirements.read_text().splitlines()
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [[python, "-m", "venv", "--clear", str(folder)]]
    # PyTorch brings what its build for this machine needs. The rest is pinned completely, partly against declared
    # upper bounds, which a resolver would refuse.
    steps += [[*pip, line] for line in lines if line.startswith("torch==")]
    steps += [[*pip, "--no-deps", "--requirement", str(requirements)]]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
            _say(f"{peer}: left out. It does not install: {reason[-1]}")
            return False
    _marker(folder).write_text(_digest(peer))
    return True


def _is_ready(peer: str, folder: Path) -> bool:
    marker = _marker(folder)
    return marker.exists() and marker.read_text() == _digest(peer)


def _marker(folder: Path) -> Path:
    return folder / "installed"


def _digest(peer: str) -> str:
    return hashlib.sha256((_REQUIREMENTS / f"requirements-{peer}.txt").read_bytes()).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name, interpreter in build(sys.argv[1:] or PEERS).items():
        print(f"{name}={interpreter}")
