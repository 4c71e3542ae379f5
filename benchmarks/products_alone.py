"""How fast this machine multiplies matrices: at best, and in the shapes of a workload. One JAX device for each core."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from measuring import cores
from operations import Product

_SQUARES = (256, 512, 1024)
_OPERATIONS = 4e8  # of a measurement on each core: some milliseconds
_OPERANDS = 4  # that a loop goes round, so that no product is the one before


def peak(repeats: int = 5) -> float:
    """Operations a second of square float32 products on all cores: the best of some sizes and repeats."""
    return max(2 * size**3 * cores() / seconds(size, size, size, repeats) for size in _SQUARES)


def seconds_of_step(products: Sequence[Product]) -> float:
    """Seconds of a step's products alone, one after the other on one core, while every core does the same."""
    return sum(product.count * seconds(product.m, product.k, product.n) for product in products)


@cache
def seconds(m: int, k: int, n: int, repeats: int = 5) -> float:
    """Seconds of one float32 product on one core, in a loop, while every core does the same; the least of some."""
    mesh, spread = _mesh(), PartitionSpec("cores")
    times = max(_OPERANDS, int(_OPERATIONS / (2 * m * k * n)))

    def chain(left: Any, right: Any, times: int) -> Any:
        # Each round overwrites the result; XLA takes no round away.
        return lax.fori_loop(0, times, lambda i, _: left[i % _OPERANDS] @ right, jnp.zeros((m, n)))

    run = jax.jit(
        jax.shard_map(
            partial(chain, times=times), mesh=mesh, in_specs=(spread, spread), out_specs=spread, check_vma=False
        )
    )
    generator = np.random.default_rng(0)
    left = generator.standard_normal((mesh.size * _OPERANDS, m, k), np.float32)
    right = generator.standard_normal((mesh.size * k, n), np.float32)
    left, right = jax.device_put((left, right), jax.sharding.NamedSharding(mesh, spread))
    jax.block_until_ready(run(left, right))
    least = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(left, right))
        least = min(least, (time.perf_counter() - start) / times)
    return float(least)


@cache
def _mesh() -> Mesh:
    jax.config.update("jax_num_cpu_devices", cores())
    return Mesh(np.array(jax.devices()), ("cores",))
