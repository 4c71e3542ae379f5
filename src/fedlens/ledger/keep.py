"""What of a run is kept: which leaves, rounds and clients have their weights stored. Statistics are always recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fedlens.errors import LedgerError


@dataclass(frozen=True)
class Keep:
    """Which clients' weights a ledger stores; norms, cosines, losses and examples it has of everybody, always.

    Patterns are those of file names, upper and lower case distinguished: `*` is anything, `/` included, `?` one
    character, `[ab]` one of these. The global model before each round is stored whole in any case.

    Example:
      >>> keep = Keep(leaves="dense*", every=5)
      >>> keep.keeps_leaf("dense/kernel"), keep.keeps_leaf("conv/kernel"), keep.keeps_round(12)
      (True, False, False)

    Attributes:
      leaves: a pattern of leaf names, or several of which one has to match.
      every: the weights of rounds 0, `every`, 2 `every`, ... are stored.
      clients: a pattern of client ids, or a list of the ids themselves; None is everybody.
      statistics_only: no local weights at all.

    Raises:
      LedgerError: a value of another kind, or `every` below 1.
    """

    leaves: str | Sequence[str] = "*"
    every: int = 1
    clients: str | Sequence[str] | None = None
    statistics_only: bool = False

    def __post_init__(self) -> None:
        """Checks the values, and makes tuples of lists, so that equal values are equal."""
        for name in ("leaves", "clients"):
            value = getattr(self, name)
            if isinstance(value, str):
                _texts([value], f"Keep.{name}")
            elif value is not None or name == "leaves":
                object.__setattr__(self, name, _texts(value, f"Keep.{name}"))
        if type(self.every) is not int or self.every < 1:
            raise LedgerError(f"Expected a whole number of rounds, at least 1, found {self.every!r}, in Keep.every.")
        if type(self.statistics_only) is not bool:
            raise LedgerError(f"Expected True or False, found {self.statistics_only!r}, in Keep.statistics_only.")

    def keeps_leaf(self, name: str) -> bool:
        """Whether the leaf of that name is stored, of the clients and rounds that are."""
        return any(fnmatchcase(name, pattern) for pattern in self.leaf_patterns)

    def keeps_round(self, number: int) -> bool:
        """Whether clients' weights of that round are stored."""
        return not self.statistics_only and number % self.every == 0

    def keeps_client(self, client_id: str) -> bool:
        """Whether that client's weights are stored, in the rounds that are."""
        if self.clients is None:
            return True
        return fnmatchcase(client_id, self.clients) if isinstance(self.clients, str) else client_id in self.clients

    @property
    def leaf_patterns(self) -> tuple[str, ...]:
        """The patterns of `leaves`."""
        return (self.leaves,) if isinstance(self.leaves, str) else tuple(self.leaves)

    def check(self, leaf_names: Iterable[str]) -> None:
        """Checks that each pattern is of some leaf.

        Raises:
          LedgerError: one is not.
        """
        names = list(leaf_names)
        for pattern in self.leaf_patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise LedgerError(
                    f"Expected a pattern that matches a leaf, found {pattern!r}, in Keep.leaves. "
                    f"The leaves are {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}."
                )

    def to_json(self) -> dict[str, Any]:
        """The value as `run.json` has it."""
        plain = {"leaves": self.leaves, "every": self.every, "clients": self.clients}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()} | {
            "statistics_only": self.statistics_only
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Keep:
        """The value that `to_json` gave.

        Raises:
          LedgerError: a value of another kind.
          KeyError, TypeError: it is no such object.
        """
        return cls(fields["leaves"], fields["every"], fields["clients"], fields["statistics_only"])


def _texts(values: Any, where: str) -> tuple[str, ...]:
    found = tuple(values) if isinstance(values, Iterable) else (values,)
    for value in found:
        if not isinstance(value, str):
            raise LedgerError(f"Expected a pattern or a list of texts, found {value!r}, in {where}.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LedgerError(f"Expected valid Unicode text, found {value!r}, in {where}.") from None
    return found
