"""Federated averaging as a process of TFF: its state, its metrics' layout and its types, around processes of fedlens.

A TFF program says the batch size by batching its data, a fedlens process has it in its type. So a process here holds
one of fedlens for each batch size that comes: `process.of_batch_size(20)` is the ordinary one, whose computations can
be explained, tapped and asked what they disclose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import federated_language as fl

from fedlens import learning
from fedlens.compat.tff.client_data import client_batches
from fedlens.compat.tff.learning.models import ModelWeights, SplitModel
from fedlens.compat.tff.learning.templates import LearningAlgorithmState, LearningProcess, LearningProcessOutput
from fedlens.compat.tff.types import at_clients, at_server
from fedlens.compat.tff.values import AttributeDict
from fedlens.language.types import type_of
from fedlens.learning.metrics import EXAMPLES, LOSS
from fedlens.learning.models import INPUT, TARGET

BATCHES = "num_batches"
_COUNTS = {EXAMPLES: 0, "clients_without_examples": 0, "clients_dropped": 0}


class LearningProcessOutputWithLocalModels(NamedTuple):
    """What `next` returns after `with_local_models()`: also what every client learned, by its id."""

    state: Any
    metrics: Any
    local_models: learning.LocalModels


@dataclass(frozen=True)
class _Typed:
    """A function that says its type, as a computation does."""

    function: Callable[..., Any]
    type_signature: fl.FunctionType

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class TrainingProcess(LearningProcess):
    """Federated averaging as TFF hands it out.

    `initialize` also takes a seed (0 by default), from which everything random in a run follows. `metrics` has TFF's
    layout: `metrics["client_work"]["train"]` holds loss and metrics as means over all examples, and the numbers of
    examples and batches.
    """

    def __init__(self, model: SplitModel, build: Callable[[int], learning.LearningProcess], local_models: bool = False):
        """Takes the model, what builds fedlens's process for a batch size, and whether to hand out local models."""
        self._split = model
        self._build = build
        self._with_local_models = functools.cache(lambda size: build(size).with_local_models())
        self._hands_out_local_models = local_models
        initialize_type = build(1).initialize_computation.type_signature
        state = at_server(_map_state(initialize_type.result.member, type_of(model.non_trainable), _struct))
        metrics = at_server(type_of(self._metrics(dict.fromkeys(self._measured(), 0.0) | _COUNTS, 0)))
        super().__init__(
            _Typed(self._initialize, fl.FunctionType(None, state)),
            _Typed(self._next, _next_type(state, metrics, model.model.inputs)),
            get_model_weights,
            set_model_weights,
        )

    def of_batch_size(self, size: int) -> learning.LearningProcess:
        """The process of fedlens for batches of `size` rows: its computations are what runs."""
        return self._with_local_models(size) if self._hands_out_local_models else self._build(size)

    def with_local_models(self) -> TrainingProcess:
        """The same process, whose `next` returns `(state, metrics, local_models)`."""
        return TrainingProcess(self._split, self._build, local_models=True)

    def _initialize(self, seed: int = 0) -> LearningAlgorithmState:
        return _in_tff_form(self._build(1).initialize(seed), self._split)

    def _next(self, state: LearningAlgorithmState, client_data: Any) -> Any:
        batches = client_batches(client_data, self._split.model.inputs)
        before = learning.ServerState(
            weights=state.global_model_weights.trainable,
            optimizer_state=state.finalizer,
            round=state.client_work["round"],
            key=state.client_work["key"],
        )
        outcome = self.of_batch_size(batches.batch_size).next(before, batches.cohort)
        after = _in_tff_form(outcome[0], self._split)
        metrics = self._metrics(outcome[1], batches.num_batches)
        if self._hands_out_local_models:
            return LearningProcessOutputWithLocalModels(after, metrics, outcome[2])
        return LearningProcessOutput(after, metrics)

    def _measured(self) -> list[str]:
        return [LOSS, *(metric.name for metric in self._split.model.metrics)]

    def _metrics(self, measured: dict[str, Any], num_batches: int) -> AttributeDict:
        train = {name: measured[name] for name in [*self._measured(), EXAMPLES]} | {BATCHES: num_batches}
        counts = {name: measured[name] for name in _COUNTS if name != EXAMPLES}
        client_work = AttributeDict(train=AttributeDict(train), **counts)
        return AttributeDict(distributor=(), client_work=client_work, aggregator=(), finalizer=())


def get_model_weights(state: LearningAlgorithmState) -> ModelWeights:
    """The model of a state."""
    return state.global_model_weights


def set_model_weights(state: LearningAlgorithmState, model_weights: Any) -> LearningAlgorithmState:
    """The state with another model."""
    return state._replace(global_model_weights=ModelWeights(*model_weights))


def _in_tff_form(state: learning.ServerState, split: SplitModel) -> LearningAlgorithmState:
    return _map_state(state, split.non_trainable, lambda container, fields: container(**fields))


def _map_state(state: Any, non_trainable: Any, build: Callable[[type, dict[str, Any]], Any]) -> Any:
    """TFF's state out of fedlens's, or its type out of the type of fedlens's."""
    weights = build(ModelWeights, {"trainable": state.weights, "non_trainable": non_trainable})
    client_work = build(AttributeDict, {"round": state.round, "key": state.key})
    nothing = build(tuple, {})
    fields = (weights, nothing, client_work, nothing, state.optimizer_state)
    return build(LearningAlgorithmState, dict(zip(LearningAlgorithmState._fields, fields, strict=True)))


def _struct(container: type, fields: dict[str, Any]) -> fl.StructWithPythonType:
    return fl.StructWithPythonType(list(fields.items()), container)


def _next_type(state: fl.FederatedType, metrics: fl.FederatedType, inputs: fl.StructType) -> fl.FunctionType:
    batch = {name: fl.TensorType(inputs[name].dtype, (None, *inputs[name].shape)) for name in (INPUT, TARGET)}
    data = at_clients(fl.SequenceType(_struct(dict, batch)))
    output = _struct(LearningProcessOutput, {"state": state, "metrics": metrics})
    return fl.FunctionType(fl.StructType([("state", state), ("client_data", data)]), output)
