"""The store of a run: rounds, clients and their local models, in open formats."""

from fedlens.ledger.folder import find_ledgers
from fedlens.ledger.format import NotInLedgerError
from fedlens.ledger.reader import Ledger
from fedlens.ledger.records import ClientPart, RoundRecord
from fedlens.ledger.stored import LedgerRound, StoredLocalModel
from fedlens.ledger.writer import LedgerWriter

__all__ = [
    "ClientPart",
    "Ledger",
    "LedgerRound",
    "LedgerWriter",
    "NotInLedgerError",
    "RoundRecord",
    "StoredLocalModel",
    "find_ledgers",
]
