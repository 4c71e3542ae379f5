"""Max pooling as lowered for CPU, against XLA's own: the same bits, in all the ways in which models pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlens.runtime import pooling
from fedlens.runtime.lowering import lowered_for_cpu


@pytest.fixture(autouse=True, scope="module")
def installed():
    assert pooling.install()


def both(function, *operands):
    """The function compiled as XLA has it, and as fedlens does, with what was compiled."""
    expected = jax.jit(function)(*operands)
    with lowered_for_cpu():
        lowered = jax.jit(function).lower(*operands)
        return expected, lowered.compile()(*operands), lowered.as_text()


def pooled(window, strides, padding):
    return lambda x: nn.max_pool(x, window, strides, padding)


@settings(max_examples=12)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["VALID", "SAME", ((1, 0), (0, 1))]),
    st.tuples(st.integers(3, 7), st.integers(3, 7)),
    st.sampled_from([np.float32, np.int32, jnp.bfloat16]),
)
def test_pooling_has_the_bits_of_xla(window, strides, padding, extent, dtype):
    x = np.random.default_rng(0).integers(-5, 5, (2, *extent, 3)).astype(dtype)
    if padding not in ("VALID", "SAME"):
        padding = tuple(
            (min(low, size - 1), min(high, size - 1)) for (low, high), size in zip(padding, window, strict=True)
        )
    expected, found, text = both(pooled(window, strides, padding), x)
    assert "reduce_window" not in text
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@settings(max_examples=12)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.sampled_from(["VALID", "SAME", ((2, 0), (1, 1))]),
    st.tuples(st.integers(3, 8), st.integers(3, 8)),
    st.sampled_from([np.nan, -np.inf, 1.0]),
)
def test_gradients_go_to_the_first_of_equal_cells(window, strides, padding, extent, special):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 3, (2, *extent, 3)).astype(np.float32)  # many ties
    x[0, 0, 0, 0] = special
    if padding not in ("VALID", "SAME"):
        padding = tuple(
            (min(low, size - 1), min(high, size - 1)) for (low, high), size in zip(padding, window, strict=True)
        )
    pooling_of = pooled(window, strides, padding)
    slope = rng.integers(-4, 5, jax.eval_shape(pooling_of, x).shape).astype(np.float32)  # whose sums are exact

    def gradient(x, slope):
        return jax.vjp(pooling_of, x)[1](slope)[0]

    expected, found, text = both(gradient, x, slope)
    assert "select_and_scatter" not in text
    np.testing.assert_array_equal(found, expected)


def test_a_gradient_by_its_definition():
    """Each window of three, two apart, gives its slope to its largest cell; the cell 4 is largest in two of them."""
    x, slope = np.array([1, 0, 4, 3, 2, 9], np.float32), np.array([10, 20], np.float32)

    def pool(x):
        return nn.max_pool(x[None, :, None], (3,), (2,))[0, :, 0]

    with lowered_for_cpu():
        found = jax.jit(lambda x, slope: jax.vjp(pool, x)[1](slope)[0])(x, slope)
    np.testing.assert_array_equal(found, [0, 0, 30, 0, 0, 0])


def test_overlapping_gradients_in_16_bits_are_rounded_once():
    """In bfloat16, 256 + 1 is 256, three times over; the sum 259 lies between 258 and 260."""
    x = np.zeros((1, 7, 1), np.float32)
    x[0, 3] = 1  # the largest of four windows
    slope = np.array([256, 1, 1, 1], np.float32)[None, :, None]

    def gradient(x, slope):
        return jax.vjp(pooled((4,), (1,), "VALID"), x)[1](slope)[0]

    with lowered_for_cpu():
        found = jax.jit(gradient)(x.astype(jnp.bfloat16), slope.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 3, 0]) == 260


def test_windows_far_apart_keep_the_gradient_of_xla():
    x = np.random.default_rng(2).normal(size=(1, 20, 20, 2)).astype(np.float32)
    expected, found, text = both(jax.grad(lambda x: pooled((1, 1), (9, 9), "VALID")(x).sum()), x)
    assert "select_and_scatter" in text
    np.testing.assert_array_equal(found, expected)


def test_under_vmap_and_scan():
    x = np.random.default_rng(3).normal(size=(4, 2, 6, 6, 3)).astype(np.float32)

    def gradients(x):
        one = jax.grad(lambda image: (pooled((2, 2), (2, 2), "VALID")(image) ** 2).sum())
        return jax.vmap(one)(x), jax.lax.map(one, x)

    expected, found, text = both(gradients, x)
    assert "select_and_scatter" not in text
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_outside_of_fedlens_nothing_changes():
    x = np.ones((1, 4, 4, 1), np.float32)
    text = jax.jit(jax.grad(lambda x: pooled((2, 2), (2, 2), "VALID")(x).sum())).lower(x).as_text()
    assert "select_and_scatter" in text
