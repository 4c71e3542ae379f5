"""`python_computation`: any Python, on NumPy arrays of its own, with a declared result that is checked."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedlens as fed

VECTOR = fed.TensorType(np.float32, (3,))
BATCHES = fed.SequenceType(
    fed.type_of(collections.OrderedDict(x=np.zeros((2, 3), np.float32), y=np.zeros(2, np.int32)))
)
DTYPES = [
    np.bool_,
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128),
]


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


def batches(count):
    rng = np.random.default_rng(count)
    return [
        {"x": rng.normal(size=(2, 3)).astype(np.float32), "y": rng.integers(0, 9, 2).astype(np.int32)}
        for _ in range(count)
    ]


def test_it_runs_what_no_trace_could(in_engine):
    @fed.python_computation(VECTOR, np.int32)
    def count_down(vector):
        steps = 0
        while vector.max() > 0:  # as many steps as the values say
            vector -= 1
            steps += 1
        return steps

    assert count_down(np.array([1.5, 4.5, -2], np.float32)) == 5


def test_it_gets_numpy_arrays_and_scalars_in_the_containers_of_its_type(in_engine):
    @dataclasses.dataclass
    class Point:
        x: object
        y: object

    found = []

    @fed.python_computation(fed.type_of({"b": np.zeros(3, np.float32), "a": Point(np.int8(0), 0.5)}), np.bool_)
    def look(argument):
        found.append(argument)
        return True

    look({"b": np.arange(3, dtype=np.float32), "a": Point(np.int8(7), 0.25)})
    (argument,) = found
    assert list(argument) == ["b", "a"]
    assert type(argument["b"]) is np.ndarray
    assert type(argument["a"]) is Point
    assert type(argument["a"].x) is np.int8
    assert (argument["a"].x, argument["a"].y) == (7, 0.25)


def test_several_arguments_come_by_name_or_position(in_engine):
    @fed.python_computation([("minuend", np.int32), ("subtrahend", np.int32)], np.int32)
    def difference(subtrahend, minuend):
        return minuend - subtrahend

    @fed.python_computation((np.int32, np.int32), np.int32)
    def power(base, exponent):
        return base**exponent

    assert difference(10, 3) == 7
    assert power(2, 5) == 32


def test_a_function_without_arguments(in_engine):
    @fed.python_computation(None, np.int64)
    def large():
        return 2**40

    assert large() == 2**40


def test_a_sequence_can_be_iterated_again_and_again_and_folded(in_engine):
    @fed.python_computation(BATCHES, [np.float32, np.float32, np.int64, np.int32])
    def sums(sequence):
        by_loop = sum(batch["x"].sum() for batch in sequence)
        again = sum(float(batch["x"].sum()) for batch in sequence)
        folded = sequence.reduce(np.int64(2**40), lambda total, batch: total + batch["y"].sum())
        assert all(type(batch["x"]) is np.ndarray for batch in sequence)
        return np.float32(by_loop), again, folded, int(sequence.num_batches)

    data = batches(4)
    by_loop, again, folded, count = sums(data)
    expected = sum(float(batch["x"].sum(dtype=np.float64)) for batch in data)
    np.testing.assert_allclose([by_loop, again], expected, rtol=1e-5)
    assert int(folded) == 2**40 + sum(int(batch["y"].sum()) for batch in data)
    assert count == 4


def test_sequences_on_the_host_sum_map_and_shuffle_in_numpy(in_engine):
    @fed.python_computation(fed.SequenceType(fed.TensorType(np.int64, (2,))), [fed.TensorType(np.int64, (2,))] * 3)
    def three(sequence):
        shuffled = sequence.shuffle(jax.random.key(3))
        assert sorted(row[0] for row in shuffled) == sorted(row[0] for row in sequence)
        return sequence.sum(), sequence.map(lambda row: row * 2).sum(), shuffled.sum()

    rows = [np.array([2**40 + number, number], np.int64) for number in range(5)]
    for found, factor in zip(three(rows), (1, 2, 1), strict=True):
        np.testing.assert_array_equal(found, np.sum(rows, axis=0) * factor)
    for found in three([]):
        np.testing.assert_array_equal(found, [0, 0])


def test_a_sequence_is_iterated_on_the_host_only():
    @fed.jax_computation
    def loop(sequence):
        return sum(batch["y"].sum() for batch in sequence)

    with pytest.raises(fed.LanguageError, match=r"traced. Use sequence.reduce, or fed.python_computation"):
        fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))(lambda data: fed.federated_map(loop, data))


def test_what_a_function_writes_into_is_its_own(in_engine):
    rows_type = fed.SequenceType(VECTOR)

    @fed.python_computation((VECTOR, rows_type), VECTOR)
    def spoil(vector, rows):
        for row in rows:
            row[:] = np.nan
        vector[:] = sum(rows, np.zeros(3, np.float32))
        return vector

    vector, rows = np.ones(3, np.float32), [np.full(3, 2, np.float32)] * 2
    np.testing.assert_array_equal(spoil(vector, rows), [4, 4, 4])
    np.testing.assert_array_equal(vector, 1)
    np.testing.assert_array_equal(rows, 2)


def test_a_buffer_that_is_returned_again_is_copied(in_engine):
    buffer = np.zeros(3, np.float32)

    @fed.python_computation(VECTOR, VECTOR)
    def into_buffer(vector):
        buffer[:] = vector
        return buffer

    @fed.federated_computation(fed.FederatedType(VECTOR, fed.CLIENTS))
    def of_each(vectors):
        return fed.federated_map(into_buffer, vectors)

    values = [np.full(3, number, np.float32) for number in range(4)]
    np.testing.assert_array_equal(of_each(values).stacked, values)


def test_jax_is_as_the_user_has_set_it(in_engine):
    @fed.python_computation(np.float64, np.str_)
    def narrow(_):
        return str(jnp.asarray(np.int64(1)).dtype)

    assert narrow(np.float64(0)) == "int32"


@given(st.sampled_from(DTYPES), st.data())
def test_every_dtype_goes_through_with_its_bits(dtype, data):
    bits = data.draw(hnp.arrays(np.uint8, (3, np.dtype(dtype).itemsize)))
    if dtype is np.bool_:
        bits &= 1
    values = bits.view(dtype).reshape(3)
    same = fed.python_computation(fed.TensorType(dtype, (3,)), fed.TensorType(dtype, (3,)))(lambda x: x)
    found = np.asarray(same(values))
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()


RESULT = collections.OrderedDict(w=VECTOR, n=np.int32)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"w": np.zeros(3), "n": 1}, r"Expected float32\[3\] at 'w', found float64\[3\]"),
        ({"w": np.zeros(2, np.float32), "n": 1}, r"Expected float32\[3\] at 'w', found float32\[2\]"),
        ({"w": np.zeros(3, np.float32), "n": 1.5}, r"Expected int32 at 'n', found the Python scalar 1.5"),
        ({"w": np.zeros(3, np.float32), "n": np.int64(1)}, r"Expected int32 at 'n', found int64\[\]"),
        ({"w": np.zeros(3, np.float32), "n": 2**40}, r"Expected a value that fits int32 at 'n', found 1099511627776"),
        ({"w": np.zeros(3, np.float32)}, "2 fields against 1"),
        ({"w": np.zeros(3, np.float32), "m": 1}, "Expected a field 'n', found fields w, m"),
        (np.zeros(3, np.float32), r"Expected a container <w=float32\[3\],n=int32>, found float32\[3\]"),
        (None, "found no fields"),
        ({"w": [0.0, 0.0, 0.0], "n": 1}, r"Expected float32\[3\] at 'w', found list"),
        ({"w": "abc", "n": 1}, r"Expected float32\[3\] at 'w', found str"),
    ],
)
def test_a_result_of_another_type_names_function_leaf_and_both_types(result, message):
    declared = fed.python_computation(np.int32, RESULT)(lambda number: result)
    with pytest.raises(fed.StructureError, match=message) as caught:
        declared(1)
    assert "in the result of the Python computation 'lambda@test_python" in str(caught.value)
    assert "declared as <w=float32[3],n=int32>" in str(caught.value)
    assert "at the server" in str(caught.value)


def test_python_scalars_fit_and_numpy_scalars_are_not_narrowed():
    half = fed.python_computation(np.float32, np.float32)(lambda number: float(number) / 2)
    assert half(0.5) == 0.25
    # np.float64 is a float too; as an argument it would lose half of its bits.
    with pytest.raises(fed.StructureError, match=r"Expected float32, found float64\[\]"):
        half(np.float64(1 / 3))


@pytest.mark.parametrize("result", [None, BATCHES, [BATCHES, np.int32], fed.FunctionType(None, np.int32), []])
def test_a_result_type_must_be_made_of_tensors(result):
    with pytest.raises(fed.LanguageError, match="Expected a result type of tensors"):
        fed.python_computation(np.int32, result)


def test_arguments_that_do_not_fit_the_type():
    with pytest.raises(fed.LanguageError, match="a field for each of the arguments first, second"):
        fed.python_computation(np.int32, np.int32)(lambda first, second: first)


def test_it_has_the_name_and_type_of_its_function():
    @fed.python_computation(VECTOR, {"largest": np.float32})
    def largest(vector):
        return {"largest": vector.max()}

    assert str(largest.type_signature) == "(float32[3] -> <largest=float32>)"
    assert largest(np.arange(3, dtype=np.float32)) == {"largest": 2}
    assert "largest" in str(fed.compiler.explain(largest))
