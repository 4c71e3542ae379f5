"""What is handed out beside a sum changes no bit of it: neither where chunks end, nor who is summed side by side."""

import jax
import numpy as np
import pytest

import fedlens as fed
from fedlens.runtime import Local, engine

LENGTH = 2500  # 10 kB are tiny, 20 kB are not

VECTORS = fed.FederatedType(fed.TensorType(np.float32, (LENGTH,)), fed.CLIENTS)


@fed.federated_computation(VECTORS)
def total(vectors):
    return fed.federated_sum(fed.federated_map(lambda vector: 1.2345678 * vector + 0.1, vectors))


@pytest.fixture(scope="module")
def cohort():
    random = np.random.default_rng(0)
    return fed.Cohort(list(random.normal(size=(700, LENGTH)).astype(np.float32)))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("clients_in_a_chunk", [None, 45], ids=["one chunk", "several chunks"])
def test_a_tap_leaves_a_sum_as_it_is(cohort, monkeypatch, devices, clients_in_a_chunk):
    if clients_in_a_chunk is not None:
        monkeypatch.setattr(engine, "_COMPUTED_BYTES", clients_in_a_chunk * 4 * LENGTH)
    with fed.use(Local(jax.local_devices()[:devices])):
        alone = total(cohort)
        beside, _ = fed.tap(total, "map.0")(cohort)
    np.testing.assert_array_equal(alone, beside)
