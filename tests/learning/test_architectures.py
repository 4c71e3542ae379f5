"""The networks have the shapes and sizes that they state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fedlens import trees
from fedlens.learning.architectures import MLP, CharacterLSTM, DigitsCNN

IMAGES = jnp.ones((3, 8, 8, 1))
TEXT = jnp.ones((3, 12), jnp.int32)


@pytest.mark.parametrize(
    ("network", "x", "outputs", "parameters"),
    [
        (DigitsCNN(), IMAGES, (3, 10), 16 * 9 + 16 + 32 * 16 * 9 + 32 + 512 * 64 + 64 + 64 * 10 + 10),
        (DigitsCNN((4,), 6, 7), IMAGES, (3, 7), 4 * 9 + 4 + 64 * 6 + 6 + 6 * 7 + 7),
        (MLP(), IMAGES, (3, 10), 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),
        (MLP(()), IMAGES, (3, 10), 650),
        # An LSTM layer of n units on m inputs has 4 (m + n + 1) n parameters.
        (CharacterLSTM(79, 8, 32, 2), TEXT, (3, 12, 79), 79 * 8 + 4 * 32 * (41 + 65) + 33 * 79),
    ],
    ids=["cnn", "small cnn", "mlp", "logistic regression", "lstm"],
)
def test_outputs_and_sizes(network, x, outputs, parameters):
    weights = jax.eval_shape(network.init, jax.random.key(0), x)
    assert trees.size(weights) == parameters
    assert jax.eval_shape(network.apply, weights, x).shape == outputs


def test_a_character_is_predicted_from_those_before_it_only():
    network = CharacterLSTM(9, 4, 8, 2)
    text = jnp.arange(12)[None] % 9
    weights = network.init(jax.random.key(0), text)
    before, after = (network.apply(weights, x) for x in (text, text.at[0, 7].set(3)))
    assert jnp.array_equal(before[:, :7], after[:, :7])
    assert not jnp.array_equal(before[:, 7:], after[:, 7:])
