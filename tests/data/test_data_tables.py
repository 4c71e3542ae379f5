"""Tables of pandas and Arrow become the arrays that were put into them."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from fedlens.data import FederatedData
from fedlens.errors import DataError

images = hnp.arrays(
    hnp.scalar_dtypes().filter(lambda dtype: dtype.kind in "biuf" and dtype.isnative and dtype.itemsize <= 8),
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    elements={"allow_nan": False},
)


def expected_of(column):
    clients = np.array([f"c{row % 2}" for row in range(len(column))])
    return FederatedData.from_arrays({"x": column}, clients), clients.tolist()


def assert_same(found, expected):
    assert found.ids == expected.ids
    assert found.element_type["x"].shape == expected.element_type["x"].shape
    np.testing.assert_array_equal(found.columns["x"], expected.columns["x"])


@settings(deadline=None, derandomize=True)
@given(images)
def test_arrow_lists_become_axes(column):
    expected, clients = expected_of(column)
    arrow_type = pa.from_numpy_dtype(column.dtype)
    for _ in column.shape[1:]:
        arrow_type = pa.list_(arrow_type)
    data = FederatedData.from_table(pa.table({"client": clients, "x": pa.array(column.tolist(), arrow_type)}))
    assert data.columns["x"].dtype == column.dtype
    assert_same(data, expected)


@settings(deadline=None, derandomize=True)
@given(images)
def test_pandas_lists_become_axes(column):
    expected, clients = expected_of(column)
    for rows in (column.tolist(), list(column)):
        frame = pd.DataFrame({"client": clients, "x": pd.Series(rows, dtype=object)}, index=range(5, 5 + len(rows)))
        frame["x"] = pd.Series(rows, dtype=object, index=frame.index)
        assert_same(FederatedData.from_table(frame), expected)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32])
def test_plain_columns_keep_their_dtype(dtype, tmp_path):
    column = np.array([0, 1, 1], dtype)
    frame = pd.DataFrame({"who": [7, 8, 7], "x": column, "note": ["a", "b", "c"]})
    table = pa.table({"who": [7, 8, 7], "x": column, "note": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "table.parquet")
    for source in (frame, table, pq.read_table(tmp_path / "table.parquet")):
        data = FederatedData.from_table(source, client="who", columns=["x"])
        assert data.ids == ("7", "8")
        assert data.columns["x"].dtype == dtype
        np.testing.assert_array_equal(data.columns["x"], column[[0, 2, 1]])


@pytest.mark.parametrize("dtype", ["Int32", "Float64", "boolean", "int32[pyarrow]", "double[pyarrow]"])
def test_nullable_pandas_columns_without_nulls_are_numbers(dtype):
    frame = pd.DataFrame({"client": ["a", "b"], "x": pd.Series([0, 1], dtype=dtype)})
    column = FederatedData.from_table(frame).columns["x"]
    assert column.dtype.kind == {"I": "i", "F": "f", "b": "b", "i": "i", "d": "f"}[dtype[0]]
    np.testing.assert_array_equal(column, [0, 1])


@pytest.mark.parametrize("dtype", ["category", "string", "string[pyarrow]", object])
def test_pandas_client_columns_of_every_string_type(dtype):
    frame = pd.DataFrame({"client": pd.Series(["b", "a", "b"], dtype=dtype), "x": [0, 1, 2]})
    assert FederatedData.from_table(frame).ids == ("b", "a")


def test_arrow_types_that_hold_the_same():
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    flat = pa.array(rows.ravel())
    tensor_type = pa.fixed_shape_tensor(pa.float32(), (3,))
    clients = pa.array(["b", "a", "b", "a"]).dictionary_encode()
    for column in (
        pa.FixedSizeListArray.from_arrays(flat, 3),
        pa.array(rows.tolist(), pa.large_list(pa.float32())),
        pa.ExtensionArray.from_storage(tensor_type, pa.FixedSizeListArray.from_arrays(flat, 3)),
    ):
        whole = pa.table({"client": clients, "x": column})
        for table in (whole, pa.concat_tables([whole.slice(0, 1), whole.slice(2, 0), whole.slice(1)])):
            data = FederatedData.from_table(table)
            assert data.ids == ("b", "a")
            assert data.columns["x"].dtype == np.float32
            np.testing.assert_array_equal(data.columns["x"], rows[[0, 2, 1, 3]])


def frame_and_table(**columns):
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    return [frame, pa.table(columns)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"client": ["a", None], "x": [0, 1]}, "every row of column 'client', found null in row 1"),
        ({"client": ["a", "b"], "x": [0, None]}, "every row of column 'x', found null in row 1"),
        ({"client": ["a", "b"], "x": [[0, 1], None]}, "every row of column 'x', found null in row 1"),
        ({"client": ["a", "b"], "x": [[0, 1], [2, None]]}, "every row of column 'x', found null in row 1"),
        ({"client": ["a", "b"], "x": [[[0], [1]], [[2], [None]]]}, "every row of column 'x', found null in row 1"),
        ({"client": ["a", "b"], "x": [[0, 1], [2]]}, "lists of one shape in column 'x', found .*1.* in row 1"),
        (
            {"client": ["a", "b"], "x": [[[0], [1]], [[2], [3, 4]]]},
            "lists of one shape in column 'x', found .*in row 1",
        ),
        ({"client": ["a", "b"], "x": ["u", "v"]}, "numbers in column 'x', found 'u' in row 0"),
        ({"client": ["a", "b"], "x": [["u"], ["v"]]}, "numbers in column 'x', found .*'u'.* in row 0"),
        ({"client": [0.5, 1.5], "x": [0, 1]}, "client ids to be all strings or all integers, found .*0.5"),
        ({"clients": ["a", "b"], "x": [0, 1]}, "a column 'client' in the table, found none. Nearest names: clients"),
        ({"client": ["a", "b"]}, "at least one column, found none"),
    ],
)
def test_what_cannot_become_an_array_is_named(columns, message):
    for table in frame_and_table(**columns):
        with pytest.raises(DataError, match=message):
            FederatedData.from_table(table)


def test_rows_are_counted_over_chunks():
    chunks = [pa.table({"client": ["a", "b"], "x": [[1, 2], [3, 4]]}), pa.table({"client": ["c"], "x": [[5]]})]
    with pytest.raises(DataError, match=r"column 'x', found \[1\] in row 2 where the first row has \[2\]"):
        FederatedData.from_table(pa.concat_tables(chunks))
    chunks[1] = pa.table({"client": ["c"], "x": [[None, 1]]})
    with pytest.raises(DataError, match="column 'x', found null in row 2"):
        FederatedData.from_table(pa.concat_tables(chunks))


def test_columns_asked_for_must_be_there():
    for table in frame_and_table(client=["a"], pixels=[1]):
        with pytest.raises(
            DataError, match=r"Expected a column 'pixel' in the table, found none\. Nearest names: pixels"
        ):
            FederatedData.from_table(table, columns=["pixel"])
        assert FederatedData.from_table(table, columns="pixels").ids == ("a",)


def test_column_names_must_be_unique_strings():
    twice = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["client", "x", "x"])
    for table in (twice, pd.DataFrame([["a", 1, 2]], columns=["client", "x", "x"])):
        with pytest.raises(DataError, match="Expected each column name once, found 'x' 2 times"):
            FederatedData.from_table(table)
    with pytest.raises(DataError, match=r"Expected column names to be strings, found 0\. Rename the column"):
        FederatedData.from_table(pd.DataFrame({"client": ["a"], 0: [1]}))


def test_an_empty_table_has_no_clients():
    table = pa.table({"client": pa.array([], pa.string()), "x": pa.array([], pa.int64())})
    for source in (table, table.to_pandas()):
        with pytest.raises(DataError, match="at least one client"):
            FederatedData.from_table(source)


def test_other_tables_are_refused():
    with pytest.raises(DataError, match=r"Expected a pandas\.DataFrame or a pyarrow\.Table, found dict"):
        FederatedData.from_table({"client": ["a"]})
