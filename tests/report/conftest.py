"""Ledgers whose weights are known in closed form, written without JAX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlens.ledger import ClientPart, Ledger, LedgerWriter, RoundRecord

SHAPES = {"kernel": (5, 4), "bias": (4,)}


def write_ledger(
    folder: Path,
    *,
    rounds: int = 4,
    ids: tuple[str, ...] = ("ann", "bob", "cleo"),
    shapes: dict[str, tuple[int, ...]] | None = None,
    planned: int | None = None,
    metrics: Callable[[int], dict[str, float]] = lambda number: {"test_accuracy": number / 10, "test_loss": 1.0},
    change: Callable[[int, list[np.ndarray]], None] = lambda number, stacks: None,
    checkpoint: bool = True,
    **options: Any,
) -> Ledger:
    """A run whose weights are drawn from the round's number; `change` may alter the local models of a round."""
    shapes = SHAPES if shapes is None else shapes

    def global_weights(number: int) -> list[np.ndarray]:
        rng = np.random.default_rng([1, number])
        return [(number * 0.7 + rng.normal(size=shape)).astype(np.float32) for shape in shapes.values()]

    example = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with LedgerWriter.create(folder, weights=example, config={}, rounds=planned or rounds, **options) as writer:
        for number in range(rounds):
            start, end = global_weights(number), global_weights(number + 1)
            rng = np.random.default_rng([2, number])
            stacks = [(leaf + rng.normal(size=(len(ids), *leaf.shape))).astype(np.float32) for leaf in start]
            change(number, stacks)
            order = rng.permutation(len(ids))  # rows in the file are not in cohort order
            part = ClientPart(
                tuple(ids[place] for place in order),
                order,
                [stack[order] for stack in stacks],
                np.full(len(ids), 5),
                {"loss": rng.normal(size=len(ids))},
            )
            after = {f"weights/{name}": leaf for name, leaf in zip(shapes, end, strict=True)} if checkpoint else {}
            writer.record(RoundRecord(number, start, [part], metrics(number), {**after, "key": np.zeros(2, np.uint32)}))
    return Ledger(folder)


@pytest.fixture
def make_ledger(tmp_path: Path) -> Callable[..., Ledger]:
    numbers = iter(range(100))
    return lambda **options: write_ledger(tmp_path / f"run-{next(numbers)}", **options)
