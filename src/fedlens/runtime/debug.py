"""The debug engine: a Python loop over clients, nothing compiled.

Slow, and plain: prints and breakpoints in a user's function see values, a traceback ends at the user's own line, and an
error carries a note with the stage, the step and the client. The other engines are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from fedlens.compiler import ClientStage, ServerStage, Step
from fedlens.errors import StructureError
from fedlens.language.types import contains_sequence, describe, leaf_paths, tensor_types
from fedlens.runtime import reductions
from fedlens.runtime.engine import OnNonFinite, Sink, StageCohort, StageResult, check_finite
from fedlens.runtime.interpreter import eager, evaluate, run_step
from fedlens.runtime.values import Part


class Debug:
    """Computes client after client, operation by operation."""

    def run_clients(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        cohort: StageCohort,
        sink: Sink | None = None,
        on_nonfinite: OnNonFinite = "ignore",
    ) -> StageResult:
        """Runs a client stage; see `Engine.run_clients`."""
        with jax.enable_x64(True):
            totals = {step.name: reductions.zeros(step) for step in stage.reductions}
            outputs: dict[str, list[Part]] = {name: [] for name in stage.outputs}
            dropped: list[int] = []
            for chunk in cohort.chunks(stage):
                partial = {step.name: reductions.zeros(step) for step in stage.reductions}
                kept: dict[str, list[list[np.ndarray]]] = {name: [] for name in stage.outputs}
                for position in chunk:
                    values, operands = self._run_client(stage, shared, cohort, int(position))
                    for name in stage.outputs:
                        kept[name].append([np.asarray(leaf) for leaf in reductions.leaves(values[name])])
                    finite = np.asarray(reductions.finite(stage.reductions, operands))[None]
                    if on_nonfinite != "ignore" and len(
                        check_finite(stage, [cohort.ids[position]], finite, on_nonfinite)
                    ):
                        dropped.append(int(position))
                        continue
                    for step, operand in zip(stage.reductions, operands, strict=True):
                        partial[step.name] = reductions.accumulate(step, partial[step.name], operand)
                totals = reductions.merge(totals, partial)
                parts = {
                    name: [Part(chunk, tuple(np.stack(leaf) for leaf in zip(*rows, strict=True)))]
                    for name, rows in kept.items()
                }
                if sink is not None:
                    sink(parts)
                else:
                    for name, part in parts.items():
                        outputs[name] += part
            results = {step.name: reductions.finish(step, totals[step.name]) for step in stage.reductions}
        return StageResult(results, {} if sink is not None else outputs, np.array(dropped, np.int64))

    def run_server(self, stage: ServerStage, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a server stage; see `Engine.run_server`."""
        values = dict(environment)
        with jax.enable_x64(True):
            for step in stage.body:
                with _naming(f"at the server, in step {step.name!r}"):
                    values[step.name] = run_step(step, values, eager)
        return {name: values[name] for name in stage.outputs}

    def _run_client(
        self, stage: ClientStage, shared: Mapping[str, Any], cohort: StageCohort, position: int
    ) -> tuple[dict[str, Any], list[Any]]:
        client_id = cohort.ids[position]
        values = {**shared, **{name: cohort.columns[name].value(position) for name in stage.columns}}
        for step in stage.body:
            with _naming(f"in client {client_id!r}, client stage {stage.index}, step {step.name!r}"):
                values[step.name] = run_step(step, values, eager)
                _check(step, values[step.name])
        return values, [evaluate(step.operand, values, eager) for step in stage.reductions]


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Adds where it happened to any error, and leaves the error itself and its traceback as they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This happened {place}.")
        raise


def _check(step: Step, value: Any) -> None:
    type_ = reductions.member(step)
    if contains_sequence(type_):
        return
    found: Sequence[Any] = jax.tree.leaves(value)
    for path, tensor, leaf in zip(leaf_paths(type_), tensor_types(type_), found, strict=True):
        if leaf.dtype != tensor.dtype or leaf.shape != tensor.shape:
            raise StructureError(f"Expected {tensor} at {path!r}, found {describe(leaf)}.")
