import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlens.ledger import checksums


@given(clients=st.integers(0, 5), size=st.integers(0, 70), piece=st.sampled_from([1, 7, 16, 64]))
def test_pieces_are_the_bytes_and_checksums_are_those_of_zlib(clients, size, piece):
    rows = np.random.default_rng(size).integers(0, 256, (clients, size), np.uint8)
    found = np.zeros(clients, np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_PIECE", piece)
        pieces = list(checksums.passed_on(rows, found))
    assert b"".join(bytes(each) for each in pieces) == rows.tobytes()
    assert all(each.size <= piece for each in pieces)
    assert found.tolist() == [zlib.crc32(row) for row in rows]


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 300_000), (4, 0), (0, 7)], ids=str)
def test_rows_of_any_shape_have_the_checksum_of_their_bytes(shape):
    local = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert checksums.of_rows(local).tolist() == [zlib.crc32(row.tobytes()) for row in local]
    assert checksums.of_array(local) == zlib.crc32(local.tobytes())
