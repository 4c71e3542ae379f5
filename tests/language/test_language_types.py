"""Types and positional values: every container comes back as it went in."""

import collections
import dataclasses
from typing import Any, NamedTuple

import attrs
import federated_language as fl
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens as fed
from fedlens import trees
from fedlens.errors import StructureError
from fedlens.language.types import (
    contains_sequence,
    from_positional,
    is_wide,
    leaf_paths,
    matched_fields,
    num_bytes,
    tensor_types,
    to_positional,
)


class Weights(NamedTuple):
    kernel: Any
    bias: Any


@dataclasses.dataclass
class Model:  # on purpose not registered with JAX
    weights: Any
    step: Any


@attrs.define
class Settings:
    rate: Any
    decay: Any


DTYPES = ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", "complex64", "complex128"]
arrays = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
)
names = st.sampled_from(["z", "kernel", "bias", "a", "y2"])
values = st.recursive(
    arrays,
    lambda children: st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.dictionaries(names, children, max_size=3).map(collections.OrderedDict),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Weights, children, children),
        st.builds(Model, children, children),
        st.builds(Settings, children, children),
        st.none(),
    ),
    max_leaves=8,
)


@given(values)
def test_a_value_comes_back_as_it_went_in(value):
    type_ = fed.type_of(value)
    again = from_positional(to_positional(value, type_), type_)
    assert trees.skeleton(again) == trees.skeleton(value)
    assert type(again) is type(value)
    assert [type(part) for part in _containers(again)] == [type(part) for part in _containers(value)]
    for (path, leaf), (path_again, leaf_again) in zip(trees.items(value), trees.items(again), strict=True):
        assert path == path_again
        assert leaf_again is leaf


def _containers(value):
    fields = trees.fields_of(value)
    return [] if fields is None else [value, *(part for _, child in fields for part in _containers(child))]


@given(values)
def test_a_type_lists_the_leaves_of_its_values(value):
    type_ = fed.type_of(value)
    leaves = dict(trees.items(value))
    assert leaf_paths(type_) == list(leaves)
    assert [(tensor.dtype, tensor.shape) for tensor in tensor_types(type_)] == [
        (leaf.dtype, leaf.shape) for leaf in leaves.values()
    ]
    assert num_bytes(type_) == sum(leaf.nbytes for leaf in leaves.values())
    assert is_wide(type_) == any(leaf.dtype.name in ("int64", "float64", "complex128") for leaf in leaves.values())


def test_fields_stay_in_the_order_in_which_they_were_written():
    assert str(fed.type_of({"z": 1, "a": {"y": 2.0, "b": True}})) == "<z=int32,a=<y=float32,b=bool>>"


def test_jax_arrays_numpy_arrays_and_shapes_have_one_type():
    expected = fl.TensorType(np.float32, (2, 3))
    for value in (np.zeros((2, 3), np.float32), jnp.zeros((2, 3)), jax.ShapeDtypeStruct((2, 3), np.float32), expected):
        assert fed.type_of(value) == expected
    assert fed.type_of(jnp.zeros(2, jnp.bfloat16)) == fl.TensorType(ml_dtypes.bfloat16, (2,))


@pytest.mark.parametrize(
    ("scalar", "dtype"), [(True, np.bool_), (3, np.int32), (2**40, np.int64), (-(2**40), np.int64), (0.5, np.float32)]
)
def test_a_python_scalar_has_the_narrowest_dtype_that_holds_it(scalar, dtype):
    assert fed.type_of(scalar) == fl.TensorType(dtype)


@pytest.mark.parametrize(
    ("value", "type_", "message"),
    [
        ({"w": 1.0}, [("w", np.float32), ("b", np.float32)], r"fields w, b, found fields w: 2 fields against 1"),
        ({"w": 1.0, "c": 1.0}, [("w", np.float32), ("b", np.float32)], r"a field 'b', found fields w, c"),
        (
            {"m": {"w": 1, "c": 1}},
            [("m", [("w", np.int32), ("b", np.int32)])],
            r"a field 'b' at 'm', found fields w, c",
        ),
        (3.0, [("w", np.float32)], r"a container <w=float32>, found float"),
        ({"w": [1.0]}, [("w", np.float32)], r"float32 at 'w', found list with fields 0"),
        ({"w": np.zeros(3)}, [("w", (np.float32, [3]))], r"float32\[3\] at 'w', found float64\[3\]"),
        ({"w": [np.zeros(2)]}, [("w", [(np.float64, [3])])], r"float64\[3\] at 'w/0', found float64\[2\]"),
        ({"w": np.zeros((3, 1))}, [("w", (np.float64, [3]))], r"float64\[3\] at 'w', found float64\[3,1\]"),
        ({"w": "abc"}, [("w", np.float32)], r"float32 at 'w', found str"),
        ({"w": None}, [("w", np.float32)], r"float32 at 'w', found NoneType"),
        ({"w": 1.5}, [("w", np.int32)], r"int32 at 'w', found the Python scalar 1\.5"),
        ({"w": True}, [("w", np.int32)], r"int32 at 'w', found the Python scalar True"),
        ({"w": 1}, [("w", np.bool_)], r"bool at 'w', found the Python scalar 1"),
        ({"w": 2**40}, [("w", np.int32)], r"fits int32 at 'w', found 1099511627776"),
        ({"w": -1}, [("w", np.uint8)], r"fits uint8 at 'w', found -1"),
        ({"w": 1e300}, [("w", np.float32)], r"fits float32 at 'w', found 1e\+300"),
        ({"w": 1.0}, [("w", (np.float32, [2]))], r"float32\[2\] at 'w', found the Python scalar 1\.0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(value, type_, message):
    with pytest.raises(StructureError, match=f"^Expected .*{message}"):
        to_positional(value, fl.to_type(type_))


@pytest.mark.parametrize("type_", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("scalar", [0, 3, 0.5, float("inf"), float("-inf"), float("nan")])
def test_python_numbers_fit_every_floating_type(type_, scalar):
    array = to_positional(scalar, fl.TensorType(type_))
    assert array.dtype == type_
    np.testing.assert_equal(float(array), float(scalar))


def test_fields_are_found_by_name_where_both_have_names():
    type_ = fl.to_type([("a", np.int32), ("b", np.float32)])
    assert to_positional({"b": 2.0, "a": 1}, type_) == (1, 2.0)
    assert to_positional(collections.OrderedDict(b=2.0, a=1), type_) == (1, 2.0)
    assert to_positional((1, 2.0), type_) == (1, 2.0)
    assert matched_fields({"b": [2.0], "a": None}, type_) == [None, [2.0]]


def test_unknown_dimensions_take_any_size():
    batch = np.zeros((5, 2), np.float32)
    assert to_positional(batch, fl.TensorType(np.float32, (None, 2))) is batch
    with pytest.raises(StructureError, match="found float32"):
        to_positional(batch, fl.TensorType(np.float32, (None, 3)))


def test_a_key_array_is_refused_with_the_way_out():
    with pytest.raises(StructureError, match=r"at 'state/key', found key<fry>\[?\]?.*jax\.random\.key_data\(key\)"):
        fed.type_of({"state": {"key": jax.random.key(0)}})


def test_what_is_no_array_has_no_type():
    with pytest.raises(StructureError, match="an array or a scalar at 'a/1', found object"):
        fed.type_of({"a": [1, object()]})
    with pytest.raises(StructureError, match="strings, found 1"):
        fed.type_of({1: 2.0})


def test_a_reserved_field_name_is_refused_with_its_path():
    with pytest.raises(StructureError, match=r"at 'a'.*reserved"):
        fed.type_of({"a": {"python_container": 1.0}})


def test_sequences_are_found_inside_of_types():
    sequence = fl.SequenceType(np.float32)
    assert contains_sequence(fl.to_type([("a", np.int32), ("b", [sequence])]))
    assert contains_sequence(fl.FederatedType(sequence, fl.CLIENTS))
    assert not contains_sequence(fl.to_type([np.int32, np.float32]))
