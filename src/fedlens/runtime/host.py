"""Client stages with work for the host: chunk by chunk, traced segments as programs, host segments as a Python loop.

The last segment is a client stage like any other, over columns that are computed when a chunk of them is packed: by the
segments before it, of that chunk's clients. So it reduces in the same pass, a chunk's host work runs while the devices
compute the chunk before it, and nothing is held for more than two chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import federated_language as fl
import jax
import numpy as np
from jaxtyping import Int

from fedlens.compiler import ClientStage, Segment, ServerStage
from fedlens.compiler.functions import describe_step
from fedlens.errors import UnsupportedError
from fedlens.runtime import checks, stage_log
from fedlens.runtime.columns import Column, TensorColumn
from fedlens.runtime.engine import Engine, OnNonFinite, Sink, StageCohort, StageResult
from fedlens.runtime.host_calls import at_host, call_on_host
from fedlens.runtime.interpreter import run_step
from fedlens.runtime.value_columns import ComputedColumn, SelectedColumn, column_of_positional
from fedlens.runtime.values import ClientValues, Part


def run_segments(
    engine: Engine,
    segments: Sequence[Segment[ClientStage]],
    stage: ClientStage,
    shared: Mapping[str, Any],
    cohort: StageCohort,
    sink: Sink | None,
    on_nonfinite: OnNonFinite,
) -> StageResult:
    """Runs a client stage that has work for the host.

    Args:
      engine: runs the traced segments.
      segments: of the stage; at least one is the host's.
      stage: the whole stage.
      shared: see `Engine.run_clients`, as for the following.
      cohort: the clients.
      sink: takes outputs chunk by chunk.
      on_nonfinite: what to do with infinities that enter reductions.

    Raises:
      ResultError: a Python computation returned what it was not declared to; client, function and leaf are named.
    """
    types = {name: type_ for each in segments for name, type_ in _types_of_outputs(each.stage).items()}
    *first, last = segments
    ends_on_host = last.on_host
    computed = _ComputedChunk(engine, segments if ends_on_host else first, shared, cohort)
    # What is computed on the way counts too: a chunk of it is held.
    chunks = cohort.chunks(replace(stage, output_types=tuple(types.values())))
    handed_out = [name for name in stage.outputs if ends_on_host or name not in last.stage.outputs]
    outputs: dict[str, list[Part]] = {name: [] for name in stage.outputs}
    waiting = deque(chunks)

    def take(parts: Mapping[str, list[Part]]) -> None:
        chunk = waiting.popleft()
        if not computed.kept:  # the last segment reads nothing of it
            computed(chunk)
        columns = computed.kept.popleft()
        parts = dict(parts) | {name: [Part(chunk, _leaves(columns[name]))] for name in handed_out}
        if sink is not None:
            sink(parts)
        else:
            for name, of_chunk in parts.items():
                outputs[name] += of_chunk

    if ends_on_host:
        for _ in chunks:
            take({})
        return StageResult({}, {} if sink is not None else outputs, np.zeros(0, np.int64))
    columns = {
        name: cohort.columns[name] if name in cohort.columns else ComputedColumn(computed, name, type_, len(cohort.ids))
        for name, type_ in zip(last.stage.columns, last.stage.column_types, strict=True)
    }
    result = engine.run_clients(
        last.stage,
        {name: shared[name] for name in last.stage.shared},
        StageCohort(cohort.ids, columns, len(chunks[0])),
        take,
        on_nonfinite,
    )
    return replace(result, outputs={} if sink is not None else outputs)


class _ComputedChunk:
    """What some segments compute for the clients of a chunk; computed once for each chunk, in order."""

    def __init__(
        self,
        engine: Engine,
        segments: Sequence[Segment[ClientStage]],
        shared: Mapping[str, Any],
        cohort: StageCohort,
    ):
        self._engine = engine
        self._segments = segments
        self._shared = shared
        self._cohort = cohort
        self._positions = np.zeros(0, np.int64)
        self._failure: Exception | None = None
        self.kept: deque[dict[str, Column]] = deque()

    def __call__(self, positions: Int[np.ndarray, " clients"]) -> Mapping[str, Column]:
        """The columns that the segments hand out, for the clients at these positions, ascending."""
        if self._failure is not None:  # an engine may try again in another way: the host's work is not done twice
            raise self._failure
        if not np.array_equal(positions, self._positions):
            try:
                with stage_log.phase("computing"):
                    self.kept.append(self._compute(positions))
            except Exception as error:
                self._failure = error
                raise
            self._positions = positions
        return self.kept[-1]

    def _compute(self, positions: Int[np.ndarray, " clients"]) -> dict[str, Column]:
        ids = tuple(self._cohort.ids[position] for position in positions)
        columns: dict[str, Column] = {
            name: SelectedColumn(column, positions) for name, column in self._cohort.columns.items()
        }
        found: dict[str, Column] = {}
        for segment in self._segments:
            of_segment = StageCohort(ids, {name: columns[name] for name in segment.stage.columns})
            shared = {name: self._shared[name] for name in segment.stage.shared}
            types = _types_of_outputs(segment.stage)
            if segment.on_host:
                rows = _run_clients_on_host(segment.stage, shared, of_segment)
                handed_out = {
                    name: column_of_positional([row[name] for row in rows], type_) for name, type_ in types.items()
                }
            else:
                result = self._engine.run_clients(segment.stage, shared, of_segment)
                if result.confirm is not None:
                    result.confirm()
                handed_out = {name: _column_of_parts(ids, types[name], result.outputs[name]) for name in types}
            columns |= handed_out
            found |= handed_out
        return found


def run_server_segments(
    engine: Engine, segments: Sequence[Segment[ServerStage]], stage: ServerStage, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs a server stage that has work for the host: step by step there, as programs between.

    Args:
      engine: runs the traced segments.
      segments: of the stage.
      stage: the whole stage.
      environment: see `Engine.run_server`.

    Raises:
      ResultError: a Python computation returned what it was not declared to; function and leaf are named.
    """
    values = dict(environment)
    for segment in segments:
        if not segment.on_host:
            values |= engine.run_server(segment.stage, values)
            continue
        with jax.enable_x64(True):
            for step in segment.stage.body:
                with at_host(f"at the server, in {describe_step(step)}"):
                    values[step.name] = run_step(step, values, call_on_host)
    return {name: values[name] for name in stage.outputs}


def _run_clients_on_host(stage: ClientStage, shared: Mapping[str, Any], cohort: StageCohort) -> list[dict[str, Any]]:
    """What each client hands out, by name; client after client, in the order of the cohort."""
    rows = []
    shared = jax.tree.map(_on_one_device, shared)
    for position, client_id in enumerate(cohort.ids):
        with jax.enable_x64(True):
            values = {**shared, **{name: cohort.columns[name].value(position) for name in stage.columns}}
            for step in stage.body:
                with at_host(f"in client {client_id!r}, client stage {stage.index}, {describe_step(step)}"):
                    values[step.name] = run_step(step, values, call_on_host)
            flags, found = checks.within(stage, values, call_on_host)
        checks.refuse_beyond(stage, [client_id], np.asarray(flags)[None], np.asarray(found)[None])
        rows.append({name: values[name] for name in stage.outputs})
    return rows


def _on_one_device(leaf: Any) -> Any:
    """What the server computed is on all devices, and so would be what is computed with it: the same, on each."""
    is_spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return leaf.addressable_data(0) if is_spread else leaf


def _column_of_parts(ids: tuple[str, ...], type_: fl.Type, parts: list[Part]) -> Column:
    return TensorColumn(type_, tuple(ClientValues(ids, type_, parts).stacked_leaves()), len(ids))


def _leaves(column: Column) -> tuple[np.ndarray, ...]:
    if not isinstance(column, TensorColumn):
        raise UnsupportedError("Expected clients' results made of tensors, found sequences. Fold them first.")
    return column.leaves


def _types_of_outputs(stage: ClientStage) -> dict[str, fl.Type]:
    return dict(zip(stage.outputs, stage.output_types, strict=True))
