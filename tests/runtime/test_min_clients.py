"""`min_clients`: an aggregate over fewer clients is refused, on every engine and in every context."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import ConfigError, DisclosureError
from fedlens.runtime.context import current_context

ENGINES = ["local", "debug"]
VECTOR = fed.TensorType(np.float32, (2,))
CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)


@fed.jax_computation(VECTOR)
def double(x):
    return 2 * x


@fed.federated_computation(CLIENTS)
def mean_and_values(values):
    doubled = fed.federated_map(double, values)
    return {"mean": fed.federated_mean(doubled), "each": doubled}


@fed.federated_computation(CLIENTS)
def two_phases(values):
    mean = fed.federated_mean(values)
    minus = fed.jax_computation(lambda value, mean: value - mean, VECTOR, VECTOR)
    return fed.federated_map(minus, (values, fed.federated_broadcast(mean)))


@fed.federated_computation(CLIENTS)
def only_values(values):
    return fed.federated_map(double, values)


def cohort(count, bad=()):
    return fed.Cohort(
        {f"client {i}": np.full(2, np.nan if i in bad else i, np.float32) for i in range(count)}, chunk_size=2
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_an_aggregate_over_the_minimum_is_what_it_is_without_one(engine):
    with fed.use(engine, min_clients=3):
        found = mean_and_values(cohort(3))
    np.testing.assert_array_equal(found["mean"], [2, 2])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_aggregate_over_fewer_clients_is_refused_by_name(engine):
    with fed.use(engine, min_clients=3), pytest.raises(DisclosureError) as error:
        mean_and_values(cohort(2))
    assert str(error.value).startswith("Expected at least 3 clients in output 'mean', found 2. ")


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_computed_or_handed_to_a_sink_before_the_refusal(engine):
    seen = []

    @fed.python_computation(VECTOR, VECTOR)
    def noting(value):
        seen.append(value)
        return value

    @fed.federated_computation(CLIENTS)
    def noted(values):
        held = fed.federated_map(noting, values)
        return fed.federated_mean(held), held

    taken = []
    with fed.use(engine, min_clients=3), pytest.raises(DisclosureError):
        current_context().run(noted, cohort(2), sink=taken.append)
    assert not seen
    assert not taken


@pytest.mark.parametrize("engine", ENGINES)
def test_what_derives_from_an_aggregate_is_refused_with_it(engine):
    with fed.use(engine, min_clients=3), pytest.raises(DisclosureError, match="in output 'result', found 2"):
        two_phases(cohort(2))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_limit_is_for_aggregates_not_for_values_that_each_client_hands_out(engine):
    with fed.use(engine, min_clients=3):
        assert list(only_values(cohort(2)).ids) == ["client 0", "client 1"]


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_that_are_left_out_do_not_count(engine):
    with fed.use(engine, min_clients=3):
        outcome = current_context().run(mean_and_values, cohort(4, bad=[1]), on_nonfinite="drop")
        np.testing.assert_allclose(outcome.value["mean"], [10 / 3, 10 / 3], rtol=1e-6)
        with pytest.raises(DisclosureError, match="found 2, as the values of 2 more were not finite"):
            current_context().run(mean_and_values, cohort(4, bad=[1, 3]), on_nonfinite="drop")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_depends_on_too_few_clients_goes_to_no_sink_once_clients_are_left_out(engine):
    taken = []
    with fed.use(engine, min_clients=3), pytest.raises(DisclosureError):
        current_context().run(two_phases, cohort(4, bad=[1, 3]), on_nonfinite="drop", sink=taken.append)
    assert not taken


def test_a_secure_sum_counts_too():
    @fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))
    def total(values):
        return fed.federated_secure_sum_bitwidth(values, 8)

    with fed.use(min_clients=2), pytest.raises(DisclosureError, match="Expected at least 2 clients"):
        total(fed.Cohort({"alice": 3}))


def test_the_limit_ends_with_its_context():
    with fed.use("local", min_clients=3):
        pass
    np.testing.assert_array_equal(mean_and_values(cohort(1))["mean"], [0, 0])


def test_the_asynchronous_context_has_the_limit():
    async def main():
        return await mean_and_values(cohort(2))

    with fed.use(fed.async_context(min_clients=3)), pytest.raises(DisclosureError):
        asyncio.run(main())


def test_the_context_of_programs_has_the_limit():
    @fed.federated_computation(CLIENTS)
    def mean(values):
        return fed.federated_mean(values)

    async def main():
        return await mean(cohort(2)).get_value()

    with fed.use(fed.program_context(min_clients=3)), pytest.raises(DisclosureError):
        asyncio.run(main())
    with fed.use(fed.program_context(min_clients=2)):
        np.testing.assert_array_equal(asyncio.run(main()), [0.5, 0.5])


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3"])
def test_the_limit_is_a_number_of_clients(wrong):
    found = pytest.raises(ConfigError, match="Expected min_clients to be an integer of at least 1")
    with found, fed.use("local", min_clients=wrong):
        pass


def test_a_context_has_its_own_limit():
    with pytest.raises(ConfigError, match="Give it to the context"), fed.use(fed.async_context(), min_clients=3):
        pass
