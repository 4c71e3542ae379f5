"""The local engine: one XLA program for each client stage, over all devices of this machine.

Clients are dealt to devices, largest first; each device walks over its share in one loop (`chunk_program`). A cohort
runs in chunks; what one chunk gave is handed out while the next computes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from fedlens.compiler import ClientStage, ServerStage, segments
from fedlens.compiler.functions import describe_tracing
from fedlens.errors import ConfigError
from fedlens.language.tracebacks import noting
from fedlens.language.types import contains_sequence, num_bytes
from fedlens.runtime import checks, chunk_program, convolution, pooling, reductions, scans, stage_log
from fedlens.runtime.chunk_program import AXIS, Watch
from fedlens.runtime.columns import Layout, Share, bucket
from fedlens.runtime.devices import compute_devices
from fedlens.runtime.engine import OnNonFinite, Sink, StageCohort, StageResult, check_finite, to_host
from fedlens.runtime.host import run_segments, run_server_segments
from fedlens.runtime.interpreter import calls_local_computation, eager, evaluate_stage, inline
from fedlens.runtime.lowering import cpu_options, lowered_for_cpu
from fedlens.runtime.replicas import on_all_devices
from fedlens.runtime.rows import RowMemory, Rows
from fedlens.runtime.sequences import without_python_lengths
from fedlens.runtime.values import Part

_GROUP = 32  # clients; 16 took 3 % more of W4's time, 64 and 100 were no faster
_TINY = 16 * 1024  # bytes of what a client sends; a group of them then fits into a core's cache
_MANY = 256  # clients of a device
_MANY_TO_DEAL = 4096  # clients; dealing each to the least loaded device would be a Python loop over all of them
_WATCH: dict[OnNonFinite, Watch] = {"ignore": "nothing", "raise": "sums", "drop": "drop"}


class Local:
    """Computes on the devices of this process.

    Attributes:
      devices: what it computes on; by default all that JAX's default backend has.
      clients_per_step: how many clients a device computes side by side (by `vmap`); None chooses 32 where there are
        many clients and what each sends is tiny, and 1 otherwise.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None, *, clients_per_step: int | None = None):
        """Takes the devices to compute on, at least one, and how many clients a device computes side by side.

        Raises:
          ConfigError: `clients_per_step` is below 1.
        """
        if clients_per_step is not None and clients_per_step < 1:
            raise ConfigError(f"Expected clients_per_step to be at least 1, found {clients_per_step}.")
        self.clients_per_step = clients_per_step
        self.devices = tuple(devices) if devices is not None else compute_devices()
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._by_device = NamedSharding(self._mesh, PartitionSpec(AXIS))
        self._in_place = all(device.platform == "cpu" for device in self.devices)
        self._compiler_options = cpu_options() if self._in_place else None
        self._one_by_one: WeakSet[ClientStage] = WeakSet()  # stages that cannot be computed side by side
        # Whether what is reduced holds sequences, and its bytes: asked in every round, before the devices have work.
        self._sends: WeakKeyDictionary[ClientStage, tuple[bool, int]] = WeakKeyDictionary()
        self._programs: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        convolution.install()
        pooling.install()
        scans.install()

    def run_clients(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        cohort: StageCohort,
        sink: Sink | None = None,
        on_nonfinite: OnNonFinite = "ignore",
    ) -> StageResult:
        """Runs a client stage; see `Engine.run_clients`."""
        if parts := segments(stage):
            return run_segments(self, parts, stage, shared, cohort, sink, on_nonfinite)
        group = self._group(stage, cohort)
        try:
            return self._run_clients(stage, shared, cohort, sink, on_nonfinite, group)
        except NotImplementedError:  # JAX's for an operation without a rule for batches, such as an exported program
            if group == 1 or self.clients_per_step is not None:
                raise
            self._one_by_one.add(stage)
            return self._run_clients(stage, shared, cohort, sink, on_nonfinite, 1)

    def _group(self, stage: ClientStage, cohort: StageCohort) -> int:
        """How many clients a device computes side by side: several if there are many and what each gives is tiny."""
        if stage not in self._sends:
            sent = [reductions.sent_type(step) for step in stage.reductions]
            # By what is reduced alone if anything is: what is handed out beside it must not change the order of a sum.
            size = sum(map(num_bytes, sent or stage.output_types))
            self._sends[stage] = any(map(contains_sequence, sent)), size
        has_sequences, size = self._sends[stage]
        if has_sequences:
            return 1  # a group would hold the rows of all clients once for each of its own
        if self.clients_per_step is not None:
            return self.clients_per_step
        if stage in self._one_by_one or size > _TINY:
            return 1
        return _GROUP if len(cohort.chunks(stage)[0]) >= _MANY * len(self.devices) else 1

    def _run_clients(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        cohort: StageCohort,
        sink: Sink | None,
        on_nonfinite: OnNonFinite,
        group: int,
    ) -> StageResult:
        run_chunk, finish, memory = self._client_programs(stage)
        outputs: dict[str, list[Part]] = {name: [] for name in stage.outputs} if sink is None else {}
        dropped: list[np.ndarray] = []
        total: Any = None
        computing: tuple[list[Share], Any, Callable[..., Any], Rows | None] | None = None

        def take(shares: list[Share], results: Any, compute: Callable[..., Any], room: Rows | None) -> None:
            """Hands out what a chunk computed; called when the next one is under way."""
            rows, seen, sums = results
            jax.block_until_ready(sums)  # no more than two chunks under way: JAX 0.10 deadlocked on many
            if on_nonfinite == "drop":
                dropped.append(_check_chunk(stage, cohort.ids, shares, seen, on_nonfinite))
            if "passed" in seen and not to_host(seen["passed"]).all():
                *_, of_clients = compute("clients", alone, None, None)  # once more, to see whose it was
                _check_chunk(stage, cohort.ids, shares, of_clients, on_nonfinite)
            if room is None:
                arrays = {name: self._of_devices(rows[name]) for name in stage.outputs}
            else:
                arrays = memory.lend(room._replace(memory=rows))
            parts = {name: _parts(shares, arrays[name]) for name in stage.outputs}
            if sink is not None:
                sink(parts)
            else:
                for name, of_chunk in parts.items():
                    outputs[name] += of_chunk

        with jax.enable_x64(True), lowered_for_cpu():
            with stage_log.phase("packing"):
                held = on_all_devices(without_python_lengths(dict(shared)), self._everywhere)
                read_after = {name: held[name] for name in reductions.names_read(stage.reductions, stage.shared)}
            capacity = 0
            chunks = cohort.chunks(stage)
            alone = len(chunks) == 1
            for chunk in chunks:
                with stage_log.phase("packing"):
                    shares = self._deal(stage, cohort, chunk, group)
                    # A short last chunk takes the capacity of the others, and compiles nothing.
                    capacity = max(-(-bucket(max(len(share) for share in shares)) // group) * group, capacity)
                    packed, counts, layouts = self._pack(stage, cohort, shares, capacity, group)
                compute = partial(run_chunk, capacity, group, layouts, held, packed, counts)
                room = memory.take(capacity, [len(share) for share in shares])
                sums, rows, seen = compute(_WATCH[on_nonfinite], alone, *(room or (None, None))[:2])
                total = sums if total is None else finish.merge(total, sums, read_after)
                if computing is not None:
                    take(*computing)
                computing = shares, (rows, seen, sums), compute, room
            # Under way while the last chunk is awaited.
            results, fits = total if alone else finish.finish(total, read_after)

        def confirm() -> None:
            with jax.enable_x64(True), lowered_for_cpu():
                if computing is not None:
                    take(*computing)
                checks.refuse_unfit(stage, {name: to_host(flags) for name, flags in fits.items()})

        if on_nonfinite != "drop":
            return StageResult(results, outputs, np.zeros(0, np.int64), confirm)
        confirm()
        return StageResult(results, outputs, np.concatenate([np.zeros(0, np.int64), *dropped]))

    def run_server(self, stage: ServerStage, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a server stage as one program, or without one if it only moves values; see `Engine.run_server`."""
        if parts := segments(stage):
            return run_server_segments(self, parts, stage, environment)
        program = self._programs.get(stage)
        if program is None:
            if any(step.is_lazy and step.name in stage.outputs for step in stage.body):
                # A sequence cannot leave a program; it is computed when its elements are read.
                with jax.enable_x64(True):
                    return evaluate_stage(stage, environment, eager)
            if not any(calls_local_computation(step) for step in stage.body):
                return evaluate_stage(stage, environment, inline)
            own = replace(stage)  # a program that held its own key would never be forgotten
            program = self._programs[stage] = jax.jit(lambda values: evaluate_stage(own, values, inline))
        with jax.enable_x64(True), lowered_for_cpu():
            read = {name: environment[name] for name in stage.inputs}
            results: dict[str, Any] = program(on_all_devices(without_python_lengths(read), self._everywhere))
        return results

    def _client_programs(self, stage: ClientStage) -> tuple[Callable[..., Any], _Finish, RowMemory]:
        programs = self._programs.get(stage)
        if programs is None:
            own = replace(stage)  # as in run_server
            run_chunk = jax.jit(
                partial(chunk_program.run_chunk, own, self._mesh),
                static_argnums=(0, 1, 2, 6, 7),
                donate_argnums=8,
                compiler_options=self._compiler_options,
            )
            memory = RowMemory(own, self._by_device, self._in_place)
            programs = self._programs[stage] = run_chunk, _Finish(own), memory
        return programs

    def _deal(
        self, stage: ClientStage, cohort: StageCohort, chunk: Int[np.ndarray, " clients"], group: int
    ) -> list[Share]:
        """Deals a chunk's clients to devices, largest first to the least loaded.

        Each share is in cohort order; or largest first if clients run in groups, whose time is that of the largest.
        """
        count = len(self.devices)
        costs = [cohort.columns[name].costs()[chunk] for name in stage.columns]
        cost: np.ndarray = np.max(costs, axis=0) if costs else np.ones(len(chunk), np.int64)
        if bool(np.all(cost == cost[0])):
            return np.array_split(chunk, count)
        order = np.argsort(-cost, kind="stable")
        if count == 1:
            return [chunk if group == 1 else chunk[order]]
        of_device = np.empty(len(chunk), np.int64)
        if len(chunk) > _MANY_TO_DEAL:
            # There and back again over the devices: their loads then differ by one client's cost at most.
            of_device[order] = np.resize([*range(count), *reversed(range(count))], len(chunk))
        else:
            loads = [(0, device) for device in range(count)]
            for client in order:
                load, device = heapq.heappop(loads)
                of_device[client] = device
                heapq.heappush(loads, (load + int(cost[client]), device))
        if group > 1:
            chunk, of_device = chunk[order], of_device[order]
        return [chunk[of_device == device] for device in range(count)]

    def _pack(
        self, stage: ClientStage, cohort: StageCohort, shares: list[Share], capacity: int, group: int
    ) -> tuple[list[list[jax.Array]], jax.Array, tuple[Layout, ...]]:
        """For each column its arrays, spread over the devices; how many clients each device has; the layouts."""
        leaves: list[Sequence[np.ndarray]] = [[np.array([len(share)], np.int32) for share in shares]]
        layouts = []
        for name in stage.columns:
            column = cohort.columns[name]
            by_device, layout = column.pack(shares, capacity, in_place=self._in_place, grouped=group > 1)
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

    def _of_devices(self, leaves: Sequence[jax.Array]) -> list[list[np.ndarray]]:
        """For each leaf the rows of each device, in host memory."""
        of_device = [{piece.device: piece.data for piece in leaf.addressable_shards} for leaf in leaves]
        return [[to_host(rows[device]) for device in self.devices] for rows in of_device]


def _parts(shares: list[Share], leaves: Sequence[Sequence[np.ndarray]]) -> list[Part]:
    return [
        Part(share, tuple(rows[device][: len(share)] for rows in leaves))
        for device, share in enumerate(shares)
        if len(share)
    ]


class _Finish:
    """The small programs after the loop: merge the accumulators of two chunks, and turn one into results."""

    def __init__(self, stage: ClientStage):
        noted = noting(describe_tracing(f"client stage {stage.index}", *stage.reductions), unless_noted=True)
        self.merge = jax.jit(noted(partial(chunk_program.merge_all, stage)))
        self.finish = jax.jit(noted(partial(chunk_program.results, stage)))


def _check_chunk(
    stage: ClientStage,
    ids: Sequence[str],
    shares: list[Share],
    seen: Mapping[str, jax.Array],
    on_nonfinite: OnNonFinite,
) -> Int[np.ndarray, " dropped"]:
    """The positions of the clients to leave out, by what was seen of each; raises for the first that is to raise."""
    positions = np.concatenate(shares)
    order = np.argsort(positions)
    positions = positions[order]
    owners = [ids[position] for position in positions]

    def of_clients(flags: jax.Array) -> np.ndarray:
        by_device = np.split(to_host(flags), len(shares))
        return np.concatenate([rows[: len(share)] for share, rows in zip(shares, by_device, strict=True)])[order]

    finite = of_clients(seen["finite"])
    bad = check_finite(stage, owners, finite, on_nonfinite)
    if "within" in seen:
        # Who is left out sends nothing that could be beyond a bound.
        kept = finite.all(axis=1, keepdims=True) if on_nonfinite == "drop" else True
        checks.refuse_beyond(stage, owners, of_clients(seen["within"]) | ~np.bool_(kept), of_clients(seen["found"]))
    return positions[bad]
