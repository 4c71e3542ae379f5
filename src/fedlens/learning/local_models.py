"""`LocalModels`: what every client learned in a round, by client id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlens import trees
from fedlens.language.types import leaf_paths
from fedlens.runtime import ClientValues
from fedlens.runtime.values import Part


@dataclass(frozen=True)
class LocalModel:
    """One client's model after its local training, before anything was averaged.

    Attributes:
      client_id: whose it is.
      weights: the model.
      global_weights: the model that the client started from.
      num_examples: how many examples it trained on; 0 leaves the global model as it is.
      metrics: loss and metrics over its training, as means over examples; NaN without examples.
    """

    client_id: str
    weights: Any
    global_weights: Any
    num_examples: int
    metrics: dict[str, float]

    @property
    def update(self) -> Any:
        """The local model minus the global one."""
        return trees.map(np.subtract, self.weights, self.global_weights)

    @property
    def update_norm(self) -> float:
        """The L2 norm of `update`: how far the client went."""
        squares = (np.square(np.asarray(leaf, np.float64)).sum() for leaf in trees.leaves(self.update))
        return float(np.sqrt(sum(squares)))

    def __repr__(self) -> str:
        return f"LocalModel({self.client_id!r}, {self.num_examples} examples, {trees.size(self.weights)} parameters)"


class LocalModels:
    """The local models of one round, in cohort order.

    Example:
      >>> local_models["form-03"].weights["dense"]["kernel"].shape
      >>> for client_id, local_model in local_models.items(): ...
      >>> local_models.stacked["dense"]["kernel"].shape  # (clients, *shape)

    Attributes:
      ids: the client ids in cohort order.
      values: weights, number of examples and metrics of each client, as they were computed.
      global_weights: the model that the clients started from.
    """

    def __init__(self, values: ClientValues, global_weights: Any):
        """Takes client values with the fields weights, num_examples and metrics."""
        self.ids = values.ids
        self.values = values
        self.global_weights = global_weights

    def __getitem__(self, client_id: str) -> LocalModel:
        return self._model(client_id, self.values[client_id])

    def __iter__(self) -> Iterator[LocalModel]:
        return (model for _, model in self.items())

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.values

    def items(self) -> Iterator[tuple[str, LocalModel]]:
        """The client ids with their local models, in cohort order."""
        return ((client_id, self._model(client_id, value)) for client_id, value in self.values.items())

    @property
    def weights(self) -> ClientValues:
        """The weights alone, as they were computed: for `build_fed_eval`, or as a cohort of an own computation."""
        chosen = [place for place, path in enumerate(leaf_paths(self.values.type)) if path.split("/")[0] == "weights"]
        parts = [Part(part.positions, tuple(part.leaves[place] for place in chosen)) for part in self.values.parts]
        return ClientValues(self.ids, self.values.type["weights"], parts)

    @property
    def stacked(self) -> Any:
        """All weights as one pytree whose leaves have a leading axis of clients, in cohort order."""
        return self.values.stacked["weights"]

    def __repr__(self) -> str:
        return f"LocalModels({len(self)} clients, {trees.size(self.global_weights)} parameters each)"

    def _model(self, client_id: str, value: dict[str, Any]) -> LocalModel:
        measured = {name: float(number) for name, number in value["metrics"].items()}
        return LocalModel(client_id, value["weights"], self.global_weights, int(value["num_examples"]), measured)
