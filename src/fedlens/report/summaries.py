"""What a ledger holds, as plain values that JSON and tables are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedlens.ledger import Ledger, LedgerRound

Summary = dict[str, Any]  # strings, numbers, lists and dicts of them: what JSON has


def summarize_ledger(ledger: Ledger) -> Summary:
    """A run in short: how far it is, how many clients took part, what it measured last."""
    rounds = ledger.rounds
    return {
        "path": str(ledger.path),
        "state": ledger.state,
        "rounds": len(rounds),
        "planned_rounds": ledger.planned_rounds,
        "clients": len(ledger.clients),
        "parameters": sum(math.prod(leaf.shape) for leaf in ledger.run.leaves),
        "size_bytes": ledger.size_bytes,
        "last_metrics": ledger.round(rounds[-1]).metrics if rounds else {},
    }


def summarize_run(ledger: Ledger) -> Summary:
    """A run: the short summary, its configuration, its leaves, and the metrics of every round."""
    return summarize_ledger(ledger) | {
        "config": dict(ledger.config),
        "versions": dict(ledger.run.versions),
        "leaves": [{"leaf": leaf.name, "shape": list(leaf.shape), "dtype": leaf.dtype} for leaf in ledger.run.leaves],
        "metrics": [{"round": row["round"]} | row for row in ledger.metrics()],
    }


def summarize_round(stored: LedgerRound) -> Summary:
    """A round: its metrics, and its clients in cohort order."""
    columns = [name for name in stored.table().column_names if name not in ("round", "part", "row", "leaves")]
    return {
        "round": stored.number,
        "metrics": stored.metrics,
        "clients": stored.table().select(columns).to_pylist(),
    }


def summarize_client(ledger: Ledger, client_id: str) -> Summary:
    """A client's way through the run: a row for each round it took part in, with the norms of its update by leaf."""
    return {"client": client_id, "rounds": [_without(row, "client") for row in ledger.client(client_id)]}


def summarize_local_model(stored: LedgerRound, client_id: str) -> Summary:
    """One local model: what the client reported, and each leaf with its norms and checksum.

    Raises:
      LedgerError: there is no such client in the round, or its stored weights are damaged.
    """
    local = stored[client_id]
    place = stored.ids.index(client_id)
    checksums = {row["leaf"]: row["checksum"] for row in stored.table().column("leaves")[place].as_py()}
    return {
        "client": client_id,
        "round": stored.number,
        "num_examples": local.num_examples,
        "metrics": dict(local.metrics),
        "update_norm": local.update_norm,
        "leaves": [
            {
                "leaf": name,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "norm": float(np.linalg.norm(array.astype(np.float64).ravel())),
                "update_norm": local.leaf_norms[name],
                "checksum": f"{checksums[name]:08x}",
            }
            for name, array in local.leaves.items()
        ],
    }


def finite(value: Any) -> Any:
    """`value` with None for infinities and NaNs, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without(row: Summary, name: str) -> Summary:
    return {key: value for key, value in row.items() if key != name}
