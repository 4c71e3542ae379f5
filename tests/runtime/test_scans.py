"""Recurrent layers as lowered for CPU, against XLA's own lowering: the same numbers, fewer products in the loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from lowered import assert_close, both, drawn, looped_products, lower, lower_for_cpu

from fedlens.runtime import scan_plan, scans
from fedlens.runtime.lowering import lowered_for_cpu

STEPS, ROWS, INPUTS, UNITS = 7, 2, 8, 16
CELLS = {"OptimizedLSTM": nn.OptimizedLSTMCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "simple": nn.SimpleCell}


@pytest.fixture(autouse=True, scope="module")
def installed():
    assert scans.install()


def training(network, x, **arguments):
    """The loss and all gradients of a network, with its parameters and inputs."""
    parameters = network.init(jax.random.key(0), x)

    def loss(parameters, x):
        return jnp.mean(jnp.sin(3 * network.apply(parameters, x, **arguments)))

    return jax.value_and_grad(loss, argnums=(0, 1)), parameters, x


def inputs(*shape, dtype=np.float32):
    return drawn(*(shape or (ROWS, STEPS, INPUTS)), dtype=dtype)


@pytest.mark.parametrize(
    ("cell", "form"),
    [*((name, "forwards") for name in CELLS), ("OptimizedLSTM", "backwards"), ("GRU", "of unequal lengths")],
)
def test_flax_layers_have_the_numbers_of_xla_and_only_the_recurrent_products_in_loops(cell, form):
    network = nn.RNN(CELLS[cell](UNITS), reverse=form == "backwards", keep_order=True)
    arguments = {"seq_lengths": jnp.array([STEPS, 3])} if form == "of unequal lengths" else {}
    expected, found, before, after = both(*training(network, inputs(), **arguments))
    assert_close(found, expected)
    # There and back, h U for each gate; neither x W, nor a gradient of W, of U, or of x.
    assert len(after) <= len(before) / 3
    assert {rows.split("[")[1].split(",")[0] for rows in after} == {str(ROWS)}


def test_an_optimized_lstm_has_one_product_in_each_loop():
    *_, before, after = both(*training(nn.RNN(nn.OptimizedLSTMCell(UNITS)), inputs()))
    assert len(before) == 6
    assert after == [f"f32[{ROWS},{UNITS}]", f"f32[{ROWS},{4 * UNITS}]"]


def test_a_kernel_for_few_inputs_profits_from_what_is_stacked_for_another():
    rows, few = 12, 2  # more rows by far than the gradient of a kernel for 2 inputs would pay for on its own
    expected, found, _, after = both(*training(nn.RNN(nn.OptimizedLSTMCell(UNITS)), inputs(rows, STEPS, few)))
    assert_close(found, expected)
    assert not any(shape.endswith(f",{few}]") and not shape.startswith(f"f32[{rows},") for shape in after)
    assert not any(shape.startswith((f"f32[{4 * UNITS}", f"f32[{UNITS}", f"f32[{few},")) for shape in after)


def test_several_layers_and_both_directions():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(UNITS)), nn.RNN(nn.GRUCell(UNITS)))(x)
            return x

    expected, found, before, after = both(*training(Network(), inputs()))
    assert_close(found, expected)
    assert len(after) < len(before) / 2


@pytest.mark.parametrize("kernels", ["own", "shared"])
def test_clients_side_by_side(kernels):
    function, parameters, x = training(nn.RNN(nn.OptimizedLSTMCell(UNITS)), inputs())
    x = inputs(3, *x.shape)
    if kernels == "own":
        parameters = jax.tree.map(lambda leaf: leaf * jnp.arange(1.0, 4.0).reshape(3, *[1] * leaf.ndim), parameters)
    expected, found, before, after = both(
        jax.vmap(function, in_axes=(0 if kernels == "own" else None, 0)), parameters, x
    )
    assert_close(found, expected)
    assert (len(before), len(after)) == (6, 2)


# Where JAX tracks what differs between devices, a step sums the gradients of kernels that don't; those stay.
@pytest.mark.parametrize(("check_vma", "left"), [(False, 2), (True, 4)])
def test_on_several_devices(check_vma, left):
    mesh, (everywhere, by_row) = Mesh(np.array(jax.devices()[:2]), ("rows",)), (PartitionSpec(), PartitionSpec("rows"))

    def loss(kernels, x):
        def step(h, x):
            h = jnp.tanh(x @ kernels[0] + h @ kernels[1])
            return h, h

        return jnp.mean(jax.lax.scan(step, x[0] * 0, x)[1] ** 2)

    def of_all(kernels, x):
        return jax.lax.pmean(jax.grad(loss)(kernels, jnp.swapaxes(x, 0, 1)), "rows")

    spread = jax.shard_map(of_all, mesh=mesh, in_specs=(everywhere, by_row), out_specs=everywhere, check_vma=check_vma)
    expected, found, before, after = both(spread, inputs(2, UNITS, UNITS) / UNITS, inputs(2 * ROWS, STEPS, UNITS))
    assert_close(found, expected)
    assert len(after) == left < len(before)


def test_a_loop_of_training_steps():
    function, parameters, x = training(nn.RNN(nn.GRUCell(UNITS)), inputs())
    batches = jnp.stack([x, -x, x + 1, x / 2, x - 1])

    def train(parameters, batches):
        def step(parameters, batch):
            loss, (gradient, _) = function(parameters, batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient), loss

        return jax.lax.scan(step, parameters, batches)

    expected, found, *_ = both(train, parameters, batches)
    assert_close(found, expected)


def test_64_bits():
    with jax.enable_x64(True):
        network = nn.RNN(nn.LSTMCell(UNITS, param_dtype=jnp.float64, dtype=jnp.float64))
        expected, found, before, after = both(*training(network, inputs(dtype=np.float64)))
        assert_close(found, expected, 1e-13)
        assert len(after) < len(before)


def test_16_bits_are_no_less_exact():
    def gradient(dtype):
        network = nn.RNN(nn.OptimizedLSTMCell(UNITS, dtype=dtype))
        function, *operands = training(network, inputs())
        return both(function, *operands)

    exact, *_ = gradient(jnp.float32)
    expected, found, before, after = gradient(jnp.bfloat16)
    assert len(after) < len(before)
    leaves = [*map(jax.tree.leaves, (expected, found, exact))]
    assert [leaf.dtype for leaf in leaves[0]] == [leaf.dtype for leaf in leaves[1]]
    errors = [
        sum(
            np.linalg.norm(np.float32(one) - truth) / np.linalg.norm(truth)
            for one, truth in zip(of, leaves[2], strict=True)
        )
        for of in leaves[:2]
    ]
    assert errors[1] <= 1.1 * errors[0]


def test_loops_over_a_symbolic_number_of_steps_stay():
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("steps"), ROWS, UNITS), np.float32)

    def gram(x):
        return jax.lax.scan(lambda total, x: (total + x.T @ x, ()), jnp.zeros((UNITS, UNITS)), x)[0]

    with lowered_for_cpu():
        exported = jax.export.export(jax.jit(gram))(x)
    each = inputs(STEPS, ROWS, UNITS)
    assert_close(exported.call(each), gram(each))


def test_only_within_the_gate():
    function, *operands = training(nn.RNN(nn.OptimizedLSTMCell(UNITS)), inputs())
    scans.install()
    first = lower(function, *operands).as_text()
    lower_for_cpu(function, *operands)
    assert lower(function, *operands).as_text() == first


def test_no_more_is_held_than_allowed(monkeypatch):
    function, *operands = training(nn.RNN(nn.OptimizedLSTMCell(UNITS)), inputs())
    monkeypatch.setattr(scan_plan, "MOST_BYTES", 100)
    assert looped_products(lower_for_cpu(function, *operands)) == looped_products(lower(function, *operands))
