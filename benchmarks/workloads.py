"""The workloads that every benchmark runs, and how they are timed: the same numbers, cohorts and figures everywhere.

Imports NumPy alone, so that a script for another framework can use it in that framework's own environment.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Federated averaging with plain SGD, one epoch a round, every client with equally many examples.

    Attributes:
      name: what `--workload` calls it.
      clients: in the cohort of a round.
      pool: clients that cohorts are drawn from.
      examples: of one client.
      batch: examples in a step of SGD.
      learning_rate: of SGD.
      features: shape of one example, channels last.
      classes: number of labels.
      convolutions: output channels of the 3x3 convolutions (no padding, each with ReLU), then 2x2 max pooling.
      hidden: widths of the dense layers between features and classes, each with ReLU.
      dropout: rate after the convolutions, and rate after the hidden layers; 0 is none.
    """

    name: str
    clients: int
    pool: int
    examples: int
    batch: int
    learning_rate: float
    features: tuple[int, ...]
    classes: int
    convolutions: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    dropout: tuple[float, float] = (0.0, 0.0)

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the kernels by name, `conv0`, ..., `dense0`, ...; every kernel has a bias for its last axis."""
        shapes: dict[str, tuple[int, ...]] = {}
        features = self.features
        for number, channels in enumerate(self.convolutions):
            shapes[f"conv{number}"] = (3, 3, features[-1], channels)
            features = (features[0] - 2, features[1] - 2, channels)
        if self.convolutions:
            features = (features[0] // 2, features[1] // 2, features[2])
        widths = [int(np.prod(features)), *self.hidden, self.classes]
        for number, shape in enumerate(pairwise(widths)):
            shapes[f"dense{number}"] = shape
        return shapes

    def parameters(self) -> int:
        """The number of parameters."""
        return sum(int(np.prod(shape)) + shape[-1] for shape in self.layers().values())


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "W1",
            clients=10,
            pool=100,
            examples=100,
            batch=20,
            learning_rate=0.1,
            features=(28, 28, 1),
            classes=62,
            convolutions=(32, 64),
            hidden=(128,),
            dropout=(0.25, 0.5),
        ),
        Workload(
            "W2",
            clients=50,
            pool=100,
            examples=100,
            batch=10,
            learning_rate=0.1,
            features=(784,),
            classes=62,
            hidden=(200, 200),
        ),
        Workload(
            "W4",
            clients=100_000,
            pool=100_000,
            examples=20,
            batch=10,
            learning_rate=0.1,
            features=(64,),
            classes=10,
        ),
    )
}


@cache
def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The pool: features float32 `[client, example, *features]`, labels int32 `[client, example]`; always the same."""
    workload = WORKLOADS[name]
    generator = np.random.default_rng(0)
    features = np.empty((workload.pool, workload.examples, *workload.features), np.float32)
    labels = np.empty((workload.pool, workload.examples), np.int32)
    for client in range(workload.pool):
        generator.standard_normal(dtype=np.float32, out=features[client])
        labels[client] = generator.integers(0, workload.classes, workload.examples)
    return features, labels


def cohort(name: str, round_number: int) -> np.ndarray:
    """The clients of a round, as positions in the pool; without repetition, in random order."""
    workload = WORKLOADS[name]
    return np.random.default_rng(1000 + round_number).choice(workload.pool, workload.clients, replace=False)


def measure(run_round: Callable[[int], object], rounds: int, warmup: int = 2) -> list[float]:
    """Seconds of each of `rounds` calls of `run_round(number)`, which returns when all is done, after warming up."""
    seconds = []
    for number in range(warmup + rounds):
        start = time.perf_counter()
        run_round(number)
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def report(
    name: str, engine: str, seconds: Sequence[float], *, capture: bool, packages: Sequence[str], **more: Any
) -> Mapping[str, Any]:
    """Prints one line of JSON: what ran, how fast, and in which versions of `packages`. Returns what it printed."""
    median = statistics.median(seconds)
    line = {
        "workload": name,
        "engine": engine,
        "capture": capture,
        "rounds": len(seconds),
        "median_s_per_round": round(median, 4),
        "min_s_per_round": round(min(seconds), 4),
        "clients_per_s": round(WORKLOADS[name].clients / median, 1),
        "peak_rss_mb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        ),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        **more,
    }
    print(json.dumps(line), flush=True)
    return line
