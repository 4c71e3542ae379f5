"""The store of a run: rounds, clients and their local models, in open formats."""

from fedlens.ledger.folder import find_ledgers
from fedlens.ledger.format import NotInLedgerError
from fedlens.ledger.keep import Keep
from fedlens.ledger.prune import Pruned
from fedlens.ledger.reader import Ledger
from fedlens.ledger.recorder import Recorder
from fedlens.ledger.records import ClientPart, RoundRecord
from fedlens.ledger.stored import LedgerRound, StoredLocalModel
from fedlens.ledger.usage import LeafUsage, RoundUsage, Usage
from fedlens.ledger.verify import Damage
from fedlens.ledger.writer import LedgerWriter

__all__ = [
    "ClientPart",
    "Damage",
    "Keep",
    "LeafUsage",
    "Ledger",
    "LedgerRound",
    "LedgerWriter",
    "NotInLedgerError",
    "Pruned",
    "Recorder",
    "RoundRecord",
    "RoundUsage",
    "StoredLocalModel",
    "Usage",
    "find_ledgers",
]
