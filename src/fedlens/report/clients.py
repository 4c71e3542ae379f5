"""What local training did for each client: its model against the global one, at home and on everybody's examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlens import trees
from fedlens.ledger import Ledger, StoredLocalModel

if TYPE_CHECKING:  # reading a ledger, which also imports this folder, does not load JAX
    from fedlens.data import FederatedData
    from fedlens.learning.models import Model

ROWS = 20  # clients that are compared when a run has more of them


@dataclass(frozen=True)
class ClientComparison:
    """One client's local model beside the global model.

    Attributes:
      client_id: the client.
      round: the round that the local model is of, the last one that the client took part in.
      num_examples: how many examples it trained on in that round.
      held_out: how many examples of its own were held out.
      local_at_home: accuracy of its local model on its own held-out examples; NaN without any.
      global_at_home: accuracy of the global model on them.
      local_everywhere: accuracy of its local model on the held-out examples of all clients together.
      distance: L2 norm of its local model minus the global one.
    """

    client_id: str
    round: int
    num_examples: int
    held_out: int
    local_at_home: float
    global_at_home: float
    local_everywhere: float
    distance: float


def last_local_models(ledger: Ledger, limit: int = ROWS) -> list[StoredLocalModel]:
    """Each client's last local model that the ledger has whole.

    With more than `limit` clients only those of the last round that has any, and at most `limit` of them, in cohort
    order. A ledger that leaves out leaves, or keeps statistics only, has none.

    Raises:
      LedgerError: the ledger is damaged.
    """
    if ledger.run.kept_leaves != ledger.run.leaves:
        return []
    rounds = [stored for stored in map(ledger.round, reversed(ledger.rounds)) if stored.kept_ids]
    if len(ledger.clients) > limit:
        return [rounds[0][client_id] for client_id in rounds[0].kept_ids[:limit]] if rounds else []
    last: dict[str, StoredLocalModel] = {}
    for stored in rounds:
        last |= {client_id: stored[client_id] for client_id in stored.kept_ids if client_id not in last}
    return [last[client_id] for client_id in sorted(last)]


def compare_clients(
    model: Model,
    global_weights: trees.PyTree,
    local_models: Sequence[StoredLocalModel],
    held_out: FederatedData,
    everybody: FederatedData,
) -> list[ClientComparison]:
    """Evaluates local models and the global one on held-out examples.

    Args:
      model: whose weights they are; it measures an `accuracy`.
      global_weights: the final global model.
      local_models: of different clients, from a ledger of that model.
      held_out: each client's own held-out examples.
      everybody: the clients whose held-out examples, taken together, all local models are evaluated on.

    Raises:
      LedgerError: the stored models are damaged.
      DataError: a client is not in `held_out`.
    """
    from fedlens.language import type_of
    from fedlens.learning import build_fed_eval
    from fedlens.learning.models import INPUT, TARGET
    from fedlens.runtime.values import ClientValues, Part

    if not local_models:
        return []
    ids = [local.client_id for local in local_models]
    reference = [np.asarray(leaf) for leaf in trees.leaves(global_weights)]
    leaves = tuple(map(np.stack, zip(*(local.leaves.values() for local in local_models), strict=True)))
    values = ClientValues(ids, type_of(global_weights), [Part(np.arange(len(ids)), leaves)])

    evaluate = build_fed_eval(model)
    at_home = held_out.select(ids).cohort(0)
    of_local = evaluate(values, at_home).by_client
    of_global = evaluate(global_weights, at_home).by_client
    everywhere = evaluate.on_examples(values, everybody.columns[INPUT], everybody.columns[TARGET])
    squares = sum(_squared_norms(stack, leaf) for stack, leaf in zip(leaves, reference, strict=True))
    return [
        ClientComparison(
            client_id=local.client_id,
            round=local.round,
            num_examples=local.num_examples,
            held_out=int(of_local[local.client_id]["num_examples"]),
            local_at_home=of_local[local.client_id]["accuracy"],
            global_at_home=of_global[local.client_id]["accuracy"],
            local_everywhere=everywhere[local.client_id]["accuracy"],
            distance=float(np.sqrt(square)),
        )
        for local, square in zip(local_models, np.asarray(squares), strict=True)
    ]


def _squared_norms(stack: Any, leaf: Any) -> Any:
    difference = stack.astype(np.float64) - leaf.astype(np.float64)
    return (difference**2).reshape(len(stack), -1).sum(axis=1)
