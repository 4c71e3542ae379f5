"""Who runs a workload, and how: fedlens, the hand-written reference, and the peers at their best settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@dataclass(frozen=True)
class Contestant:
    """One program on one workload.

    Attributes:
      name: what the table calls it.
      workload: what it runs.
      command: how to start it; prints one line of JSON last.
    """

    name: str
    workload: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class _Peer:
    environment: str
    script: str
    settings: Mapping[str, tuple[str, ...]]  # by workload: the fastest on two cores
    launcher: Mapping[str, tuple[str, ...]]  # by workload: what stands before the script


_FEWER = ("--scale", "0.01")  # of W4's clients: a peer takes a minute for all; its time per client is the same
_PEERS = {
    "torch loop": _Peer(
        "pfl",
        "torch_loop.py",
        {"W1": ("--threads", "2"), "W2": (), "W3": (), "W4": _FEWER},
        {},
    ),
    "pfl": _Peer(
        "pfl",
        "pfl_rounds.py",
        {"W1": ("--threads", "2"), "W2": (), "W3": (), "W4": _FEWER},
        dict.fromkeys(("W2", "W3", "W4"), _TWO_PROCESSES),
    ),
    "fedjax": _Peer(
        "fedjax",
        "fedjax_rounds.py",
        {"W1": ("--backend", "pmap"), "W2": ("--backend", "jit"), "W4": ("--backend", "jit", *_FEWER)},
        {},
    ),
    "flower": _Peer(
        "flwr",
        "flower_rounds.py",
        {"W1": ("--cpus-per-client", "2", "--threads", "2"), "W2": (), "W3": (), "W4": _FEWER},
        {},
    ),
}


def contestants(workload: str, pythons: Mapping[str, str], common: tuple[str, ...] = ()) -> list[Contestant]:
    """Everybody who runs a workload.

    Args:
      workload: its name.
      pythons: the interpreters of the peers' environments that there are; none leaves the peers out.
      common: options that everybody gets, such as `--rounds 5`.
    """
    options = ("--workload", workload, *common)

    def own(name: str, script: str, *more: str) -> Contestant:
        return Contestant(name, workload, (sys.executable, str(_HERE / script), *options, *more))

    chosen = [own("fedlens", "run.py"), own("reference", "reference.py")]
    if workload == "W3":
        chosen += [
            own("fedlens with Flax's LSTM", "run.py", "--recurrent", "flax"),
            own("naive reference", "reference.py", "--form", "naive"),
        ]
    for name, peer in _PEERS.items():
        if workload in peer.settings and peer.environment in pythons:
            script = str(_HERE / "peers" / peer.script)
            launcher = peer.launcher.get(workload, ())
            command = (pythons[peer.environment], *launcher, script, *options, *peer.settings[workload])
            chosen.append(Contestant(name, workload, command))
    return chosen
