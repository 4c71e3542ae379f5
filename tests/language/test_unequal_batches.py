"""Batches and tensors of undefined size: each arrives as it is, and a program is compiled for each size."""

import collections

import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed

BATCHES = fed.SequenceType(
    collections.OrderedDict(x=fed.TensorType(np.float32, (None, 2)), y=fed.TensorType(np.int32, (None,)))
)
ROWS = fed.TensorType(np.float32, (None, 2))


@pytest.fixture
def in_engine(engine):
    with fed.use(engine):
        yield


def client(*sizes, seed=0):
    rng = np.random.default_rng([seed, *sizes])
    return [
        {"x": rng.normal(size=(size, 2)).astype(np.float32), "y": rng.integers(0, 9, size).astype(np.int32)}
        for size in sizes
    ]


def rows_of(batches):
    return np.concatenate([np.zeros((0, 2), np.float32), *(batch["x"] for batch in batches)])


@fed.jax_computation(BATCHES)
def descend(batches):
    """Gradient descent on the distance to each batch's mean: what it does depends on the order and the sizes."""

    def step(state, batch):
        weights, sizes = state
        gradient = jax.grad(lambda w: jnp.mean(jnp.sum((batch["x"] - w) ** 2, axis=1)) / 2)(weights)
        return weights - 0.5 * gradient, sizes * 2 + batch["x"].shape[0]

    weights, sizes = batches.reduce((jnp.zeros(2), jnp.int32(0)), step)
    return {"weights": weights, "sizes": sizes, "largest_y": batches.map(lambda b: b["y"].max()).reduce(0, jnp.maximum)}


@fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
def descended(batches):
    local = fed.federated_map(descend, batches)
    return local, fed.federated_mean(local.weights)


def descend_in_numpy(batches):
    weights, sizes = np.zeros(2), 0
    for batch in batches:
        weights = weights + 0.5 * (batch["x"].mean(axis=0, dtype=np.float64) - weights)
        sizes = 2 * sizes + len(batch["x"])
    return weights, sizes


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_each_batch_has_its_true_size(in_engine, chunk_size):
    data = {"full": client(5, 5, 5), "last is smaller": client(5, 5, 3), "none": [], "mixed": client(1, 7, 1, 1, 2)}
    local, mean = descended(fed.Cohort(data, chunk_size=chunk_size))
    expected = {name: descend_in_numpy(batches) for name, batches in data.items()}
    for name, (weights, sizes) in expected.items():
        np.testing.assert_allclose(local[name]["weights"], weights, rtol=1e-5, atol=1e-6)
        assert local[name]["sizes"] == sizes
        assert local[name]["largest_y"] == max((batch["y"].max() for batch in data[name]), default=0)
    np.testing.assert_allclose(mean, np.mean([weights for weights, _ in expected.values()], axis=0), rtol=1e-5)


def test_at_the_server_and_unplaced(in_engine):
    batches = client(4, 4, 1)
    weights, sizes = descend_in_numpy(batches)
    found = descend(batches)
    np.testing.assert_allclose(found["weights"], weights, rtol=1e-5)
    assert found["sizes"] == sizes

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.SERVER))
    def at_server(data):
        return fed.federated_map(descend, data)

    np.testing.assert_array_equal(at_server(batches)["weights"], found["weights"])


def test_a_python_computation_iterates_over_them(in_engine):
    @fed.python_computation(BATCHES, {"rows": np.int32, "sum": fed.TensorType(np.float32, (2,))})
    def count(batches):
        sizes = [len(batch["y"]) for batch in batches]
        assert batches.num_batches == len(sizes)
        folded = batches.reduce(np.zeros(2, np.float32), lambda total, batch: total + batch["x"].sum(axis=0))
        return {"rows": sum(sizes), "sum": folded}

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def counted(batches):
        return fed.federated_map(count, batches)

    data = {"a": client(5, 5, 2), "b": []}
    found = counted(fed.Cohort(data))
    for name, batches in data.items():
        assert found[name]["rows"] == len(rows_of(batches))
        np.testing.assert_allclose(found[name]["sum"], rows_of(batches).sum(axis=0), rtol=1e-5, atol=1e-6)


def test_tensors_of_undefined_size(in_engine):
    total = fed.jax_computation(lambda model, rows: model + rows.sum(axis=0), [fed.TensorType(np.float32, (2,)), ROWS])

    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.float32, (2,)), fed.SERVER), fed.FederatedType(ROWS, fed.CLIENTS)
    )
    def sums(model, rows):
        halved = fed.federated_map(fed.jax_computation(lambda leaf: leaf / 2, fed.TensorType(np.float32, (2,))), model)
        local = fed.federated_map(total, (fed.federated_broadcast(halved), rows))
        return fed.federated_sum(local), local

    rng = np.random.default_rng(2)
    rows = [rng.normal(size=(size, 2)).astype(np.float32) for size in (3, 1, 0, 3)]
    model = np.ones(2, np.float32)
    found, local = sums(2 * model, rows)
    expected = [model + of_client.sum(axis=0) for of_client in rows]
    np.testing.assert_allclose(local.stacked, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, np.sum(expected, axis=0), rtol=1e-5)
    np.testing.assert_allclose(total(model, rows[0]), expected[0], rtol=1e-5)


def test_values_of_undefined_size_pass_between_host_steps(in_engine):
    positive = fed.python_computation(ROWS, ROWS)(lambda rows: rows[rows[:, 0] > 0])
    count = fed.jax_computation(lambda rows: jnp.sum(rows[:, 0]) + 0 * rows.shape[0], ROWS)

    @fed.federated_computation(fed.FederatedType(ROWS, fed.CLIENTS))
    def sums(rows):
        return fed.federated_map(count, fed.federated_map(positive, rows))

    rows = [np.array([[1, 0], [-1, 0], [3, 0]], np.float32), np.array([[-1, 0]], np.float32)]
    assert list(sums(rows)) == [4, 0]


def test_a_program_is_compiled_for_each_pattern_of_sizes_and_no_client_alone(two_devices, compilations):
    with fed.use(two_devices):
        descended(fed.Cohort([client(5, 5, 5, 3), client(5, 5, 3)]))
        with compilations() as found:
            descended(fed.Cohort([client(5, 5, 3, seed=1), client(5, 5, 5, 3, seed=1)]))
        assert not found
        # 97 to 104 full batches have room for 104: one program serves all of them.
        with compilations() as first:
            descend(client(*[5] * 97, 3))
        with compilations() as found:
            for count in range(98, 105, 2):
                descend(client(*[5] * count, 3))
        assert first
        assert not found


def test_results_may_not_depend_on_an_undefined_size():
    with pytest.raises(fed.LanguageError, match=r"undefined dimensions.*found float32\[3,2\] and float32\[5,2\]"):
        fed.jax_computation(lambda rows: rows * 2, ROWS)
    with pytest.raises(fed.LanguageError, match="undefined dimensions"):
        fed.jax_computation(lambda batches: jnp.zeros(batches.runs[0].batch(0)["x"].shape), BATCHES)


def test_a_batch_is_found_by_its_number_on_the_host_alone():
    second = fed.python_computation(BATCHES, np.int32)(lambda batches: len(batches.batch(1)["x"]))
    assert second(client(4, 3, 2)) == 3
    with pytest.raises(fed.LanguageError, match=r"use sequence.reduce"):
        fed.jax_computation(lambda batches: batches.batch(1)["y"].sum(), BATCHES)


def test_a_result_whose_shape_differs_in_a_call_is_refused(in_engine):
    first_ten = fed.jax_computation(lambda rows: rows[:2].sum(axis=1), ROWS)  # two, unless there are fewer
    assert first_ten(np.ones((4, 2), np.float32)).shape == (2,)
    with pytest.raises(fed.LanguageError, match=r"Expected 'lambda.* to return float32\[2\].*found float32\[1\]"):
        first_ten(np.ones((1, 2), np.float32))


def test_a_step_that_keeps_no_shape_is_refused():
    with pytest.raises(fed.LanguageError, match="keep the shapes and dtypes"):
        fed.jax_computation(lambda batches: batches.reduce(jnp.zeros(3), lambda _, batch: batch["x"][:, 0]), BATCHES)


def test_an_unknown_number_of_dimensions_is_refused():
    with pytest.raises(fed.UnsupportedError, match="Expected a known number of dimensions"):
        fed.jax_computation(lambda value: 1, fed.TensorType(np.float32, None))


def test_shuffling_is_refused():
    with pytest.raises(fed.LanguageError, match="Expected batches of one known size to shuffle"):
        fed.jax_computation(
            lambda batches: batches.shuffle(jax.random.key(0)).reduce(0, lambda state, _: state), BATCHES
        )


def test_a_sum_of_no_batches_has_no_shape(in_engine):
    total = fed.jax_computation(lambda batches: batches.map(lambda batch: batch["x"].sum(axis=0)).sum(), BATCHES)
    np.testing.assert_allclose(total(client(2, 3)), rows_of(client(2, 3)).sum(axis=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(fed.LanguageError, match="Expected a batch to sum, found none"):
        total([])


def test_a_batch_that_does_not_fit_names_client_batch_and_leaf():
    wrong = [*client(2), {"x": np.zeros((2, 3), np.float32), "y": np.zeros(2, np.int32)}]
    with pytest.raises(
        fed.CohortError, match=r"Expected float32\[\?,2\] at 'batch 1/x', found .*\[2,3\], in client 'b'"
    ):
        descended(fed.Cohort({"a": client(2), "b": wrong}))


def test_examples_of_a_data_set_have_no_batch_size():
    data = fed.data.FederatedData.from_clients({"a": client(3)[0]})
    with pytest.raises(fed.CohortError, match=r"say nothing of a batch size. Use fed.batch_type"):
        descended(data.cohort(0))


def test_clients_values_of_several_shapes_are_not_handed_back():
    @fed.federated_computation(fed.FederatedType(ROWS, fed.CLIENTS))
    def same(rows):
        return rows

    with pytest.raises(fed.UnsupportedError, match=r"known shape, found float32\[\?,2\]"):
        same([np.zeros((2, 2), np.float32)])


def test_a_dimension_of_none_at_all_is_defined(in_engine):
    same = fed.jax_computation(lambda rows: rows, fed.TensorType(np.float32, (0, 2)))
    assert same(np.zeros((0, 2), np.float32)).shape == (0, 2)
    width = fed.jax_computation(lambda rows: rows.sum(axis=0), fed.TensorType(np.float32, (None, 0)))
    assert width(np.zeros((3, 0), np.float32)).shape == (0,)
