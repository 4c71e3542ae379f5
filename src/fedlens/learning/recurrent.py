"""A long short-term memory layer that trains at the hardware's speed on CPU.

Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997, with the forget gate of Gers,
Schmidhuber and Cummins, "Learning to forget", Neural Computation 12(10), 2000; the equations are those of Flax's
`OptimizedLSTMCell`:

    i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o),  z = x W + h U + b
    c' = f c + i g,  h' = o tanh(c')

Only `h U` has to wait for the step before. Everything else is taken out of the loop over time, in both directions:

- `x W + b` is one product over all steps; so are the gradients of W, U and x, from the gradients of z of all steps.
- The way back is written by hand (a `custom_vjp`, hence no forward-mode differentiation): whatever its loop can have
  as a factor known beforehand is computed for all steps at once, and the loop emits the gradients of z, nothing else.
  Differentiating the loop instead accumulates the gradient of U, as large as U itself, in every step.
- The transpose of U is written out once before the loop, and not read across in every step.
- sigmoid(z) = (tanh(z / 2) + 1) / 2, so that one tanh serves all gates; XLA's tanh is vectorised, its sigmoid divides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float, Int

from fedlens.errors import StructureError

Carry = tuple[Float[Array, "*batch units"], Float[Array, "*batch units"]]
"""The state between two steps: the cell state c and the hidden state h, in the order of Flax."""

_Initializer = Callable[..., Array]
_GATES = 4  # input, forget, cell, output: i, f, g, o


def lstm(
    inputs: Float[Array, "*batch time inputs"],
    input_kernel: Float[Array, "inputs 4*units"],
    recurrent_kernel: Float[Array, "units 4*units"],
    bias: Float[Array, " 4*units"],
    carry: Carry | None = None,
    lengths: Int[Array, " *batch"] | None = None,
) -> tuple[Carry, Float[Array, "*batch time units"]]:
    """An LSTM layer over whole sequences.

    It works under `jit`, `vmap`, `scan` and `grad`; forward-mode and second derivatives are refused by JAX. With 16-bit
    arrays products are of 16 bits and the state is kept in float32.

    Example:
      >>> x, state = jnp.ones((2, 5, 3)), jnp.zeros((2, 1))
      >>> (c, h), outputs = lstm(x, jnp.zeros((3, 4)), jnp.zeros((1, 4)), jnp.zeros(4), (state + 1, state))
      >>> outputs.shape, c[0]  # every gate is open by half, and nothing new comes in
      ((2, 5, 1), Array([0.03125], dtype=float32))

    Args:
      inputs: the sequences. They, the kernels and the bias are taken in the dtype that all of them promote to.
      input_kernel: for the gates i, f, g, o, side by side.
      recurrent_kernel: likewise.
      bias: likewise.
      carry: the state before the first step; None is zeros.
      lengths: how many steps of each sequence count, at most `time`; None is all. The steps after them change nothing:
        their inputs are not looked at, and they keep the state, so that their outputs repeat the last one that counts.

    Returns:
      The state after the last step, and the hidden state after each step.

    Raises:
      StructureError: shapes that do not belong together.
    """
    inputs, input_kernel, recurrent_kernel, bias = promote_dtype(inputs, input_kernel, recurrent_kernel, bias)
    _check_shapes(inputs, input_kernel, recurrent_kernel, bias)
    *batch, time, _ = inputs.shape
    units = recurrent_kernel.shape[0]
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    c, h = (jnp.zeros((*batch, units), wide),) * 2 if carry is None else (jnp.asarray(each, wide) for each in carry)
    for name, state in (("c", c), ("h", h)):
        _check_shape(f"the carry's {name}", state, (*batch, units))

    if lengths is not None:
        lengths = jnp.asarray(lengths)
        _check_shape("lengths", lengths, tuple(batch))
        counts = jnp.arange(time) < lengths[..., None]
        inputs = jnp.where(counts[..., None], inputs, 0)  # what fills up a batch may be NaN

    by_time = jnp.moveaxis(inputs, -2, 0)
    projected = jnp.matmul(by_time, input_kernel, preferred_element_type=wide) + bias.astype(wide)
    hidden, cells = _recurrence(projected, recurrent_kernel, c, h)

    if lengths is None:
        last = (cells[-1], hidden[-1]) if time else (c, h)
    else:
        hidden, last = _held_after(lengths, (c, cells), (h, hidden))
    return last, jnp.moveaxis(hidden, 0, -2).astype(inputs.dtype)


class LSTM(nn.Module):
    """A long short-term memory layer: `flax.linen.RNN(OptimizedLSTMCell(features))`, trained faster on CPU.

    Same equations, same distributions of the initial parameters, the same order of the carry. The parameters are three
    arrays, in which the gates i, f, g, o lie side by side along the last axis: `input_kernel`, Flax's `ii`, `if`, `ig`,
    `io`; `recurrent_kernel`, the kernels of `hi`, `hf`, `hg`, `ho`; and `bias`, their biases. Reverse-mode
    differentiation only, see `lstm`.

    Example:
      >>> network = nn.Sequential([nn.Embed(79, 8), fed.models.LSTM(256), fed.models.LSTM(256), nn.Dense(79)])
      >>> model = fed.models.from_flax(network, inputs=data.element_type, loss=fed.losses.cross_entropy)

    Attributes:
      features: how many units: the size of the hidden state, of the cell state and of an output.
      return_carry: whether a call returns `(carry, outputs)` in place of the outputs; a call may say otherwise.
      dtype: of the products and the outputs; None takes what inputs and parameters promote to.
      param_dtype: of the initial parameters.
      kernel_init: of the input kernel, gate by gate.
      recurrent_kernel_init: of the recurrent kernel, gate by gate.
      bias_init: of the bias, gate by gate.
    """

    features: int
    return_carry: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: _Initializer = nn.initializers.lecun_normal()
    recurrent_kernel_init: _Initializer = nn.initializers.orthogonal()
    bias_init: _Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch time inputs"],
        *,
        initial_carry: Carry | None = None,
        seq_lengths: Int[Array, " *batch"] | None = None,
        return_carry: bool | None = None,
    ) -> Any:
        """Runs the layer over whole sequences.

        Args:
          inputs: the sequences.
          initial_carry: the state `(c, h)` before the first step; None is zeros.
          seq_lengths: how many steps of each sequence count; None is all. See `lstm`.
          return_carry: overrides the attribute.

        Returns:
          The outputs, [*batch, time, features]; or the state after the last step that counts, and the outputs.

        Raises:
          StructureError: shapes that do not belong together.
        """
        units, gates = self.features, _GATES * self.features
        w = self.param("input_kernel", _by_gate(self.kernel_init), (inputs.shape[-1], gates), self.param_dtype)
        u = self.param("recurrent_kernel", _by_gate(self.recurrent_kernel_init), (units, gates), self.param_dtype)
        b = self.param("bias", _by_gate(self.bias_init), (gates,), self.param_dtype)
        inputs, w, u, b = promote_dtype(inputs, w, u, b, dtype=self.dtype)
        carry, outputs = lstm(inputs, w, u, b, initial_carry, seq_lengths)
        return (carry, outputs) if (self.return_carry if return_carry is None else return_carry) else outputs


def _by_gate(initializer: _Initializer) -> _Initializer:
    """Initialises each gate's part on its own: an orthogonal kernel is square, and a variance is that of one gate."""

    def initialize(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        of_gate = (*shape[:-1], shape[-1] // _GATES)
        drawn_in = jnp.promote_types(dtype, jnp.float32)  # an orthogonal kernel cannot be drawn in 16 bits
        parts = [initializer(each, of_gate, drawn_in) for each in jax.random.split(key, _GATES)]
        return jnp.concatenate(parts, axis=-1).astype(dtype)

    return initialize


def _held_after(
    lengths: Int[Array, " *batch"],
    cells: tuple[Float[Array, "*batch units"], Float[Array, "time *batch units"]],
    hidden: tuple[Float[Array, "*batch units"], Float[Array, "time *batch units"]],
) -> tuple[Float[Array, "time *batch units"], Carry]:
    """The hidden states, each step after the last that counts replaced by it, and the state after that one.

    The loop runs through all steps and the states are picked afterwards: a mask within would slow down every step.
    """
    (c, h), (all_c, all_h) = zip(cells, hidden, strict=True)
    all_c, all_h = jnp.concatenate([c[None], all_c]), jnp.concatenate([h[None], all_h])  # [time + 1, *batch, units]
    steps = jnp.arange(1, len(all_h)).reshape(-1, *[1] * lengths.ndim)
    held = jnp.take_along_axis(all_h, jnp.minimum(steps, lengths)[..., None], axis=0)
    at_end = lengths[None, ..., None]
    last_c, last_h = (jnp.take_along_axis(states, at_end, axis=0)[0] for states in (all_c, all_h))
    return held, (last_c, last_h)


@jax.custom_vjp
def _recurrence(
    projected: Float[Array, "time *batch 4*units"],
    kernel: Float[Array, "units 4*units"],
    c: Float[Array, "*batch units"],
    h: Float[Array, "*batch units"],
) -> tuple[Float[Array, "time *batch units"], Float[Array, "time *batch units"]]:
    """The hidden and the cell states after each step, from what the inputs give to the gates."""
    hidden, cells, _ = _forward(projected, kernel, c, h)
    return hidden, cells


def _forward(projected: Array, kernel: Array, c: Array, h: Array) -> tuple[Array, Array, Array]:
    """The hidden states, the cell states, and the gates i, f, g, o, after each step."""
    units = kernel.shape[0]
    # sigmoid(z) = tanh(z / 2) / 2 + 1 / 2 for i, f and o; tanh(z) * 1 + 0 for g
    scale = np.repeat([0.5, 0.5, 1.0, 0.5], units).astype(projected.dtype)
    shift = np.repeat([0.5, 0.5, 0.0, 0.5], units).astype(projected.dtype)

    def step(state: Carry, z: Array) -> tuple[Carry, tuple[Array, Array, Array]]:
        c, h = state
        z = z + jnp.matmul(h.astype(kernel.dtype), kernel, preferred_element_type=z.dtype)
        gates = jnp.tanh(z * scale) * scale + shift
        i, f, g, o = jnp.split(gates, _GATES, axis=-1)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (c, h), (h, c, gates)

    _, (hidden, cells, gates) = lax.scan(step, (c, h), projected)
    return hidden, cells, gates


def _forward_for_gradient(projected: Array, kernel: Array, c: Array, h: Array) -> tuple[tuple[Array, Array], Any]:
    hidden, cells, gates = _forward(projected, kernel, c, h)
    return (hidden, cells), (kernel, c, h, hidden, cells, gates)


def _gradient(residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
    """The gradients of `projected`, `kernel`, `c` and `h`."""
    kernel, c, h, hidden, cells, gates = residuals
    i, f, g, o = jnp.split(gates, _GATES, axis=-1)
    tanh_c = jnp.tanh(cells)
    # dz = dc * (...) for i, f and g, dh * (...) for o, and dc += dh * of_c: the factors, for all steps at once. The
    # barrier keeps XLA from fusing them back into the loop, where they would wait for the step before.
    before = jnp.concatenate([c[None], cells])[:-1]
    of_z = jnp.concatenate([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], axis=-1)
    of_c = o * (1 - tanh_c * tanh_c)
    of_z, of_c, f, transposed = lax.optimization_barrier((of_z, of_c, f, kernel.T))

    def step(state: Carry, known: tuple[Array, ...]) -> tuple[Carry, Array]:
        dc, dh = state
        dh_here, dc_here, of_z, of_c, f = known
        dh = dh + dh_here
        dc = dc + dc_here + dh * of_c
        dz = of_z * jnp.concatenate([dc, dc, dc, dh], axis=-1)
        dh = jnp.matmul(dz.astype(kernel.dtype), transposed, preferred_element_type=dz.dtype)
        return (dc * f, dh), dz

    dhidden, dcells = cotangents
    known = (dhidden, dcells, of_z, of_c, f)
    (dc, dh), dz = lax.scan(step, (jnp.zeros_like(c), jnp.zeros_like(h)), known, reverse=True)
    hidden_before = jnp.concatenate([h[None], hidden])[:-1].astype(kernel.dtype)
    axes = list(range(hidden_before.ndim - 1))
    dkernel = jnp.tensordot(hidden_before, dz.astype(kernel.dtype), (axes, axes))  # all steps and sequences at once
    return dz, dkernel, dc, dh


_recurrence.defvjp(_forward_for_gradient, _gradient)


def _check_shapes(inputs: Array, input_kernel: Array, recurrent_kernel: Array, bias: Array) -> None:
    if inputs.ndim < 2 or recurrent_kernel.ndim != 2:
        raise StructureError(
            "Expected inputs [*batch, time, inputs] and a recurrent_kernel [units, 4 * units], found the shapes "
            f"{inputs.shape} and {recurrent_kernel.shape}. Add the axes that are missing, of size 1."
        )
    units = recurrent_kernel.shape[0]
    _check_shape("the recurrent_kernel", recurrent_kernel, (units, _GATES * units))
    _check_shape("the input_kernel", input_kernel, (inputs.shape[-1], _GATES * units))
    _check_shape("the bias", bias, (_GATES * units,))


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise StructureError(
            f"Expected {name} of shape {expected}, found {array.shape}. "
            "Units and batch are those of the recurrent_kernel and the inputs."
        )
