"""A function as XLA has it and as fedlens's rules lower it: results, and what is left in loops."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from fedlens.runtime.lowering import lowered_for_cpu


def drawn(*shape, dtype=np.float32):
    """Normal numbers, always the same."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def both(function, *operands):
    """What the function gives as XLA has it and as fedlens does, and the shapes of the products in loops of each."""
    results, products = [], []
    for lowered in (lower(function, *operands), lower_for_cpu(function, *operands)):
        results.append(lowered.compile()(*operands))
        products.append(looped_products(lowered))
    return *results, *products


def lower(function, *operands):
    return jax.jit(function).lower(*operands)


def lower_for_cpu(function, *operands):
    with lowered_for_cpu():
        return lower(function, *operands)


def looped_products(lowered):
    """The shapes that products within loops give, each written as HLO has it."""
    computations = {}
    for block in lowered.as_text("hlo").split("\n\n"):
        head, *lines = block.strip().splitlines() or [""]
        if not head.endswith("{"):
            continue
        computations[head.removeprefix("ENTRY ").split()[0].lstrip("%")] = lines
    called = {
        name: {each for line in lines for each in re.findall(r"(?:to_apply|calls|body)=%?([\w.\-]+)", line)}
        for name, lines in computations.items()
    }
    looped = {
        each for lines in computations.values() for line in lines for each in re.findall(r"body=%?([\w.\-]+)", line)
    }
    while more := {each for name in looped for each in called[name]} - looped:
        looped |= more
    dots = (re.search(r"= (\S+?\])\S* dot\(", line) for name in looped for line in computations[name])
    return sorted(dot[1] for dot in dots if dot)


def assert_close(found, expected, tolerance=1e-5):
    """In norm, leaf by leaf: sums are in another order, and a product over steps rounds as one over rows does."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
