"""Columns: how clients' values are laid out for devices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlens as fed
from fedlens.errors import UnsupportedError
from fedlens.memory import in_place
from fedlens.runtime.columns import SequenceColumn, StructColumn, TensorColumn, bucket, nest

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(st.integers(0, 10**9))
def test_a_bucket_is_an_eighth_larger_at_most(count):
    assert count <= bucket(count) <= max(count * 1.125, 8)
    assert bucket(bucket(count)) == bucket(count)
    assert bucket(count) <= bucket(count + 1)


def test_buckets_are_few():
    assert [bucket(count) for count in (0, 1, 7, 8, 9, 16, 17, 32, 33, 1000)] == [1, 1, 7, 8, 9, 16, 18, 32, 36, 1024]
    assert len({bucket(count) for count in range(1, 2**20 + 1)}) == 8 + 8 * 17


def sequence_column(of_clients, gaps=1):
    sizes = np.array(of_clients)
    starts = np.concatenate([[0], np.cumsum(sizes + gaps)[:-1]])
    rows = np.arange(int((sizes + gaps).sum()) + 1, dtype=np.int32)
    return SequenceColumn(fed.TensorType(np.int32), (rows,), starts, sizes, rows_per_batch=None, masked=False)


@given(lengths, st.integers(1, 3), st.integers(0, 1), st.randoms())
def test_packed_rows_are_the_clients_rows_one_after_the_other(of_clients, devices, gaps, random):
    column = sequence_column(of_clients, gaps)
    dealt = [random.randrange(devices) for _ in of_clients]
    shares = [np.array([i for i, device in enumerate(dealt) if device == number], int) for number in range(devices)]
    arrays, layout = column.pack(shares, capacity=bucket(max(map(len, shares))))
    assert layout.num_leaves == 3
    assert len({tuple(array.shape for array in of_device) for of_device in arrays}) == 1  # alike on all devices
    for share, (rows, starts, sizes) in zip(shares, arrays, strict=True):
        for place, client in enumerate(share):
            start = column.starts[client]
            packed = rows[starts[place] : starts[place] + sizes[place]]
            np.testing.assert_array_equal(packed, np.arange(start, start + of_clients[client]))
    held = max(sum(of_clients[client] for client in share) for share in shares)
    assert arrays[0][0].shape[0] == bucket(held)  # ragged clients cost what they hold


def test_aligned_rows_are_read_in_place():
    rows = in_place(np.arange(40, dtype=np.int32))
    starts, lengths = np.array([3, 20]), np.array([5, 2])
    column = SequenceColumn(fed.TensorType(np.int32), (rows,), starts, lengths, None, masked=False, in_place=True)
    shares = [np.array([1]), np.array([0])]
    arrays, _ = column.pack(shares, capacity=1, in_place=True)
    assert all(of_device[0] is rows for of_device in arrays)
    assert [[list(part) for part in of_device[1:]] for of_device in arrays] == [[[20], [2]], [[3], [5]]]
    for elsewhere, devices_read_host_memory in ((column, False), (replace(column, in_place=False), True)):
        copied, _ = elsewhere.pack(shares, capacity=1, in_place=devices_read_host_memory)
        assert list(copied[0][0][:2]) == [20, 21]
        assert list(copied[1][0][:5]) == [3, 4, 5, 6, 7]


@given(lengths)
def test_a_sequence_of_one_client_holds_its_own_rows(of_clients):
    column = sequence_column(of_clients)
    for client, (start, length) in enumerate(zip(column.starts, of_clients, strict=True)):
        sequence = column.value(client)
        assert sequence.num_batches == length
        assert [int(sequence.batch(i)) for i in range(length)] == list(range(start, start + length))


def test_costs_are_batches():
    of_batches = SequenceColumn(
        fed.TensorType(np.int32, (4,)), (np.zeros(30),), np.zeros(4, int), np.array([0, 1, 8, 9]), 4, masked=False
    )
    assert of_batches.costs().tolist() == [1, 1, 2, 3]
    tensor = TensorColumn(fed.TensorType(np.float32), (np.zeros(4, np.float32),), 4)
    assert tensor.costs().tolist() == [1, 1, 1, 1]
    assert StructColumn((tensor, of_batches)).costs().tolist() == [1, 1, 2, 3]
    assert StructColumn((tensor, tensor)).bytes_per_client() == 8


def test_leaves_are_nested_as_the_type_says():
    type_ = fed.to_type([("a", np.float32), ("b", [np.int32, [("c", np.bool_)]])])
    assert nest(type_, [1, 2, 3]) == (1, (2, (3,)))
    with pytest.raises(UnsupportedError, match=r"sequence\.reduce"):
        nest(fed.SequenceType(np.int32), [1])
