"""Examples of many clients in compressed sparse rows: columnar arrays, and each client's run of rows in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped


@dataclass(frozen=True)
class Examples:
    """Rows of `columns`; client i owns rows `starts[i] : starts[i] + lengths[i]`.

    Nothing is copied when a cohort is drawn: the columns may be memory-mapped and shared by any number of cohorts.

    Attributes:
      columns: name -> array, one row an example; all columns have the same number of rows.
      starts: first row of each client.
      lengths: number of rows of each client; 0 is allowed.
      in_place: whether a CPU device may read the columns where they lie, at addresses that suit it (`fedlens.memory`).
        Nothing is packed then; but a program is compiled for the number of rows of the columns.
    """

    columns: Mapping[str, Shaped[np.ndarray, "rows *feature"]]
    starts: Int[np.ndarray, " clients"]
    lengths: Int[np.ndarray, " clients"]
    in_place: bool = False
