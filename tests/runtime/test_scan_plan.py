"""What is taken out of a loop and what stays, on loops written for it: closed forms, and XLA's own lowering."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from lowered import assert_close, both, drawn

from fedlens.runtime import scans

STEPS, ROWS, LEFT, RIGHT = 6, 2, 12, 9


@pytest.fixture(autouse=True, scope="module")
def installed():
    assert scans.install()


def factors():
    return drawn(STEPS, ROWS, LEFT), drawn(STEPS, ROWS, RIGHT) + 1


def test_a_sum_of_products_is_one_product():
    x, y = factors()

    def gram(x, y):
        def step(total, at):
            x, y = at
            return total + x.T @ y, ()

        return lax.scan(step, jnp.ones((LEFT, RIGHT)), (x, y))[0]

    _, found, before, after = both(gram, x, y)
    assert (len(before), after) == (1, [])
    assert_close(found, np.float32(1 + np.einsum("tbl,tbr->lr", *map(np.float64, (x, y)))))


def test_what_is_done_to_a_product_is_done_to_the_sum():
    x, y = factors()
    scale = jnp.arange(1.0, RIGHT + 1)

    def function(x, y, scale):
        def step(totals, at):
            x, y = at
            product = (x.T @ y) * scale / 3
            first, second = jnp.split(product.T, [4])
            totals = totals[0] - first, first.reshape(-1) + totals[1], jnp.pad(second, ((1, 2), (0, 0))) + totals[2]
            return (*totals[:0], totals[0] + 2 * first, *totals[1:]), ()

        start = jnp.zeros((4, LEFT)), jnp.ones(4 * LEFT), jnp.zeros((RIGHT - 1, LEFT))
        return lax.scan(step, start, (x, y), reverse=True)[0]

    expected, found, before, _ = both(function, x, y, scale)
    assert len(before) == 1
    assert_close(found, expected)
    product = np.einsum("tbl,tbr->rl", *map(np.float64, (x, y))) * np.arange(1, RIGHT + 1)[:, None] / 3
    assert_close(found[1], np.float32(1 + product[:4].reshape(-1)))
    assert_close(found[2], np.float32(np.pad(product[4:], ((1, 2), (0, 0)))))


def test_a_state_that_the_loop_reads_stays():
    x, y = factors()

    def function(x, y):
        def step(total, at):
            x, y = at
            return total + x.T @ (y + total.sum()), total[0]

        return lax.scan(step, jnp.zeros((LEFT, RIGHT)), (x, y))

    expected, found, before, after = both(function, x, y)
    assert before == after != []
    assert_close(found, expected)


@pytest.mark.parametrize("twice", ["doubled", "given out", "seen after the step"])
def test_a_state_that_is_used_twice_stays(twice):
    x, y = factors()

    def function(x, y):
        def step(total, at):
            x, y = at
            following = total + x.T @ y
            if twice == "doubled":
                following = following + total
            return following, {"doubled": (), "given out": total, "seen after the step": following}[twice]

        return lax.scan(step, jnp.ones((LEFT, RIGHT)), (x, y))

    expected, found, before, after = both(function, x, y)
    assert before == after != []
    assert_close(found, expected)


def test_a_product_with_more_rows_than_the_sum_has_cells_stays():
    x, y = drawn(STEPS, 50, 3), drawn(STEPS, 50, 4)

    def function(x, y):
        def step(state, at):
            total, shift = state
            x, y = at
            return (total + jnp.sin(x + shift).T @ jnp.cos(y + shift), shift + 1), ()

        return lax.scan(step, (jnp.zeros((3, 4)), 0.0), (x, y))[0]

    expected, found, before, after = both(function, x, y)
    assert before == after != []
    assert_close(found, expected)


def test_a_loop_over_blocks_stays():
    """As a convolution's: patches of all steps at once would not fit into a cache."""
    x, y = drawn(STEPS, 20, 10), drawn(STEPS, 20, 5)

    def function(x, y, kernel):
        def step(total, at):
            x, y = at
            patches = jnp.concatenate([jnp.roll(x, shift, axis=0) for shift in range(3)], axis=1)
            return total + patches.T @ y, patches @ kernel

        return lax.scan(step, jnp.zeros((30, 5)), (x, y))

    expected, found, before, after = both(function, x, y, drawn(30, 5))
    assert before == after
    assert len(before) == 2
    assert_close(found, expected)


def test_constants_are_states_outputs_and_addends_as_any_value():
    x, y = factors()

    def function(x, y, constant):
        def step(state, at):
            total, shift, biased = state
            x, y = at
            wide = jnp.broadcast_to(constant * 2, (3, RIGHT))
            return (total + x.T @ (y + shift), constant, biased + constant), (constant, wide, jnp.float32(1), y, 3 * y)

        return lax.scan(step, (jnp.zeros((LEFT, RIGHT)), constant + 1, constant), (x, y))

    expected, found, before, after = both(function, x, y, jnp.arange(float(RIGHT)))
    assert (len(before), after) == (1, [])
    assert_close(found, expected)


def test_integers_and_what_counts_steps_stay_exact():
    x, y = factors()

    def function(x, y):
        def step(state, at):
            total, count, whole = state
            x, y = at
            whole = whole + (x.T @ x).astype(jnp.int32)
            return (total + x.T @ y, count + 1, whole), count * jnp.int32(2)

        start = jnp.zeros((LEFT, RIGHT)), jnp.int32(0), jnp.zeros((LEFT, LEFT), jnp.int32)
        return lax.scan(step, start, (x, y))

    expected, found, *_ = both(function, x, y)
    assert_close(found[0][0], expected[0][0])
    np.testing.assert_array_equal(found[0][1:][0], STEPS)
    np.testing.assert_array_equal(found[0][2], expected[0][2])  # each product is cut to whole numbers before the sum
    np.testing.assert_array_equal(found[1], 2 * np.arange(STEPS))


def test_a_product_that_the_loop_needs_is_not_computed_twice():
    kernel, x = drawn(LEFT, LEFT) / LEFT, drawn(STEPS, ROWS, LEFT)

    def function(kernel, x):
        def step(h, x):
            h = jnp.tanh(h @ kernel + x)
            scores = h @ kernel
            return scores / 2, scores

        return lax.scan(step, jnp.zeros((ROWS, LEFT)), x)

    expected, found, before, after = both(function, kernel, x)
    assert before == after != []
    assert_close(found, expected)


def test_scores_of_each_step_are_one_product_after_the_loop():
    kernel, out, x = drawn(LEFT, LEFT) / LEFT, drawn(LEFT, RIGHT), drawn(STEPS, ROWS, LEFT)

    def function(kernel, out, x):
        def step(h, x):
            h = jnp.tanh(h @ kernel + x)
            return h, jax.nn.relu(h @ out + 1)

        return lax.scan(step, jnp.zeros((ROWS, LEFT)), x)

    expected, found, before, after = both(function, kernel, out, x)
    assert (len(before), len(after)) == (2, 1)
    assert_close(found, expected)


def test_random_numbers_and_callbacks_happen_as_often_as_before():
    kernel, x, seen = drawn(LEFT, RIGHT), drawn(STEPS, ROWS, LEFT), []

    def noisy(kernel, x, key):
        def step(key, x):
            key, drawn = jax.random.split(key)
            return key, jax.random.normal(drawn, (ROWS, RIGHT)) + x @ kernel

        return lax.scan(step, key, x)[1]

    expected, found, before, after = both(noisy, kernel, x, jax.random.key(1))
    assert (len(before), after) == (1, [])
    assert_close(found, expected)

    def watched(kernel, x):
        def step(total, x):
            jax.debug.callback(lambda value: seen.append(value.shape), x)
            return total + x.T @ x, x @ kernel

        return lax.scan(step, jnp.zeros((LEFT, LEFT)), x)

    *_, before, after = both(watched, kernel, x)
    jax.effects_barrier()
    assert before == after
    assert len(seen) == 2 * STEPS


def test_wider_sums_of_narrow_products():
    x, y = (each.astype(jnp.bfloat16) for each in factors())

    def function(x, y):
        def step(total, at):
            x, y = at
            return total + (x.T @ y).astype(jnp.float32), ()

        return lax.scan(step, jnp.zeros((LEFT, RIGHT)), (x, y))[0]

    expected, found, before, after = both(function, x, y)
    assert (len(before), after) == (1, [])
    truth = np.einsum("tbl,tbr->lr", *(np.asarray(each, np.float64) for each in (x, y)))
    assert np.abs(found - truth).max() <= np.abs(expected - truth).max()


def test_a_loop_in_a_loop():
    kernel, x, y = drawn(LEFT, RIGHT), *factors()

    def function(kernel, x, y):
        def inner(total, x, y):
            def step(total, at):
                x, y = at
                return total + jnp.tanh(x).T @ (y + x @ kernel), ()

            return lax.scan(step, total, (x, y))[0]

        def step(state, scale):
            return inner(state * scale, x, y), scale

        return lax.scan(step, jnp.zeros((LEFT, RIGHT)), jnp.arange(5.0) / 5)

    expected, found, before, after = both(function, kernel, x, y)
    assert len(before) == 2
    # The inner loop is computed before or in the turns of the outer one; each of its products is one over all steps.
    assert not any(shape.startswith(f"f32[{ROWS},") for shape in after)
    assert_close(found, expected)


UNARY = {
    "tanh": jnp.tanh,
    "double": lambda v: v * 2,
    "turned twice": lambda v: v.T.T,
    "reversed": lambda v: v[:, ::-1],
    "rolled": lambda v: jnp.concatenate([v[:, 1:], v[:, :1]], axis=1),
    "gate": jax.nn.sigmoid,
    "mean": lambda v: jnp.broadcast_to(v.mean(1, keepdims=True), v.shape),
}
BINARY = {"add": jnp.add, "mul": jnp.multiply, "select": lambda a, b: jnp.where(a > 0, a, b)}


@settings(max_examples=10)
@given(st.data())
def test_any_body_and_its_gradient_have_the_numbers_of_xla(data):
    """A program drawn line by line: each takes values from before it; some are carried, some stacked."""
    size = 8
    lines = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([*UNARY, *BINARY, "kernel 0", "kernel 1"]), st.integers(0, 50), st.integers(0, 50)
            ),
            min_size=2,
            max_size=7,
        )
    )
    ends = data.draw(st.tuples(*[st.integers(0, 50)] * 5))
    reverse = data.draw(st.booleans())

    def function(kernels, x, starts):
        def step(state, x):
            h, c, total = state
            values = [h, x, c]
            for name, first, second in lines:
                value, other = values[-1 - first % len(values)], values[-1 - second % len(values)]
                if name in UNARY:
                    values.append(UNARY[name](value))
                elif name in BINARY:
                    values.append(BINARY[name](value, other))
                else:
                    values.append(value @ kernels[int(name[-1])])
            h, c, left, right, out = (values[-1 - end % len(values)] for end in ends)
            return (jnp.tanh(h), jnp.tanh(c), total + left.T @ right), (out, h)

        return lax.scan(step, (*starts, jnp.zeros((size, size))), x, reverse=reverse)

    def loss(*operands):
        results = function(*operands)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

    kernels = drawn(2, size, size) / size
    operands = kernels, drawn(STEPS, ROWS, size), tuple(drawn(2, ROWS, size))
    expected, found, before, after = both(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), *operands)
    assert len(after) <= len(before)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.abs(other).max())))
