"""SQL over a ledger's catalogue, by DuckDB in memory.

A query sees two views, `clients` and `local_models`, and nothing else: the database has neither files nor network nor
Python's variables, and its settings are locked before the query is looked at. It is parsed first, and is run only if it
is one query that reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa

from fedlens.errors import LedgerError

_CLOSED: dict[str, Any] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}
_ROWS = "fedlens_rows"
_VIEWS = (
    f"create view clients as select * exclude (leaves) from {_ROWS}",
    "create view local_models as select round, client, entry.leaf, entry.norm, entry.checksum "
    f"from (select round, client, unnest(leaves) as entry from {_ROWS})",
    "set lock_configuration = true",
)


@dataclass(frozen=True)
class Result:
    """What a query gave.

    Example:
      >>> ledger.sql("select round, avg(update_norm) as norm from clients group by round order by round").df()
    """

    _table: pa.Table

    def __repr__(self) -> str:
        return f"Result({self._table.num_rows} rows of {', '.join(self._table.column_names)})"

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self._table

    def df(self) -> Any:
        """The rows as a pandas `DataFrame`.

        Raises:
          LedgerError: pandas is not installed.
        """
        try:
            return self._table.to_pandas()
        except ImportError as error:
            raise LedgerError(f"Expected pandas, found: {error}. Run `pip install pandas`.") from error

    def pl(self) -> Any:
        """The rows as a polars `DataFrame`.

        Raises:
          LedgerError: polars is not installed.
        """
        try:
            import polars  # optional
        except ImportError as error:
            raise LedgerError(f"Expected polars, found: {error}. Run `pip install polars`.") from error
        return polars.from_arrow(self._table)

    def rows(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        rows: list[dict[str, Any]] = self._table.to_pylist()
        return rows


def run(rows: pa.Table, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> Result:
    """Runs one query over the tables of clients of all rounds; see `Ledger.sql`.

    Raises:
      LedgerError: DuckDB is not installed, or the query is wrong, is none, or asks for anything but the views.
    """
    try:
        import duckdb  # optional, and 0.1 s to import
    except ImportError:
        raise LedgerError(
            "Expected the package duckdb, which runs SQL, found none. Run `pip install 'fedlens[sql]'`."
        ) from None
    with duckdb.connect(":memory:", config=_CLOSED) as connection:
        connection.register(_ROWS, rows)
        for statement in _VIEWS:
            connection.execute(statement)
        try:
            _check(duckdb, query)
            relation = connection.sql(query, params=parameters)
            return Result(relation.to_arrow_table())
        except duckdb.Error as error:
            raise LedgerError(
                f"Expected a query over clients and local_models, found: {error}, in the query {query.strip()!r}. "
                f"clients has the columns {', '.join(name for name in rows.column_names if name != 'leaves')}; "
                "local_models has round, client, leaf, norm, checksum."
            ) from error


def _check(duckdb: ModuleType, query: str) -> None:
    """Checks that a text is one query that reads."""
    if not isinstance(query, str):
        raise LedgerError(f"Expected a SQL query as text, found {type(query).__name__}.")
    statements = duckdb.extract_statements(query)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or kinds[0] not in ("SELECT", "EXPLAIN"):
        found = f"{len(kinds)} statements" if len(kinds) != 1 else f"the statement {kinds[0]}"
        raise LedgerError(f"Expected one SELECT, found {found}, in the query {query.strip()!r}. A ledger is only read.")
