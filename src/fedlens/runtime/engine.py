"""What an engine is: it executes one client stage over one cohort, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np
from jaxtyping import Bool, Int

from fedlens.compiler import ClientStage, ServerStage
from fedlens.errors import ConfigError, NonFiniteError
from fedlens.runtime.checks import checked_leaves
from fedlens.runtime.columns import Column
from fedlens.runtime.values import Part

OnNonFinite = Literal["ignore", "raise", "drop"]

# Bytes of the clients that are computed at once. What they read may lie where it is, and be free; but not always. What
# they compute may be handed out, and waits for whoever takes it. At the end of a chunk devices wait for each other: two
# chunks in place of four save W4 3 % of its time.
_READ_BYTES = 512 * 1024 * 1024
_COMPUTED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class StageCohort:
    """The cohort of one client stage: its clients, and a column for each clients-placed value that the stage reads.

    Attributes:
      ids: client ids in cohort order.
      columns: name -> column, with a value for each client.
      chunk_size: how many clients the user wants computed at once; None leaves it to `chunks`.
    """

    ids: tuple[str, ...]
    columns: Mapping[str, Column]
    chunk_size: int | None = None

    def chunks(self, stage: ClientStage) -> list[Int[np.ndarray, " clients"]]:
        """The positions of the clients, in the pieces in which they are computed.

        Where a chunk ends depends on the cohort and the stage alone, never on the engine: partial sums are then the
        same whoever computes them. They do not depend on what is handed out either, so that a tap changes no bit of a
        sum: a chunk's inputs fit in 512 MiB, and all that its clients compute in 256, whether it leaves them or not.
        """
        size = self.chunk_size
        if size is None:
            read = sum(self.columns[name].bytes_per_client() for name in stage.columns)
            size = max(min(_READ_BYTES // max(read, 1), _COMPUTED_BYTES // max(stage.computed_bytes, 1)), 1)
        everyone = np.arange(len(self.ids))
        return [everyone[start : start + size] for start in range(0, len(everyone), size)]


@dataclass(frozen=True)
class StageResult:
    """What came back from a client stage.

    Attributes:
      reductions: step name -> positional server value.
      outputs: step name -> the clients' values; empty when they went to a sink.
      dropped: positions of the clients that were left out of the reductions, as their values were not finite.
      confirm: waits for the clients, raises if one sent what it may not, and fills in `outputs` or gives the sink the
        last chunk; None if that is done. An engine may leave it to its caller, who can start what comes next in the
        meantime, and must not hand out anything before.
    """

    reductions: Mapping[str, Any]
    outputs: Mapping[str, list[Part]]
    dropped: Int[np.ndarray, " dropped"]
    confirm: Callable[[], None] | None = None


# Takes a chunk's outputs as soon as they are computed: step name -> parts, while the engine goes on with the next
# chunk.
Sink = Callable[[Mapping[str, list[Part]]], None]


class Engine(Protocol):
    """Executes the stages of a plan."""

    def run_clients(
        self,
        stage: ClientStage,
        shared: Mapping[str, Any],
        cohort: StageCohort,
        sink: Sink | None = None,
        on_nonfinite: OnNonFinite = "ignore",
    ) -> StageResult:
        """Runs a client stage over a cohort.

        Args:
          stage: what each client computes, what is reduced and what is handed out.
          shared: name -> positional value that is equal at all clients.
          cohort: who takes part, with a column for each of `stage.columns`.
          sink: takes the outputs chunk by chunk, in cohort order; without one they come back stacked.
          on_nonfinite: what to do when a client sends infinities or NaNs into a reduction.

        Raises:
          NonFiniteError: it did, and `on_nonfinite` is "raise"; nothing of that chunk has gone to the sink.
          BoundError: a client's integers are beyond the bound of a secure sum or a select, likewise.
        """

    def run_server(self, stage: ServerStage, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the steps of a server stage; returns the values of `stage.outputs`."""


def check_on_nonfinite(on_nonfinite: str) -> None:
    """Checks that `on_nonfinite` is one of its values.

    Raises:
      ConfigError: it is not.
    """
    if on_nonfinite not in get_args(OnNonFinite):
        raise ConfigError(
            f"Expected one of {', '.join(get_args(OnNonFinite))} for on_nonfinite, found {on_nonfinite!r}."
        )


def check_finite(
    stage: ClientStage, ids: Sequence[str], finite: Bool[np.ndarray, "clients leaves"], on_nonfinite: OnNonFinite
) -> Int[np.ndarray, " dropped"]:
    """The rows of the clients whose values are not finite; raises for the first of them if it should.

    Raises:
      NonFiniteError: names stage, client and leaf.
    """
    rows = np.flatnonzero(~finite.all(axis=1))
    if len(rows) and on_nonfinite == "raise":
        names = checked_leaves(stage.reductions)
        bad = [name for name, is_finite in zip(names, finite[rows[0]], strict=True) if not is_finite]
        more = f" ({len(rows) - 1} more clients too)" if len(rows) > 1 else ""
        raise NonFiniteError(
            f"Expected finite values to aggregate, found infinity or NaN in client {ids[rows[0]]!r}, "
            f"leaf {', '.join(map(repr, dict.fromkeys(bad)))}, client stage {stage.index}{more}. Lower the client's "
            'learning rate or look at its data; on_nonfinite="drop" leaves such clients out and counts them.'
        )
    return rows


def to_host(leaf: jax.Array) -> np.ndarray:
    """An array in host memory, without a copy where the device is the host."""
    return np.asarray(leaf)
