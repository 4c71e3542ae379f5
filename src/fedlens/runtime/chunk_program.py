"""The program of a client stage over one chunk of clients: the loop that each device runs over its share.

The body of the loop is the fused stage: all maps, the reductions' accumulation, and the writing of outputs into their
rows. The trip count is the share's own, so padding costs memory and no time. `shard_map(check_vma=False)`, as a user's
own `scan` inside would fail the check.

A step of the loop computes one client, or a group of them side by side (`vmap`). Groups made a 200-unit MLP five times
slower, as its products are large enough alone; they made logistic regression of 650 parameters twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from fedlens.compiler import ClientStage
from fedlens.language.types import tensor_types
from fedlens.runtime import reductions
from fedlens.runtime.columns import Layout
from fedlens.runtime.interpreter import evaluate, inline, run_step

AXIS = "clients"

# What a program looks for infinities in: nothing; the sums of all clients, where they show if a client had one; each
# client's operands, so that it can be named; those, and leaves out the clients that have them.
Watch = Literal["nothing", "sums", "clients", "drop"]

_Carry = tuple[dict[str, Any], dict[str, list[jax.Array]], jax.Array]  # accumulators, rows of outputs, flags


def run_chunk(
    stage: ClientStage,
    mesh: Mesh,
    capacity: int,
    group: int,
    layouts: tuple[Layout, ...],
    shared: dict[str, Any],
    packed: list[list[jax.Array]],
    counts: Int[Array, " devices"],
    watch: Watch,
) -> tuple[Any, dict[str, list[jax.Array]], jax.Array]:
    """The program of a client stage over one chunk.

    Args:
      stage: what to compute.
      mesh: the devices.
      capacity: rows of outputs for each device, a multiple of `group`.
      group: how many clients a step of the loop computes.
      layouts: how to read `packed`, column by column.
      shared: what all clients see, on all devices.
      packed: for each column its arrays, spread over the devices.
      counts: how many clients each device has.
      watch: what to look for infinities in.

    Returns:
      The accumulators; the outputs, [devices * capacity, *leaf]; what was finite: each client's leaves, [devices *
      capacity, leaves], or the accumulators, [devices].
    """
    checked = len(reductions.checked_leaves(stage.reductions)) if watch in ("clients", "drop") else 0

    def share(shared: dict[str, Any], packed: list[list[jax.Array]], counts: jax.Array) -> Any:
        start = (
            {step.name: reductions.zeros(step) for step in stage.reductions},
            {
                name: [jnp.zeros((capacity, *tensor.shape), tensor.dtype) for tensor in tensor_types(type_)]
                for name, type_ in zip(stage.outputs, stage.output_types, strict=True)
            },
            jnp.ones((capacity, checked), jnp.bool_),
        )
        of_client = partial(_client, stage, layouts, shared, packed)
        if group == 1:
            body, steps = partial(_one_client, stage, watch, of_client), counts[0]
        else:
            body, steps = partial(_one_group, stage, watch, of_client, group, counts[0]), -(-counts[0] // group)
        sums, rows, finite = lax.fori_loop(jnp.int32(0), steps, body, start)
        total = _merge_devices(sums, mesh.size)
        return total, rows, reductions.all_finite(total)[None] if watch == "sums" else finite

    spread, everywhere = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        share, mesh=mesh, in_specs=(everywhere, spread, spread), out_specs=(everywhere, spread, spread), check_vma=False
    )(shared, packed, counts)


def _client(
    stage: ClientStage,
    layouts: tuple[Layout, ...],
    shared: dict[str, Any],
    packed: list[list[jax.Array]],
    position: jax.Array,
) -> tuple[list[Any], dict[str, list[jax.Array]]]:
    """What one client gives: the operand of each reduction, and the leaves of each output."""
    values = dict(shared)
    for name, layout, arrays in zip(stage.columns, layouts, packed, strict=True):
        values[name] = layout.client(arrays, position)
    for step in stage.body:
        values[step.name] = run_step(step, values, inline)
    operands = [evaluate(step.operand, values, inline) for step in stage.reductions]
    return operands, {name: reductions.leaves(values[name]) for name in stage.outputs}


def _one_client(
    stage: ClientStage, watch: Watch, of_client: Callable[..., Any], position: jax.Array, carry: _Carry
) -> _Carry:
    sums, rows, finite = carry
    operands, outputs = of_client(position)
    added = {
        step.name: reductions.accumulate(step, sums[step.name], operand)
        for step, operand in zip(stage.reductions, operands, strict=True)
    }
    if watch in ("clients", "drop"):
        flags = reductions.finite(stage.reductions, operands)
        finite = lax.dynamic_update_index_in_dim(finite, flags, position, 0)
        if watch == "drop":
            added = jax.tree.map(lambda new, old: jnp.where(flags.all(), new, old), added, sums)
    rows = jax.tree.map(lambda buffer, leaf: lax.dynamic_update_index_in_dim(buffer, leaf, position, 0), rows, outputs)
    return added, rows, finite


def _one_group(
    stage: ClientStage,
    watch: Watch,
    of_client: Callable[..., Any],
    group: int,
    count: jax.Array,
    number: jax.Array,
    carry: _Carry,
) -> _Carry:
    sums, rows, finite = carry
    first = number * group
    positions = first + jnp.arange(group, dtype=jnp.int32)
    counted = positions < count
    # The last group is filled up with its last client, who is not counted again.
    operands, outputs = jax.vmap(of_client)(jnp.minimum(positions, count - 1))
    if watch in ("clients", "drop"):
        flags = jax.vmap(partial(reductions.finite, stage.reductions))(operands)
        finite = lax.dynamic_update_slice_in_dim(finite, flags, first, 0)
        if watch == "drop":
            counted &= flags.all(axis=1)
    added = {
        step.name: reductions.accumulate_group(step, sums[step.name], operand, counted)
        for step, operand in zip(stage.reductions, operands, strict=True)
    }
    rows = jax.tree.map(lambda buffer, leaves: lax.dynamic_update_slice_in_dim(buffer, leaves, first, 0), rows, outputs)
    return added, rows, finite


def _merge_devices(sums: Any, devices: int) -> Any:
    """The accumulators of all devices, merged in their order: an all-reduce need not give the same bits every time."""
    if devices == 1:
        return sums
    of_each = lax.all_gather(sums, AXIS)
    total = jax.tree.map(lambda leaf: leaf[0], of_each)
    for device in range(1, devices):
        total = reductions.merge(total, jax.tree.map(lambda leaf, device=device: leaf[device], of_each))
    return total
