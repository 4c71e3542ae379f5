"""Which products of a scan's body need not be computed step by step, and which of those it pays to take out.

A step reads the whole of a kernel, however few rows it multiplies, and the way back reads and writes the whole of a
kernel's gradient. Three kinds of products don't wait for the step before:

- those before the loop: the product of a scanned input with a constant is known for all steps when the loop starts;
- sums: state to which every step adds a product, and which nothing else reads, is one product over all steps;
- those after the loop: a product with a constant that only outputs need can wait until its other factor is stacked.

Each is taken out if what is then held for all steps is smaller, in a step, than what the step read or wrote for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from fedlens.runtime.scan_body import Body, Knowledge
from fedlens.runtime.scan_sums import Sum, added, sum_of
from fedlens.runtime.traced import PRODUCT, Operation, needed

SHORTEST = 4
"""Loops of fewer steps stay as they are."""
MOST_BYTES = 256 * 2**20
"""What a rewritten loop may hold for all steps beyond what it held before."""


@dataclass(frozen=True)
class Plan:
    """What leaves the loop.

    Attributes:
      before: the products that are computed before it, in order.
      sums: by the place of a state in `Body.carried`, what all steps together add to it.
      after: the places in `Body.stacked` of outputs that are computed after it.
      emitted: the values that it stacks in addition.
      outside: what is known outside of the loop then.
    """

    before: tuple[Operation, ...]
    sums: dict[int, Sum]
    after: tuple[int, ...]
    emitted: tuple[int, ...]
    outside: Knowledge


@dataclass(frozen=True)
class _Candidate:
    """A state or an output that could leave the loop.

    Attributes:
      place: in `Body.carried` or `Body.stacked`.
      is_sum: whether it is a state.
      products: which products it would compute for all steps, by their results.
      leaves: the values that have to be stacked for it.
    """

    place: int
    is_sum: bool
    products: frozenset[int]
    leaves: tuple[int, ...]


def plan(body: Body, length: int) -> Plan | None:
    """What to take out of a loop of `length` steps; None if nothing that pays."""
    if length < SHORTEST or not any(operation.name == PRODUCT for operation in body.operations):
        return None
    outside = Knowledge(body)
    before = _before(outside)
    outputs = _outputs(outside)
    known = [place for place, value in enumerate(body.stacked) if outside.knows(value)]
    outside.learn(body.stacked)
    chosen = _consistent(body, [candidate for candidate in (*_sums(outside), *outputs) if candidate.products])
    if not before and not chosen:
        return None
    leaves = dict.fromkeys(leaf for candidate in chosen for leaf in candidate.leaves)
    emitted = tuple(leaf for leaf in leaves if not outside.knows(leaf))
    outside.emit(emitted)
    # What is stacked now gives other sums for nothing, as those of a bias and of a kernel for few inputs.
    places = {candidate.place for candidate in chosen if candidate.is_sum}
    others = [candidate for candidate in _sums(outside) if candidate.place not in places]
    chosen = _consistent(body, [*chosen, *others])
    leaves.update(dict.fromkeys(leaf for candidate in chosen for leaf in candidate.leaves))
    after = (*known, *(candidate.place for candidate in chosen if not candidate.is_sum))
    if length * _held(outside, before, leaves, emitted, after) > MOST_BYTES:
        return None
    places = {candidate.place for candidate in chosen if candidate.is_sum}
    sums = {place: sum_of(outside, added(outside, place)) for place in sorted(places)}
    return Plan(
        before=tuple(before),
        sums={place: total for place, total in sums.items() if total is not None},
        after=after,
        emitted=emitted,
        outside=outside,
    )


def _held(
    outside: Knowledge, before: Sequence[Operation], leaves: Iterable[int], emitted: Sequence[int], after: Sequence[int]
) -> int:
    """The bytes for one step of all that is computed outside of the loop, or stacked for it, at most."""
    body = outside.body
    outputs = {value for place, value in enumerate(body.stacked) if place not in after}
    given = outside.constant.union(body.scanned, outputs, emitted)
    made = [operation.results[0] for operation in before]
    computed = needed(body.operations, (*made, *leaves, *(body.stacked[place] for place in after)), given)
    return sum(map(body.size, (*emitted, *(result for operation in computed for result in operation.results))))


def _before(outside: Knowledge) -> list[Operation]:
    """The products before the loop, whose results `outside` knows then."""
    body, found = outside.body, []
    for operation in body.operations:
        if operation.name != PRODUCT or operation.results[0] in outside.constant:
            continue
        kernel = _kernel(outside, operation)
        if kernel is None or not all(map(outside.knows, operation.operands)):
            continue
        # Factors that have to be made from what is scanned, as the patches of a convolution, are held as well.
        held = [*operation.results, *(each for each in operation.operands if each not in outside.at_hand)]
        if sum(map(body.size, held)) <= body.size(kernel):
            found.append(operation)
            outside.learn(operation.results)
    return found


def _kernel(outside: Knowledge, operation: Operation) -> int | None:
    """The one operand of a product of floats that is the same at all steps."""
    is_float = jnp.issubdtype(outside.body.types[operation.results[0]].dtype, jnp.floating)
    constant = [operand for operand in operation.operands if operand in outside.constant]
    return constant[0] if is_float and len(constant) == 1 else None


def _sums(outside: Knowledge) -> list[_Candidate]:
    """The states to which each step only adds something whose sum over steps comes from stacked values."""
    found = []
    for place in range(len(outside.body.carried)):
        if (total := sum_of(outside, added(outside, place))) is not None:
            found.append(_Candidate(place, True, total.products, total.leaves))
    return found


def _outputs(outside: Knowledge) -> list[_Candidate]:
    """The outputs that could be computed after the loop, from stacked values and products with constants."""
    body, found = outside.body, []
    for place, output in enumerate(body.stacked):
        pending, seen = [output], set[int]()
        kernels, leaves = dict[int, int](), dict[int, None]()
        while pending:
            value = pending.pop()
            if value in seen or outside.knows(value):
                continue
            seen.add(value)
            maker = outside.maker.get(value)
            if maker is None or not maker.is_movable:
                leaves[value] = None
            elif maker.name != PRODUCT:
                pending += maker.operands
            elif (kernel := _kernel(outside, maker)) is None or all(map(outside.knows, maker.operands)):
                leaves[value] = None
            else:
                kernels[value] = kernel
                leaves.update((operand, None) for operand in maker.operands if not outside.knows(operand))
        stacked = sum(body.size(leaf) for leaf in leaves if leaf not in body.stacked)
        if kernels and stacked <= sum(map(body.size, set(kernels.values()))):
            found.append(_Candidate(place, False, frozenset(kernels), tuple(leaves)))
    return found


def _consistent(body: Body, candidates: list[_Candidate]) -> list[_Candidate]:
    """Those whose products the loop does not need in spite of them, as it would compute them twice then."""
    while True:
        sums = {candidate.place for candidate in candidates if candidate.is_sum}
        outputs = {candidate.place for candidate in candidates if not candidate.is_sum}
        leaves = [leaf for candidate in candidates for leaf in candidate.leaves]
        carried_on = [value for place, value in enumerate(body.carried_on) if place not in sums]
        stacked = [value for place, value in enumerate(body.stacked) if place not in outputs]
        within = {
            result
            for operation in needed(body.operations, (*carried_on, *stacked, *leaves))
            for result in operation.results
        }
        kept = [candidate for candidate in candidates if not candidate.products & within]
        if len(kept) == len(candidates):
            return kept
        candidates = kept
