"""Clients that are handed over together, and what is measured of all of them while they are written.

Whose devices computed them makes no difference to what is measured: the parts of a delivery are walked over together.

Large ones are measured on a thread beside the one that writes. It is as much work, but it takes its time from two cores
evenly: devices wait for each other at the end of a round, so what one thread takes from one of them, the round takes
longer.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt32

from fedlens.ledger import measure
from fedlens.ledger.measure import Clients, PerRow
from fedlens.ledger.records import ClientPart
from fedlens.ledger.tensorfile import AnyArray

WORTH_A_THREAD = 1 << 20  # bytes; less is measured sooner than it is handed to a thread


@dataclass(frozen=True)
class MeasuredPart:
    """One part of a delivery, and what is measured of its clients; the arrays are filled while that is.

    Attributes:
      of: the clients.
      squares: squared norms of their updates, [clients, leaves].
      checksums: of their leaves as they are, [clients, leaves]; 0 where nobody asked for them.
    """

    of: ClientPart
    squares: Float64[np.ndarray, "clients leaves"]
    checksums: UInt32[np.ndarray, "clients leaves"]


class Delivery:
    """The parts of one delivery; what is measured of them holds at the end of `measured`.

    Attributes:
      parts: the clients, in the order in which they are stored.
      weights: how many examples each has, which weights it in the sums; 0 for who was left out.
      scale: what the weights are divided by in the sums, at least the largest.
      squares: squared norms of their updates, [clients, leaves].
      checksums: of their leaves as they are, [clients, leaves]; 0 where nobody asked for them.
      totals: of each leaf the weighted sum of the updates, divided by `scale`; complex numbers as pairs.
      products: the inner product of each client's update with the sum of all, over all leaves; None if there are too
        many clients to know it in one pass, or if somebody was left out.
    """

    def __init__(
        self, parts: Sequence[ClientPart], global_weights: Sequence[AnyArray], checksummed: Collection[int] = ()
    ) -> None:
        """Takes the clients, and the places of the leaves that checksums are asked of; nothing is measured yet."""
        self.parts = parts
        self.weights: PerRow = np.concatenate([np.zeros(0), *(np.asarray(part.num_examples) for part in parts)])
        self.squares: Float64[np.ndarray, "clients leaves"] = np.zeros((len(self.weights), len(global_weights)))
        self.scale = 2.0 ** math.frexp(self.weights.max(initial=0.0))[1]  # a power of two: nothing is rounded
        self.totals = [measure.Total(leaf) for leaf in global_weights]
        self.products = np.zeros(len(self.weights)) if len(self.weights) <= measure.TOGETHER else None
        self.checksums: UInt32[np.ndarray, "clients leaves"] = np.zeros(self.squares.shape, np.uint32)
        self._global = global_weights
        self._checksummed = checksummed

    @contextlib.contextmanager
    def measured(self, beside: Executor) -> Iterator[None]:
        """Measures all leaves while the body runs, which must not read what is measured.

        Large deliveries are measured by a thread of `beside`, small ones before the body runs.
        """
        measuring = None
        if sum(leaf.nbytes for part in self.parts for leaf in part.weights) >= WORTH_A_THREAD:
            with contextlib.suppress(RuntimeError):  # the interpreter is about to end, which starts no more work
                measuring = beside.submit(self._measure)
        if measuring is None:
            self._measure()
            yield
        else:
            try:
                yield
            finally:
                concurrent.futures.wait([measuring])  # it reads arrays that its caller may give up
            measuring.result()
        self._leave_out_nonfinite()

    def by_part(self) -> list[MeasuredPart]:
        """What is measured of each part: views."""
        ends = np.cumsum([len(part.ids) for part in self.parts])[:-1]
        measured = zip(self.parts, np.split(self.squares, ends), np.split(self.checksums, ends), strict=True)
        return [MeasuredPart(*of_part) for of_part in measured]

    def _measure(self) -> None:
        shares = self.weights / self.scale
        for place, (reference, total) in enumerate(zip(self._global, self.totals, strict=True)):
            stacks = [np.asarray(part.weights[place]) for part in self.parts]
            for rows, together in _together(stacks):
                squares, products = self.squares[rows, place], None if self.products is None else self.products[rows]
                checksums = self.checksums[rows, place] if place in self._checksummed else None
                measure.measure(together, reference, shares[rows], squares, total, products, checksums)

    def _leave_out_nonfinite(self) -> None:
        """Takes the clients that are not finite out of the sums, which are taken again if there are any."""
        finite = np.isfinite(self.squares.sum(axis=1))
        if finite.all():
            return
        self.weights = np.where(finite, self.weights, 0.0)
        shares = self.weights / self.scale
        self.products = None
        self.totals = [measure.Total(leaf) for leaf in self._global]
        for place, (total, reference) in enumerate(zip(self.totals, self._global, strict=True)):
            start = 0
            for part in self.parts:
                places = np.flatnonzero(finite[start : start + len(part.ids)])
                for first in range(0, len(places), measure.TOGETHER):
                    chosen = places[first : first + measure.TOGETHER]
                    local = np.asarray(part.weights[place])[chosen]
                    measure.measure([local], reference, shares[start + chosen], np.zeros(len(chosen)), total)
                start += len(part.ids)


def _together(stacks: Sequence[Clients]) -> Iterator[tuple[slice, list[Clients]]]:
    """The rows of all stacks, those of several together where they are not too many."""
    if sum(len(stack) for stack in stacks) <= measure.TOGETHER:
        yield slice(None), list(stacks)
        return
    start = 0
    for stack in stacks:
        for first in range(0, len(stack), measure.TOGETHER):
            rows = stack[first : first + measure.TOGETHER]
            yield slice(start + first, start + first + len(rows)), [rows]
        start += len(stack)
