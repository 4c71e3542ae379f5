"""Every dtype goes in and comes out with its bits, at both placements, and arithmetic stays in it."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedlens as fed

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128]
DTYPES = [np.bool_, *INTEGERS, *FLOATS]


@fed.federated_computation(
    fed.FederatedType({np.dtype(dtype).name: fed.TensorType(dtype, (2,)) for dtype in DTYPES}, fed.CLIENTS)
)
def from_clients(values):
    return {"as they came": values, "mapped": fed.federated_map(lambda value: value, values)}


@fed.federated_computation(
    fed.FederatedType({np.dtype(dtype).name: fed.TensorType(dtype, (2,)) for dtype in DTYPES}, fed.SERVER)
)
def from_server(values):
    same = fed.jax_computation(lambda value: value)
    broadcast = fed.federated_broadcast(values)
    return {"as they came": values, "mapped": fed.federated_map(same, values), "broadcast": broadcast}


def from_bits(bits, dtype):
    size = 2 * np.dtype(dtype).itemsize
    return (bits[:size] & 1 if dtype is np.bool_ else bits[:size]).view(dtype)


def assert_same(found, expected):
    for name, value in expected.items():
        leaf = np.asarray(found[name])
        assert leaf.dtype == value.dtype, name
        assert leaf.shape == value.shape, name
        # XLA may give a NaN other bits; a NaN it stays.
        with np.errstate(invalid="ignore"):
            is_nan = np.zeros(2, np.bool_) if value.dtype.kind in "biu" else np.isnan(value)
            assert np.isnan(leaf[is_nan]).all(), name
        assert leaf[~is_nan].tobytes() == value[~is_nan].tobytes(), name


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


BITS = hnp.arrays(np.uint8, 32)


@given(st.lists(BITS, min_size=3, max_size=3))
def test_bits_come_back_from_clients_and_server(engine, of_clients):
    clients = [{np.dtype(dtype).name: from_bits(bits, dtype) for dtype in DTYPES} for bits in of_clients]
    with fed.use(engine):
        for path, values in from_clients(clients).items():
            assert len(values) == 3, path
            for found, expected in zip(values, clients, strict=True):
                assert_same(found, expected)
        for found in from_server(clients[0]).values():
            assert_same(found, clients[0])


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_arithmetic_stays_in_its_dtype(in_engine, dtype):
    is_integer = np.dtype(dtype).kind in "iu"
    large = np.array([np.iinfo(dtype).max // 4, 3] if is_integer else [2.0**14, 3]).astype(dtype)
    small = np.array([1, 0]).astype(dtype)
    plus_one = fed.jax_computation(lambda value: value + 1, fed.TensorType(dtype, (2,)))

    @fed.federated_computation(fed.FederatedType(fed.TensorType(dtype, (2,)), fed.CLIENTS))
    def computed(values):
        return fed.federated_map(plus_one, values), fed.federated_sum(values)

    mapped, total = computed([large, small])
    one = np.ones((), dtype)
    np.testing.assert_array_equal(mapped.stacked, np.stack([large + one, small + one]))
    assert mapped.stacked.dtype == dtype
    assert np.asarray(total).dtype == dtype
    np.testing.assert_array_equal(np.asarray(total), large + small)
    unplaced = plus_one(large)
    assert np.asarray(unplaced).dtype == dtype
    np.testing.assert_array_equal(np.asarray(unplaced), large + one)


@pytest.mark.parametrize("scalar", [np.int64(2**40 + 1), np.uint64(2**63 + 1), np.float64(1 / 3), 2**40 + 1])
def test_64_bit_scalars_keep_their_bits(in_engine, scalar):
    type_ = fed.type_of(scalar)

    @fed.federated_computation(fed.FederatedType(type_, fed.CLIENTS), fed.FederatedType(type_, fed.SERVER))
    def both(at_clients, at_server):
        return fed.federated_max(at_clients), at_server, fed.federated_broadcast(at_server)

    for found in both([scalar, scalar], scalar):
        assert found == scalar
        assert np.asarray(found).dtype == type_.dtype


def test_64_bit_constants_of_a_function_keep_their_bits(in_engine):
    @fed.jax_computation(np.float32)
    def with_constants(number):
        return {"constant": np.int64(2**40 + 1), "array": np.array([1 / 3]), "number": number}

    @fed.federated_computation(fed.FederatedType(np.float32, fed.CLIENTS))
    def of_clients(numbers):
        return fed.federated_map(with_constants, numbers)

    for found in (with_constants(0.5), of_clients([0.5])["0"]):
        assert found["constant"] == 2**40 + 1
        np.testing.assert_array_equal(found["array"], np.array([1 / 3]))
        assert np.asarray(found["number"]).dtype == np.float32


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.float64(0.5), np.float32),
        (np.int64(1), np.int32),
        (np.float32(0.5), np.float64),
        (np.float32(0.5), ml_dtypes.bfloat16),
        (np.complex128(1j), np.complex64),
        (np.int32(1), np.uint32),
        (np.bool_(True), np.int32),
        (1, np.bool_),
        (2**31, np.int32),
        (-1, np.uint8),
        (0.5, np.int32),
        (True, np.int32),
        (1e300, np.float32),
    ],
)
def test_nothing_is_cast(value, dtype):
    @fed.federated_computation(fed.FederatedType(dtype, fed.CLIENTS), fed.FederatedType(dtype, fed.SERVER))
    def both(at_clients, at_server):
        return at_clients, at_server

    fitting = np.zeros((), dtype)
    with pytest.raises(fed.CohortError, match=r"Expected .* found .*, in client 'a'"):
        both(fed.Cohort({"a": value}), fitting)
    with pytest.raises(fed.StructureError, match=r"Expected .* found .*, in the argument"):
        both(fed.Cohort({"a": fitting}), value)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1, np.float32), (2, np.uint8), (0.5, ml_dtypes.bfloat16), (True, np.bool_), (2**40, np.int64), (1, np.complex64)],
)
def test_python_scalars_that_fit_become_the_dtype(in_engine, value, dtype):
    same = fed.federated_computation(fed.FederatedType(dtype, fed.CLIENTS))(lambda values: values)
    (found,) = same([value])
    assert found.dtype == dtype
    assert found == value
