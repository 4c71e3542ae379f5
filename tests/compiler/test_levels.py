"""Levels are a partial order with least upper bounds: its laws, over all levels."""

from __future__ import annotations

from itertools import product

import pytest

from fedlens.compiler.levels import Level, at_most, join

LEVELS = list(Level)
PAIRS = list(product(LEVELS, LEVELS))
COVERS = [  # as docs/disclosure.md draws them
    ("public", "central-dp"),
    ("central-dp", "aggregate"),
    ("aggregate", "per-client"),
    ("public", "local-dp"),
    ("local-dp", "per-client"),
    ("per-client", "raw data"),
]


def reachable():
    """What the drawing says, by following its lines upwards."""
    found = {(level.value, level.value) for level in LEVELS} | set(COVERS)
    while more := {(a, d) for (a, b), (c, d) in product(found, found) if b == c} - found:
        found |= more
    return found


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_the_order_is_that_of_the_drawing(low, high):
    assert at_most(low, high) == ((low.value, high.value) in reachable())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_join_is_the_least_upper_bound(one, other):
    both = join(one, other)
    assert at_most(one, both)
    assert at_most(other, both)
    upper = [level for level in LEVELS if at_most(one, level) and at_most(other, level)]
    assert all(at_most(both, level) for level in upper)


@pytest.mark.parametrize(("one", "other", "third"), list(product(LEVELS, LEVELS, LEVELS)))
def test_a_join_does_not_depend_on_order_or_grouping(one, other, third):
    assert join(one, join(other, third)) == join(join(third, other), one) == join(one, other, third)


def test_nothing_tells_nothing():
    assert join() is Level.PUBLIC
