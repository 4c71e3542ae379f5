"""The losses against optax, closed forms, and labels that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.errors import StructureError

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(6, 300))).astype(np.float32)
LABELS = RNG.integers(0, 256, 6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32])
def test_cross_entropy_and_its_gradient(dtype):
    labels = jnp.asarray(LABELS.astype(dtype))

    def mean(loss):
        return lambda logits: loss(logits, labels).mean()

    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(fed.losses.cross_entropy(jnp.asarray(LOGITS), labels), expected, rtol=1e-5)
    found = jax.grad(mean(fed.losses.cross_entropy))(jnp.asarray(LOGITS))
    one_hot = np.eye(300)[LABELS]
    exponentials = np.exp(LOGITS.astype(np.float64))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, (softmax - one_hot) / len(LABELS), atol=1e-7)


def test_cross_entropy_does_not_overflow():
    logits = jnp.array([[1e30, 0.0], [-1e30, 0.0], [-np.inf, 0.0]], jnp.float32)
    losses = fed.losses.cross_entropy(logits, jnp.array([0, 1, 1]))
    np.testing.assert_array_equal(losses, [0, 0, 0])
    gradient = jax.grad(lambda logits: fed.losses.cross_entropy(logits, jnp.array([0, 1, 1])).sum())(logits)
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_a_label_that_is_no_class_has_no_loss(label):
    losses = fed.losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([label, 2], jnp.int32))
    assert np.isnan(losses[0])
    np.testing.assert_allclose(losses[1], np.log(3), rtol=1e-6)


def test_labels_that_are_no_integers():
    with pytest.raises(StructureError, match=r"Expected integer labels, found float32"):
        fed.losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
