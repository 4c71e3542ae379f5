"""The plane in which a run is drawn: principal components of all its captured weights.

The weights of a run are a few hundred points in as many dimensions as the model has parameters. Their scalar products
(the Gram matrix) hold everything that principal component analysis needs, and add up over blocks of parameters, so that
memory stays at one block however large model and run are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedlens.errors import LedgerError
from fedlens.ledger import Ledger, LedgerRound, commit
from fedlens.ledger.format import ROOT_LEAF
from fedlens.ledger.tensorfile import AnyArray

POINTS = 400  # global and local models that are drawn; of larger runs an even selection
_BLOCK = 32 << 20  # bytes of weights that are in memory at once, as float64


@dataclass(frozen=True)
class DrawnRound:
    """A round's points in the plane.

    Attributes:
      number: the round.
      start: the global model before it.
      local_models: client id -> its local model.
    """

    number: int
    start: Float[np.ndarray, "2"]
    local_models: dict[str, Float[np.ndarray, "2"]]


@dataclass(frozen=True)
class Plane:
    """A run in its two directions of largest variance.

    Attributes:
      rounds: the rounds drawn, in order.
      end: the global model after the last round; None when the ledger does not tell.
      explained: the share of the points' total variance along each axis.
      left_out: whether rounds or clients were left out, to keep the number of points small.
    """

    rounds: list[DrawnRound]
    end: Float[np.ndarray, "2"] | None
    explained: tuple[float, float]
    left_out: bool


def compute_plane(ledger: Ledger, points: int = POINTS) -> Plane:
    """Projects a run's global and local models onto the plane in which they vary most.

    Local models with infinities or NaNs are left out, and what the run did not keep: rounds, clients, leaves.

    Args:
      ledger: a run with at least one committed round.
      points: how many models to project at most.

    Raises:
      LedgerError: no round is committed, or the ledger is damaged.
    """
    numbers = ledger.rounds
    if not numbers:
        raise LedgerError(f"Expected a committed round to draw, found none, in {ledger.location}.")
    chosen, left_out = _choose(ledger, points)
    end = _end(ledger, numbers[-1])
    coordinates, explained = _principal_components(_gram(ledger, chosen, end))
    rounds, place = [], 0
    for stored, clients in chosen:
        start, *locals_ = coordinates[place : place + 1 + len(clients)]
        rounds.append(DrawnRound(stored.number, start, dict(zip(clients, locals_, strict=True))))
        place += 1 + len(clients)
    return Plane(rounds, coordinates[-1] if end is not None else None, explained, left_out)


def _choose(ledger: Ledger, points: int) -> tuple[list[tuple[LedgerRound, list[str]]], bool]:
    """Rounds and clients to draw: evenly spread rounds, first and last among them, then as many clients as fit."""
    keep = ledger.run.keep
    numbers = [number for number in ledger.rounds if keep is None or keep.keeps_round(number)]
    if not numbers:
        raise LedgerError(f"Expected local models to draw, found that none were kept, in {ledger.location}.")
    largest = max(len(ledger.round(numbers[0])), len(ledger.round(numbers[-1])))
    count = min(len(numbers), max(min(20, points // 2), points // (largest + 1)))
    spread = np.unique(np.linspace(0, len(numbers) - 1, count).round().astype(int))
    per_round = max(points // len(spread) - 1, 1)
    chosen = []
    left_out = len(spread) < len(numbers)
    for place in spread:
        stored = ledger.round(numbers[place])
        table = stored.table()
        finite = np.isfinite(table.column("update_norm").to_numpy())
        kept = set(stored.kept_ids)
        clients = [client for client, usable in zip(stored.ids, finite, strict=True) if usable and client in kept]
        if clients:
            chosen.append((stored, clients[:per_round]))
            left_out |= len(clients) > per_round
    if not chosen:
        raise LedgerError(
            "Expected local models to draw, found only infinities and NaNs, or none that was kept, "
            f"in {ledger.location}."
        )
    return chosen, left_out


def _end(ledger: Ledger, last: int) -> list[AnyArray] | None:
    """The global model after the last round, which the checkpoint of a run of `fed.run` holds under "weights"."""
    checkpoint = commit.read_checkpoint(ledger.path, ledger.run, last)
    names = ["weights" if leaf.name == ROOT_LEAF else f"weights/{leaf.name}" for leaf in ledger.run.leaves]
    if any(name not in checkpoint for name in names):
        return None
    leaves = [checkpoint[name] for name in names]
    fits = all(array.shape == leaf.shape for array, leaf in zip(leaves, ledger.run.leaves, strict=True))
    return leaves if fits and all(np.isfinite(array).all() for array in leaves) else None


def _gram(
    ledger: Ledger, chosen: list[tuple[LedgerRound, list[str]]], end: list[AnyArray] | None
) -> Float[np.ndarray, "points points"]:
    """The scalar products of all points, measured from their mean."""
    count = sum(1 + len(clients) for _, clients in chosen) + (end is not None)
    gram = np.zeros((count, count))
    for position, leaf in enumerate(ledger.run.leaves):
        if leaf not in ledger.run.kept_leaves:
            continue
        size = int(np.prod(leaf.shape))
        width = max(1, _BLOCK // (8 * count))
        for first in range(0, size, width):
            span = slice(first, min(first + width, size))
            block = np.empty((count, span.stop - span.start))
            place = 0
            for stored, clients in chosen:
                block[place] = stored.elements(leaf.name, span, None)
                block[place + 1 : place + 1 + len(clients)] = stored.elements(leaf.name, span, clients)
                place += 1 + len(clients)
            if end is not None:
                block[-1] = end[position].reshape(-1)[span]
            block -= block.mean(axis=0)
            gram += block @ block.T
    return gram


def _principal_components(
    gram: Float[np.ndarray, "points points"],
) -> tuple[Float[np.ndarray, "points 2"], tuple[float, float]]:
    """Each point's coordinates on the two axes of largest variance, and those axes' shares of the variance.

    Axes have no direction of their own: the last point stands to the right of the first and not below it.
    """
    values, vectors = np.linalg.eigh(gram)
    padded = np.zeros((len(gram), 2))
    strengths = np.zeros(2)
    for axis in range(min(2, len(gram))):
        strengths[axis] = max(values[-1 - axis], 0.0)
        padded[:, axis] = vectors[:, -1 - axis] * np.sqrt(strengths[axis])
        if padded[-1, axis] < padded[0, axis]:
            padded[:, axis] *= -1
    total = max(float(np.trace(gram)), np.finfo(float).tiny)
    return padded, (float(strengths[0]) / total, float(strengths[1]) / total)
