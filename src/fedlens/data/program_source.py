"""Cohorts for federated programs: the language's data source over a federated data set.

An iterator draws the cohorts of rounds 0, 1, 2, ... as `FederatedData.cohort` does, so that a program trains on the
same clients as `fed.run` with the same seed. Its state is a number, which a program saves with its own state: the data
stay where they are, and an iterator that is read back draws from a source over the same data in that process.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from functools import cached_property

import federated_language as fl

from fedlens.data.federated_data import FederatedData
from fedlens.data.sampling import integer
from fedlens.errors import DataError
from fedlens.language import batch_type
from fedlens.runtime.cohort import Cohort


class CohortSource(fl.program.FederatedDataSource):
    """Cohorts of a federated data set, for a program.

    Example:
      >>> import fedlens as fed
      >>> source = fed.CohortSource(fed.data.digits(), batch_size=20, seed=0)
      >>> iterator = source.iterator()
      >>> iterator.select(5)  # round 0
      Cohort(5 clients: form-10, form-13, form-07, ...)

    Attributes:
      data: the clients and their examples.
      batch_size: examples in a batch of `federated_type`; that of the process which trains on the cohorts.
      seed: who takes part in a round follows from it.
    """

    def __init__(self, data: FederatedData, *, batch_size: int = 20, seed: int = 0):
        """Takes the data set, the batch size and the seed.

        Raises:
          DataError: the seed or the batch size is no integer, or a column has a dtype that the language does not know.
          LanguageError: the batch size is below 1.
        """
        self.data = data
        self.batch_size = integer("batch_size", batch_size)
        self.seed = integer("seed", seed)
        self._federated_type = fl.FederatedType(
            fl.SequenceType(batch_type(data.element_type, self.batch_size)), fl.CLIENTS
        )
        with _lock:
            _sources.add(self)

    @property
    def federated_type(self) -> fl.FederatedType:
        """The type of a cohort: each client's examples as a sequence of batches with a mask."""
        return self._federated_type

    def iterator(self) -> CohortIterator:
        """A new iterator, which begins at round 0."""
        return CohortIterator(self)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this source from others: clients, how many examples each holds, type of a batch, seed.

        The examples themselves are not read: a data set on disk may be larger than memory.
        """
        facts = json.dumps([self.data.ids, str(self._federated_type), self.seed]).encode()
        return hashlib.blake2b(self.data.offsets.tobytes() + facts, digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"CohortSource({self.data!r}, batch_size={self.batch_size}, seed={self.seed})"


class CohortIterator(fl.program.FederatedDataSourceIterator):
    """Draws a cohort for each round; made by `CohortSource.iterator`.

    Attributes:
      source: where the cohorts come from.
      round: the number of the round whose cohort is drawn next.
    """

    def __init__(self, source: CohortSource, round: int = 0):  # noqa: A002
        """Begins at a round."""
        self.source = source
        self.round = round

    @property
    def federated_type(self) -> fl.FederatedType:
        """The type of a cohort, as the source has it."""
        return self.source.federated_type

    def select(self, k: int | None = None) -> Cohort:
        """The cohort of the next round.

        Args:
          k: how many clients to draw, uniformly and without replacement; None takes all.

        Raises:
          DataError: `k` is not from 1 to the number of clients; the round is then still to be drawn.
        """
        cohort = self.source.data.cohort(self.round, clients_per_round=k, seed=self.source.seed)
        self.round += 1
        return cohort

    def to_bytes(self) -> bytes:
        """The iterator as bytes: its round, and which source it draws from."""
        return json.dumps({"source": self.source.fingerprint, "round": self.round}).encode()

    @classmethod
    def from_bytes(cls, buffer: bytes) -> CohortIterator:
        """The iterator that `to_bytes` gave, in this or another process.

        Raises:
          DataError: the bytes are not an iterator's, or there is no source over the same data in this process.
        """
        try:
            state = json.loads(buffer)
            fingerprint, round_number = state["source"], integer("round", state["round"])
            if round_number < 0:
                raise ValueError(round_number)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"Expected the bytes of a CohortIterator, found {buffer[:40]!r}.") from error
        with _lock:
            sources = list(_sources)
        for source in sources:
            if source.fingerprint == fingerprint:
                return cls(source, round_number)
        raise DataError(
            f"Expected a CohortSource over the data that an iterator drew round {round_number} from, found "
            f"{len(sources)} over others. Make the source, with the same data, batch size and seed, before it is read."
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CohortIterator):
            return NotImplemented
        return (self.source.fingerprint, self.round) == (other.source.fingerprint, other.round)

    __hash__ = None  # type: ignore[assignment]  # it moves on

    def __repr__(self) -> str:
        return f"CohortIterator(round {self.round} of {self.source!r})"


_lock = threading.Lock()
_sources: weakref.WeakSet[CohortSource] = weakref.WeakSet()  # where an iterator that is read back can draw from
