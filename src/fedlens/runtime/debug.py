"""The debug engine: a Python loop over clients, nothing compiled.

Slow, and plain: prints and breakpoints in a user's function see values, a traceback ends at the user's own line, and an
error carries a note with the stage, the step and the client. The other engines are tested against it. It also checks
what they rely on: that the zero of an aggregate is the identity of its merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlens.compiler import ClientStage, ServerStage, Step
from fedlens.compiler.functions import describe_step
from fedlens.compiler.operations import SECURE_SUMS
from fedlens.errors import LanguageError, StructureError
from fedlens.language.tracebacks import noting
from fedlens.language.types import contains_sequence, describe, fits, holds_strings, leaf_paths, tensor_types
from fedlens.runtime import checks, reductions
from fedlens.runtime.engine import OnNonFinite, Sink, StageCohort, StageResult, check_finite
from fedlens.runtime.host_calls import at_host
from fedlens.runtime.interpreter import eager, run_step
from fedlens.runtime.value_columns import leaves_of, stored
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
            totals = self._zeros(stage, shared)
            outputs: dict[str, list[Part]] = {name: [] for name in stage.outputs}
            dropped: list[int] = []
            for chunk in cohort.chunks(stage):
                partial = self._zeros(stage, shared)
                kept: dict[str, list[list[np.ndarray]]] = {name: [] for name in stage.outputs}
                seen: list[np.ndarray] = []  # of each client, which leaves are finite
                for position in chunk:
                    values, operands = self._run_client(stage, shared, cohort, int(position))
                    for name in stage.outputs:
                        kept[name].append([stored(leaf) for leaf in leaves_of(values[name])])
                    client_id = cohort.ids[position]
                    finite = np.asarray(checks.finite(operands))[None]
                    seen.append(finite)
                    if on_nonfinite == "drop" and not finite.all():
                        dropped.append(int(position))
                        continue
                    flags, found = checks.within(stage, values, eager)
                    checks.refuse_beyond(stage, [client_id], np.asarray(flags)[None], np.asarray(found)[None])
                    for step, operand in zip(stage.reductions, operands, strict=True):
                        with noting(f"in client {client_id!r}, client stage {stage.index}, {describe_step(step)}"):
                            partial[step.name] = reductions.accumulate(step, partial[step.name], operand, values, eager)
                # Of a whole chunk, as the other engines do it: the message says how many clients it is.
                check_finite(stage, [cohort.ids[position] for position in chunk], np.concatenate(seen), on_nonfinite)
                totals = self._merged(stage, shared, totals, partial)
                parts = {
                    name: [Part(chunk, tuple(np.stack(leaf) for leaf in zip(*rows, strict=True)))]
                    for name, rows in kept.items()
                }
                if sink is not None:
                    sink(parts)
                else:
                    for name, part in parts.items():
                        outputs[name] += part
            results = self._finished(stage, shared, totals)
        return StageResult(results, {} if sink is not None else outputs, np.array(dropped, np.int64))

    def run_server(self, stage: ServerStage, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a server stage; see `Engine.run_server`."""
        values = dict(environment)
        with jax.enable_x64(True):
            for step in stage.body:
                with at_host(f"at the server, in {describe_step(step)}"):
                    values[step.name] = run_step(step, values, eager)
        return {name: values[name] for name in stage.outputs}

    def _run_client(
        self, stage: ClientStage, shared: Mapping[str, Any], cohort: StageCohort, position: int
    ) -> tuple[dict[str, Any], list[Any]]:
        client_id = cohort.ids[position]
        values = {**shared, **{name: cohort.columns[name].value(position) for name in stage.columns}}
        for step in stage.body:
            with at_host(f"in client {client_id!r}, client stage {stage.index}, {describe_step(step)}"):
                values[step.name] = run_step(step, values, eager)
                _check(step, values[step.name])
        return values, [reductions.sent(step, values, eager) for step in stage.reductions]

    def _zeros(self, stage: ClientStage, shared: Mapping[str, Any]) -> dict[str, reductions.Accumulator]:
        return {step.name: reductions.zeros(step, shared, eager) for step in stage.reductions}

    def _merged(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        first: dict[str, reductions.Accumulator],
        second: dict[str, reductions.Accumulator],
    ) -> dict[str, reductions.Accumulator]:
        merged = {}
        for step in stage.reductions:
            with noting(f"while merging, client stage {stage.index}, {describe_step(step)}"):
                _check_zero(step, second[step.name], shared)
                merged[step.name] = reductions.merge(step, first[step.name], second[step.name], shared, eager)
        return merged

    def _finished(
        self, stage: ClientStage, shared: Mapping[str, Any], totals: dict[str, reductions.Accumulator]
    ) -> dict[str, Any]:
        results = {}
        for step in stage.reductions:
            with noting(f"at the server, after client stage {stage.index}, {describe_step(step)}"):
                results[step.name] = reductions.finish(step, totals[step.name], shared, eager)
        secure = [step for step in stage.reductions if step.operation in SECURE_SUMS]
        checks.refuse_unfit(stage, {step.name: np.asarray(reductions.fits(step, totals[step.name])) for step in secure})
        return results


def _check_zero(step: Step, accumulator: reductions.Accumulator, shared: Mapping[str, Any]) -> None:
    """Checks that merging with the zero of an aggregate changes nothing: other engines start each device with one."""
    if step.operation != "federated_aggregate":
        return
    zero = reductions.zeros(step, shared, eager)
    paths = leaf_paths(step.part(1).type_signature)
    for order, operands in (("merge(zero, x)", (zero, accumulator)), ("merge(x, zero)", (accumulator, zero))):
        merged = reductions.merge(step, *operands, shared, eager)
        for path, found, expected in zip(paths, merged, accumulator, strict=True):
            if not _is_same(np.asarray(found), np.asarray(expected)):
                raise LanguageError(
                    f"Expected the zero of {step.name} to be the identity of its merge, found that {order} is not x in "
                    f"leaf {path or 'value'!r}: {found} where x is {expected}. How clients are grouped would change "
                    "the result. Choose another zero, or add what it holds in the report."
                )


def _is_same(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        return bool(np.array_equal(found, expected))
    epsilon = 2.0**-7 if expected.dtype.name == "bfloat16" else float(np.finfo(expected.dtype).eps)
    digits = 100 * epsilon  # a merge of means divides and multiplies
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    return bool(np.allclose(found.astype(wide), expected.astype(wide), rtol=digits, atol=0, equal_nan=True))


def _check(step: Step, value: Any) -> None:
    type_ = reductions.member(step)
    if contains_sequence(type_):
        return
    for path, tensor, leaf in zip(leaf_paths(type_), tensor_types(type_), leaves_of(value), strict=True):
        if holds_strings(tensor):
            continue  # as they came, or as a Python computation returned them: checked there
        if leaf.dtype != tensor.dtype or not fits(leaf.shape, tensor.shape):
            raise StructureError(f"Expected {tensor} at {path!r}, found {describe(leaf)}.")
