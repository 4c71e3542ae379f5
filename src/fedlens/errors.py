"""The exceptions that fedlens raises.

Every message reads "Expected ..., found ...", names the client, leaf, file or key that is at fault, and says what to
do. Catch `FedlensError` for all of them; each class also derives from the built-in exception that fits, so that code
which knows nothing of fedlens handles it too.
"""

from __future__ import annotations


class FedlensError(Exception):
    """Base class of every error that fedlens raises on purpose."""


class StructureError(FedlensError, TypeError):
    """A value's structure, shape or dtype is not what its type says, or has no type at all."""


class CohortError(FedlensError, ValueError):
    """The clients of a call are not usable: ids empty, duplicate or unequal, or a client's value of the wrong type."""


class NonFiniteError(FedlensError, ArithmeticError):
    """A client sent infinities or NaNs into an aggregation."""


class BoundError(FedlensError, ValueError):
    """A client's integers are beyond the bound of a secure sum or of a select, or their sum does not fit its dtype."""


class UnsupportedError(FedlensError, NotImplementedError):
    """A part of the language, or of a library, that fedlens does not execute."""


class LanguageError(FedlensError, TypeError):
    """A local computation does something that its place in a federated computation does not allow."""


class DisclosureError(FedlensError, ValueError):
    """A result would tell more about a client than it may."""


class LedgerError(FedlensError, OSError):
    """A ledger cannot be written or read."""


class ConfigError(FedlensError, ValueError):
    """A configuration has an unknown key or value."""


class DataError(FedlensError, ValueError):
    """A data set's arrays do not fit together, or cannot be loaded."""


class PerformanceWarning(UserWarning):
    """The computation is right and slower than this machine allows; the message says what to change."""
