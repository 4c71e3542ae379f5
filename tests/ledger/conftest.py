"""Rounds to store: a model with two leaves, clients whose weights follow from the round alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedlens.ledger import ClientPart, LedgerWriter, RoundRecord

WEIGHTS = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
IDS = ("ann", "bob", "form-03", "名前/..\n", "e")


def build_round(number: int, ids: tuple[str, ...] = IDS, parts: int = 2) -> RoundRecord:
    rng = np.random.default_rng(number)
    shapes = [(4, 3), (3,)]
    places = np.array_split(rng.permutation(len(ids)), parts)
    return RoundRecord(
        round=number,
        global_weights=[rng.normal(size=shape).astype(np.float32) for shape in shapes],
        parts=[
            ClientPart(
                ids=tuple(ids[place] for place in chosen),
                positions=chosen,
                weights=[rng.normal(size=(len(chosen), *shape)).astype(np.float32) for shape in shapes],
                num_examples=chosen * 10,
                metrics={"accuracy": chosen / 8, "loss": rng.normal(size=len(chosen)).astype(np.float32)},
            )
            for chosen in places
        ],
        metrics={"loss": 1.0 / (number + 1), "clients": len(ids)},
        checkpoint={"state/key": rng.integers(0, 2**32, 2, np.uint32), "round": np.int64(number)},
    )


@pytest.fixture
def make_round() -> Callable[..., RoundRecord]:
    return build_round


@pytest.fixture
def make_writer(tmp_path: Path) -> Callable[..., LedgerWriter]:
    def make(name: str = "run", rounds: int = 3) -> LedgerWriter:
        config = {"learning_rate": 0.1, "optimizer": {"name": "sgd"}}
        return LedgerWriter.create(tmp_path / name, weights=WEIGHTS, config=config, rounds=rounds)

    return make


@pytest.fixture
def ledger_path(make_writer: Callable[..., LedgerWriter]) -> Path:
    """A ledger of three planned rounds, two of them committed."""
    with make_writer() as writer:
        for number in range(2):
            writer.record(build_round(number))
    return writer.path


def local_model(record: RoundRecord, client: str) -> list[np.ndarray]:
    """One client's leaves, straight from the record."""
    for part in record.parts:
        if client in part.ids:
            return [leaf[part.ids.index(client)] for leaf in part.weights]
    raise KeyError(client)


@pytest.fixture
def local_model_of() -> Callable[[RoundRecord, str], list[np.ndarray]]:
    return local_model
