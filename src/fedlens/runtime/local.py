"""The local engine: one XLA program for each client stage, over all devices of this machine.

Clients are dealt to devices, largest first; each device walks over its share in one loop whose body is the fused stage:
all maps, the reductions' accumulation, and the writing of outputs into their rows. A loop, not a batch over clients: on
two CPU cores `vmap` over clients was five times slower for a 200-unit MLP. The trip count is the share's own, so
padding costs memory and no time. `shard_map(check_vma=False)`, as a user's own `scan` inside would fail the check.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from fedlens.compiler import ClientStage, ServerStage
from fedlens.language.types import tensor_types
from fedlens.runtime import convolution, pooling, reductions
from fedlens.runtime.columns import Layout, Share, bucket
from fedlens.runtime.devices import compute_devices
from fedlens.runtime.engine import OnNonFinite, Sink, StageCohort, StageResult, check_finite, to_host
from fedlens.runtime.interpreter import calls_local_computation, evaluate, evaluate_stage, inline, run_step
from fedlens.runtime.lowering import lowered_for_cpu
from fedlens.runtime.replicas import on_all_devices
from fedlens.runtime.values import Part

_AXIS = "clients"

# What a program looks for infinities in: nothing; the sums of all clients, where they show if a client had one; each
# client's operands, so that it can be named; those, and leaves out the clients that have them.
_Watch = Literal["nothing", "sums", "clients", "drop"]
_WATCH: dict[OnNonFinite, _Watch] = {"ignore": "nothing", "raise": "sums", "drop": "drop"}


class Local:
    """Computes on the devices of this process.

    Attributes:
      devices: what it computes on; by default all that JAX's default backend has.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Takes the devices to compute on, at least one."""
        self.devices = tuple(devices) if devices is not None else compute_devices()
        self._mesh = Mesh(np.array(self.devices), (_AXIS,))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._by_device = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._in_place = all(device.platform == "cpu" for device in self.devices)
        self._programs: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        convolution.install()
        pooling.install()

    def run_clients(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        cohort: StageCohort,
        sink: Sink | None = None,
        on_nonfinite: OnNonFinite = "ignore",
    ) -> StageResult:
        """Runs a client stage; see `Engine.run_clients`."""
        run_chunk, finish = self._client_programs(stage)
        outputs: dict[str, list[Part]] = {name: [] for name in stage.outputs}
        dropped: list[np.ndarray] = []
        total: Any = None
        computing: tuple[list[Share], Any, Callable[[_Watch], Any]] | None = None

        def take(shares: list[Share], results: Any, compute: Callable[[_Watch], Any]) -> None:
            """Hands out what a chunk computed; called when the next one is under way."""
            rows, finite = results
            if on_nonfinite == "drop":
                dropped.append(_check_chunk(stage, cohort.ids, shares, finite, on_nonfinite))
            elif on_nonfinite == "raise" and not to_host(finite).all():
                *_, of_clients = compute("clients")  # once more, to see whose it was
                _check_chunk(stage, cohort.ids, shares, of_clients, on_nonfinite)
            parts = {name: self._parts(shares, rows[name]) for name in stage.outputs}
            if sink is not None:
                sink(parts)
            else:
                for name, of_chunk in parts.items():
                    outputs[name] += of_chunk

        with jax.enable_x64(True), lowered_for_cpu():
            held = on_all_devices(dict(shared), self._everywhere)
            capacity = 0
            for chunk in cohort.chunks(stage):
                shares = self._deal(stage, cohort, chunk)
                # A short last chunk takes the capacity of the others, and compiles nothing.
                capacity = max(bucket(max(len(share) for share in shares)), capacity)
                packed, counts, layouts = self._pack(stage, cohort, shares, capacity)
                compute = partial(run_chunk, capacity, layouts, held, packed, counts)
                partial_sums, rows, finite = compute(_WATCH[on_nonfinite])
                total = partial_sums if total is None else finish.merge(total, partial_sums)
                if computing is not None:
                    take(*computing)
                computing = shares, (rows, finite), compute
            results = finish.finish(total)  # under way while the last chunk is awaited
            if computing is not None:
                take(*computing)
        positions = np.concatenate([np.zeros(0, np.int64), *dropped])
        return StageResult(results, {} if sink is not None else outputs, positions)

    def run_server(self, stage: ServerStage, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a server stage as one program, or without one if it only moves values; see `Engine.run_server`."""
        if not any(calls_local_computation(step) for step in stage.body):
            return evaluate_stage(stage, environment, inline)
        program = self._programs.get(stage)
        if program is None:
            own = replace(stage)  # a program that held its own key would never be forgotten
            program = self._programs[stage] = jax.jit(lambda values: evaluate_stage(own, values, inline))
        with jax.enable_x64(True), lowered_for_cpu():
            read = {name: environment[name] for name in stage.inputs}
            # The one Python number in a positional value is a sequence's length, an int32 wherever it is traced.
            read = jax.tree.map(lambda leaf: np.int32(leaf) if isinstance(leaf, int) else leaf, read)
            results: dict[str, Any] = program(on_all_devices(read, self._everywhere))
        return results

    def _client_programs(self, stage: ClientStage) -> tuple[Callable[..., Any], _Finish]:
        programs = self._programs.get(stage)
        if programs is None:
            own = replace(stage)  # as in run_server
            run_chunk = jax.jit(partial(_run_chunk, own, self._mesh), static_argnums=(0, 1, 5))
            programs = self._programs[stage] = run_chunk, _Finish(own)
        return programs

    def _deal(self, stage: ClientStage, cohort: StageCohort, chunk: Int[np.ndarray, " clients"]) -> list[Share]:
        """Deals a chunk's clients to devices, largest first to the least loaded; each share in cohort order."""
        count = len(self.devices)
        costs = [cohort.columns[name].costs()[chunk] for name in stage.columns]
        cost: np.ndarray = np.max(costs, axis=0) if costs else np.ones(len(chunk), np.int64)
        if count == 1 or bool(np.all(cost == cost[0])):
            return np.array_split(chunk, count)
        loads = [(0, device) for device in range(count)]
        of_device = np.empty(len(chunk), np.int64)
        for client in np.argsort(-cost, kind="stable"):
            load, device = heapq.heappop(loads)
            of_device[client] = device
            heapq.heappush(loads, (load + int(cost[client]), device))
        return [chunk[of_device == device] for device in range(count)]

    def _pack(
        self, stage: ClientStage, cohort: StageCohort, shares: list[Share], capacity: int
    ) -> tuple[list[list[jax.Array]], jax.Array, tuple[Layout, ...]]:
        """For each column its arrays, spread over the devices; how many clients each device has; the layouts."""
        leaves: list[Sequence[np.ndarray]] = [[np.array([len(share)], np.int32) for share in shares]]
        layouts = []
        for name in stage.columns:
            by_device, layout = cohort.columns[name].pack(shares, capacity, in_place=self._in_place)
            leaves += zip(*by_device, strict=True)
            layouts.append(layout)
        counts, *placed = self._place(leaves)
        remaining = iter(placed)
        return [list(islice(remaining, layout.num_leaves)) for layout in layouts], counts, tuple(layouts)

    def _place(self, leaves: Sequence[Sequence[np.ndarray]]) -> list[jax.Array]:
        """Each leaf, given as an array for each device, as one array whose leading axis is spread over the devices."""
        pieces = [piece for leaf in leaves for piece in leaf]
        placed = iter(jax.device_put(pieces, list(self.devices) * len(leaves)))  # one call: each costs 0.1 ms
        return [
            jax.make_array_from_single_device_arrays(
                (len(leaf) * leaf[0].shape[0], *leaf[0].shape[1:]), self._by_device, list(islice(placed, len(leaf)))
            )
            for leaf in leaves
        ]

    def _parts(self, shares: list[Share], leaves: Sequence[jax.Array]) -> list[Part]:
        by_device = [[to_host(rows) for rows in self._device_rows(leaf)] for leaf in leaves]
        return [
            Part(share, tuple(leaf[device][: len(share)] for leaf in by_device))
            for device, share in enumerate(shares)
            if len(share)
        ]

    def _device_rows(self, leaf: jax.Array) -> list[jax.Array]:
        of_device = {piece.device: piece.data for piece in leaf.addressable_shards}
        return [of_device[device] for device in self.devices]


class _Finish:
    """The small programs after the loop: merge the accumulators of two chunks, and turn one into results."""

    def __init__(self, stage: ClientStage):
        self.merge = jax.jit(reductions.merge)
        self.finish = jax.jit(
            lambda total: {step.name: reductions.finish(step, total[step.name]) for step in stage.reductions}
        )


def _run_chunk(
    stage: ClientStage,
    mesh: Mesh,
    capacity: int,
    layouts: tuple[Layout, ...],
    shared: dict[str, Any],
    packed: list[list[jax.Array]],
    counts: jax.Array,
    watch: _Watch,
) -> tuple[Any, dict[str, list[jax.Array]], jax.Array]:
    """The program of a client stage over one chunk.

    Args:
      stage: what to compute.
      mesh: the devices.
      capacity: rows of outputs for each device.
      layouts: how to read `packed`, column by column.
      shared: what all clients see, on all devices.
      packed: for each column its arrays, spread over the devices.
      counts: how many clients each device has.
      watch: what to look for infinities in.

    Returns:
      The accumulators; the outputs, [devices * capacity, *leaf]; what was finite: each client's leaves, [devices *
      capacity, leaves], or the accumulators, [devices].
    """
    by_client = watch in ("clients", "drop")
    checked = len(reductions.checked_leaves(stage.reductions)) if by_client else 0

    def share(shared: dict[str, Any], packed: list[list[jax.Array]], counts: jax.Array) -> Any:
        def one_client(position: jax.Array, carry: Any) -> Any:
            sums, rows, finite = carry
            values = dict(shared)
            for name, layout, arrays in zip(stage.columns, layouts, packed, strict=True):
                values[name] = layout.client(arrays, position)
            for step in stage.body:
                values[step.name] = run_step(step, values, inline)
            operands = [evaluate(step.operand, values, inline) for step in stage.reductions]
            added = {
                step.name: reductions.accumulate(step, sums[step.name], operand)
                for step, operand in zip(stage.reductions, operands, strict=True)
            }
            if checked:
                flags = reductions.finite(stage.reductions, operands)
                finite = lax.dynamic_update_index_in_dim(finite, flags, position, 0)
                if watch == "drop":
                    added = jax.tree.map(lambda new, old: jnp.where(flags.all(), new, old), added, sums)
            rows = {
                name: [
                    lax.dynamic_update_index_in_dim(buffer, leaf, position, 0)
                    for buffer, leaf in zip(rows[name], reductions.leaves(values[name]), strict=True)
                ]
                for name in stage.outputs
            }
            return added, rows, finite

        start = (
            {step.name: reductions.zeros(step) for step in stage.reductions},
            {
                name: [jnp.zeros((capacity, *tensor.shape), tensor.dtype) for tensor in tensor_types(type_)]
                for name, type_ in zip(stage.outputs, stage.output_types, strict=True)
            },
            jnp.ones((capacity, checked), jnp.bool_),
        )
        sums, rows, finite = lax.fori_loop(jnp.int32(0), counts[0], one_client, start)
        total = _merge_devices(sums, mesh.size)
        return total, rows, reductions.all_finite(total)[None] if watch == "sums" else finite

    spread, everywhere = PartitionSpec(_AXIS), PartitionSpec()
    return jax.shard_map(
        share, mesh=mesh, in_specs=(everywhere, spread, spread), out_specs=(everywhere, spread, spread), check_vma=False
    )(shared, packed, counts)


def _merge_devices(sums: Any, devices: int) -> Any:
    """The accumulators of all devices, merged in their order: an all-reduce need not give the same bits every time."""
    if devices == 1:
        return sums
    of_each = lax.all_gather(sums, _AXIS)
    total = jax.tree.map(lambda leaf: leaf[0], of_each)
    for device in range(1, devices):
        total = reductions.merge(total, jax.tree.map(lambda leaf, device=device: leaf[device], of_each))
    return total


def _check_chunk(
    stage: ClientStage, ids: Sequence[str], shares: list[Share], finite: jax.Array, on_nonfinite: OnNonFinite
) -> Int[np.ndarray, " dropped"]:
    by_device = to_host(finite).reshape(len(shares), finite.shape[0] // len(shares), finite.shape[1])
    flags = np.concatenate([rows[: len(share)] for share, rows in zip(shares, by_device, strict=True)])
    positions = np.concatenate(shares)
    order = np.argsort(positions)
    bad = check_finite(stage, [ids[position] for position in positions[order]], flags[order], on_nonfinite)
    return positions[order][bad]
