"""Clipping: the norm of what it returns, for every input; and what it leaves as it is."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlens as fed
from fedlens.errors import ConfigError, LanguageError
from fedlens.privacy.clipping import clipped

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
NORMS = st.floats(1e-3, 1e3)


def length(*leaves):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves)))


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (4,), elements=FLOATS), arrays.arrays(np.float32, (2, 3), elements=FLOATS), NORMS)
def test_no_result_is_longer_than_the_norm_and_short_ones_keep_their_bits(kernel, bias, norm):
    found = clipped({"kernel": kernel, "bias": bias}, norm)
    before, after = length(kernel, bias), length(*found.values())
    assert after <= norm * (1 + 1e-5)
    if np.isfinite(before) and before < norm * (1 - 1e-5):
        np.testing.assert_array_equal(found["kernel"], kernel)
        np.testing.assert_array_equal(found["bias"], bias)
    if not np.isfinite(before):
        assert after == 0


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.float32, (6,), elements=st.floats(-1e3, 1e3, width=32)), NORMS)
def test_a_longer_value_is_scaled_down_to_the_norm_and_clipping_again_changes_nothing_more(value, norm):
    once = np.asarray(clipped(value, norm))
    twice = np.asarray(clipped(once, norm))
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-30)
    if length(value) > norm:
        np.testing.assert_allclose(once, value * (norm / length(value)), rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e38])
def test_the_squares_of_very_small_and_very_large_numbers_matter_not(size):
    value = np.full(3, size, np.float32)
    np.testing.assert_allclose(clipped(value, 1.0), value / max(1.0, np.sqrt(3.0) * size), rtol=1e-5)


def test_leaves_keep_their_dtypes():
    found = clipped({"half": np.full(2, 3, np.float16), "single": np.full(2, 4, np.float32)}, 1.0)
    assert [leaf.dtype for leaf in found.values()] == [np.float16, np.float32]
    np.testing.assert_allclose(length(*found.values()), 1, rtol=1e-3)


@pytest.mark.parametrize("engine", ["local", "debug"])
def test_mapped_over_clients_each_is_clipped_for_itself(engine):
    @fed.federated_computation(fed.FederatedType(fed.TensorType(np.float32, (2,)), fed.CLIENTS))
    def computation(values):
        return fed.federated_map(fed.privacy.clip(1.0), values)

    with fed.use(engine):
        found = computation(
            fed.Cohort({"alice": np.array([3, 4], np.float32), "bob": np.array([0.3, 0.4], np.float32)})
        )
    np.testing.assert_allclose(found["alice"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(found["bob"], np.array([0.3, 0.4], np.float32))


@pytest.mark.parametrize("norm", [0, -1.0, np.inf, np.nan, "1", True, None])
def test_a_norm_is_a_positive_number(norm):
    with pytest.raises(ConfigError, match="Expected a positive, finite norm, found"):
        fed.privacy.clip(norm)


def test_whole_numbers_are_not_clipped():
    with pytest.raises(LanguageError, match="Expected floating-point numbers to clip, found int32 numbers in leaf 'n'"):
        fed.privacy.clip(1.0)({"w": np.zeros(2, np.float32), "n": np.int32(3)})
