"""`removals.jsonl`: what was removed from a ledger, one JSON object a line, in the order in which it was.

A line is written before what it says is done. It says it so that doing it again changes nothing, and a removal that was
interrupted is finished by doing the last line once more. Clients stand in it by the SHA-256 of their ids: whoever knows
an id can see whether the client was removed, and the id itself is gone. Each line has its checksum (see `seal`): one
flipped bit should not remove another round.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlens.errors import LedgerError
from fedlens.ledger import durable, jsontext, seal
from fedlens.ledger.storage import LocalStore, Store

FILE = "removals.jsonl"
ROUNDS, CLIENTS = "rounds", "clients"

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Removal:
    """One removal.

    Attributes:
      kind: `ROUNDS` when rounds were removed altogether, `CLIENTS` when clients were removed from rounds.
      rounds: which rounds.
      clients: the digests of the clients; none for `ROUNDS`.
    """

    kind: str
    rounds: tuple[int, ...]
    clients: tuple[str, ...] = ()


def digest(client_id: str) -> str:
    """What stands in place of a client's id: the SHA-256 of its UTF-8 bytes, in hexadecimal.

    Example:
      >>> digest("ann")[:8]
      'f66d0163'
    """
    return hashlib.sha256(client_id.encode()).hexdigest()


def read_removals(store: Store) -> list[Removal]:
    """What was removed from a ledger so far.

    Raises:
      LedgerError: the file cannot be read, or is damaged.
    """
    if store.stamp(FILE) is None:
        return []
    try:
        return [_parse(line) for line in store.read(FILE).splitlines()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"Expected a list of removals, found damage ({type(error).__name__}: {error}), in {store.where(FILE)}. "
            "Restore the file from a copy."
        ) from error


def add_removal(folder: Path, removal: Removal) -> None:
    """Adds one to the file, and through to the disk.

    Raises:
      LedgerError: the file is damaged.
      OSError: what the operating system reports; nothing is added then.
    """
    lines = [_to_json(each) for each in (*read_removals(LocalStore(folder)), removal)]
    durable.replace_file(folder / FILE, lines)


def _to_json(removal: Removal) -> bytes:
    fields: dict[str, Any] = {"kind": removal.kind, "rounds": list(removal.rounds)}
    if removal.kind == CLIENTS:
        fields["clients"] = list(removal.clients)
    fields["checksum"] = seal.BLANK
    return seal.seal(json.dumps(fields).encode(), seal.END_OF_METADATA) + b"\n"


def _parse(line: bytes) -> Removal:
    fields = jsontext.parse(line)
    if "checksum" not in fields or seal.is_broken(line, seal.END_OF_METADATA):
        raise ValueError("a line without its checksum")
    removal = Removal(fields["kind"], tuple(fields["rounds"]), tuple(fields.get("clients", ())))
    if removal.kind not in (ROUNDS, CLIENTS) or not _are_rounds(removal.rounds):
        raise ValueError(f"a removal of {removal.kind!r}, {removal.rounds!r}")
    if not all(isinstance(client, str) and _DIGEST.fullmatch(client) for client in removal.clients):
        raise ValueError("clients that are no digests")
    return removal


def _are_rounds(rounds: Iterable[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in rounds)
