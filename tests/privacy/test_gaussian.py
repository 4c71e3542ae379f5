"""Gaussian noise: its moments and independence, against the normal distribution of SciPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats

import fedlens as fed
from fedlens.compiler.mechanisms import Clip, GaussianNoise, LocalGaussian, from_text, mechanism_of, to_text
from fedlens.errors import ConfigError, UnsupportedError

COUNT = 40_000
KEY = np.asarray(jax.random.PRNGKey(7))


def noise_of(mechanism, value, key=KEY):
    found = mechanism(value, key)
    return jax.tree.map(lambda after, before: np.asarray(after, np.float64) - before, found, value)


@pytest.mark.parametrize("deviation", [0.5, 3.0])
def test_the_noise_is_normal_with_the_deviation_that_was_asked_for(deviation):
    noise = noise_of(fed.privacy.gaussian_noise(deviation, 1.0), np.zeros(COUNT, np.float32))
    # Of 40,000 draws the mean is within 5 of its standard errors, the deviation too; the seed is fixed.
    assert abs(noise.mean()) < 5 * deviation / np.sqrt(COUNT)
    assert abs(noise.std() / deviation - 1) < 5 / np.sqrt(2 * COUNT)
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-3


def test_the_leaves_have_noise_of_their_own_and_keep_their_types():
    value = {"a": np.zeros(COUNT, np.float32), "b": np.zeros((COUNT // 4, 4), np.float32)}
    noise = noise_of(fed.privacy.gaussian_noise(1.0, 1.0), value)
    assert noise["b"].shape == (COUNT // 4, 4)
    assert abs(np.corrcoef(noise["a"], noise["b"].ravel())[0, 1]) < 5 / np.sqrt(COUNT)


def test_the_noise_follows_from_the_key_and_does_not_depend_on_the_value():
    mechanism = fed.privacy.gaussian_noise(1.0, 1.0)
    first = noise_of(mechanism, np.zeros(100, np.float32))
    np.testing.assert_array_equal(first, noise_of(mechanism, np.zeros(100, np.float32)))
    np.testing.assert_allclose(first, noise_of(mechanism, np.full(100, 8, np.float32)), atol=1e-5)
    other = noise_of(mechanism, np.zeros(100, np.float32), np.asarray(jax.random.PRNGKey(8)))
    assert np.all(first != other)


def test_the_local_mechanism_clips_before_it_adds_noise():
    value = np.full(COUNT, 100, np.float32)
    found = np.asarray(fed.privacy.local_gaussian(2.0, norm=10.0)(value, KEY), np.float64)
    mean = 10 / np.sqrt(COUNT)  # of a value of norm 10 whose numbers are equal
    assert abs(found.mean() - mean) < 5 * 2 / np.sqrt(COUNT)
    assert abs(found.std() / 2 - 1) < 5 / np.sqrt(2 * COUNT)


def test_a_private_sum_is_the_sum_of_clipped_values_and_noise():
    vector = fed.TensorType(np.float32, (2,))

    @fed.federated_computation(
        fed.FederatedType(vector, fed.CLIENTS), fed.FederatedType(fed.TensorType(np.uint32, (2,)), fed.SERVER)
    )
    def private_sum(values, key):
        total = fed.federated_sum(fed.federated_map(fed.privacy.clip(5.0), values))
        return total, fed.federated_map(fed.privacy.gaussian_noise(1.0, 5.0), (total, key))

    values = [np.array([3, 4], np.float32), np.array([30, 40], np.float32)]
    total, noised = private_sum(values, KEY)
    np.testing.assert_allclose(total, [6, 8], rtol=1e-6)
    alone = fed.privacy.gaussian_noise(1.0, 5.0)(np.zeros(2, np.float32), KEY)
    np.testing.assert_allclose(noised - total, alone, atol=1e-5)


@pytest.mark.parametrize("wrong", [0, -1.0, np.inf, np.nan])
def test_deviations_and_sensitivities_are_positive(wrong):
    with pytest.raises(ConfigError, match="positive, finite standard deviation"):
        fed.privacy.gaussian_noise(wrong, 1.0)
    with pytest.raises(ConfigError, match="positive, finite sensitivity"):
        fed.privacy.gaussian_noise(1.0, wrong)
    with pytest.raises(ConfigError, match="positive, finite norm"):
        fed.privacy.local_gaussian(1.0, wrong)


MECHANISMS = [Clip(0.5), GaussianNoise(2.0, 1.0), LocalGaussian(4.0, 1.0)]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_a_mechanism_is_the_same_in_writing(mechanism):
    assert from_text(to_text(mechanism)) == mechanism


@pytest.mark.parametrize(
    "text", ["", "clip", "{}", '{"kind": "laplace"}', '{"kind": "clip"}', '{"kind": "clip", "norm": -1}', "[1]"]
)
def test_a_mechanism_that_is_not_known_is_refused(text):
    with pytest.raises(UnsupportedError, match="Expected one of the mechanisms clip, gaussian-noise, local-gaussian"):
        from_text(text)


def test_a_computation_says_what_it_is_here_and_after_its_way_over_a_proto():
    @fed.federated_computation(fed.TensorType(np.float32, (2,)))
    def clipped(value):
        return fed.privacy.clip(0.5)(value)

    def mechanisms(block):
        found = [mechanism_of(block)] if isinstance(block, fed.framework.CompiledComputation) else []
        return [each for each in found if each] + [each for child in block.children() for each in mechanisms(child)]

    for computation in (clipped, fed.to_portable(clipped)):
        block = fed.framework.ComputationBuildingBlock.from_proto(computation.to_proto())
        from fedlens.compiler.normalize import normalize

        assert mechanisms(normalize(block)) == [Clip(0.5)]
