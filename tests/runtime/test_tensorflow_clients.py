"""TensorFlow computations at clients and server, between JAX's, in every engine, against NumPy."""

import collections
import typing

import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import CohortError, StructureError

pytestmark = pytest.mark.tensorflow

BATCH = fed.type_of(collections.OrderedDict(y=np.zeros(2, np.int32), x=np.zeros((2, 3), np.float32)))
BATCHES = fed.SequenceType(BATCH)
UNEQUAL = fed.SequenceType([("y", fed.TensorType(np.int32, (None,))), ("x", fed.TensorType(np.float32, (None, 3)))])
VECTOR = fed.TensorType(np.float32, (3,))


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


def client_batches(*counts, size=lambda number: 2):
    rng = np.random.default_rng(len(counts))
    return {
        f"client {client}": [
            {
                "x": rng.normal(size=(size(number), 3)).astype(np.float32),
                "y": rng.integers(0, 9, size(number)).astype(np.int32),
            }
            for number in range(count)
        ]
        for client, count in enumerate(counts)
    }


def sums(data):
    return {client: sum((batch["x"].sum(axis=0) for batch in batches), np.zeros(3)) for client, batches in data.items()}


def test_clients_map_and_reduce_between_the_two_libraries(tf, in_engine):
    @fed.jax_computation
    def halve(x):
        return x / 2

    @fed.tensorflow_computation
    def cube(x):
        return {"cube": x**3, "sign": tf.sign(x)}

    @fed.tensorflow_computation
    def at_server(total):
        return tf.sqrt(total)

    @fed.federated_computation(fed.FederatedType(VECTOR, fed.CLIENTS), fed.FederatedType(np.float32, fed.CLIENTS))
    def program(values, weights):
        cubes = fed.federated_map(cube, fed.federated_map(halve, values))
        mean = fed.federated_mean(cubes["cube"], weights)
        return mean, fed.federated_map(at_server, fed.federated_sum(fed.federated_map(halve, weights))), cubes

    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=3).astype(np.float32) for name in "abcde"}
    weights = {name: np.float32(1 + position) for position, name in enumerate("abcde")}
    mean, root, cubes = program(fed.Cohort(values), fed.Cohort(weights))
    expected = np.average([(value / 2) ** 3 for value in values.values()], axis=0, weights=list(weights.values()))
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(root, np.sqrt(sum(weights.values()) / 2), rtol=1e-6)
    for name, value in values.items():
        np.testing.assert_allclose(cubes[name]["cube"], (value / 2) ** 3, rtol=1e-5)
        np.testing.assert_array_equal(cubes[name]["sign"], np.sign(value))


def test_clients_fold_over_their_batches(tf, in_engine):
    @fed.tensorflow_computation(BATCHES)
    def total(batches):
        return batches.reduce(tf.zeros(3), lambda state, batch: state + tf.reduce_sum(batch["x"], axis=0))

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def program(batches):
        totals = fed.federated_map(total, batches)
        return fed.federated_sum(totals), totals

    data = client_batches(3, 0, 1, 5)
    total_of_all, totals = program(fed.Cohort(data))
    for client, expected in sums(data).items():
        np.testing.assert_allclose(totals[client], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total_of_all, sum(sums(data).values()), rtol=1e-5, atol=1e-6)


def test_batches_of_several_sizes(tf, in_engine):
    @fed.tensorflow_computation(UNEQUAL)
    def summary(batches):
        return batches.reduce(
            (tf.zeros(3), 0), lambda s, batch: (s[0] + tf.reduce_sum(batch["x"], axis=0), s[1] + tf.size(batch["y"]))
        )

    data = client_batches(4, 1, 0, size=lambda number: (3, 3, 1, 5)[number])
    for client, batches in data.items():
        found, count = summary(batches)
        np.testing.assert_allclose(found, sums(data)[client], rtol=1e-5, atol=1e-6)
        assert count == sum(len(batch["y"]) for batch in batches)


def test_what_a_client_made_of_its_data_feeds_jax(tf, in_engine):
    @fed.tensorflow_computation(BATCHES)
    def prepare(batches):
        return batches.filter(lambda batch: batch["y"][0] > 3).map(lambda batch: batch["x"] * 2)

    assert str(prepare.type_signature.result) == "float32[2,3]*"

    @fed.jax_computation(prepare.type_signature.result)
    def total(batches):
        return batches.reduce(jnp.zeros(3), lambda state, batch: state + batch.sum(axis=0))

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def program(batches):
        return fed.federated_sum(fed.federated_map(total, fed.federated_map(prepare, batches)))

    data = client_batches(5, 4, 6)
    kept = [2 * batch["x"].sum(axis=0) for batches in data.values() for batch in batches if batch["y"][0] > 3]
    np.testing.assert_allclose(program(fed.Cohort(data)), sum(kept), rtol=1e-5, atol=1e-5)


def test_examples_of_a_data_set_come_as_masked_batches(tf, in_engine):
    digits = fed.data.digits()
    batches_type = fed.SequenceType(fed.batch_type(digits.element_type, 16))

    @fed.tensorflow_computation(batches_type)
    def count(batches):
        return batches.reduce(0, lambda total, batch: total + tf.reduce_sum(tf.cast(batch["mask"], tf.int32)))

    @fed.federated_computation(fed.FederatedType(batches_type, fed.CLIENTS))
    def program(batches):
        return fed.federated_map(count, batches)

    clients = list(digits)[:4]
    sizes = {client: len(next(iter(digits.client(client).values()))) for client in clients}
    assert {client: int(value) for client, value in program(digits.cohort_of(clients)).items()} == sizes


def test_data_sets_of_tensorflow_are_what_clients_hold(tf, in_engine):
    @fed.jax_computation(BATCHES)
    def total(batches):
        return batches.reduce(jnp.zeros(3), lambda state, batch: state + batch["x"].sum(axis=0))

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def program(batches):
        return fed.federated_map(total, batches)

    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=(2 * count, 3)).astype(np.float32) for name, count in [("ann", 3), ("bob", 1)]}
    data = {
        name: tf.data.Dataset.from_tensor_slices({"x": x, "y": np.zeros(len(x), np.int32)}).batch(2)
        for name, x in rows.items()
    }
    totals = program(fed.Cohort(data))
    for name, x in rows.items():
        np.testing.assert_allclose(totals[name], x.sum(axis=0), rtol=1e-5)
        np.testing.assert_allclose(total(data[name]), x.sum(axis=0), rtol=1e-5)


def test_a_polymorphic_computation_takes_a_data_set(tf):
    count = fed.tensorflow_computation(lambda batches: batches.reduce(0, lambda n, batch: n + tf.size(batch["s"])))
    assert count(tf.data.Dataset.from_tensor_slices({"s": ["a", "b", "c"]}).batch(2)) == 3


def test_elements_in_named_tuples_keep_their_fields_apart(tf, in_engine):
    class Example(typing.NamedTuple):
        right: object
        left: object

    batches_type = fed.SequenceType(fed.type_of(Example(np.float32(0), np.float32(0))))

    @fed.tensorflow_computation(batches_type)
    def split(batches):
        difference = batches.reduce(0.0, lambda total, example: total + example.right - example.left)
        return difference, batches.map(lambda example: Example(example.left, example.right * 10))

    difference, swapped = split([Example(5.0, 1.0), Example(7.0, 2.0)])
    assert difference == 9
    assert [(example.right, example.left) for example in swapped] == [(1, 50), (2, 70)]
    assert type(swapped[0]) is Example


def test_strings_of_clients(tf, in_engine):
    words_type = fed.TensorType(np.str_, (None,))

    @fed.tensorflow_computation(words_type)
    def longest(words):
        return tf.reduce_max(tf.strings.length(words, unit="UTF8_CHAR"))

    @fed.federated_computation(fed.FederatedType(words_type, fed.CLIENTS))
    def program(words):
        return fed.federated_map(longest, words)

    found = program(fed.Cohort({"ann": np.array(["a", "äöü"]), "bob": np.array(["hello"])}))
    assert {name: int(value) for name, value in found.items()} == {"ann": 3, "bob": 5}


def test_an_error_names_client_step_and_function(tf, in_engine):
    @fed.tensorflow_computation(np.int32)
    def reciprocal(x):
        tf.debugging.assert_positive(x, message="not positive")
        with tf.control_dependencies([tf.debugging.assert_positive(x, message="not positive")]):
            return tf.identity(x)

    @fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))
    def program(values):
        return fed.federated_map(reciprocal, values)

    with pytest.raises(tf.errors.InvalidArgumentError, match="not positive") as raised:
        program(fed.Cohort({"ann": 1, "bob": -1, "cat": 2}))
    notes = " ".join(raised.value.__notes__)
    assert "in client 'bob', client stage 0, step " in notes
    assert "function 'reciprocal'" in notes


def test_results_that_do_not_fit_the_type_name_the_client(tf, in_engine):
    mask = fed.tensorflow_computation(lambda x: tf.boolean_mask(x, x > 0), VECTOR)
    proto = mask.to_proto()
    proto.type.function.result.CopyFrom(VECTOR.to_proto())  # says three, and gives as many as are positive
    claimed = fed.framework.ConcreteComputation.from_proto(proto)

    @fed.federated_computation(fed.FederatedType(VECTOR, fed.CLIENTS))
    def program(values):
        return fed.federated_map(claimed, values)

    values = {"ann": np.ones(3, np.float32), "bob": np.array([1, -1, 1], np.float32)}
    with pytest.raises(StructureError, match=r"Expected float32\[3\], found float32\[2\].*TensorFlow.*client 'bob'"):
        program(fed.Cohort(values))


def test_data_sets_that_cannot_be_taken_are_refused_with_their_client(tf):
    @fed.federated_computation(fed.FederatedType(fed.SequenceType(np.int64), fed.CLIENTS))
    def program(numbers):
        return fed.federated_map(fed.jax_computation(lambda s: s.reduce(np.int64(0), lambda a, b: a + b)), numbers)

    with pytest.raises(CohortError, match=r"repeats for ever.*client 'bob'"):
        program(fed.Cohort({"ann": tf.data.Dataset.range(3), "bob": tf.data.Dataset.range(3).repeat()}))
    with pytest.raises(CohortError, match=r"dense tensors.*DatasetSpec.*client '0'"):
        program([tf.data.Dataset.range(4).window(2)])
    with pytest.raises(CohortError, match=r"Expected int64.*found int32.*client '0'"):
        program([tf.data.Dataset.from_tensor_slices([1, 2])])
