"""`tensorflow_computation`: what a traced function may use and return, against NumPy."""

import collections
import dataclasses
import typing

import attrs
import ml_dtypes
import numpy as np
import pytest
from federated_language.proto import computation_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedlens as fed
from fedlens.errors import LanguageError, StructureError, UnsupportedError

pytestmark = pytest.mark.tensorflow

DTYPES = [
    np.bool_,
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128),
]
VECTOR = fed.TensorType(np.float32, (3,))


class Pair(typing.NamedTuple):
    right: object
    left: object


@attrs.define
class Weights:
    kernel: object
    bias: object


@dataclasses.dataclass
class Point:
    y: object
    x: object


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_values_of_every_dtype_pass_unchanged(tf, dtype):
    type_ = fed.TensorType(dtype, (2, 2))
    same = fed.tensorflow_computation(lambda x: x, type_)
    value = np.array([[0, 1], [1, 0]]).astype(dtype)
    found = same(value)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, value)
    assert same.type_signature.result == type_


@settings(max_examples=25)
@given(value=hnp.arrays(np.float64, hnp.array_shapes(max_dims=3), elements=st.floats(-1e6, 1e6)))
def test_a_polymorphic_computation_takes_the_type_of_its_argument(tf, value):
    cumulative = fed.tensorflow_computation(lambda x: tf.cumsum(x, axis=-1))
    np.testing.assert_allclose(cumulative(value), np.cumsum(value, axis=-1), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("value", ["", "ä\0b", b"\xff\0"])
def test_strings_arrive_as_bytes(tf, value):
    twice = fed.tensorflow_computation(lambda x: tf.strings.join([x, x]), np.str_)
    expected = 2 * (value.encode() if isinstance(value, str) else value)
    assert twice(value) == expected
    lengths = fed.tensorflow_computation(lambda x: tf.strings.length(x), fed.TensorType(np.str_, (None,)))
    np.testing.assert_array_equal(lengths(np.array([value, "abc"], object)), [len(expected) // 2, 3])


@pytest.mark.parametrize(
    "container",
    [
        lambda a, b: {"b": b, "a": a},
        lambda a, b: collections.OrderedDict(b=b, a=a),
        Pair,
        Weights,
        Point,
        lambda a, b: [a, b],
        lambda a, b: (a, {"z": b, "y": [a]}),
    ],
)
def test_arguments_and_results_are_in_the_containers_of_their_types(tf, container):
    argument = container(np.float32(3), np.arange(3, dtype=np.float32))
    seen = []

    @fed.tensorflow_computation(fed.type_of(argument))
    def look(value):
        seen.append(value)
        return value

    found = look(argument)
    assert type(seen[0]) is type(argument)
    assert type(found) is type(argument)
    assert look.type_signature.result == fed.type_of(argument)
    assert [path for path, _ in fed.trees.items(found)] == [path for path, _ in fed.trees.items(argument)]
    for got, expected in zip(fed.trees.leaves(found), fed.trees.leaves(argument), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_several_arguments_come_by_name_or_position(tf):
    difference = fed.tensorflow_computation(
        lambda subtrahend, minuend: minuend - subtrahend, [("minuend", np.int32), ("subtrahend", np.int32)]
    )
    assert difference(10, 3) == 7


def test_a_function_without_arguments_may_return_numbers_strings_and_arrays(tf):
    @fed.tensorflow_computation
    def constants():
        return {"i": 7, "f": 0.5, "s": "abc", "a": np.arange(3), "t": tf.constant(True)}

    found = constants()
    assert (found["i"], found["f"], found["s"], found["t"]) == (7, 0.5, b"abc", True)
    assert str(constants.type_signature) == "( -> <i=int32,f=float32,s=str,a=int64[3],t=bool>)"


def test_control_flow_of_tensorflow(tf):
    @fed.tensorflow_computation(np.int32)
    def collatz(start):
        def step(n, count):
            return tf.cond(n % 2 == 0, lambda: n // 2, lambda: 3 * n + 1), count + 1

        return tf.while_loop(lambda n, count: n != 1, step, (start, 0))[1]

    def by_hand(n):
        return 0 if n == 1 else 1 + by_hand(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert [collatz(n) for n in (1, 6, 27)] == [by_hand(n) for n in (1, 6, 27)]


def test_tensors_are_compared_by_value(tf):
    both = fed.tensorflow_computation(lambda a, b: (a == b, a != b), VECTOR, VECTOR)
    equal, different = both(np.array([1, 2, 3], np.float32), np.array([1, 0, 3], np.float32))
    np.testing.assert_array_equal(equal, [True, False, True])
    np.testing.assert_array_equal(different, [False, True, False])


def test_python_control_flow_in_a_tf_function(tf):
    @fed.tensorflow_computation(fed.TensorType(np.float32, (None,)))
    @tf.function
    def total_of_positive(values):
        total = 0.0
        for value in values:
            if value > 0:
                total += value
        return total

    assert total_of_positive(np.array([1, -2, 3], np.float32)) == 4


def test_variables_start_anew_in_every_call(tf):
    @fed.tensorflow_computation(np.float32, np.int32)
    def compound(amount, years):
        balance = tf.Variable(amount)  # initialised with the argument
        factor = tf.Variable(1.5)

        @tf.function
        def run():
            for _ in tf.range(years):
                balance.assign(balance * factor)
            return balance.read_value()

        return run()

    assert [compound(2.0, 3), compound(2.0, 3), compound(4.0, 0)] == [2 * 1.5**3, 2 * 1.5**3, 4]


def test_a_table_is_initialised(tf):
    @fed.tensorflow_computation(fed.TensorType(np.str_, (None,)))
    def numbers(words):
        initializer = tf.lookup.KeyValueTensorInitializer(["one", "two"], np.array([1, 2], np.int64))
        return tf.lookup.StaticHashTable(initializer, -1).lookup(words)

    for _ in range(2):
        np.testing.assert_array_equal(numbers(np.array(["two", "ten"])), [2, -1])


def test_gradients_are_those_of_the_closed_form(tf):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)

    @fed.tensorflow_computation(VECTOR, fed.type_of(x), fed.type_of(y))
    def gradient(w, x, y):
        with tf.GradientTape() as tape:
            tape.watch(w)
            loss = tf.reduce_mean((tf.linalg.matvec(x, w) - y) ** 2)
        return tape.gradient(loss, w)

    w = np.ones(3, np.float32)
    np.testing.assert_allclose(gradient(w, x, y), 2 / 8 * x.T @ (x @ w - y), rtol=1e-5)


def test_a_seeded_draw_is_the_same_in_every_call(tf):
    seeded = fed.tensorflow_computation(lambda: tf.random.normal((4,), seed=3))
    stateless = fed.tensorflow_computation(lambda s: tf.random.stateless_normal((4,), [s, 0]), np.int32)
    generator = fed.tensorflow_computation(lambda: tf.random.Generator.from_seed(5).normal((4,)))
    unseeded = fed.tensorflow_computation(lambda: tf.random.normal((4,)))
    np.testing.assert_array_equal(seeded(), seeded())
    np.testing.assert_array_equal(generator(), generator())
    np.testing.assert_array_equal(stateless(1), stateless(1))
    assert not np.array_equal(stateless(1), stateless(2))
    assert not np.array_equal(unseeded(), unseeded())


def test_computations_call_each_other(tf):
    @fed.tensorflow_computation(np.float32)
    def counted(x):
        calls = tf.Variable(0.0)
        with tf.control_dependencies([calls.assign_add(x)]):
            return {"count": calls.read_value()}

    @fed.tensorflow_computation(np.float32)
    def twice(x):
        return counted(x)["count"], counted(2 * x)["count"]

    assert twice(np.float32(3)) == (3, 6)  # each has a variable of its own


def test_it_runs_from_its_bytes_alone(tf):
    @fed.tensorflow_computation(fed.type_of({"b": np.zeros(3, np.float32), "a": np.int32(0)}))
    def shift(argument):
        return {"y": argument["b"] + tf.cast(argument["a"], tf.float32), "x": argument["a"]}

    data = shift.to_proto().SerializeToString()
    again = fed.framework.ConcreteComputation.from_proto(computation_pb2.Computation.FromString(data))
    found = again({"b": np.ones(3, np.float32), "a": np.int32(2)})
    np.testing.assert_array_equal(found["y"], [3, 3, 3])
    assert found["x"] == 2
    assert fed.to_portable(shift).to_proto() == shift.to_proto()


def test_tensors_and_data_sets_have_types(tf):
    dataset = tf.data.Dataset.from_tensor_slices({"x": np.zeros((4, 2), np.float32), "s": ["a"] * 4}).batch(3)
    assert str(fed.type_of(dataset)) == "<x=float32[?,2],s=str[?]>*"
    assert fed.type_of(dataset.element_spec) == fed.type_of(dataset).element
    assert str(fed.type_of((tf.constant([1]), tf.Variable(1.0), tf.TensorSpec(None, tf.bfloat16)))) == (
        "<int32[1],float32,'bfloat16'(shape=None)>"
    )
    with pytest.raises(StructureError, match="dense tensor, found RaggedTensor"):
        fed.type_of(tf.ragged.constant([[1], [1, 2]]))
    with pytest.raises(StructureError, match="found TensorFlow's qint8"):
        fed.type_of(tf.TensorSpec((), tf.qint8))


def test_eager_tensors_are_accepted_as_values(tf):
    double = fed.jax_computation(lambda x: 2 * x, VECTOR)
    np.testing.assert_array_equal(double(tf.constant([1.0, 2.0, 3.0])), [2, 4, 6])
    with pytest.raises(StructureError, match=r"float32\[3\]"):
        double(tf.constant([1, 2, 3]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda tf: None, "found None"),
        (lambda tf: object(), "found object"),
        (lambda tf: tf.sparse.from_dense([1.0, 0.0]), "SparseTensor"),
        (lambda tf: {"r": tf.ragged.constant([[1], [1, 2]])}, "RaggedTensor"),
    ],
)
def test_what_is_no_tensor_is_refused(tf, function, message):
    with pytest.raises((LanguageError, StructureError), match=message):
        fed.tensorflow_computation(lambda: function(tf))


def test_an_error_of_the_function_names_it(tf):
    def train(x):
        if x > 0:
            return x
        return -x

    with pytest.raises(TypeError) as raised:
        fed.tensorflow_computation(train, np.float32)
    assert "in 'train', traced with an argument float32 into a TensorFlow graph" in raised.value.__notes__[0]


def test_other_computations_are_refused_inside(tf):
    double = fed.jax_computation(lambda x: 2 * x, np.float32)
    with pytest.raises(UnsupportedError, match=r"calls of other TensorFlow computations.*float32 -> float32"):
        fed.tensorflow_computation(lambda x: double(x), np.float32)
