"""What the scripts of all peers share: the workloads of `benchmarks/`, client by client, and saving local models."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # each peer has an environment of its own, without fedlens

from measuring import arguments as arguments
from measuring import chosen as chosen
from measuring import measure as measure
from measuring import report as report
from workloads import TextWorkload, Workload, data, texts
from workloads import cohort as cohort

Client = tuple[np.ndarray, np.ndarray]


def clients(workload: Workload | TextWorkload) -> list[Client]:
    """Features `[examples, *features]`, channels last, and labels `[examples, *steps]` of every client of the pool."""
    if isinstance(workload, TextWorkload):
        x, y, offsets = texts()
        starts = offsets[1:-1]
        return list(zip(np.split(x, starts), np.split(y, starts), strict=True))
    return list(zip(*data(workload), strict=True))


class LocalModels:
    """Every client's local model as a file of NumPy's; two rounds are kept, overwritten in turn."""

    def __init__(self, folder: Path):
        self._folder = folder
        for name in "01":
            (folder / name).mkdir()

    def save(self, round_number: int, client: int | str, leaves: Mapping[str, Any]) -> None:
        arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        np.savez(self._folder / str(round_number % 2) / f"{client}.npz", **arrays)


@contextmanager
def local_models(capture: bool) -> Iterator[LocalModels | None]:
    """Where local models go, removed at the end; None without `capture`."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        yield LocalModels(Path(folder)) if capture else None
