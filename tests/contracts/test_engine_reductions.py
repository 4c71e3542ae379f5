"""Reductions of every kind and dtype on every engine, against NumPy: aggregates, extremes, secure sums."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens.errors import BoundError, LanguageError, NonFiniteError, UnsupportedError
from fedlens.runtime import Context, Debug

VALUES = np.array([3, 1, -4, 1.5, 9, 2, 6], np.float32)
IDS = [f"client {i}" for i in range(len(VALUES))]


CHUNK = 3  # clients: every cohort here takes several chunks


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def at_clients(type_):
    return fed.FederatedType(type_, fed.CLIENTS)


def cohort(values, chunk_size=CHUNK):
    return fed.Cohort(
        dict(zip((f"client {i}" for i in range(len(values))), values, strict=True)), chunk_size=chunk_size
    )


MOMENTS = fed.to_type([("n", np.int32), ("sum", np.float64), ("largest", (np.float32, (2,)))])


@fed.jax_computation(MOMENTS, np.float32)
def accumulate(state, x):
    return {
        "n": state["n"] + 1,
        "sum": state["sum"] + x.astype(jnp.float64) ** 2,
        "largest": jnp.maximum(state["largest"], jnp.stack([x, -x])),
    }


@fed.jax_computation(MOMENTS, MOMENTS)
def merge(first, second):
    return {
        "n": first["n"] + second["n"],
        "sum": first["sum"] + second["sum"],
        "largest": jnp.maximum(first["largest"], second["largest"]),
    }


@fed.jax_computation(MOMENTS)
def report(state):
    return {"mean square": state["sum"] / state["n"], "range": state["largest"]}


@fed.jax_computation
def no_moments():
    return {"n": jnp.int32(0), "sum": np.float64(0), "largest": jnp.full(2, -jnp.inf, jnp.float32)}


@fed.federated_computation(at_clients(np.float32))
def moments(values):
    return fed.federated_aggregate(values, no_moments(), accumulate, merge, report)


def test_an_aggregate_is_what_its_functions_say():
    result = moments(cohort(VALUES))
    assert list(result) == ["mean square", "range"]
    assert result["mean square"].dtype == np.float64
    np.testing.assert_allclose(result["mean square"], np.mean(VALUES.astype(np.float64) ** 2), rtol=1e-12)
    np.testing.assert_array_equal(result["range"], [9, 4])


def test_an_aggregate_beside_a_sum_and_of_mapped_values():
    @fed.federated_computation(at_clients(np.float32), fed.FederatedType(np.float32, fed.SERVER), np.float32)
    def both(values, scale, start):
        add = fed.jax_computation(lambda a, b: a + b, np.float32, np.float32)
        scaled = fed.federated_map(
            fed.jax_computation(lambda x, s: x * s, np.float32, np.float32),
            fed.federated_zip((values, fed.federated_broadcast(scale))),
        )
        # The report captures a value from around it: a function over names, not a local computation.
        add_start = fed.federated_computation(lambda total: add(total, start), np.float32)
        return fed.federated_aggregate(scaled, np.float32(0), add, add, add_start), fed.federated_sum(values)

    total, plain = both(cohort(VALUES), 2.0, 0.5)
    assert (float(total), float(plain)) == (2 * VALUES.sum() + 0.5, VALUES.sum())


def test_clients_accumulate_in_the_order_of_the_cohort():
    """The last client of a device wins; devices merge in order, so that the last client of all does."""
    pair = fed.to_type([("seen", np.bool_), ("x", np.float32)])
    last = fed.jax_computation(lambda state, x: {"seen": True, "x": x}, pair, np.float32)
    later = fed.jax_computation(
        lambda a, b: {"seen": a["seen"] | b["seen"], "x": jnp.where(b["seen"], b["x"], a["x"])}, pair, pair
    )
    nothing = fed.jax_computation(lambda: {"seen": False, "x": jnp.float32(0)})
    take = fed.jax_computation(lambda state: state["x"], pair)

    @fed.federated_computation(at_clients(np.float32))
    def last_of(values):
        return fed.federated_aggregate(values, nothing(), last, later, take)

    for chunk_size in (None, CHUNK):
        assert last_of(cohort(VALUES, chunk_size)) == VALUES[-1]


def test_a_zero_that_is_no_identity_is_refused_by_the_debug_engine():
    add = fed.jax_computation(lambda a, b: a + b, np.float32, np.float32)

    @fed.federated_computation(at_clients(np.float32))
    def shifted(values):
        return fed.federated_aggregate(
            values, np.float32(1), add, add, fed.jax_computation(lambda total: total, np.float32)
        )

    with (
        fed.use(Debug()),
        pytest.raises(LanguageError, match=r"the zero of federated_aggregate_\d+ to be the identity of its merge"),
    ):
        shifted(cohort(VALUES))


DTYPES = [
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64),
]


def any_values(dtype, rng, clients=6):
    """Numbers over the whole range of integers; small ones that add up exactly for floats."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, (clients, 3), dtype=dtype, endpoint=True)
    return (rng.integers(-8, 8, (clients, 3)) / 4).astype(dtype)


def test_extremes_and_sums_keep_every_dtype():
    rng = np.random.default_rng(3)
    values = {np.dtype(dtype).name: any_values(dtype, rng) for dtype in DTYPES}
    type_ = fed.to_type([(name, (leaf.dtype.type, (3,))) for name, leaf in values.items()])

    @fed.federated_computation(at_clients(type_))
    def reduced(x):
        return fed.federated_min(x), fed.federated_max(x), fed.federated_sum(x)

    smallest, largest, total = reduced(
        cohort([{name: leaf[i] for name, leaf in values.items()} for i in range(6)], chunk_size=4)
    )
    for name, leaf in values.items():
        for found, expected in (
            (smallest[name], leaf.min(0)),
            (largest[name], leaf.max(0)),
            (total[name], leaf.sum(0, dtype=leaf.dtype)),  # integers wrap around in their own dtype, as NumPy's do
        ):
            assert found.dtype == leaf.dtype
            np.testing.assert_array_equal(np.asarray(found), expected)


def test_complex_numbers_are_summed_and_averaged_in_their_dtype():
    rng = np.random.default_rng(4)
    values = {
        name: (rng.normal(size=(5, 2)) + 1j * rng.normal(size=(5, 2))).astype(name)
        for name in ("complex64", "complex128")
    }

    @fed.federated_computation(
        at_clients([(name, (leaf.dtype.type, (2,))) for name, leaf in values.items()]), at_clients(np.uint8)
    )
    def reduced(x, weights):
        return fed.federated_sum(x), fed.federated_mean(x), fed.federated_mean(x, weights)

    weights = np.array([0, 255, 3, 4, 5], np.uint8)
    results = reduced(
        cohort([{name: leaf[i] for name, leaf in values.items()} for i in range(5)]),
        cohort(list(weights)),
    )
    for name, leaf in values.items():
        wide = leaf.astype(np.complex128)
        for result, expected in zip(
            results, (wide.sum(0), wide.mean(0), np.average(wide, axis=0, weights=weights)), strict=True
        ):
            assert result[name].dtype == leaf.dtype
            tolerance = 1e-6 if name == "complex64" else 1e-14
            np.testing.assert_allclose(np.asarray(result[name]), expected, rtol=tolerance)


@settings(max_examples=5)
@given(
    st.lists(st.lists(st.floats(width=32, allow_subnormal=False), min_size=3, max_size=3), min_size=1, max_size=5).map(
        lambda rows: np.array(rows, np.float32)
    )
)
def test_extremes_are_numpys_with_nan_and_infinity(engine, rows):
    with fed.use(engine):
        smallest, largest = extremes(cohort(list(rows)))
    np.testing.assert_array_equal(smallest, rows.min(0))
    np.testing.assert_array_equal(largest, rows.max(0))


@fed.federated_computation(at_clients((np.float32, (3,))))
def extremes(x):
    return fed.federated_min(x), fed.federated_max(x)


def test_infinities_in_extremes_and_aggregates_are_found(engine):
    """No sum shows them: a maximum forgets a negative infinity."""
    values = [np.array([i, -i, 0.5], np.float32) for i in range(5)]
    values[3] = np.array([0, -np.inf, 0], np.float32)
    argument = cohort(values)

    @fed.federated_computation(at_clients((np.float32, (3,))))
    def largest(x):
        return fed.federated_max(x)

    assert float(largest(argument)[1]) == 0
    with pytest.raises(NonFiniteError, match="in client 'client 3', leaf 'value', client stage 0"):
        Context(engine).run(largest, argument, on_nonfinite="raise")
    outcome = Context(engine).run(extremes, argument, on_nonfinite="drop")
    assert outcome.dropped == ("client 3",)
    np.testing.assert_array_equal(outcome.value[0], np.delete(values, 3, axis=0).min(0))

    bad = VALUES.copy()
    bad[4] = np.nan
    with pytest.raises(NonFiniteError, match="in client 'client 4', leaf 'value', client stage 0"):
        Context(engine).run(moments, cohort(bad), on_nonfinite="raise")
    outcome = Context(engine).run(moments, cohort(bad), on_nonfinite="drop")
    kept = np.delete(VALUES, 4).astype(np.float64)
    np.testing.assert_allclose(outcome.value["mean square"], np.mean(kept**2), rtol=1e-12)


COUNTS = fed.to_type([("a", np.int32), ("b", (np.uint8, (2,)))])


@fed.federated_computation(at_clients(COUNTS))
def secure(counts):
    return {
        "one bound": fed.federated_secure_sum(counts, 10),
        "bounds": fed.federated_secure_sum(counts, {"a": 1000, "b": 300}),
        "bits": fed.federated_secure_sum_bitwidth(counts, {"a": 4, "b": 64}),
    }


def counts_of(numbers):
    return [{"a": np.int32(a), "b": np.array(b, np.uint8)} for a, b in numbers]


def test_a_secure_sum_is_the_sum():
    numbers = [(0, (1, 2)), (10, (10, 0)), (7, (3, 3)), (1, (0, 0)), (2, (1, 1))]
    result = secure(cohort(counts_of(numbers)))
    for found in result.values():
        assert (int(found["a"]), found["a"].dtype) == (20, np.int32)
        np.testing.assert_array_equal(found["b"], [15, 6])
        assert found["b"].dtype == np.uint8


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            (11, (0, 0)),
            r"integers from 0 to 10 in a secure sum, found 11 in client 'client 3', leaf 'a', client stage 0",
        ),
        ((-1, (0, 0)), r"integers from 0 to 10 in a secure sum, found -1 in client 'client 3', leaf 'a'"),
        ((0, (2, 12)), r"integers from 0 to 10 in a secure sum, found 12 in client 'client 3', leaf 'b'"),
    ],
)
def test_a_number_beyond_a_secure_sums_bound_names_the_client(number, message):
    numbers = [(1, (1, 1))] * 3 + [number] + [(1, (1, 1))]
    with pytest.raises(BoundError, match=message):
        secure(cohort(counts_of(numbers)))


def test_a_number_of_too_many_bits_names_the_client():
    @fed.federated_computation(at_clients(np.int64))
    def total(x):
        return fed.federated_secure_sum_bitwidth(x, 40)

    values = [np.int64(2**40 - 1), np.int64(5), np.int64(0)]
    assert int(total(cohort(values))) == 2**40 + 4
    values[1] = np.int64(2**40)
    with pytest.raises(
        BoundError, match=r"from 0 to 2\*\*40 - 1 in a secure sum, found 1099511627776 in client 'client 1'"
    ):
        total(cohort(values))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint64])
def test_a_secure_sum_that_does_not_fit_is_no_wrong_number(dtype):
    most = np.iinfo(dtype).max
    total = fed.federated_computation(lambda x: fed.federated_secure_sum_bitwidth(x, 64), at_clients(dtype))
    assert int(total(cohort([dtype(most - 3), dtype(1), dtype(2)]))) == most
    with pytest.raises(
        BoundError, match=f"secure sum that fits {np.dtype(dtype).name}, found a larger one in leaf 'value'"
    ):
        total(cohort([dtype(most)] * 3))


def test_bounds_that_are_computed():
    @fed.federated_computation(at_clients(np.int32), np.int32)
    def total(x, bound):
        return fed.federated_secure_sum(x, fed.jax_computation(lambda b: b + 1, np.int32)(bound))

    values = [np.int32(3), np.int32(6), np.int32(1)]
    assert total(cohort(values), 5) == 10
    with pytest.raises(BoundError, match="from 0 to 5 in a secure sum, found 6 in client 'client 1'"):
        total(cohort(values), 4)


def test_a_client_that_is_left_out_is_in_no_bound(engine):
    """What a client that is not finite would have sent is not sent."""

    @fed.federated_computation(at_clients([("x", np.float32), ("n", np.int32)]))
    def total(values):
        return fed.federated_sum(values.x), fed.federated_secure_sum(values.n, 3)

    values = [{"x": np.float32(1), "n": np.int32(n)} for n in (1, 2, 3, 1)]
    values[2] = {"x": np.float32(np.nan), "n": np.int32(99)}
    outcome = Context(engine).run(total, cohort(values), on_nonfinite="drop")
    assert outcome.dropped == ("client 2",)
    assert (float(outcome.value[0]), int(outcome.value[1])) == (3, 4)
    values[3] = {"x": np.float32(1), "n": np.int32(4)}
    with pytest.raises(BoundError, match="found 4 in client 'client 3', leaf 'value', client stage 0"):
        Context(engine).run(total, cohort(values), on_nonfinite="drop")


def test_a_bfloat16_is_kept():
    """The language refuses extremes of bfloat16 for not knowing it; a sum it allows."""
    values = [ml_dtypes.bfloat16(x) for x in (1.5, -2, 0.25)]
    total = fed.federated_computation(lambda x: fed.federated_sum(x), at_clients(ml_dtypes.bfloat16))
    result = total(cohort(values))
    assert (float(result), result.dtype) == (-0.25, ml_dtypes.bfloat16)


def test_what_has_no_static_shape_is_refused():
    @fed.federated_computation(at_clients(fed.TensorType(np.float32, (None,))))
    def smallest(x):
        return fed.federated_min(x)

    with pytest.raises(UnsupportedError, match=r"known shape in federated_min_\d+, found float32\[\?\]"):
        smallest(cohort([np.ones(2, np.float32)]))
