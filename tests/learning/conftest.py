"""Small federated data, a logistic regression for it, and how far two models are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

import fedlens as fed
from fedlens import trees
from fedlens.data import FederatedData

SIZES = {"ann": 7, "bob": 3, "nil": 0, "dora": 12, "eve": 5}  # no batch size that the tests use divides them all


def make_data(sizes: Mapping[str, int] = SIZES, seed: int = 0) -> FederatedData:
    rng = np.random.default_rng(seed)
    return FederatedData.from_clients(
        {
            client_id: {
                "x": rng.normal(size=(count, 4)).astype(np.float32),
                "y": rng.integers(0, 3, count).astype(np.int32),
            }
            for client_id, count in sizes.items()
        }
    )


@pytest.fixture(scope="session")
def make() -> Callable[..., FederatedData]:
    return make_data


@pytest.fixture(scope="session")
def data() -> FederatedData:
    return make_data()


@pytest.fixture(scope="session")
def logistic(data: FederatedData) -> fed.Model:
    """Softmax regression: `w` float32[4,3] and `b` float32[3], not zero at the start."""

    def init(key):
        of_w, of_b = jax.random.split(key)
        return {"w": 0.5 * jax.random.normal(of_w, (4, 3)), "b": 0.5 * jax.random.normal(of_b, (3,))}

    return fed.models.from_functions(
        init=init,
        apply=lambda weights, x: x @ weights["w"] + weights["b"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
        metrics=[fed.metrics.accuracy],
    )


def flat(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector, by path: the fields of a dict have no order of their own."""
    leaves = sorted(trees.items(tree), key=lambda item: item[0])
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for _, leaf in leaves])


@pytest.fixture(scope="session")
def vector() -> Callable[[Any], np.ndarray]:
    return flat


@pytest.fixture(scope="session")
def distance() -> Callable[[Any, Any], float]:
    """`norm(a - b) / norm(b)` over all leaves."""

    def measure(a: Any, b: Any) -> float:
        return float(np.linalg.norm(flat(a) - flat(b)) / max(np.linalg.norm(flat(b)), 1e-30))

    return measure


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Any, Any], bool]:
    """Whether two trees have the same leaves to the bit, NaNs included."""

    def compare(a: Any, b: Any) -> bool:
        of_a, of_b = list(trees.items(a)), list(trees.items(b))
        return [path for path, _ in of_a] == [path for path, _ in of_b] and all(
            np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
            for (_, x), (_, y) in zip(of_a, of_b, strict=True)
        )

    return compare
