"""Sequences: folds, maps and shuffles of ragged clients, against NumPy, on every engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import CohortError, LanguageError, StructureError
from fedlens.runtime import Examples

ELEMENT = fed.type_of({"x": np.zeros(2, np.float32), "number": np.int32(0)})
BATCHES = fed.SequenceType(fed.batch_type(ELEMENT, 4))
LENGTHS = (5, 0, 8, 1, 12, 3, 0)


def examples(lengths=LENGTHS):
    """Ragged clients in shared arrays; a row's number is its place in them. Between clients lie rows of nobody."""
    lengths = np.array(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    total = int((lengths + 1).sum())
    x = np.random.default_rng(0).normal(size=(total, 2)).astype(np.float32)
    return Examples({"x": x, "number": np.arange(total, dtype=np.int32)}, starts, lengths)


def cohort(lengths=LENGTHS, **options):
    return fed.Cohort.from_examples([f"c{i}" for i in range(len(lengths))], examples(lengths), **options)


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def test_rows_that_fill_up_a_batch_are_masked_and_the_clients_own():
    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def extremes(data):
        def step(state, batch):
            low, high, rows = state
            return jnp.minimum(low, batch["number"].min()), jnp.maximum(high, batch["number"].max()), rows + 4

        zero = jnp.int32(10**6), jnp.int32(-1), jnp.int32(0)
        return fed.federated_map(lambda batches: (*batches.reduce(zero, step), batches.num_batches), data)

    data = examples()
    for result, start, length in zip(extremes(cohort()), data.starts, data.lengths, strict=True):
        low, high, rows, batches = map(int, result)
        assert batches == -(-length // 4)
        assert rows == 4 * batches
        if length:
            assert (low, high) == (start, start + length - 1)


def test_a_client_without_rows_gives_the_zero():
    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def fold(data):
        return fed.federated_map(lambda batches: batches.reduce({"n": 7.5}, lambda s, _: {"n": s["n"] + 1}), data)

    assert [value["n"] for value in fold(cohort([0, 0, 9]))] == [7.5, 7.5, 10.5]
    assert [value["n"] for value in fold(cohort([0]))] == [7.5]


def test_map_and_sum_against_numpy():
    def masked(batch):
        return {"total": jnp.where(batch["mask"][:, None], batch["x"], 0).sum(0), "count": batch["mask"].sum()}

    @fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
    def totals(data):
        return fed.federated_map(lambda batches: batches.map(masked).map(lambda part: part | {"one": 1}).sum(), data)

    data = examples()
    for result, start, length in zip(totals(cohort()), data.starts, data.lengths, strict=True):
        np.testing.assert_allclose(result["total"], data.columns["x"][start : start + length].sum(0), rtol=1e-5)
        assert result["count"] == length
        assert result["one"] == -(-length // 4)


def test_lists_of_batches():
    @fed.federated_computation(fed.FederatedType(fed.SequenceType(fed.TensorType(np.float32, (2,))), fed.CLIENTS))
    def totals(data):
        return fed.federated_map(lambda batches: (batches.sum(), batches.num_batches), data)

    clients = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": [], "c": iter([np.ones(2, np.float32)])}
    result = totals(fed.Cohort(clients))
    assert {client: (total.tolist(), int(count)) for client, (total, count) in result.items()} == {
        "a": ([6.0, 9.0], 3),
        "b": ([0.0, 0.0], 0),
        "c": ([1.0, 1.0], 1),
    }


def test_a_sequence_beside_other_values_and_nested_in_containers():
    type_ = fed.to_type([("scale", np.float32), ("data", [fed.SequenceType(np.int32)])])

    @fed.federated_computation(fed.FederatedType(type_, fed.CLIENTS))
    def scaled(value):
        return fed.federated_map(lambda held: held["scale"] * held["data"][0].sum(), value)

    clients = {"a": {"scale": 2.0, "data": [[1, 2, 3]]}, "b": {"data": [[]], "scale": 5.0}}
    assert list(scaled(fed.Cohort(clients))) == [12.0, 0.0]
    assert list(scaled(fed.Cohort({"c": (2.0, [[4]])}))) == [8.0]


def test_called_at_the_top_it_takes_a_list_of_batches():
    @fed.jax_computation(fed.SequenceType(fed.TensorType(np.float32, (2,))), np.float32)
    def total(batches, factor):
        return batches.reduce(jnp.float32(0), lambda state, batch: state + batch.sum()) * factor

    assert total([np.ones(2, np.float32)] * 3, 0.5) == 3.0
    assert total([], 0.5) == 0.0
    with pytest.raises(StructureError, match=r"at 'batches/batch 1', found float32\[3\], in the argument arg"):
        total([np.ones(2, np.float32), np.ones(3, np.float32)], 1.0)


def test_wide_batches_are_summed_exactly():
    @fed.federated_computation(fed.FederatedType(fed.SequenceType(np.int64), fed.CLIENTS))
    def totals(data):
        return fed.federated_map(lambda batches: batches.sum(), data)

    assert totals([[np.int64(2**40), np.int64(3)], []])["0"] == 2**40 + 3


def test_gradients_inside_of_the_fold_descend():
    rng = np.random.default_rng(1)
    truth = np.array([2, -1], np.float32)
    inputs = rng.normal(size=(40, 2)).astype(np.float32)
    data = Examples({"x": inputs, "y": inputs @ truth}, np.array([0, 24]), np.array([24, 16]))
    batches_type = fed.SequenceType(fed.batch_type(fed.type_of({"x": truth, "y": np.float32(0)}), 8))

    @fed.federated_computation(fed.FederatedType(batches_type, fed.CLIENTS))
    def trained(data):
        def loss(weights, batch):
            return jnp.mean((batch["x"] @ weights - batch["y"]) ** 2)

        def step(weights, batch):
            return weights - 0.1 * jax.grad(loss)(weights, batch)

        return fed.federated_map(lambda batches: batches.reduce(jnp.zeros(2), step), data)

    for result, rows in zip(trained(fed.Cohort.from_examples(["a", "b"], data)), ((0, 24), (24, 40)), strict=True):
        expected = np.zeros(2)
        for start in range(*rows, 8):
            x = inputs[start : start + 8].astype(np.float64)
            expected -= 0.1 * 2 * x.T @ (x @ expected - x @ truth) / 8
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def fold(zero, step, element=np.float32):
    return fed.jax_computation(lambda batches: batches.reduce(zero, step), fed.SequenceType(element))


def test_a_gradient_through_the_fold_is_refused():
    with pytest.raises(LanguageError, match=r"'slope' to differentiate inside the step.*Move jax\.grad into the step"):

        @fed.jax_computation(np.float32, fed.SequenceType(np.float32))
        def slope(weight, batches):
            return jax.grad(lambda w: batches.reduce(jnp.float32(0), lambda state, batch: state + w * batch))(weight)


@pytest.mark.parametrize(
    ("zero", "step", "message"),
    [
        (0.0, lambda state, batch: (state, batch), r"structure of its zero.*found PyTreeDef\(\(\*, \*\)\)"),
        ((0.0, 0.0), lambda state, batch: 1.0, r"structure of its zero.*found PyTreeDef\(\*\)"),
        ({"a": 0.0}, lambda state, batch: {"b": batch}, "structure of its zero.*'a'.*found.*'b'"),
        (0.0, lambda state, batch: None, "structure of its zero"),
        (0.0, lambda state, batch: jnp.stack([state, batch]), r"float32\[\], found float32\[2\]"),
        (0, lambda state, batch: state + batch, r"int32\[\], found float32\[\]"),
    ],
)
def test_a_step_keeps_the_kind_of_its_state(zero, step, message):
    with pytest.raises(LanguageError, match=message):
        fold(zero, step)


def test_python_numbers_take_the_dtype_of_the_state():
    assert fold(jnp.int32(3), lambda state, batch: 5)([1.0]) == 5
    assert fold(0.0, lambda state, batch: state + batch)([1.0, 2.0]) == 3.0


def test_without_a_mask_examples_fill_whole_batches():
    unmasked = fed.SequenceType(fed.to_type([("x", (np.float32, [4, 2])), ("number", (np.int32, [4]))]))

    @fed.federated_computation(fed.FederatedType(unmasked, fed.CLIENTS))
    def totals(data):
        return fed.federated_map(lambda batches: batches.map(lambda batch: batch["number"].sum()).sum(), data)

    assert list(totals(cohort([4, 0, 8]))) == [0 + 1 + 2 + 3, 0, sum(range(6, 14))]
    with pytest.raises(CohortError, match=r"multiple of 4 examples.*no mask, found 5 in client 'c1'.*batch_type"):
        totals(cohort([4, 5, 6]))


def test_examples_that_do_not_fit_the_batches_are_refused():
    def count(fields, size=4):
        type_ = fed.SequenceType(fed.batch_type(fed.to_type(fields), size))
        computation = fed.federated_computation(
            lambda data: fed.federated_map(lambda batches: batches.num_batches, data),
            fed.FederatedType(type_, fed.CLIENTS),
        )
        return list(computation(cohort([1])))

    assert count([("number", np.int32)]) == [1]  # a computation may use fewer fields than the data have
    with pytest.raises(CohortError, match="fields y, mask, found x, number"):
        count([("y", np.int32)])
    with pytest.raises(CohortError, match="int64 in field 'number', found int32"):
        count([("number", np.int64)])
    with pytest.raises(CohortError, match=r"float32\[3\] in field 'x', found float32\[2\]"):
        count([("x", (np.float32, [3]))])
    with pytest.raises(CohortError, match="found examples of a data set"):
        fed.federated_computation(lambda x: fed.federated_sum(x), fed.FederatedType(np.int32, fed.CLIENTS))(cohort())


def test_a_wrong_batch_is_refused_with_its_client_and_place():
    @fed.federated_computation(fed.FederatedType(fed.SequenceType([("x", np.float32)]), fed.CLIENTS))
    def count(data):
        return fed.federated_map(lambda batches: batches.num_batches, data)

    good = {"x": 1.0}
    with pytest.raises(CohortError, match=r"float32 at 'batch 2/x', found str, in client 'bob'"):
        count(fed.Cohort({"ann": [good], "bob": [good, good, {"x": "no"}]}))
    with pytest.raises(CohortError, match=r"a list of batches .* in client 'bob', found dict with fields x"):
        count(fed.Cohort({"ann": [good], "bob": good}))
