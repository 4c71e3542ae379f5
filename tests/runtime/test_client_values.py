"""Client values: what the clients returned, by id and in order."""

import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import CohortError
from fedlens.runtime.values import Part, of_array

IDS = ("zoe", "ann", "bob", "eve", "max")
TYPE = fed.type_of({"z": np.zeros((2, 3), np.float32), "a": [0, 0.5]})
ROWS = np.arange(30, dtype=np.float32).reshape(5, 2, 3)


@pytest.fixture(params=["one part", "dealt to devices and chunks"])
def values(request):
    whole = (ROWS, np.arange(5, dtype=np.int32), np.arange(5, dtype=np.float32) / 2)
    shares = [np.arange(5)] if request.param == "one part" else [np.array([0, 3]), np.array([1]), np.array([4, 2])]
    return fed.ClientValues(IDS, TYPE, [Part(share, tuple(leaf[share] for leaf in whole)) for share in shares])


def test_by_id(values):
    for position, client_id in enumerate(IDS):
        np.testing.assert_array_equal(values[client_id]["z"], ROWS[position])
        assert values[client_id]["a"] == [position, position / 2]


def test_in_cohort_order(values):
    assert values.ids == IDS
    assert [value["a"][0] for value in values] == [0, 1, 2, 3, 4]
    assert [(client_id, int(value["a"][0])) for client_id, value in values.items()] == list(
        zip(IDS, range(5), strict=True)
    )
    assert dict(values.items()).keys() == set(IDS)


def test_stacked(values):
    stacked = values.stacked
    assert list(stacked) == ["z", "a"]
    np.testing.assert_array_equal(stacked["z"], ROWS)
    assert [leaf.tolist() for leaf in stacked["a"]] == [[0, 1, 2, 3, 4], [0, 0.5, 1, 1.5, 2]]
    assert [leaf.dtype for leaf in values.stacked_leaves()] == [np.float32, np.int32, np.float32]


def test_length_and_membership(values):
    assert len(values) == 5
    assert "bob" in values
    assert "bo" not in values
    assert 0 not in values


def test_repr_is_short(values):
    assert repr(values) == "ClientValues(5 clients: z float32[2,3], a/0 int32[], a/1 float32[])"
    many = of_array(IDS, np.zeros(5))
    assert repr(many) == "ClientValues(5 clients: value float64[])"
    wide = fed.type_of([0.5] * 9)
    part = Part(np.arange(1), tuple(np.zeros((9, 1), np.float32)))
    assert repr(fed.ClientValues(["a"], wide, [part])).endswith("1 float32[], 2 float32[], ...)")


def test_an_unknown_client_is_named_with_the_nearest(values):
    with pytest.raises(
        CohortError, match=r"^Expected the id of a client of this cohort, such as 'zoe', found 'zoo'\.$"
    ):
        values["zoo"]
    with pytest.raises(KeyError, match="such as 'zoe', 'ann', 'bob', found 0"):
        values[0]


def test_values_of_an_array():
    values = of_array(IDS, ROWS)
    np.testing.assert_array_equal(values["bob"], ROWS[2])
    assert values.stacked is ROWS
