"""Rows of outputs are written over only when nobody can read them any more, and then they are."""

import gc

import jax
import ml_dtypes
import numpy as np
import pytest

import fedlens as fed
from fedlens.runtime import Local, rows

CLIENTS, LENGTH = 40, 20_003  # 3.2 MB of float32: worth keeping; no whole sectors

VECTORS = fed.FederatedType(fed.TensorType(np.float32, (LENGTH,)), fed.CLIENTS)
SCALE = fed.FederatedType(np.float32, fed.SERVER)


@fed.jax_computation
def scaled(vector, scale):
    return {"scaled": vector * scale, "half": (vector * scale).astype(ml_dtypes.bfloat16), "count": scale.astype(int)}


@fed.federated_computation(VECTORS, SCALE)
def work(vectors, scale):
    return fed.federated_map(scaled, (vectors, fed.federated_broadcast(scale)))


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(CLIENTS, LENGTH)).astype(np.float32)


@pytest.fixture(scope="module")
def cohort(vectors):
    return fed.Cohort(list(vectors))


@pytest.fixture(params=[1, 2], ids=["one device", "two devices"], scope="module")
def engine(request):
    return Local(jax.local_devices()[: request.param])


def addresses(values):
    return {leaf.ctypes.data for part in values.parts for leaf in part.leaves}


def room_of(memory, capacity):
    """The shape of a leaf's rows on each device, of memory that is taken for so many clients."""
    scaled, *_ = memory.lend(memory.take(capacity, [1] * memory._by_device.num_devices))["federated_map_2"]
    return [of_device.shape for of_device in scaled]


def check(values, vectors, scale):
    stacked = values.stacked
    np.testing.assert_array_equal(stacked["scaled"], vectors * np.float32(scale))
    assert stacked["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stacked["half"], (vectors * np.float32(scale)).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(stacked["count"], np.full(CLIENTS, scale, np.int32))


def test_what_is_held_stays_as_it_is(engine, cohort, vectors):
    with fed.use(engine):
        held = [work(cohort, scale) for scale in range(4)]
        for scale in range(4, 7):
            check(work(cohort, scale), vectors, scale)  # dropped at once
    for scale, values in enumerate(held):
        check(values, vectors, scale)


@pytest.mark.parametrize(
    "keep",
    [
        lambda values: values["7"]["scaled"],
        lambda values: values.parts[0].leaves[0][3:5, ::2],
        lambda values: memoryview(values["7"]["scaled"]),
        lambda values: jax.numpy.asarray(values["7"]["scaled"]),
    ],
    ids=["a client's leaf", "a view of a view", "a memoryview", "a JAX array"],
)
def test_a_single_view_holds_its_round(engine, cohort, keep):
    with fed.use(engine):
        kept = keep(work(cohort, 1))
        gc.collect()
        before = np.array(kept)
        for scale in (2, 3, 4, 5):
            work(cohort, scale)
    np.testing.assert_array_equal(np.array(kept), before)


def test_memory_that_nobody_holds_is_used_again(engine, cohort, vectors):
    with fed.use(Local(engine.devices)):  # whose memory no other test holds
        first = work(cohort, 1)
        second = work(cohort, 2)
        of_first, of_second = addresses(first), addresses(second)
        assert not of_first & of_second
        del first
        third = work(cohort, 3)
        assert addresses(third) == of_first
        del second
        check(work(cohort, 4), vectors, 4)
        gc.collect()  # NumPy's comparison leaves a cycle
        assert addresses(work(cohort, 5)) == of_second
    check(third, vectors, 3)


def test_rows_lie_by_sectors_as_in_a_file_where_those_of_the_devices_follow_each_other(engine, vectors):
    with fed.use(Local(engine.devices)):
        for clients in (CLIENTS, CLIENTS - 1, CLIENTS - 3, CLIENTS):  # the same capacity, other places
            values = work(fed.Cohort(list(vectors[:clients])), 2)
            assert len(values.parts) == len(engine.devices)
            before = [0, *np.cumsum([len(part.positions) for part in values.parts])]
            for start, part in zip(before, values.parts, strict=False):
                for leaf in part.leaves:
                    assert leaf.ctypes.data % 512 == (64 + start * leaf[0].nbytes) % 512
                    assert start or leaf.ctypes.data % 4096 == 64
            np.testing.assert_array_equal(values.stacked["scaled"], vectors[:clients] * 2)
            np.testing.assert_array_equal(values.stacked["count"], np.full(clients, 2))


def test_no_more_is_kept_than_a_little(engine, cohort, vectors, monkeypatch):
    monkeypatch.setattr(rows, "_KEPT", int(2.5 * 6 * LENGTH * CLIENTS))  # float32 and bfloat16 of two rounds
    with fed.use(Local(engine.devices)) as context:
        held = [work(cohort, scale) for scale in range(4)]
        for scale, values in enumerate(held):
            check(values, vectors, scale)
        del held, values
        gc.collect()
        ((_, _, memory),) = context.engine._programs.values()
        assert len(memory._spare) == 2


def test_cohorts_of_other_sizes(engine, vectors):
    with fed.use(engine):
        for clients in (CLIENTS, 25, 1, CLIENTS, 13, 25):
            values = work(fed.Cohort(list(vectors[:clients])), 2)
            np.testing.assert_array_equal(values.stacked["scaled"], vectors[:clients] * 2)


def test_rows_of_another_capacity_are_not_taken(engine, cohort):
    with fed.use(Local(engine.devices)) as context:
        work(cohort, 1)
        ((_, _, memory),) = context.engine._programs.values()
        small = memory.take(30, [30] * len(engine.devices))
        assert room_of(memory, 50) == [(50, LENGTH)] * len(engine.devices)
        memory.lend(small)  # and dropped at once, as the first chunk is when the second is larger
        assert room_of(memory, 50) == [(50, LENGTH)] * len(engine.devices)
        assert room_of(memory, 30) == [(30, LENGTH)] * len(engine.devices)


def test_what_is_handed_out_cannot_be_written_to(engine, cohort):
    with fed.use(engine):
        leaf = work(cohort, 1)["0"]["scaled"]
    with pytest.raises(ValueError, match="read-only"):
        leaf[0] = 1


def test_a_round_in_several_chunks(engine, vectors):
    chunked = fed.Cohort(list(vectors), chunk_size=16)
    with fed.use(engine):
        held = work(chunked, 1)
        for scale in (2, 3):
            check(work(chunked, scale), vectors, scale)
    check(held, vectors, 1)
