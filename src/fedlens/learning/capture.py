"""Capture: which taps of a round hand out the clients' local models, and how these become `LocalModels`.

A round's client work may return the weights or the update, beside the number of examples and what was measured; fields
are found by their names. Weights and update are the same model, told from the global one, so only one of them leaves
the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import federated_language as fl
import numpy as np
from federated_language import framework

from fedlens import trees
from fedlens.compiler import Level, taps
from fedlens.compiler.levels import join
from fedlens.errors import ConfigError, StructureError
from fedlens.language.types import leaf_paths, tensor_types
from fedlens.learning.local_models import LocalModels
from fedlens.learning.metrics import EXAMPLES
from fedlens.learning.state import WEIGHTS
from fedlens.runtime import ClientValues
from fedlens.runtime.context import ResultSink
from fedlens.runtime.values import Part

WORK = "client_work"
UPDATE, SUMS, METRICS = "update", "sums", "metrics"
_TAPPED = "1/"  # where what was tapped is in the result of a tapped computation
_COUNTS = (EXAMPLES, "weight")  # what a client work may call the number of its examples


@dataclass(frozen=True)
class Capture:
    """The taps of a round that make up its clients' local models.

    Attributes:
      model: the tap of the weights, or of the update.
      is_update: which of the two.
      num_examples: the tap of how many examples the client trained on.
      measured: the tap of what was measured; None if the client work returns nothing of the kind.
      are_sums: whether that is sums over examples, among them `num_examples`, and not means.
      level: what these values disclose about a client.
      bypasses: the secure sums and mechanisms of differential privacy that handing them out goes around.
    """

    model: str
    is_update: bool
    num_examples: str
    measured: str | None
    are_sums: bool
    level: Level
    bypasses: tuple[str, ...]

    @property
    def policy(self) -> dict[str, Any]:
        """What a ledger keeps about what its models disclose."""
        return {"taps": list(self.names), "level": self.level.value, "bypasses": list(self.bypasses)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all taps."""
        return tuple(name for name in (self.model, self.num_examples, self.measured) if name is not None)

    def local_models(self, tapped: Mapping[str, ClientValues], global_weights: Any) -> LocalModels:
        """What the taps handed out, as local models of clients that started from `global_weights`.

        Raises:
          StructureError: a client counts its examples in fractions.
        """
        model, counts = tapped[self.model], _whole(tapped[self.num_examples], self.num_examples)
        fields = [(EXAMPLES, counts), (WEIGHTS, _added(global_weights, model) if self.is_update else model)]
        measured = [] if self.measured is None else _measured(tapped[self.measured], self.are_sums)
        return LocalModels(_side_by_side([(METRICS, _side_by_side(measured, counts)), *fields]), global_weights)

    def passed_on(self, sink: Callable[[LocalModels], None], global_weights: Any) -> ResultSink:
        """A sink for the tapped round that gives `sink` the local models of each chunk of clients."""

        def pass_on(chunk: Mapping[str, ClientValues]) -> None:
            tapped = {path.removeprefix(_TAPPED): values for path, values in chunk.items()}
            sink(self.local_models(tapped, global_weights))

        return pass_on


def capture_of(round_: framework.ConcreteComputation, weights_type: fl.Type) -> Capture:
    """The taps of a round whose global model has the type `weights_type`.

    Raises:
      ConfigError: the round has no client work or several; or the client work returns no model of this type, no
        number of examples, or metrics that are no numbers.
    """
    described = {each.name: each for each in taps(round_, at=lambda each: each.name.split(".")[0] == WORK)}
    work = described[WORK] if WORK in described else taps(round_, at=WORK)[0]  # which says that it is none, or several
    fields = dict(work.type.items()) if isinstance(work.type, fl.StructType) else {}
    model = next((name for name in (WEIGHTS, UPDATE) if _is_model(fields.get(name), weights_type)), None)
    count = next((name for name in _COUNTS if _is_number(fields.get(name))), None)
    if model is None or count is None:
        raise ConfigError(
            f"Expected client work that returns the model of its client as 'weights' or 'update', of type "
            f"{weights_type}, and its number of examples as 'num_examples', found a result of {work.function or WORK} "
            f"of type {work.type}. Name these fields so, or take what there is with fed.tap: "
            f"{', '.join(each.name for each in taps(round_))}."
        )
    sums, means = fields.get(SUMS), fields.get(METRICS)
    are_sums = isinstance(sums, fl.StructType) and EXAMPLES in dict(sums.items())
    measured = SUMS if are_sums else METRICS if isinstance(means, fl.StructType) else None
    if measured is not None and not all(map(_is_measurement, tensor_types(fields[measured]))):
        raise ConfigError(
            f"Expected numbers in the field {measured!r} of what {work.function or WORK} returns, found "
            f"{fields[measured]}. Return arrays in a field of another name, and take them with fed.tap."
        )
    names = [f"{WORK}.{name}" for name in (model, count, measured) if name is not None]
    chosen = [described[name] for name in names]
    return Capture(
        model=names[0],
        is_update=model == UPDATE,
        num_examples=names[1],
        measured=names[2] if measured else None,
        are_sums=are_sums,
        level=join(*(each.level for each in chosen)),
        bypasses=tuple(dict.fromkeys(name for each in chosen for name in each.bypasses)),
    )


def _is_model(type_: fl.Type | None, weights_type: fl.Type) -> bool:
    return (
        type_ is not None
        and leaf_paths(type_) == leaf_paths(weights_type)
        and tensor_types(type_) == tensor_types(weights_type)
    )


def _is_number(type_: fl.Type | None) -> bool:
    return isinstance(type_, fl.TensorType) and type_.shape == () and type_.dtype.kind in "iuf"


def _is_measurement(type_: fl.TensorType) -> bool:
    return type_.shape == () and type_.dtype.kind in "biufV"  # V: bfloat16 and the like


def _whole(counts: ClientValues, name: str) -> ClientValues:
    """Numbers of examples as integers."""
    if counts.type.dtype.kind in "iu":
        return counts
    (column,) = counts.stacked_leaves()
    fractions = np.flatnonzero(column != np.floor(column))
    if len(fractions):
        raise StructureError(
            f"Expected a whole number of examples in {name!r}, found {column[fractions[0]]} in client "
            f"{counts.ids[fractions[0]]!r}. Return how many there were as {EXAMPLES!r} beside it."
        )
    parts = [Part(part.positions, (part.leaves[0].astype(np.int64),)) for part in counts.parts]
    return ClientValues(counts.ids, fl.TensorType(np.int64), parts)


def _added(global_weights: Any, updates: ClientValues) -> ClientValues:
    """The weights of clients whose updates are known."""
    start = [np.asarray(leaf) for leaf in trees.leaves(global_weights)]
    parts = [
        Part(part.positions, tuple(leaf + each for leaf, each in zip(start, part.leaves, strict=True)))
        for part in updates.parts
    ]
    return ClientValues(updates.ids, updates.type, parts)


def _measured(values: ClientValues, are_sums: bool) -> list[tuple[str, ClientValues]]:
    """Each measurement on its own, as means over examples."""
    names, types = leaf_paths(values.type), tensor_types(values.type)
    count = names.index(EXAMPLES) if are_sums else None
    found = []
    for place, (name, type_) in enumerate(zip(names, types, strict=True)):
        if place == count:
            continue
        columns = [part.leaves[place] for part in values.parts]
        if count is not None:
            counts = [part.leaves[count] for part in values.parts]
            columns = [_mean(column, of_part) for column, of_part in zip(columns, counts, strict=True)]
        parts = [Part(part.positions, (column,)) for part, column in zip(values.parts, columns, strict=True)]
        found.append((name, ClientValues(values.ids, type_, parts)))
    return sorted(found, key=lambda each: each[0])


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean over examples, as `metrics.finalize` has it; NaN over none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = total / count.astype(total.dtype)
    return mean


def _side_by_side(fields: list[tuple[str, ClientValues]], like: ClientValues | None = None) -> ClientValues:
    """Values of the same clients as the fields of one struct; of none, the empty struct for the clients of `like`."""
    first = fields[0][1] if fields else like
    assert first is not None
    type_ = fl.StructWithPythonType([(name, values.type) for name, values in fields], dict)
    parts = [
        Part(part.positions, tuple(leaf for _, values in fields for leaf in values.parts[number].leaves))
        for number, part in enumerate(first.parts)
    ]
    return ClientValues(first.ids, type_, parts)
