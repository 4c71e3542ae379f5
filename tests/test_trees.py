"""Trees: containers are taken apart and put together in the order of their own fields."""

import collections
import dataclasses
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlens import trees
from fedlens.errors import StructureError


class Pair(NamedTuple):
    second: Any
    first: Any


@dataclasses.dataclass(frozen=True)
class Layer:
    kernel: Any
    bias: Any


@attrs.define
class Point:
    y: Any
    x: Any


names = st.text("abcxyz_", min_size=1, max_size=4)
nested = st.recursive(
    st.integers(),
    lambda children: st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.dictionaries(names, children, max_size=3).map(collections.OrderedDict),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Layer, children, children),
        st.builds(Point, children, children),
        st.none(),
    ),
    max_leaves=12,
)


@given(nested)
def test_mapping_the_identity_gives_an_equal_tree_of_the_same_classes(tree):
    again = trees.map(lambda leaf: leaf, tree)
    assert again == tree
    assert type(again) is type(tree)


@given(nested)
def test_every_path_leads_to_its_leaf(tree):
    for path, leaf in trees.items(tree):
        assert trees.get(tree, path) == leaf
    assert [leaf for _, leaf in trees.items(tree)] == trees.leaves(tree)
    assert len({path for path, _ in trees.items(tree)}) == len(trees.leaves(tree))


@given(nested)
def test_a_skeleton_is_json_and_holds_the_order_of_the_leaves(tree):
    import json

    skeleton = json.loads(json.dumps(trees.skeleton(tree)))
    rebuilt = trees.from_skeleton(skeleton, trees.leaves(tree))
    assert list(trees.items(rebuilt)) == list(trees.items(tree))


def test_fields_keep_the_order_in_which_they_were_written():
    tree = {"z": 1, "a": {"y": 2, "b": 3}, "m": [4, Pair(5, Layer(6, Point(7, 8)))]}
    assert dict(trees.items(tree)) == {
        "z": 1,
        "a/y": 2,
        "a/b": 3,
        "m/0": 4,
        "m/1/second": 5,
        "m/1/first/kernel": 6,
        "m/1/first/bias/y": 7,
        "m/1/first/bias/x": 8,
    }
    assert trees.leaves(tree) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_map_over_two_trees_pairs_leaves_by_position():
    assert trees.map(lambda a, b: a - b, Layer(5, [3]), Layer(1, [2])) == Layer(4, [1])
    with pytest.raises(StructureError, match="one structure"):
        trees.map(lambda a, b: a, {"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(StructureError, match="one structure"):
        trees.map(lambda a, b: a, {"a": 1}, 3)


def test_a_path_that_leads_nowhere_is_a_key_error():
    for path in ("b", "a/0", "a/x/y"):
        with pytest.raises(KeyError, match=path):
            trees.get({"a": {"x": 1}}, path)


def test_leaves_that_do_not_fit_a_skeleton_are_refused():
    with pytest.raises(StructureError, match="more leaves than 1"):
        trees.from_skeleton(trees.skeleton([1, 2]), [1])
    with pytest.raises(StructureError, match="fewer leaves than 3"):
        trees.from_skeleton(trees.skeleton([1, 2]), [1, 2, 3])


def test_keys_of_a_mapping_are_strings():
    with pytest.raises(StructureError, match=r"strings, found 3\b.*\bint\b"):
        trees.leaves({3: 1})


def test_without_a_class_named_fields_make_a_dict_and_others_a_tuple():
    assert trees.build(None, [("b", 1), ("a", 2)]) == {"b": 1, "a": 2}
    assert list(trees.build(None, [("b", 1), ("a", 2)])) == ["b", "a"]
    assert trees.build(None, [(None, 1), (None, 2)]) == (1, 2)
    with pytest.raises(StructureError, match="set"):
        trees.build(set, [(None, 1)])


def test_size_counts_scalars():
    assert trees.size({"a": np.zeros((2, 3)), "b": [np.zeros(()), np.zeros((0, 5))], "c": None}) == 7
