"""Cohorts drawn from a federated data set, and the generators that draw them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlens.data import FederatedData
from fedlens.data.sampling import generator
from fedlens.errors import DataError


@pytest.fixture(scope="module")
def data():
    return FederatedData.from_clients({f"c{i}": {"y": np.arange(100 * i, 100 * i + i)} for i in range(20)})


def test_without_a_number_all_clients_take_part_in_order(data):
    cohort = data.cohort(7)
    assert cohort.ids == data.ids
    np.testing.assert_array_equal(cohort.examples.lengths, np.arange(20))


@settings(deadline=None, derandomize=True)
@given(round=st.integers(0, 10**6), count=st.integers(1, 20), seed=st.integers(-3, 2**70))
def test_a_cohort_is_a_draw_without_replacement_of_clients_and_their_rows(data, round, count, seed):  # noqa: A002
    cohort = data.cohort(round, clients_per_round=count, seed=seed)
    assert len(set(cohort.ids)) == len(cohort) == count
    assert cohort.ids == data.cohort(round, clients_per_round=count, seed=seed).ids
    examples = cohort.examples
    for client_id, start, length in zip(cohort.ids, examples.starts, examples.lengths, strict=True):
        np.testing.assert_array_equal(examples.columns["y"][start : start + length], data.client(client_id)["y"])


def test_a_cohort_of_clients_that_are_named(data):
    cohort = data.cohort_of(["c7", "c0", "c3"])
    assert cohort.ids == ("c7", "c0", "c3")
    np.testing.assert_array_equal(cohort.examples.lengths, [7, 0, 3])
    start = cohort.examples.starts[2]
    np.testing.assert_array_equal(cohort.examples.columns["y"][start : start + 3], data.client("c3")["y"])
    assert data.cohort_of("c1").ids == ("c1",)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["c1", "x"], "Expected one of the 20 clients .*, found 'x'"),
        (["c1", "c1"], "Expected each client id once, found 'c1' twice"),
        ([], "Expected the ids of at least one client"),
    ],
)
def test_a_cohort_of_clients_that_are_not_there(data, ids, message):
    with pytest.raises(DataError, match=message):
        data.cohort_of(ids)


def test_nothing_is_copied(data):
    assert data.cohort_of(["c3"]).examples.columns["y"] is data.columns["y"]
    assert data.cohort(0, clients_per_round=3).examples.columns["y"] is data.columns["y"]


def test_every_client_and_every_position_is_equally_likely(data):
    rounds = 4000
    drawn = np.array([data.cohort(round, clients_per_round=5).ids for round in range(rounds)])
    for position in range(5):
        counts = np.unique(drawn[:, position], return_counts=True)[1]
        assert len(counts) == 20
        chi_squared = np.sum((counts - rounds / 20) ** 2) / (rounds / 20)
        assert chi_squared < 43.8  # the 99.9 % quantile at 19 degrees of freedom


def test_rounds_and_seeds_do_not_mirror_one_another(data):
    # Words of a plain SeedSequence([seed, round]) run together; (seed, round) must not.
    pairs = [(0, 1), (1, 0), (2**32, 0), (0, 2**32), (2**32, 1), (1, 2**32), (-1, 0), (0, -1)]
    draws = {data.cohort(round, clients_per_round=20, seed=seed).ids for seed, round in pairs}
    assert len(draws) == len(pairs)


def test_the_generator_is_philox_keyed_by_the_digest_of_the_names():
    digest = hashlib.blake2b(b'["split", 3, "alice"]', digest_size=16).digest()
    expected = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(4)
    np.testing.assert_array_equal(generator("split", 3, "alice").bit_generator.random_raw(4), expected)


@pytest.mark.parametrize("count", [0, 21])
def test_clients_per_round_out_of_range(data, count):
    message = f"Expected clients_per_round from 1 to 20, the clients of the data set, found {count}"
    with pytest.raises(DataError, match=message):
        data.cohort(0, clients_per_round=count)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"round": 0, "clients_per_round": 2.0}, "clients_per_round"),
        ({"round": "0", "clients_per_round": 2}, "round"),
        ({"round": 0, "clients_per_round": 2, "seed": None}, "seed"),
    ],
)
def test_arguments_that_are_no_integers(data, arguments, name):
    with pytest.raises(DataError, match=f"Expected {name} to be an integer, found"):
        data.cohort(**arguments)
