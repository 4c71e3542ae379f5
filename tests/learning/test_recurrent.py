"""The LSTM layer is Flax's, value for value and gradient for gradient, and its loops hold one small product a step."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import fedlens as fed
from fedlens.data import FederatedData
from fedlens.errors import StructureError
from fedlens.learning.recurrent import lstm

GATES = "ifgo"
SIZES = {  # batch, time, inputs, units
    "one step of one sequence": ((1,), 1, 3, 4),
    "one of all": ((1,), 1, 1, 1),
    "no batch axis": ((), 5, 3, 4),
    "two batch axes": ((2, 3), 4, 2, 3),
    "long": ((4,), 80, 8, 32),
}


def arguments(batch, time, inputs, units, dtype=np.float32, seed=0):
    """Random arguments of `lstm`: inputs, input kernel, recurrent kernel, bias, and the initial c and h."""
    rng = np.random.default_rng(seed)
    shapes = ((*batch, time, inputs), (inputs, 4 * units), (units, 4 * units), (4 * units,), (*batch, units))
    scales = (1, inputs**-0.5, units**-0.5, 0.5, 1)
    x, w, u, b, c = (scale * rng.normal(size=shape) for scale, shape in zip(scales, shapes, strict=True))
    return tuple(np.asarray(each, dtype) for each in (x, w, u, b, c, np.tanh(rng.normal(size=shapes[4]))))


@jax.jit
def ours(x, w, u, b, c, h):
    (c, h), outputs = lstm(x, w, u, b, (c, h))
    return outputs, c, h


def flax(x, w, u, b, c, h):
    """Flax's layer with the same parameters."""
    units = u.shape[0]
    cell = {"i" + gate: {"kernel": kernel} for gate, kernel in zip(GATES, jnp.split(w, 4, axis=1), strict=True)}
    for gate, kernel, bias in zip(GATES, jnp.split(u, 4, axis=1), jnp.split(b, 4), strict=True):
        cell["h" + gate] = {"kernel": kernel, "bias": bias}
    layer = nn.RNN(nn.OptimizedLSTMCell(units), return_carry=True)
    (c, h), outputs = layer.apply({"params": {"cell": cell}}, x, initial_carry=(c, h))
    return outputs, c, h


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def by_numpy(x, w, u, b, c, h):
    """The equations, one step after another; x is [batch, time, inputs]."""
    outputs = []
    for each in np.moveaxis(x, -2, 0):
        i, f, g, o = np.split(each @ w + h @ u + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=-2), c, h


def with_gradients(function, args, seed=1):
    """What `function` returns, and the gradients of a random combination of all its numbers for all arguments."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(function, *args)
    weights = [np.asarray(rng.normal(size=result.shape), result.dtype) for result in shapes]

    def combined(*args):
        results = function(*args)
        return sum(jnp.vdot(w, result) for w, result in zip(weights, results, strict=True)), results

    gradient = jax.jit(jax.grad(combined, argnums=tuple(range(len(args))), has_aux=True))
    gradients, results = gradient(*args)
    return *results, *gradients


def assert_near(found, expected, tolerance):
    """`norm(found - expected) <= tolerance * norm(expected)`, leaf by leaf, with equal types."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), f"leaf {number}"


@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_flax(sizes):
    with jax.enable_x64(True):
        args = arguments(*SIZES[sizes], dtype=np.float64)
        expected = with_gradients(flax, args)
        assert expected[0].dtype == np.float64
        assert_near(with_gradients(ours, args), expected, 1e-12)


def test_values_and_gradients_are_those_of_flax_in_32_bits():
    args = arguments(*SIZES["long"])
    assert_near(with_gradients(ours, args), with_gradients(flax, args), 1e-5)


def test_values_are_those_of_the_equations():
    args = arguments((3,), 9, 4, 5, dtype=np.float64)
    with jax.enable_x64(True):
        assert_near(ours(*args), by_numpy(*args), 1e-13)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        check_grads(ours, arguments((2,), 5, 3, 4, dtype=np.float64), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_a_leaking_integrator_has_its_closed_form():
    # Gates that depend on nothing: c after t steps is f^t c + i g (1 - f^t) / (1 - f).
    i, f, g, o = 0.3, 0.9, 0.5, 0.7
    bias = np.array([np.log(i / (1 - i)), np.log(f / (1 - f)), np.arctanh(g), np.log(o / (1 - o))], np.float32)
    zeros = np.zeros((1, 4), np.float32)
    t = np.arange(1, 13)
    cells = f**t * 2 + i * g * (1 - f**t) / (1 - f)
    outputs, c, h = ours(np.zeros((1, 12, 1), np.float32), zeros, zeros, bias, np.full((1, 1), 2.0), np.zeros((1, 1)))
    np.testing.assert_allclose(outputs[0, :, 0], o * np.tanh(cells), rtol=1e-5)
    np.testing.assert_allclose((c[0, 0], h[0, 0]), (cells[-1], o * np.tanh(cells[-1])), rtol=1e-5)


def test_under_vmap_each_has_its_own_weights():
    many = [arguments((2,), 5, 3, 4, seed=seed) for seed in range(3)]
    stacked = [np.stack(leaves) for leaves in zip(*many, strict=True)]
    found = jax.vmap(lambda *args: with_gradients(ours, args))(*stacked)
    for number, args in enumerate(many):
        assert_near([leaf[number] for leaf in found], with_gradients(ours, args), 1e-5)


def test_under_vmap_over_sequences_the_weights_are_shared():
    x, w, u, b, c, h = args = arguments((4,), 6, 3, 5)
    over_sequences = jax.vmap(ours, in_axes=(0, None, None, None, 0, 0))
    assert_near(with_gradients(over_sequences, args), with_gradients(ours, (x, w, u, b, c, h)), 1e-5)


def test_a_sequence_in_two_parts_is_the_sequence():
    x, *rest = args = arguments((3,), 10, 4, 5)

    def in_two_parts(x, w, u, b, c, h):
        carry, first = lstm(x[:, :4], w, u, b, (c, h))
        carry, second = lstm(x[:, 4:], w, u, b, carry)
        return jnp.concatenate([first, second], axis=1), *carry

    assert_near(with_gradients(in_two_parts, args), with_gradients(ours, args), 1e-5)
    outputs, *carry = ours(x[:, :0], *rest)
    assert outputs.shape == (3, 0, 5)
    assert_near(carry, rest[3:], 0)


def test_without_a_carry_it_starts_from_zeros():
    x, w, u, b, c, h = arguments((3,), 4, 2, 3)
    (last_c, last_h), outputs = jax.jit(lstm)(x, w, u, b)
    assert_near((outputs, last_c, last_h), ours(x, w, u, b, 0 * c, 0 * h), 0)


def test_steps_after_the_end_of_a_sequence_change_nothing():
    lengths = (4, 0, 7)
    x, *rest = args = arguments((3,), 7, 4, 5)
    counts = np.arange(7) < np.array(lengths)[:, None]

    def together(x, w, u, b, c, h):
        (c, h), outputs = lstm(x, w, u, b, (c, h), jnp.array(lengths))
        return outputs, c, h

    def one_by_one(x, w, u, b, c, h):
        outputs, cs, hs = [], [], []
        for row, length in enumerate(lengths):
            (last_c, last_h), found = lstm(x[row, :length], w, u, b, (c[row], h[row]))
            outputs.append(jnp.concatenate([found, jnp.tile(last_h, (7 - length, 1))]))
            cs.append(last_c)
            hs.append(last_h)
        return jnp.stack(outputs), jnp.stack(cs), jnp.stack(hs)

    expected = with_gradients(one_by_one, args)
    assert_near(with_gradients(together, args), expected, 1e-5)
    padded = np.where(counts[..., None], x, np.nan).astype(np.float32)
    assert_near(with_gradients(together, (padded, *rest)), expected, 1e-5)


def test_products_of_16_bits():
    # A bfloat16 is off by up to 2^-9 of itself; eight steps follow one another.
    args = arguments((3,), 8, 6, 16)
    found = with_gradients(ours, [jnp.asarray(each, jnp.bfloat16) for each in args])
    assert [leaf.dtype for leaf in found] == ["bfloat16", "float32", "float32"] + ["bfloat16"] * 6
    assert_near([np.asarray(leaf, np.float32) for leaf in found], with_gradients(ours, args), 0.03)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_a_step_is_one_product_and_holds_nothing_as_large_as_a_kernel():
    args = arguments((3,), 20, 16, 32)  # a kernel has 32 * 128 numbers, a batch of gates 3 * 128
    jaxpr = jax.make_jaxpr(lambda *args: with_gradients(ours, args)[3:])(*args).jaxpr
    loops = [equation for equation in equations(jaxpr) if equation.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        body = loop.params["jaxpr"].jaxpr
        products = [each for each in equations(body) if each.primitive.name == "dot_general"]
        assert [each.outvars[0].aval.shape for each in products] in ([(3, 128)], [(3, 32)])
        assert all(variable.aval.size <= 3 * 128 for variable in body.outvars)


@pytest.mark.filterwarnings("default")
def test_forward_mode_is_refused():
    x, *rest = arguments((2,), 3, 2, 3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ours(x, *rest)[0], (x,), (x,))


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (4,), "Expected inputs .*, found the shapes \\(4,\\)"),
        (1, (3, 20), "Expected the input_kernel of shape \\(4, 20\\), found \\(3, 20\\)"),
        (2, (5, 15), "Expected the recurrent_kernel of shape \\(5, 20\\), found \\(5, 15\\)"),
        (3, (5,), "Expected the bias of shape \\(20,\\), found \\(5,\\)"),
        (4, (5,), "Expected the carry's c of shape \\(3, 5\\), found \\(5,\\)"),
        (5, (2, 5), "Expected the carry's h of shape \\(3, 5\\), found \\(2, 5\\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(position, shape, message):
    args = list(arguments((3,), 7, 4, 5))
    args[position] = np.zeros(shape, np.float32)
    with pytest.raises(StructureError, match=message):
        ours(*args)
    with pytest.raises(StructureError, match="Expected lengths of shape \\(3,\\), found \\(2,\\)"):
        lstm(*arguments((3,), 7, 4, 5)[:4], lengths=np.array([1, 2]))


# The Flax module.


def test_the_layer_computes_what_the_function_computes():
    x, w, u, b, c, h = arguments((3,), 7, 4, 5)
    weights = {"params": {"input_kernel": w, "recurrent_kernel": u, "bias": b}}
    lengths = np.array([2, 7, 0])
    function, layer = jax.jit(lstm), fed.models.LSTM(5)
    with_carry = fed.models.LSTM(5, return_carry=True)

    @jax.jit
    def found():
        return (
            layer.apply(weights, x),
            layer.apply(weights, x, seq_lengths=lengths),
            layer.apply(weights, x, initial_carry=(c, h), return_carry=True),
            with_carry.apply(weights, x, initial_carry=(c, h)),
            with_carry.apply(weights, x, return_carry=False),
        )

    plain, of_lengths = function(x, w, u, b)[1], function(x, w, u, b, lengths=lengths)[1]
    both = function(x, w, u, b, (c, h))
    assert_near(*map(jax.tree.leaves, (found(), (plain, of_lengths, both, both, plain))), 1e-6)


def test_initial_parameters_are_drawn_gate_by_gate():
    units, inputs = 48, 96
    layer = fed.models.LSTM(units, bias_init=nn.initializers.normal(1.0))
    weights = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((2, 3, inputs)))["params"]
    assert {name: leaf.shape for name, leaf in weights.items()} == {
        "input_kernel": (inputs, 4 * units),
        "recurrent_kernel": (units, 4 * units),
        "bias": (4 * units,),
    }
    gates = np.split(np.asarray(weights["recurrent_kernel"]), 4, axis=1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(units), atol=1e-5)
    assert not any(np.allclose(gates[0], gate) for gate in gates[1:])
    # Flax's kernel_init has the variance 1 / inputs: 18,432 numbers tell it to 1 %.
    assert np.var(weights["input_kernel"]) * inputs == pytest.approx(1, abs=0.05)
    assert len(np.unique(weights["bias"])) == 4 * units


def test_types_of_the_layer():
    def types(x_dtype, **options):
        """Of the parameters, and of the outputs."""
        layer, x = fed.models.LSTM(5, **options), jnp.ones((2, 3, 4), x_dtype)
        outputs, weights = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
        (of_weights,) = {leaf.dtype.name for leaf in jax.tree.leaves(weights)}
        return of_weights, outputs.dtype.name

    assert types("float32") == ("float32", "float32")
    assert types("bfloat16") == ("float32", "float32")  # what both promote to
    assert types("float32", dtype="bfloat16") == ("float32", "bfloat16")
    assert types("bfloat16", param_dtype="bfloat16") == ("bfloat16", "bfloat16")
    with jax.enable_x64(True):
        assert types("float64") == ("float32", "float64")


def test_it_trains_in_a_process_as_flax_does(two_devices, distance):
    rng = np.random.default_rng(0)
    clients = {
        f"client-{count}": {
            "x": rng.normal(size=(count, 6, 4)).astype(np.float32),
            "y": rng.integers(0, 5, (count, 6)).astype(np.int32),
        }
        for count in range(1, 5)
    }
    data = FederatedData.from_clients(clients)
    form = {"inputs": data.element_type, "loss": fed.losses.cross_entropy}
    model = fed.models.from_flax(fed.models.LSTM(5), **form)

    def apply(weights, x):
        zeros = jnp.zeros((len(x), 5))
        return flax(x, weights["input_kernel"], weights["recurrent_kernel"], weights["bias"], zeros, zeros)[0]

    trained = []
    for each in (model, fed.models.from_functions(model.init, apply, **form)):
        process = fed.learning.build_weighted_fed_avg(each, optax.sgd(0.5), batch_size=2, epochs=3)
        with fed.use(two_devices):
            before = process.initialize(0)
            trained.append(process.next(before, data.cohort(0))[0].weights)
    assert distance(before.weights, trained[1]) > 0.01
    assert distance(*trained) < 1e-5
