"""The participants of one call: an ordered set of client ids, and the data that each of them holds.

A cohort carries values as the user has them: one Python value a client, stacked arrays that an earlier call returned,
or `Examples` of a federated data set. Which arrays a computation is fed is decided when the cohort meets the
computation's type (`fedlens.runtime.columns`), so one cohort serves computations with different batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlens.errors import CohortError
from fedlens.runtime.examples import Examples

if TYPE_CHECKING:
    from fedlens.runtime.values import ClientValues


class Cohort:
    """Client ids in order, with one value for each.

    Example:
      >>> cohort = Cohort({"alice": {"w": 1.0}, "bob": {"w": 3.0}})
      >>> cohort.ids
      ('alice', 'bob')

    Attributes:
      ids: the client ids, unique and not empty, in cohort order.
      chunk_size: how many clients are computed at once; None leaves the choice to the stage that runs.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[Any], *, chunk_size: int | None = None):
        """Makes a cohort of one value a client.

        Args:
          values: client id -> value; or values alone, whose clients are then called "0" to "n-1".
          chunk_size: how many clients are computed at once, at least 1.

        Raises:
          CohortError: ids that are not strings, are empty or occur twice; no client at all.
        """
        if isinstance(values, Mapping):
            ids, source = list(values), list(values.values())
        else:
            source = list(values)
            ids = [str(position) for position in range(len(source))]
        self._hold(ids, source, chunk_size)

    @classmethod
    def from_examples(
        cls, ids: Sequence[str], examples: Examples, *, chunk_size: int | None = None, checked: bool = False
    ) -> Cohort:
        """Makes a cohort whose clients hold runs of rows in shared arrays; nothing is copied.

        Args:
          ids: the client ids.
          examples: their rows.
          chunk_size: how many clients are computed at once, at least 1.
          checked: whether `ids` are known to be good, as those of a data set are; checking 100,000 takes 15 ms.

        Raises:
          CohortError: as for `Cohort`, or there are not as many runs of rows as ids.
        """
        if not len(ids) == len(examples.starts) == len(examples.lengths):
            raise CohortError(
                f"Expected a start and a length for each of {len(ids)} client ids, "
                f"found {len(examples.starts)} starts and {len(examples.lengths)} lengths."
            )
        return cls._of(ids, examples, chunk_size, checked)

    @classmethod
    def from_client_values(cls, values: ClientValues, *, chunk_size: int | None = None) -> Cohort:
        """Makes a cohort of what the clients of an earlier call returned."""
        return cls._of(values.ids, values, chunk_size, checked=True)

    @classmethod
    def _of(cls, ids: Sequence[str], source: object, chunk_size: int | None, checked: bool) -> Cohort:
        cohort = cls.__new__(cls)
        cohort._hold(ids, source, chunk_size, checked)
        return cohort

    def _hold(self, ids: Sequence[str], source: Any, chunk_size: int | None, checked: bool = False) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise CohortError(f"Expected a chunk size of at least 1, found {chunk_size}.")
        if not checked:
            _check_ids(ids)
        self.ids: tuple[str, ...] = tuple(ids)
        self.chunk_size = chunk_size
        self._source: list[Any] | Examples | ClientValues = source

    @property
    def source(self) -> list[Any] | Examples | ClientValues:
        """What the clients hold: a list in cohort order, `Examples`, or `ClientValues`."""
        return self._source

    @property
    def examples(self) -> Examples:
        """The examples that the cohort was made from.

        Raises:
          CohortError: it was not made from examples.
        """
        if not isinstance(self._source, Examples):
            raise CohortError("Expected a cohort drawn from a federated data set, found one of single values.")
        return self._source

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        shown = ", ".join(self.ids[:3]) + (", ..." if len(self.ids) > 3 else "")
        return f"Cohort({len(self.ids)} clients: {shown})"


def _check_ids(ids: Sequence[str]) -> None:
    if len(ids) == 0:
        raise CohortError("Expected a cohort of at least one client, found none.")
    for client_id in ids:
        if not isinstance(client_id, str):
            raise CohortError(
                f"Expected client ids to be strings, found {client_id!r} of type {type(client_id).__name__}."
            )
        if not client_id:
            raise CohortError('Expected client ids to be non-empty strings, found "".')
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(client_id for client_id in ids if client_id in seen or seen.add(client_id))  # type: ignore[func-returns-value]
        raise CohortError(f"Expected each client once in a cohort, found client {twice!r} twice.")
