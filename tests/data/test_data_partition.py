"""Partitioners use each example once, and skew labels as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlens.data import partition_by_label, partition_dirichlet, partition_iid
from fedlens.errors import DataError

labels = st.lists(st.integers(-2, 4), min_size=1, max_size=60).map(np.array)
seeds = st.integers(0, 5)


def pool(y):
    return {"y": y, "row": np.arange(len(y))}


def assert_each_example_once(data, y):
    np.testing.assert_array_equal(np.sort(data.columns["row"]), np.arange(len(y)))
    np.testing.assert_array_equal(data.columns["y"], y[data.columns["row"]])
    for client_id in data:
        assert np.all(np.diff(data.client(client_id)["row"]) > 0)


def sizes(data):
    return np.diff(data.offsets)


@settings(deadline=None, derandomize=True)
@given(labels, seeds, st.data())
def test_iid_deals_every_example_once_and_evenly(y, seed, draws):
    clients = draws.draw(st.integers(1, len(y)))
    data = partition_iid(pool(y), clients, seed)
    assert_each_example_once(data, y)
    assert len(data) == clients
    assert np.ptp(sizes(data)) <= 1


@settings(deadline=None, derandomize=True)
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.data())
def test_by_label_gives_exactly_so_many_labels(seed, num_labels, clients, draws):
    per_client = draws.draw(st.integers(-(-num_labels // clients), num_labels))
    owners = -(-clients * per_client // num_labels)
    counts = draws.draw(st.lists(st.integers(owners, owners + 8), min_size=num_labels, max_size=num_labels))
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_labels), counts))
    data = partition_by_label(pool(y), clients, per_client, seed)
    assert_each_example_once(data, y)
    of_each = [np.unique(data.client(client_id)["y"]) for client_id in data]
    assert all(len(found) == per_client for found in of_each)
    assert np.ptp(np.bincount(np.concatenate(of_each), minlength=num_labels)) <= 1
    for label in range(num_labels):
        shares = [np.sum(data.client(client_id)["y"] == label) for client_id in data]
        assert np.ptp([share for share in shares if share]) <= 1


@settings(deadline=None, derandomize=True)
@given(labels, seeds, st.floats(1e-12, 1e12), st.data())
def test_dirichlet_deals_every_example_once_and_evenly(y, seed, alpha, draws):
    clients = draws.draw(st.integers(1, len(y)))
    data = partition_dirichlet(pool(y), clients, alpha, seed)
    assert_each_example_once(data, y)
    assert len(data) == clients
    assert np.ptp(sizes(data)) <= 1


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e300])
def test_dirichlet_at_the_ends_of_floating_point(alpha):
    y = np.arange(50) % 5
    assert_each_example_once(partition_dirichlet(pool(y), 10, alpha), y)


def test_dirichlet_goes_from_one_label_a_client_to_the_pooled_mixture():
    y = np.repeat(np.arange(10), 1000)

    def largest_shares(alpha):
        data = partition_dirichlet({"y": y}, 20, alpha, seed=1)
        return np.array([np.bincount(data.client(name)["y"], minlength=10).max() / 500 for name in data])

    assert np.median(largest_shares(1e-3)) > 0.99
    assert np.median(largest_shares(1e6)) < 0.14  # 0.1 for each label, standard deviation 0.013


def test_dirichlet_mixtures_have_the_variance_of_the_distribution():
    # One share q of Dirichlet(alpha / 2, alpha / 2) has variance 1 / (4 (alpha + 1)); counts of n add binomial noise:
    # Var = n / 4 * (1 + (n - 1) / (alpha + 1)). Half of a large pool is dealt, so that no label runs out early.
    alpha, n, clients = 3.0, 50, 4000
    y = np.arange(n * clients) % 2
    data = partition_dirichlet({"y": y}, clients, alpha, seed=0)
    ones = data.columns["y"].reshape(clients, n).sum(axis=1)[: clients // 2]
    assert ones.var() == pytest.approx(n / 4 * (1 + (n - 1) / (alpha + 1)), rel=0.1)
    assert ones.mean() == pytest.approx(n / 2, rel=0.05)


@pytest.mark.parametrize(
    "partition",
    [
        lambda y, seed: partition_iid({"y": y}, 4, seed),
        lambda y, seed: partition_by_label({"y": y}, 4, 2, seed),
        lambda y, seed: partition_dirichlet({"y": y}, 4, 1.0, seed),
    ],
)
def test_seeds_repeat_and_differ(partition):
    y = np.arange(40) % 4
    first, again, other = (partition(y, seed).columns["y"].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_client_names_sort():
    assert partition_iid({"y": np.arange(11)}, 11).ids == tuple(f"client-{i:02}" for i in range(11))
    assert partition_iid({"y": np.arange(2)}, 2).ids == ("client-0", "client-1")


def test_labels_may_be_in_another_column():
    data = partition_by_label({"digit": np.arange(6) % 2, "x": np.zeros((6, 2))}, 2, 1, label="digit")
    assert {len(np.unique(data.client(name)["digit"])) for name in data} == {1}


@pytest.mark.parametrize("clients", [0, 7])
def test_clients_out_of_range(clients):
    message = f"Expected clients from 1 to 6, the number of examples, found {clients}"
    y = {"y": np.arange(6)}
    with pytest.raises(DataError, match=message):
        partition_iid(y, clients)
    with pytest.raises(DataError, match=message):
        partition_by_label(y, clients, 1)
    with pytest.raises(DataError, match=message):
        partition_dirichlet(y, clients, 1.0)


@pytest.mark.parametrize(
    ("y", "clients", "per_client", "message"),
    [
        ([0, 1], 2, 3, "labels_per_client from 1 to 2, the labels in column 'y', found 3"),
        ([0, 1], 2, 0, "labels_per_client from 1 to 2, the labels in column 'y', found 0"),
        ([0, 1, 2], 2, 1, r"clients \* labels_per_client of at least 3, .*found 2 \* 1"),
        ([0, 0, 0, 7], 4, 1, "an example of label 7 in column 'y' for each of the 2 clients that own it, found 1"),
        ([0.5, 1.5], 2, 1, r"one integer label an example in column 'y', found float64\[2\]"),
        ([[0], [1]], 2, 1, r"one integer label an example in column 'y', found int64\[2, 1\]"),
    ],
)
def test_labels_that_cannot_be_dealt(y, clients, per_client, message):
    with pytest.raises(DataError, match=message):
        partition_by_label({"y": y}, clients, per_client)


def test_missing_label_column():
    with pytest.raises(DataError, match=r"Expected a column 'y' of labels, found digit\. Name it with `label=`"):
        partition_dirichlet({"digit": [0, 1]}, 1, 1.0)


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(DataError, match="Expected alpha to be a finite number above 0, found"):
        partition_dirichlet({"y": [0, 1]}, 1, alpha)
