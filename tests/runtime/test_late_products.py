"""Products of few terms behind a step's barrier: which move, and that what the step gives stays what it was."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from lowered import assert_close, drawn

from fedlens.runtime.late_products import MAX_TERMS, products_last
from fedlens.runtime.lowering import lowered_for_cpu

SIZES = (12, 9, 7)
OPTIMIZERS = {
    "SGD": (optax.sgd(0.1), True),
    "weight decay": (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), True),
    "a schedule": (optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), True),
    "momentum": (optax.sgd(0.1, momentum=0.9), False),
    "Adam": (optax.adam(0.1), False),
    "clipping by the norm": (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), False),
}


@pytest.fixture(autouse=True, scope="module")
def lowered():
    with lowered_for_cpu():
        yield


def network(weights, x):
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ weights[-1][0] + weights[-1][1]


def initial(dtype=jnp.float32):
    return [(0.3 * drawn(*shape, dtype=dtype), jnp.ones(shape[1], dtype)) for shape in itertools.pairwise(SIZES)]


def training(optimizer=OPTIMIZERS["SGD"][0], loss=lambda outputs, y: jnp.mean((outputs - y) ** 2)):
    """A step of training: `(weights, optimizer state, x, y)` to the first two and the loss."""

    def step(weights, state, x, y):
        value, gradient = jax.value_and_grad(lambda weights: loss(network(weights, x), y))(weights)
        updates, state = optimizer.update(lax.optimization_barrier(gradient), state, weights)
        return optax.apply_updates(weights, updates), state, value

    return step


def batch(examples, dtype=jnp.float32):
    return drawn(examples, SIZES[0], dtype=dtype), drawn(examples, SIZES[-1], dtype=dtype)


def number_of_products(step, *arguments):
    return str(jax.make_jaxpr(step)(*arguments)).count("dot_general")


# Forwards a product for each layer, back one for each kernel, and one for the hidden layer.
FORWARDS, KERNELS, HIDDEN = 2, 2, 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_a_gradient_that_is_read_once_moves_and_the_numbers_stay(name):
    optimizer, moves = OPTIMIZERS[name]
    arguments = (initial(), optimizer.init(initial()), *batch(5))
    step = training(optimizer)
    assert number_of_products(step, *arguments) == FORWARDS + KERNELS + HIDDEN
    moved = KERNELS if moves else 0
    assert number_of_products(products_last(step), *arguments) == FORWARDS + KERNELS + HIDDEN - moved
    assert_close(jax.jit(products_last(step))(*arguments), jax.jit(step)(*arguments))


@pytest.mark.parametrize("examples", [1, 2, MAX_TERMS, MAX_TERMS + 1])
def test_a_gradient_over_many_examples_stays_a_product(examples):
    arguments = (initial(), OPTIMIZERS["SGD"][0].init(initial()), *batch(examples))
    left = number_of_products(products_last(training()), *arguments)
    assert left == FORWARDS + HIDDEN + (KERNELS if examples > MAX_TERMS else 0)


def test_16_bit_floats_stay_with_the_library_which_adds_in_32():
    arguments = (initial(jnp.bfloat16), OPTIMIZERS["SGD"][0].init(initial()), *batch(5, jnp.bfloat16))
    assert number_of_products(products_last(training()), *arguments) == FORWARDS + KERNELS + HIDDEN


def test_a_kernel_that_two_layers_share_has_its_gradient_as_a_sum_of_both():
    def step(kernel, x):
        gradient = jax.grad(lambda kernel: jnp.sum(jnp.sin(jnp.sin(x @ kernel) @ kernel)))(kernel)
        return kernel - 0.1 * lax.optimization_barrier(gradient)

    kernel, x = drawn(6, 6), drawn(3, 6)
    assert number_of_products(products_last(step), kernel, x) == number_of_products(step, kernel, x) - 2
    assert_close(jax.jit(products_last(step))(kernel, x), step(kernel, x))


def test_the_gradient_of_a_linear_layer_is_the_sum_of_outer_products():
    def step(kernel, x, weights):
        gradient = jax.grad(lambda kernel: jnp.sum(weights * (x @ kernel)))(kernel)
        return kernel - lax.optimization_barrier(gradient)

    x, weights = drawn(4, 8), drawn(4, 3)
    found = jax.jit(products_last(step))(jnp.zeros((8, 3)), x, weights)
    expected = -sum(np.outer(row, weight) for row, weight in zip(np.asarray(x), np.asarray(weights), strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(
    examples=st.integers(1, MAX_TERMS),
    inputs=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    outputs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    axis=st.integers(0, 2),
)
def test_kernels_of_any_number_of_axes_contracted_along_any(examples, inputs, outputs, axis):
    axis = min(axis, len(inputs))
    x = drawn(*inputs[:axis], examples, *inputs[axis:])
    slopes = drawn(examples, *outputs)

    def step(kernel, x, slopes):
        return kernel - lax.optimization_barrier(jnp.tensordot(x, slopes, ((axis,), (0,))))

    kernel = drawn(*inputs, *outputs)
    assert number_of_products(products_last(step), kernel, x, slopes) == 0
    found = jax.jit(products_last(step))(kernel, x, slopes)
    expected = np.asarray(kernel, np.float64) - np.tensordot(
        np.asarray(x, np.float64), np.asarray(slopes, np.float64), ((axis,), (0,))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_products_of_the_optimizer_stay_where_they_are():
    def step(kernel, x):
        gradient = lax.optimization_barrier(x.T @ x)
        return kernel - 0.1 * (jnp.sin(gradient) @ jnp.cos(gradient))  # of three terms, from what is behind the barrier

    kernel, x = drawn(3, 3), drawn(2, 3)
    assert number_of_products(products_last(step), kernel, x) == 2
    np.testing.assert_array_equal(jax.jit(products_last(step))(kernel, x), jax.jit(step)(kernel, x))


def test_without_the_barrier_or_with_two_a_step_stays_as_it_is():
    def step(kernel, x, barriers):
        gradient = x.T @ x
        for _ in range(barriers):
            gradient = lax.optimization_barrier(gradient)
        return kernel - gradient

    for barriers in (0, 2):
        one = partial(step, barriers=barriers)
        assert number_of_products(products_last(one), drawn(3, 3), drawn(2, 3)) == 1


def test_in_a_loop_that_closes_over_traced_values_and_under_vmap():
    optimizer = OPTIMIZERS["SGD"][0]
    state = optimizer.init(initial())

    def trained(key, x, y, wrap):
        noisy = training(optimizer, lambda outputs, y: jnp.mean((outputs - y + jax.random.normal(key)) ** 2))

        def step(_, carried):
            return wrap(noisy)(*carried, x, y)[:2]

        return lax.fori_loop(0, 3, step, (initial(), state))[0]

    keys, x, y = jax.random.split(jax.random.key(0), 4), drawn(4, 5, SIZES[0]), drawn(4, 5, SIZES[-1])

    def of_all(wrap):
        return jax.jit(jax.vmap(lambda *client: trained(*client, wrap)))(keys, x, y)

    assert_close(of_all(products_last), of_all(lambda step: step))


def test_only_programs_for_cpu_of_the_local_engine_change():
    def step(kernel, x):
        return kernel - lax.optimization_barrier(x.T @ x)

    arguments = drawn(3, 3), drawn(2, 3)
    found = []
    thread = threading.Thread(target=lambda: found.append(number_of_products(products_last(step), *arguments)))
    thread.start()  # in which nothing is lowered for CPU
    thread.join()
    assert found == [1]
    assert number_of_products(products_last(step), *arguments) == 0


def test_a_step_with_effects_is_left_as_it_is(capfd):
    def step(kernel, x):
        jax.debug.print("a step")
        return kernel - lax.optimization_barrier(x.T @ x)

    jax.block_until_ready(jax.jit(products_last(step))(jnp.zeros((3, 3)), drawn(2, 3)))
    jax.effects_barrier()
    assert capfd.readouterr().out == "a step\n"
