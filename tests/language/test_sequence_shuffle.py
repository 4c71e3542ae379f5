"""The order of a sequence's rows: nothing dropped, nothing twice, and a shuffle that a client's own key decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens.language.sequence import SequenceLayout
from fedlens.runtime import Examples

BATCHES = fed.SequenceType(fed.batch_type(fed.type_of({"number": np.int32(0)}), 4))
LENGTHS = (5, 0, 8, 1, 12, 3, 0)
MOST = 16  # rows that `listed` has room for


def cohort(lengths=LENGTHS, **options):
    """Ragged clients in one array; a row's number is its place in it. Between clients lie rows of nobody."""
    lengths = np.array(lengths)
    numbers = np.arange((lengths + 1).sum(), dtype=np.int32)
    return fed.Cohort.from_examples(
        ids(len(lengths)), Examples({"number": numbers}, starts(lengths), lengths), **options
    )


def starts(lengths):
    return np.concatenate([[0], np.cumsum(np.array(lengths) + 1)[:-1]])


def ids(count):
    return [f"c{i}" for i in range(count)]


def keys(count, seed=0):
    """A key for each client, none of which is another's."""
    every = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), i)))(jnp.arange(count))
    return fed.Cohort(dict(zip(ids(count), np.asarray(every), strict=True)))


def listed(batches):
    """The numbers of the rows in the order in which they come, and how many there are."""

    def step(state, batch):
        rows, count = state
        places = jnp.where(batch["mask"], count + jnp.cumsum(batch["mask"]) - 1, MOST)
        return rows.at[places].set(batch["number"], mode="drop"), count + batch["mask"].sum(dtype=jnp.int32)

    return batches.reduce((jnp.full(MOST, -1, jnp.int32), jnp.int32(0)), step)


@fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
def list_rows(data):
    return fed.federated_map(listed, data)


@fed.federated_computation(
    fed.FederatedType(BATCHES, fed.CLIENTS), fed.FederatedType(fed.TensorType(np.uint32, (2,)), fed.CLIENTS)
)
def list_shuffled_rows(data, key):
    return fed.federated_map(lambda batches, key: listed(batches.shuffle(key)), (data, key))


def rows_of(result):
    return {client_id: rows[:count].tolist() for client_id, (rows, count) in result.items()}


@pytest.fixture(autouse=True)
def _on_every_engine(engine):
    with fed.use(engine):
        yield


def test_each_row_comes_once_in_its_order():
    assert rows_of(list_rows(cohort())) == {
        f"c{i}": list(range(start, start + length))
        for i, (start, length) in enumerate(zip(starts(LENGTHS), LENGTHS, strict=True))
    }


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_change_nothing(chunk_size):
    assert rows_of(list_rows(cohort(chunk_size=chunk_size))) == rows_of(list_rows(cohort()))


def test_shuffled_every_row_comes_once():
    plain, shuffled = rows_of(list_rows(cohort())), rows_of(list_shuffled_rows(cohort(), keys(len(LENGTHS))))
    assert {client: sorted(rows) for client, rows in shuffled.items()} == plain
    assert shuffled["c4"] != plain["c4"]
    assert shuffled["c2"] != plain["c2"]


def test_the_order_of_a_shuffle_depends_on_the_key_and_the_own_length_alone():
    def order(lengths, client):
        same_key = fed.Cohort(dict.fromkeys(ids(len(lengths)), keys(1).source[0]))
        rows = rows_of(list_shuffled_rows(cohort(lengths), same_key))[f"c{client}"]
        return [row - int(starts(lengths)[client]) for row in rows]

    alone = order([9], 0)
    assert sorted(alone) == list(range(9))
    assert order([9, 2, 3], 0) == alone
    assert order([16, 16, 9], 2) == alone  # others have more rows, so that the arrays have another size
    assert order([1, 9, 0, 4, 16, 9], 1) == alone
    assert order([1, 9, 0, 4, 16, 9], 5) == alone


def test_engines_shuffle_alike():
    shuffled = rows_of(list_shuffled_rows(cohort(), keys(len(LENGTHS))))
    with fed.use("debug"):
        assert rows_of(list_shuffled_rows(cohort(), keys(len(LENGTHS)))) == shuffled


def test_lists_of_batches_are_shuffled_batch_by_batch():
    @fed.federated_computation(
        fed.FederatedType(fed.SequenceType(np.int32), fed.CLIENTS),
        fed.FederatedType(fed.TensorType(np.uint32, (2,)), fed.CLIENTS),
    )
    def polynomial(data, key):
        def horner(batches, key):
            return batches.shuffle(key).reduce(jnp.int32(0), lambda total, digit: total * 10 + digit)

        return fed.federated_map(horner, (data, key))

    for number in polynomial(fed.Cohort({"c0": [1, 2, 3, 4, 5, 6], "c1": [7]}), keys(2)):
        assert "".join(sorted(str(number))) in ("123456", "7")


@settings(max_examples=5)
@given(lengths=st.lists(st.integers(0, MOST), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_nothing_is_dropped_and_nothing_comes_twice(lengths, seed):
    plain = rows_of(list_rows(cohort(lengths)))
    shuffled = rows_of(list_shuffled_rows(cohort(lengths), keys(len(lengths), seed)))
    assert [len(rows) for rows in plain.values()] == lengths
    assert {client: sorted(rows) for client, rows in shuffled.items()} == plain


@fed.jax_computation(fed.TensorType(np.uint32, (1200, 2)))
def orders_of_three_rows(keys):
    layout = SequenceLayout(fed.TensorType(np.int32), rows_per_batch=None, masked=False, max_rows=5)
    rows = fed.Sequence((jnp.arange(5),), 0, 3, None, layout)
    return jax.vmap(lambda key: rows.shuffle(key).order[:3])(keys)


def test_every_order_is_equally_likely():
    orders = orders_of_three_rows(np.stack(keys(1200).source))
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.sum((counts - 200) ** 2) / 200 < 20.5  # the 99.9 % quantile at 5 degrees of freedom
