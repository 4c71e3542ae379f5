"""Every engine takes any nested structure and any cohort, and gives back what NumPy gives."""

import collections
import dataclasses
from typing import Any, NamedTuple

import attrs
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens import trees


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


shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
leaves = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype), st.sampled_from(["float32", "float64", "float16"]), shapes
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["z", "kernel", "a"]), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.builds(lambda first, second: (first, second), inner, inner),
        st.builds(Weights, inner, st.none() | inner),
        st.builds(Model, inner, inner),
        st.builds(Settings, inner, inner),
    ),
    max_leaves=4,
)
ids = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


def computation_of(type_):
    @fed.federated_computation(fed.FederatedType(type_, fed.CLIENTS))
    def compute(values):
        return {
            "as they came": values,
            "mapped": fed.federated_map(lambda value: value, values),
            "sum": fed.federated_sum(values),
            "mean": fed.federated_mean(values),
        }

    return compute


def assert_same_containers(found, expected):
    assert type(found) is type(expected) or trees.fields_of(expected) is None
    for (name, child), (expected_name, expected_child) in zip(
        trees.fields_of(found) or [], trees.fields_of(expected) or [], strict=True
    ):
        assert name == expected_name
        assert_same_containers(child, expected_child)


@settings(max_examples=12)
@given(template=nested, ids=ids, chunk_size=st.none() | st.integers(1, 4), seed=st.integers(0, 2**31))
def test_any_structure_of_any_cohort(engine, template, ids, chunk_size, seed):
    rng = np.random.default_rng(seed)
    values = [
        trees.map(lambda leaf: rng.integers(-8, 8, leaf.shape).astype(leaf.dtype) / leaf.dtype.type(4), template)
        for _ in ids
    ]
    with fed.use(engine):
        cohort = fed.Cohort(dict(zip(ids, values, strict=True)), chunk_size=chunk_size)
        result = computation_of(fed.type_of(template))(cohort)
    for name in ("as they came", "mapped"):
        assert result[name].ids == tuple(ids)
        for found, value in zip(result[name], values, strict=True):
            assert_same_containers(found, value)
            for found_leaf, leaf in zip(trees.leaves(found), trees.leaves(value), strict=True):
                assert (found_leaf.dtype, found_leaf.shape) == (leaf.dtype, leaf.shape)
                assert np.asarray(found_leaf).tobytes() == leaf.tobytes()
    for name, reduced in (("sum", np.sum), ("mean", np.mean)):
        assert_same_containers(result[name], template)
        for found_leaf, *of_clients in zip(trees.leaves(result[name]), *map(trees.leaves, values), strict=True):
            assert (found_leaf.dtype, found_leaf.shape) == (of_clients[0].dtype, of_clients[0].shape)
            tolerance = {2: 1e-3, 4: 1e-6, 8: 1e-15}[found_leaf.dtype.itemsize]
            expected = reduced(np.stack(of_clients).astype(np.float64), axis=0)
            np.testing.assert_allclose(np.asarray(found_leaf, np.float64), expected, rtol=tolerance)


def test_an_ordered_dict_keeps_its_class_and_order(engine):
    value = collections.OrderedDict(z=1.0, a=collections.OrderedDict(y=2.0, b=3.0))
    with fed.use(engine):
        result = computation_of(fed.type_of(value))([value])
    for found in (result["mean"], result["mapped"]["0"], result["as they came"]["0"]):
        assert found == value
        assert_same_containers(found, value)


def test_jax_arrays_and_numpy_arrays_alike(engine):
    import jax.numpy as jnp

    type_ = fed.type_of({"w": jnp.zeros(2)})
    with fed.use(engine):
        mean = computation_of(type_)([{"w": jnp.ones(2)}, {"w": np.full(2, 3, np.float32)}])["mean"]
    np.testing.assert_array_equal(mean["w"], [2, 2])
