"""TFF's optimizers against their published update rules, written out in NumPy in 64 bits."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens.compat.tff as tff
from fedlens.compat.tff.learning.optimizers import as_optax
from fedlens.errors import UnsupportedError

WEIGHTS = np.array([1.0, -2.0, 0.5])
GRADIENTS = np.random.default_rng(0).normal(size=(6, 3))
optimizers = tff.learning.optimizers


def sgdm(rate, momentum=None):
    w, v = WEIGHTS, np.zeros(3)
    for g in GRADIENTS:
        v = (momentum or 0) * v + g
        w = w - rate * v
    return w


def adam_like(rate, b1=0.9, b2=0.999, epsilon=1e-7, first=0.0, yogi=False, decay=0.0):
    w, a, s = WEIGHTS, np.zeros(3), np.full(3, first)
    for t, g in enumerate(GRADIENTS, start=1):
        a = b1 * a + (1 - b1) * g
        s = s + (1 - b2) * np.sign(g**2 - s) * g**2 if yogi else b2 * s + (1 - b2) * g**2
        normalization = np.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - rate * (normalization * a / (np.sqrt(s) + epsilon) + decay * w)
    return w


def adagrad(rate, first=0.1, epsilon=1e-7):
    w, s = WEIGHTS, np.full(3, first)
    for g in GRADIENTS:
        s = s + g**2
        w = w - rate * g / np.sqrt(s + epsilon)
    return w


def rmsprop(rate, decay=0.9, epsilon=1e-7):
    w, s = WEIGHTS, np.zeros(3)
    for g in GRADIENTS:
        s = decay * s + (1 - decay) * g**2
        w = w - rate * g / (np.sqrt(s) + epsilon)
    return w


def after_all_gradients(optimizer):
    weights = WEIGHTS.astype(np.float32)
    state = optimizer.init(weights)
    for gradient in GRADIENTS.astype(np.float32):
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optimizers.build_sgdm(), sgdm(0.01)),
        (optimizers.build_sgdm(0.1, momentum=0.9), sgdm(0.1, 0.9)),
        (optimizers.build_adam(0.1), adam_like(0.1)),
        # An epsilon that shows whether it is added before or after the bias is corrected.
        (optimizers.build_adam(0.1, 0.8, 0.99, epsilon=0.1), adam_like(0.1, 0.8, 0.99, epsilon=0.1)),
        (optimizers.build_adamw(0.1), adam_like(0.1, decay=0.004)),
        (optimizers.build_adamw(0.1, weight_decay=0.3), adam_like(0.1, decay=0.3)),
        (optimizers.build_yogi(0.1), adam_like(0.1, epsilon=1e-3, first=1e-6, yogi=True)),
        (optimizers.build_adagrad(0.1), adagrad(0.1)),
        (optimizers.build_adagrad(0.1, 1.0, 0.5), adagrad(0.1, 1.0, 0.5)),
        (optimizers.build_rmsprop(0.1), rmsprop(0.1)),
        (optimizers.build_rmsprop(0.1, 0.5, epsilon=0.1), rmsprop(0.1, 0.5, epsilon=0.1)),
    ],
)
def test_the_update_rule_is_tff_s(optimizer, expected):
    np.testing.assert_allclose(after_all_gradients(optimizer), expected, rtol=2e-5)


@given(st.floats(0.001, 1.0), st.floats(0.0, 0.95))
def test_momentum_is_heavy_ball_for_any_numbers(rate, momentum):
    found = after_all_gradients(optimizers.build_sgdm(rate, momentum))
    np.testing.assert_allclose(found, sgdm(rate, momentum), rtol=1e-4, atol=1e-5)


def test_adam_is_not_optax_s_when_epsilon_matters():
    ours = after_all_gradients(optimizers.build_adam(0.1, epsilon=0.1))
    assert not np.allclose(ours, after_all_gradients(optax.adam(0.1, eps=0.1)), rtol=1e-2)


def keras_optimizer(name, **config):
    return type(name, (), {"get_config": lambda self: {"name": name.lower(), **config}})()


def test_an_optimizer_a_function_and_keras_settings_are_all_understood():
    expected = after_all_gradients(optimizers.build_sgdm(0.1, 0.5))
    sgd = keras_optimizer("SGD", learning_rate=0.1, momentum=0.5, nesterov=False, weight_decay=None)
    for given_as in (optimizers.build_sgdm(0.1, 0.5), lambda: optax.sgd(0.1, 0.5), sgd, lambda: sgd):
        np.testing.assert_array_equal(after_all_gradients(as_optax(given_as)), expected)
    adam = keras_optimizer("Adam", learning_rate=0.1, beta_1=0.8, beta_2=0.9, epsilon=1e-3, amsgrad=False)
    np.testing.assert_allclose(after_all_gradients(as_optax(adam)), adam_like(0.1, 0.8, 0.9, epsilon=1e-3), rtol=2e-5)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (keras_optimizer("Ftrl", learning_rate=0.1), "one of the Keras optimizers SGD, Adam, found Ftrl"),
        (keras_optimizer("Adam", learning_rate=0.1, amsgrad=True), "found amsgrad"),
        (keras_optimizer("SGD", learning_rate={"class_name": "ExponentialDecay"}), "a schedule of learning rates"),
        (0.1, "an optimizer of tff.learning.optimizers or of optax, found float"),
    ],
)
def test_what_is_not_translated_is_refused(optimizer, message):
    with pytest.raises(UnsupportedError, match=message):
        as_optax(optimizer)


@pytest.mark.tensorflow
def test_keras_own_optimizers_take_the_same_steps():
    import tensorflow as tf

    for keras in (
        tf.keras.optimizers.SGD(0.1),
        tf.keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        tf.keras.optimizers.Adam(0.1, epsilon=0.1),
    ):
        variable = tf.Variable(WEIGHTS.astype(np.float32))
        for gradient in GRADIENTS.astype(np.float32):
            keras.apply_gradients([(tf.constant(gradient), variable)])
        np.testing.assert_allclose(after_all_gradients(as_optax(keras)), variable.numpy(), rtol=2e-5)
