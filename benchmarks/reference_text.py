"""W3 as a JAX program written by hand: unequal clients, and an LSTM in two forms.

    python benchmarks/reference.py --workload W3 [--form naive]

`naive` is the LSTM as one writes it down, a `lax.scan` over time that JAX differentiates. `fast` takes out of the scan
whatever need not wait for the step before: the input's projection is one product; the way back is written by hand, its
scan emits only the gradients of the gates, and the gradient of the recurrent kernel is one product after it; that
kernel is transposed once, not in every step; one tanh serves all gates. Clients are dealt to the devices longest first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import in_place, write
from workloads import TextWorkload, cohort, texts

Parameters = dict[str, jax.Array]
Layer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def naive(inputs: jax.Array, kernel: jax.Array, recurrent: jax.Array, bias: jax.Array) -> jax.Array:
    """`[time, batch, inputs] -> [time, batch, units]`: hidden states after each step, from zeros; gates i, f, g, o."""

    def step(state: tuple[jax.Array, jax.Array], x: jax.Array) -> Any:
        hidden, cell = state
        i, f, g, o = jnp.split(x @ kernel + hidden @ recurrent + bias, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros((inputs.shape[1], recurrent.shape[0]))
    return lax.scan(step, (zeros, zeros), inputs)[1]


def fast(inputs: jax.Array, kernel: jax.Array, recurrent: jax.Array, bias: jax.Array) -> jax.Array:
    """The same states."""
    return recur(inputs @ kernel + bias, recurrent)


def _walk(projected: jax.Array, recurrent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The hidden states, the gates and the cells of all steps."""
    units = recurrent.shape[0]
    scale = np.repeat(np.float32([0.5, 0.5, 1, 0.5]), units)  # sigmoid(z) = tanh(z / 2) / 2 + 1 / 2
    shift = np.repeat(np.float32([0.5, 0.5, 0, 0.5]), units)

    def step(state: tuple[jax.Array, jax.Array], z: jax.Array) -> Any:
        hidden, cell = state
        gates = jnp.tanh((z + hidden @ recurrent) * scale) * scale + shift
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = f * cell + i * g
        hidden = o * jnp.tanh(cell)
        return (hidden, cell), (hidden, gates, cell)

    zeros = jnp.zeros((projected.shape[1], units))
    return lax.scan(step, (zeros, zeros), projected)[1]


@jax.custom_vjp
def recur(projected: jax.Array, recurrent: jax.Array) -> jax.Array:
    """Hidden states `[time, batch, units]` of what the inputs give to the gates, `[time, batch, 4 * units]`."""
    return _walk(projected, recurrent)[0]


def _recur_forward(projected: jax.Array, recurrent: jax.Array) -> Any:
    hidden, gates, cells = _walk(projected, recurrent)
    return hidden, (recurrent, hidden, gates, cells)


def _recur_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    recurrent, hidden, gates, cells = kept
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    zeros = jnp.zeros_like(hidden[:1])
    before, squashed = jnp.concatenate([zeros, cells[:-1]]), jnp.tanh(cells)
    # What does not wait for the step after it, for all steps at once; the barrier keeps it out of the scan.
    of_gates = jnp.concatenate([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)], -1)
    of_cell = o * (1 - squashed * squashed)
    of_gates, of_cell, f, transposed = lax.optimization_barrier((of_gates, of_cell, f, recurrent.T))

    def step(state: tuple[jax.Array, jax.Array], at: tuple[jax.Array, ...]) -> Any:
        of_hidden, carried = state
        of_output, of_gates, of_cell, f = at
        of_hidden = of_hidden + of_output
        carried = carried + of_hidden * of_cell
        of_z = of_gates * jnp.concatenate([carried, carried, carried, of_hidden], axis=-1)
        return (of_z @ transposed, carried * f), of_z

    start = (zeros[0], zeros[0])
    of_projected = lax.scan(step, start, (gradient, of_gates, of_cell, f), reverse=True)[1]
    earlier = jnp.concatenate([zeros, hidden[:-1]]).reshape(-1, recurrent.shape[0])
    return of_projected, earlier.T @ of_projected.reshape(-1, recurrent.shape[1])


recur.defvjp(_recur_forward, _recur_backward)
FORMS: dict[str, Layer] = {"fast": fast, "naive": naive}


def initialize(workload: TextWorkload) -> Parameters:
    """Everything uniform within one over the root of the units, as PyTorch has it; biases zero."""
    generator = np.random.default_rng(0)
    bound, gates = workload.units**-0.5, 4 * workload.units
    shapes = {"embedding": (workload.vocabulary, workload.embedding)}
    for number, width in enumerate(workload.widths()[:-1]):
        shapes |= {f"kernel{number}": (width, gates), f"recurrent{number}": (workload.units, gates)}
    shapes["dense"] = (workload.units, workload.vocabulary)
    parameters = {
        name: jnp.asarray(generator.uniform(-bound, bound, shape).astype(np.float32)) for name, shape in shapes.items()
    }
    biases = {f"bias{number}": jnp.zeros(gates) for number in range(workload.layers)}
    return {**parameters, **biases, "dense_bias": jnp.zeros(workload.vocabulary)}


def loss(
    workload: TextWorkload, layer: Layer, parameters: Parameters, x: jax.Array, y: jax.Array, counts: jax.Array
) -> jax.Array:
    """Mean cross-entropy over the sequences `[batch, steps]` that count."""
    states = parameters["embedding"][x.T]  # [time, batch, embedding]
    for number in range(workload.layers):
        states = layer(states, *(parameters[f"{name}{number}"] for name in ("kernel", "recurrent", "bias")))
    scores = jax.nn.log_softmax(states @ parameters["dense"] + parameters["dense_bias"])
    of_sequences = -jnp.take_along_axis(scores, y.T[..., None], axis=-1)[..., 0].mean(0)
    return jnp.where(counts, of_sequences, 0).sum() / jnp.maximum(counts.sum(), 1)


def train(
    workload: TextWorkload,
    layer: Layer,
    parameters: Parameters,
    pool: tuple[jax.Array, jax.Array],
    start: jax.Array,
    length: jax.Array,
    key: jax.Array,
) -> Parameters:
    """One client: its sequences in random order, one step of SGD a batch, as many as it has."""
    slots = jnp.arange(workload.longest)
    order = jnp.argsort(jnp.where(slots < length, jax.random.uniform(key, slots.shape), 2))

    def step(number: jax.Array, parameters: Parameters) -> Parameters:
        within = number * workload.batch + jnp.arange(workload.batch)
        rows = start + order[within]
        x, y = (column.at[rows].get(mode="clip") for column in pool)
        gradient = jax.grad(partial(loss, workload, layer))(parameters, x, y, within < length)
        return jax.tree.map(lambda p, g: p - workload.learning_rate * g, parameters, gradient)

    return lax.fori_loop(0, -(-length // workload.batch), step, parameters)


def deal(lengths: np.ndarray, batch: int, devices: int) -> np.ndarray:
    """Positions of clients by device, longest first to the one with the fewest batches; -1 fills up.

    Returns:
      `[devices, room]`, with room for the most unequal shares: one shape for all rounds is compiled once.
    """
    dealt = np.full((devices, max(len(lengths) - devices + 1, 1)), -1)
    load, count = np.zeros(devices, int), np.zeros(devices, int)
    for client in np.argsort(-lengths, kind="stable"):
        device = int(np.argmin(load))
        dealt[device, count[device]] = client
        load[device] += -(-lengths[client] // batch)
        count[device] += 1
    return dealt


def rounds(workload: TextWorkload, capture: Path | None, form: str) -> Callable[[int], None]:
    """The function that runs one round, from the drawing of its cohort to the new global model."""
    mesh = Mesh(np.array(jax.devices()), ("clients",))
    by_client, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("clients"), PartitionSpec()))
    pool = texts()
    columns = tuple(in_place(column, everywhere) for column in (pool.x, pool.y))
    parameters = jax.device_put(initialize(workload), everywhere)
    run_key = jax.random.key(1)

    def one_device(
        parameters: Parameters, columns: Any, key: jax.Array, members: jax.Array, starts: jax.Array, lengths: jax.Array
    ) -> Any:
        def one_client(total: Any, client: Any) -> Any:
            member, start, length = client
            client_key = jax.random.fold_in(key, member)
            local = train(workload, FORMS[form], parameters, columns, start, length, client_key)
            total = jax.tree.map(lambda s, leaf: s + length * leaf, total, local)
            return total, local if capture is not None else None

        start = jax.tree.map(jnp.zeros_like, parameters)
        total, local = lax.scan(one_client, start, (members, starts, lengths))
        total, weight = lax.psum((total, lengths.sum()), "clients")
        return jax.tree.map(lambda leaf: leaf / weight, total), local

    everywhere_spec, by_client_spec = PartitionSpec(), PartitionSpec("clients")
    run = jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(everywhere_spec,) * 3 + (by_client_spec,) * 3,
            out_specs=(everywhere_spec, by_client_spec),
            check_vma=False,
        )
    )

    def run_round(number: int) -> None:
        nonlocal parameters
        clients = cohort(workload, number)
        starts, lengths = pool.offsets[clients], np.diff(pool.offsets)[clients]
        dealt = deal(lengths, workload.batch, mesh.size)
        members, starts, lengths = (
            jax.device_put(np.where(dealt >= 0, column[dealt], 0).astype(np.int32).reshape(-1), by_client)
            for column in (clients, starts, lengths)
        )
        key = jax.device_put(jax.random.fold_in(run_key, number), everywhere)
        parameters, local = run(parameters, columns, key, members, starts, lengths)
        if capture is not None:
            folder = capture / str(number % 2)
            folder.mkdir(exist_ok=True)
            write(local, folder, 0)
        jax.block_until_ready(parameters)

    return run_round
