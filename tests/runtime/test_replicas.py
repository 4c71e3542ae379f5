"""Results are ordinary arrays on one device, and are on every device again when they come back."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedlens.runtime import replicas


@pytest.fixture
def everywhere():
    return NamedSharding(Mesh(np.array(jax.local_devices()[:2]), ("clients",)), PartitionSpec())


def test_a_result_is_on_one_device_and_comes_back_without_a_copy(everywhere):
    value = jax.device_put(jnp.arange(6.0), everywhere)
    single = replicas.on_one_device(value)
    assert single.devices() == {jax.local_devices()[0]}
    assert single.unsafe_buffer_pointer() == value.addressable_data(0).unsafe_buffer_pointer()
    back = replicas.on_all_devices({"w": single}, everywhere)["w"]
    assert back is value


def test_replicas_are_forgotten_with_the_result(everywhere):
    gc.collect()  # what other tests left must not go in between
    before = len(replicas._replicas)
    single = replicas.on_one_device(jax.device_put(jnp.arange(6.0), everywhere))
    assert len(replicas._replicas) == before + 1
    del single
    gc.collect()
    assert len(replicas._replicas) == before


def test_a_value_of_other_devices_is_copied(everywhere):
    one = NamedSharding(Mesh(np.array(jax.local_devices()[:1]), ("clients",)), PartitionSpec())
    single = replicas.on_one_device(jax.device_put(jnp.arange(6.0), everywhere))
    back = replicas.on_all_devices([single, np.int32(3)], one)
    assert [leaf.sharding for leaf in back] == [one, one]
    assert np.array_equal(back[0], np.arange(6.0))
    assert back[1] == 3
