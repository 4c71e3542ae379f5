"""Values that every device has. Results are handed out as ordinary arrays, on one device; when such an array comes
back, as the state of a process does in every round, its copies on the other devices are found again.

Copying seven leaves of 0.8 MB to two devices took 1.5 ms, twice in a round of 40.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
from jax.sharding import NamedSharding

_replicas: dict[int, jax.Array] = {}  # id of an array that was handed out -> the same value on all devices


def on_one_device(array: jax.Array) -> jax.Array:
    """A replicated array as one on its first device, without a copy."""
    first = array.addressable_data(0)
    # A new object, which `array` does not hold: when the last holder of it is gone, so are the replicas.
    single = jax.make_array_from_single_device_arrays(first.shape, first.sharding, [first])
    _replicas[id(single)] = array
    weakref.finalize(single, _replicas.pop, id(single), None).atexit = False
    return single


def on_all_devices(values: Any, sharding: NamedSharding) -> Any:
    """A pytree of arrays with every leaf on all devices of `sharding`, which replicates."""
    leaves, structure = jax.tree.flatten(values)
    replicas = [_replicas.get(id(leaf), leaf) for leaf in leaves]
    missing = [
        number
        for number, leaf in enumerate(replicas)
        if not isinstance(leaf, jax.Array) or leaf.sharding != sharding or leaf.is_deleted()
    ]
    if missing:  # in one call: each costs 0.1 ms, one for nothing too
        copies = jax.device_put([leaves[number] for number in missing], sharding)
        for number, copy in zip(missing, copies, strict=True):
            replicas[number] = copy
    return jax.tree.unflatten(structure, replicas)
