"""SQL over a ledger: what NumPy and pyarrow compute from the tables, and nothing beyond the two views."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlens.errors import LedgerError
from fedlens.ledger import ClientPart, Keep, Ledger, LedgerWriter

pytest.importorskip("duckdb")


def test_averages_as_numpy_computes_them(ledger_path):
    found = (
        Ledger(ledger_path).sql("select client, avg(norm) as norm from local_models where round > 0 group by 1").arrow()
    )
    rows = pq.read_table(ledger_path / "rounds/000001.parquet").to_pylist()
    expected = {row["client"]: np.mean([leaf["norm"] for leaf in row["leaves"]]) for row in rows}
    assert dict(zip(found["client"].to_pylist(), found["norm"].to_pylist(), strict=True)) == pytest.approx(expected)


def test_the_views(ledger_path):
    ledger = Ledger(ledger_path)
    clients = ledger.sql("select * from clients").arrow()
    assert clients.cast(ledger.table().drop_columns(["leaves"]).schema).equals(ledger.table().drop_columns(["leaves"]))
    models = ledger.sql("from local_models")
    assert models.arrow().column_names == ["round", "client", "leaf", "norm", "checksum"]
    expected = [
        {"round": row["round"], "client": row["client"]} | {name: leaf[name] for name in ("leaf", "norm", "checksum")}
        for row in ledger.table().to_pylist()
        for leaf in row["leaves"]
    ]
    assert models.rows() == expected
    assert len(models) == 20
    joined = ledger.sql(
        "select count(*) as n from clients join local_models using (round, client) where accuracy > 0.3"
    )
    assert joined.rows() == [{"n": 2 * 2 * 2}]  # positions 3 and 4, two rounds, two leaves


def test_what_was_not_kept_is_null(tmp_path, make_round):
    weights = {"dense": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    with LedgerWriter.create(tmp_path / "run", weights=weights, config={}, rounds=1, keep=Keep("*bias")) as writer:
        writer.record(make_round(0))
    query = "select leaf, count(*) as clients, count(checksum) as kept from local_models group by leaf order by leaf"
    assert Ledger(tmp_path / "run").sql(query).rows() == [
        {"leaf": "dense/bias", "clients": 5, "kept": 5},
        {"leaf": "dense/kernel", "clients": 5, "kept": 0},
    ]


def test_pandas_and_polars(ledger_path):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    result = Ledger(ledger_path).sql("select round, sum(num_examples)::bigint as n from clients group by 1 order by 1")
    assert repr(result) == "Result(2 rows of round, n)"
    assert result.df().equals(pandas.DataFrame({"round": [0, 1], "n": [100, 100]}))
    assert result.pl().equals(polars.DataFrame({"round": [0, 1], "n": [100, 100]}))


def test_parameters_are_values_and_no_sql(ledger_path):
    ledger = Ledger(ledger_path)
    query = "select round from clients where client = ? order by 1"
    assert ledger.sql(query, ["名前/..\n"]).rows() == [{"round": 0}, {"round": 1}]
    assert ledger.sql(query, ["'; drop table clients; --"]).rows() == []
    assert ledger.sql("select count(*) as n from clients where round = $r", {"r": 1}).rows() == [{"n": 5}]


def test_a_ledger_without_rounds(make_writer):
    make_writer().close()
    ledger = Ledger(make_writer("other").path)
    assert ledger.sql("select * from clients").rows() == []
    assert ledger.sql("select count(*) as n from local_models").rows() == [{"n": 0}]


def test_metrics_that_differ_between_rounds(make_writer, make_round):
    first, second = make_round(0), make_round(1)
    for part in second.parts:
        part.metrics["Own metric"] = part.metrics.pop("accuracy")
    with make_writer() as writer:
        writer.record(first)
        writer.record(second)
    query = 'select round, count(accuracy) as a, count("Own metric") as b from clients group by round order by round'
    assert Ledger(writer.path).sql(query).rows() == [{"round": 0, "a": 5, "b": 0}, {"round": 1, "a": 0, "b": 5}]


def test_names_that_sql_cannot_tell_apart_stay_both_readable(make_writer, make_round):
    first, second = make_round(0), make_round(1)
    for part in second.parts:
        part.metrics["ACCURACY"] = part.metrics.pop("accuracy")
    with make_writer() as writer:
        writer.record(first)
        writer.record(second)
    names = Ledger(writer.path).sql("select * from clients").arrow().column_names
    assert sum(name.casefold().startswith("accuracy") for name in names) == 2


def test_metrics_whose_types_do_not_go_together(make_writer, make_round):
    first, second = make_round(0), make_round(1)
    for part in second.parts:
        part.metrics["accuracy"] = part.metrics["accuracy"] > 0.3
    with make_writer() as writer:
        writer.record(first)
        writer.record(second)
    with pytest.raises(LedgerError, match="metrics of one type over all rounds"):
        Ledger(writer.path).sql("select * from clients")


WRONG = {
    "select norms from local_models": r"norms.*'select norms from local_models'.*local_models has round, client, leaf",
    "select * from models": "models.*does not exist",
    "selec 1": "syntax error",
    "select client from": r"in the query 'select client from'",
    "select avg(client) from clients": "avg",
    "select client::int from clients": "Could not convert",
    "select * from clients where round > ?": "parameter",
    "select * from read_text('{file}')": "disabled by configuration",
    "from read_parquet('{file}')": "disabled by configuration",
    "select * from '{file}'": "disabled by configuration|does not exist",
    "select * from glob('/*')": "disabled by configuration",
    "select * from read_csv('https://example.org/x.csv')": "disabled by configuration",
    "select * from outside": "does not exist",  # a variable of Python
    "copy clients to '{file}'": "found the statement COPY",
    "copy (select 1) to '{file}'": "found the statement COPY",
    "attach '{file}' as other": "found the statement ATTACH",
    "install httpfs": "Expected one SELECT",
    "load '{file}'": "Expected one SELECT",
    "set enable_external_access = true": "found the statement SET",
    "drop view clients": "found the statement DROP",
    "create table t as select 1": "found the statement CREATE",
    "insert into clients select * from clients": "found the statement INSERT",
    "delete from clients": "found the statement DELETE",
    "export database '{file}'": "Expected one SELECT",
    "call pragma_version()": "Expected one SELECT",
    "select 1; select 2": "found 2 statements",
    "select 1; copy clients to '{file}'": "found 2 statements",
    "": "found 0 statements",
    "-- nothing": "found 0 statements",
}


@pytest.mark.parametrize(("query", "message"), WRONG.items())
def test_a_query_that_is_refused_leaves_everything_as_it_was(ledger_path, tmp_path, query, message):
    outside = pa.table({"x": [1]})
    file = tmp_path / "file.csv"
    file.write_text("a,b\n1,2\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LedgerError, match=f"(?s){message}"):
        Ledger(ledger_path).sql(query.format(file=file))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert outside.num_rows == 1


def test_what_is_no_text(ledger_path):
    with pytest.raises(LedgerError, match="Expected a SQL query as text, found NoneType"):
        Ledger(ledger_path).sql(None)


def test_without_duckdb(ledger_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(LedgerError, match=r"pip install 'fedlens\[sql\]'"):
        Ledger(ledger_path).sql("select 1")


def test_many_clients_and_rounds(tmp_path):
    """40,000 clients over 20 rounds: every row is there once."""
    weights = {"w": np.zeros(1, np.float32)}
    ids = tuple(f"client {place}" for place in range(2000))
    with LedgerWriter.create(tmp_path / "run", weights=weights, config={}, rounds=20, keep=Keep(every=20)) as writer:
        for number in range(20):
            local = np.full((2000, 1), number, np.float32)
            part = ClientPart(ids, np.arange(2000), [local], np.arange(2000), {"loss": np.full(2000, number / 2)})
            writer.begin(number, [weights["w"]])
            writer.add([part])
            writer.commit({}, {})
    query = "select count(*)::int as n, count(distinct client)::int as ids, sum(loss) as loss, sum(norm) as norm from clients join local_models using (round, client)"  # noqa: E501
    total = 2000 * sum(range(20))
    assert Ledger(tmp_path / "run").sql(query).rows() == [{"n": 40_000, "ids": 2000, "loss": total / 2, "norm": total}]
