"""Cohorts for programs: those of `FederatedData.cohort`, round by round; an iterator's bytes bring it back."""

from __future__ import annotations

import federated_language as fl
import numpy as np
import pytest

import fedlens as fed
from fedlens.data.program_source import CohortIterator
from fedlens.errors import DataError, LanguageError


def make_data(clients=6, first=0):
    numbers = np.arange(first, first + 3 * clients, dtype=np.float32)
    return fed.data.FederatedData.from_arrays({"x": numbers}, clients=[f"c{int(n) // 3}" for n in numbers - first])


def facts(cohort):
    examples = cohort.examples
    return cohort.ids, examples.starts.tolist(), examples.lengths.tolist()


def test_it_is_the_languages_data_source_and_its_type_that_of_batches_with_a_mask():
    source = fed.CohortSource(make_data(), batch_size=4)
    iterator = source.iterator()
    assert isinstance(source, fl.program.FederatedDataSource)
    assert isinstance(iterator, fl.program.FederatedDataSourceIterator)
    assert str(source.federated_type) == "{<x=float32[4],mask=bool[4]>*}@CLIENTS"
    assert iterator.federated_type == source.federated_type


def test_an_iterator_draws_the_cohorts_of_the_data_set_round_by_round():
    data = make_data()
    iterator = fed.CohortSource(data, seed=7).iterator()
    for number, k in enumerate([2, None, 5, 2]):
        assert iterator.round == number
        assert facts(iterator.select(k)) == facts(data.cohort(number, clients_per_round=k, seed=7))


def test_iterators_are_independent_passes():
    source = fed.CohortSource(make_data(), seed=1)
    first, second = source.iterator(), source.iterator()
    drawn = [facts(first.select(3)) for _ in range(4)]
    assert [facts(second.select(3)) for _ in range(4)] == drawn
    assert len({ids for ids, _, _ in drawn}) > 1


@pytest.mark.parametrize("k", [0, -1, 7, 1.5])
def test_a_draw_that_is_refused_does_not_count(k):
    iterator = fed.CohortSource(make_data()).iterator()
    with pytest.raises(DataError, match="clients_per_round"):
        iterator.select(k)
    assert iterator.round == 0


def test_a_cohort_is_an_argument_of_a_computation_of_the_type():
    source = fed.CohortSource(make_data(), batch_size=2)

    @fed.federated_computation(source.federated_type)
    def count(data):
        def examples(batches):
            return batches.reduce(np.int32(0), lambda total, batch: total + batch["mask"].sum(dtype=np.int32))

        return fed.federated_sum(fed.federated_map(examples, data))

    assert count(source.iterator().select(4)) == 12


def test_an_iterator_comes_back_from_its_bytes_and_goes_on():
    source = fed.CohortSource(make_data(), seed=3)
    iterator = source.iterator()
    for _ in range(3):
        iterator.select(2)
    again = CohortIterator.from_bytes(iterator.to_bytes())
    assert again == iterator
    assert again is not iterator
    assert again != source.iterator()
    assert [facts(again.select(2)) for _ in range(3)] == [facts(iterator.select(2)) for _ in range(3)]


def test_bytes_that_were_saved_once_are_still_read():
    source = fed.CohortSource(make_data(), seed=2)
    buffer = b'{"source": "ea22cef08a48c00fe2199bfa5f7e1471", "round": 5}'
    assert CohortIterator.from_bytes(buffer).round == 5
    assert CohortIterator(source, 5).to_bytes() == buffer


@pytest.mark.parametrize(
    "other",
    [
        lambda: fed.CohortSource(make_data(5), seed=3),
        lambda: fed.CohortSource(make_data(), seed=4),
        lambda: fed.CohortSource(make_data(), batch_size=3, seed=3),
    ],
    ids=["clients", "seed", "batch size"],
)
def test_without_a_source_over_the_same_data_an_iterator_is_not_read(other):
    buffer = fed.CohortSource(make_data(), seed=3).iterator().to_bytes()  # the source is gone
    alive = other()
    with pytest.raises(DataError, match="Make the source, with the same data, batch size and seed"):
        CohortIterator.from_bytes(buffer)
    assert alive.seed in (3, 4)


@pytest.mark.parametrize(
    "buffer", [b"", b"\xff\x00", b"[]", b"{}", b'{"source": "a", "round": "1"}', b'{"source": "a", "round": -1}']
)
def test_other_bytes_are_refused(buffer):
    with pytest.raises(DataError, match="the bytes of a CohortIterator"):
        CohortIterator.from_bytes(buffer)


def test_arguments_are_checked():
    with pytest.raises(DataError, match="batch_size to be an integer"):
        fed.CohortSource(make_data(), batch_size=2.5)
    with pytest.raises(DataError, match="seed to be an integer"):
        fed.CohortSource(make_data(), seed="now")
    with pytest.raises(LanguageError, match="batch size of at least 1"):
        fed.CohortSource(make_data(), batch_size=0)
