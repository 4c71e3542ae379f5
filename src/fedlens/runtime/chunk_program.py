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
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from fedlens.compiler import ClientStage
from fedlens.compiler.functions import describe_tracing
from fedlens.compiler.operations import SECURE_SUMS
from fedlens.language.tracebacks import noting
from fedlens.language.types import tensor_types
from fedlens.runtime import checks, reductions
from fedlens.runtime.columns import Layout
from fedlens.runtime.interpreter import inline, run_step
from fedlens.runtime.rows import Memory, Starts, write

AXIS = "clients"

# What a program looks for infinities in: nothing; the sums of all clients, where they show if a client had one; each
# client's operands, so that it can be named; those, and leaves out the clients that have them. Numbers beyond a bound
# are looked for always, and found, client by client, with "clients".
Watch = Literal["nothing", "sums", "clients", "drop"]

# What was seen, by name: "finite" and "within", [clients, leaves], and "found", [clients, leaves, 2], are of each
# client, see `checks`; "passed" is whether all clients passed, to be asked again with "clients" if not.
_Seen = dict[str, jax.Array]
_Leaves = dict[str, list[jax.Array]]  # output -> its leaves
_Carry = tuple[dict[str, Any], _Leaves | Memory, _Seen]  # accumulators, rows of outputs


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
    alone: bool,
    memory: Memory | None,
    starts: Starts | None,
) -> tuple[Any, _Leaves | Memory, _Seen]:
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
      alone: whether there is no other chunk, so that the accumulators can be turned into results at once.
      memory: where to write the outputs to, see `RowMemory`; None makes room for them.
      starts: where in it the rows begin.

    Returns:
      The accumulators, or if `alone` what `results` makes of them; the outputs, [devices * capacity, *leaf], or the
      memory that has them; what was seen: of each client, [devices * capacity, ...], and whether all passed, [devices].
    """

    def share(
        shared: dict[str, Any], packed: list[list[jax.Array]], counts: jax.Array, memory: Any, starts: Any
    ) -> Any:
        start = (
            {step.name: reductions.zeros(step, shared, inline) for step in stage.reductions},
            memory if memory is not None else _no_rows(stage, capacity),
            _nothing_seen(stage, watch, capacity),
        )
        of_client = partial(_client, stage, layouts, shared, packed)
        put = None if starts is None else partial(write, stage, capacity, starts)
        if group == 1:
            body, steps = partial(_one_client, stage, watch, of_client, put, shared), counts[0]
        else:
            body = partial(_one_group, stage, watch, of_client, put, shared, group, counts[0])
            steps = -(-counts[0] // group)
        sums, rows, seen = lax.fori_loop(jnp.int32(0), steps, body, start)
        total = _merge_devices(stage, shared, sums, mesh.size)
        if watch == "sums":
            seen["passed"] = checks.all_finite(stage.reductions, total) & seen.get("passed", True)
        return total, rows, seen | {name: seen[name][None] for name in ("passed",) if name in seen}

    spread, everywhere = PartitionSpec(AXIS), PartitionSpec()
    noted = noting(describe_tracing(f"client stage {stage.index}", *stage.reductions), unless_noted=True)
    total, rows, seen = jax.shard_map(
        noted(share),
        mesh=mesh,
        in_specs=(everywhere, spread, spread, spread, spread),
        out_specs=(everywhere, spread, spread),
        check_vma=False,
    )(shared, packed, counts, memory, starts)
    return noted(partial(results, stage))(total, shared) if alone else total, rows, seen


def _no_rows(stage: ClientStage, capacity: int) -> _Leaves:
    return {
        name: [jnp.zeros((capacity, *tensor.shape), tensor.dtype) for tensor in tensor_types(type_)]
        for name, type_ in zip(stage.outputs, stage.output_types, strict=True)
    }


def _client(
    stage: ClientStage,
    layouts: tuple[Layout, ...],
    shared: dict[str, Any],
    packed: list[list[jax.Array]],
    position: jax.Array,
) -> tuple[list[Any], dict[str, list[jax.Array]], tuple[jax.Array, jax.Array]]:
    """What one client gives: the operand of each reduction, the leaves of each output, and `checks.within` of it."""
    values = dict(shared)
    for name, layout, arrays in zip(stage.columns, layouts, packed, strict=True):
        values[name] = layout.client(arrays, position)
    for step in stage.body:
        with noting(describe_tracing(f"client stage {stage.index}", step)):
            values[step.name] = run_step(step, values, inline)
    operands = [reductions.sent(step, values, inline) for step in stage.reductions]
    outputs = {name: reductions.leaves(values[name]) for name in stage.outputs}
    return operands, outputs, checks.within(stage, values, inline)


def _one_client(
    stage: ClientStage,
    watch: Watch,
    of_client: Callable[..., Any],
    put: Callable[..., Any] | None,
    shared: dict[str, Any],
    position: jax.Array,
    carry: _Carry,
) -> _Carry:
    sums, rows, seen = carry
    operands, outputs, bounded = of_client(position)
    added = {
        step.name: reductions.accumulate(step, sums[step.name], operand, shared, inline)
        for step, operand in zip(stage.reductions, operands, strict=True)
    }
    look = _look(stage, watch, operands, bounded)
    if watch == "drop":
        added = jax.tree.map(lambda new, old: jnp.where(look["finite"].all(), new, old), added, sums)
    if "passed" in look:
        seen = {**seen, "passed": seen["passed"] & look.pop("passed")}
    in_rows = partial(jax.tree.map, lambda buffer, leaf: lax.dynamic_update_index_in_dim(buffer, leaf, position, 0))
    rows = in_rows(rows, outputs) if put is None else put(rows, outputs, position)
    return added, rows, seen | in_rows({name: seen[name] for name in look}, look)


def _one_group(
    stage: ClientStage,
    watch: Watch,
    of_client: Callable[..., Any],
    put: Callable[..., Any] | None,
    shared: dict[str, Any],
    group: int,
    count: jax.Array,
    number: jax.Array,
    carry: _Carry,
) -> _Carry:
    sums, rows, seen = carry
    first = number * group
    positions = first + jnp.arange(group, dtype=jnp.int32)
    counted = positions < count
    # The last group is filled up with its last client, who is not counted again.
    operands, outputs, bounded = jax.vmap(of_client)(jnp.minimum(positions, count - 1))
    look = jax.vmap(partial(_look, stage, watch))(operands, bounded) if _nothing_seen(stage, watch, 0) else {}
    if "passed" in look:  # the last client, who fills up the group, says nothing new
        seen = {**seen, "passed": seen["passed"] & look.pop("passed").all()}
    if watch == "drop":
        counted &= look["finite"].all(axis=1)
    added = {
        step.name: reductions.accumulate_group(step, sums[step.name], operand, counted, shared, inline)
        for step, operand in zip(stage.reductions, operands, strict=True)
    }
    in_rows = partial(jax.tree.map, lambda buffer, leaves: lax.dynamic_update_slice_in_dim(buffer, leaves, first, 0))
    rows = in_rows(rows, outputs) if put is None else put(rows, outputs, first)
    return added, rows, seen | in_rows({name: seen[name] for name in look}, look)


def _look(stage: ClientStage, watch: Watch, operands: list[Any], bounded: tuple[jax.Array, jax.Array]) -> _Seen:
    """What a program with this watch sees of one client."""
    within, found = bounded
    if watch == "clients":
        return {"finite": checks.finite(operands), "within": within, "found": found}
    look: _Seen = {"finite": checks.finite(operands)} if watch == "drop" else {}
    passed = [within.all()] if checks.bounded_leaves(stage) else []
    if watch == "drop" and passed:  # who is left out sends nothing that could be beyond a bound
        passed = [passed[0] | ~look["finite"].all()]
    if watch == "sums" and _sent_beside_sums(stage):
        beside = zip(stage.reductions, operands, strict=True)
        passed.append(checks.finite([operand for step, operand in beside if not reductions.is_sum(step)]).all())
    return look | ({"passed": jnp.stack(passed).all()} if passed else {})


def _nothing_seen(stage: ClientStage, watch: Watch, capacity: int) -> _Seen:
    """What `_look` fills in, before any client."""
    bounded = len(checks.bounded_leaves(stage))
    seen: _Seen = {}
    if watch in ("clients", "drop"):
        seen["finite"] = jnp.ones((capacity, len(checks.checked_leaves(stage.reductions))), jnp.bool_)
    if watch == "clients":
        seen["within"] = jnp.ones((capacity, bounded), jnp.bool_)
        seen["found"] = jnp.zeros((capacity, bounded, 2), jnp.int64)
    elif bounded or (watch == "sums" and _sent_beside_sums(stage)):
        seen["passed"] = jnp.bool_(True)
    return seen


def _sent_beside_sums(stage: ClientStage) -> list[str]:
    """The leaves whose infinities no sum shows: those of minima, maxima and aggregates."""
    return checks.checked_leaves([step for step in stage.reductions if not reductions.is_sum(step)])


def merge_all(stage: ClientStage, first: Any, second: Any, shared: dict[str, Any]) -> Any:
    """Merges the accumulators of all reductions of a stage; `first` is of earlier clients."""
    return {
        step.name: reductions.merge(step, first[step.name], second[step.name], shared, inline)
        for step in stage.reductions
    }


def results(stage: ClientStage, total: Any, shared: dict[str, Any]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The results of all reductions of a stage, and of each secure sum what fits its dtype."""
    secure = [step for step in stage.reductions if step.operation in SECURE_SUMS]
    return (
        {step.name: reductions.finish(step, total[step.name], shared, inline) for step in stage.reductions},
        {step.name: reductions.fits(step, total[step.name]) for step in secure},
    )


def _merge_devices(stage: ClientStage, shared: dict[str, Any], sums: Any, devices: int) -> Any:
    """The accumulators of all devices, merged in their order: an all-reduce need not give the same bits every time."""
    if devices == 1:
        return sums
    first, *others = _gathered(sums, devices)
    for other in others:
        first = merge_all(stage, first, other, shared)
    return first


def _gathered(values: Any, devices: int) -> list[Any]:
    """The values of each device, on all devices: leaves of one dtype travel together, as devices wait for each other
    once for each array.
    """
    leaves, structure = jax.tree.flatten(values)
    of_devices: list[list[Any]] = [[None] * len(leaves) for _ in range(devices)]
    for dtype in {leaf.dtype for leaf in leaves}:
        numbers = [number for number, leaf in enumerate(leaves) if leaf.dtype == dtype]
        gathered = lax.all_gather(jnp.concatenate([leaves[number].ravel() for number in numbers]), AXIS)
        ends = np.cumsum([leaves[number].size for number in numbers])[:-1]
        for device, of_device in enumerate(of_devices):
            for number, piece in zip(numbers, jnp.split(gathered[device], ends), strict=True):
                of_device[number] = piece.reshape(leaves[number].shape)
    return [jax.tree.unflatten(structure, of_device) for of_device in of_devices]
