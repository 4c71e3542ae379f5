"""Cohorts of many sizes share few programs: a compilation costs more than a round."""

import jax.monitoring
import numpy as np

import fedlens as fed
from fedlens.runtime import Context, Examples, Local


@fed.federated_computation(fed.FederatedType(fed.TensorType(np.float32, (3,)), fed.CLIENTS))
def mean_and_values(values):
    return fed.federated_mean(values), fed.federated_map(lambda x: x * 2, values)


BATCHES = fed.SequenceType(fed.batch_type(fed.type_of({"x": 0.5}), 4))


@fed.federated_computation(fed.FederatedType(BATCHES, fed.CLIENTS))
def totals(data):
    def total(batches):
        return batches.map(lambda batch: (batch["x"] * batch["mask"]).sum()).sum()

    return fed.federated_sum(fed.federated_map(total, data))


def cohort_of(count, **options):
    return fed.Cohort(list(np.ones((count, 3), np.float32)), **options)


def ragged(count, seed):
    lengths = np.random.default_rng(seed).integers(15, 26, count)
    ends = np.cumsum(lengths)
    examples = Examples({"x": np.ones(int(ends[-1]), np.float32)}, ends - lengths, lengths)
    return fed.Cohort.from_examples([str(i) for i in range(count)], examples)


def test_cohorts_of_20_to_40_clients(two_devices, compilations):
    context = Context(two_devices)
    with compilations() as first:
        for count in range(20, 41):
            assert context.run(mean_and_values, cohort_of(count)).value[0][0] == 1
    # A device holds 10 to 20 clients, which have 9 capacities. The rest are small: to merge, to finish a mean, to type.
    assert 9 <= len(first) <= 9 + 5
    with compilations() as again:
        for count in range(20, 41):
            context.run(mean_and_values, cohort_of(count))
    assert again == []


def test_programs_grow_with_the_logarithm_of_the_cohort(compilations):
    context = Context(Local(jax.local_devices()[:1]))
    with compilations() as found:
        for count in range(64, 129):
            context.run(mean_and_values, cohort_of(count))
    assert len(found) <= 9 + 5


def test_ragged_cohorts_of_one_size(two_devices, compilations):
    context = Context(two_devices)
    with compilations() as first:
        for seed in range(12):
            context.run(totals, ragged(20, seed))
    assert len(first) <= 4 + 5  # some 200 rows a device, give or take a tenth: few capacities
    with compilations() as again:
        for seed in range(12):
            context.run(totals, ragged(20, seed))
    assert again == []


def test_chunks_share_one_program(two_devices, compilations):
    context = Context(two_devices)
    context.run(mean_and_values, cohort_of(16, chunk_size=8))
    with compilations() as found:
        context.run(mean_and_values, cohort_of(61, chunk_size=8))  # seven chunks of 8, and one of 5
    assert found == []
