"""Levels: how much a value tells about one client, as a partial order.

    public < central-dp < aggregate < per-client < raw data
    public < local-dp   <             per-client

A value that several bounds hold for, such as the mean of values that are locally private, has the smallest of them: of
`local-dp` and `aggregate` neither is below the other, so such a value keeps both (see `fedlens.compiler.flow`).
"""

from __future__ import annotations

import enum


class Level(enum.Enum):
    """How much a value tells about one client.

    Attributes:
      PUBLIC: nothing; it is computed from what the server gave.
      CENTRAL_DP: what a mechanism of differential privacy at the server lets through.
      LOCAL_DP: what a mechanism of differential privacy at the client lets through.
      AGGREGATE: its part in a sum or mean over the cohort, whatever the cohort's size.
      PER_CLIENT: a value that was computed from the client's data.
      RAW: the client's data themselves.
    """

    PUBLIC = "public"
    CENTRAL_DP = "central-dp"
    LOCAL_DP = "local-dp"
    AGGREGATE = "aggregate"
    PER_CLIENT = "per-client"
    RAW = "raw data"

    def __str__(self) -> str:
        return self.value


_UP_TO = {  # level -> itself and all that tell less
    Level.PUBLIC: {Level.PUBLIC},
    Level.CENTRAL_DP: {Level.PUBLIC, Level.CENTRAL_DP},
    Level.LOCAL_DP: {Level.PUBLIC, Level.LOCAL_DP},
    Level.AGGREGATE: {Level.PUBLIC, Level.CENTRAL_DP, Level.AGGREGATE},
    Level.PER_CLIENT: set(Level) - {Level.RAW},
    Level.RAW: set(Level),
}


def at_most(level: Level, limit: Level) -> bool:
    """Whether `level` tells no more than `limit`; False too for levels of which neither is below the other.

    Example:
      >>> at_most(Level.CENTRAL_DP, Level.AGGREGATE), at_most(Level.LOCAL_DP, Level.AGGREGATE)
      (True, False)
    """
    return level in _UP_TO[limit]


def join(*levels: Level) -> Level:
    """The least level that all of `levels` are at most: what they tell together; `PUBLIC` of none.

    Example:
      >>> join(Level.LOCAL_DP, Level.AGGREGATE)
      <Level.PER_CLIENT: 'per-client'>
    """
    above = [limit for limit in Level if all(at_most(level, limit) for level in levels)]
    return min(above, key=lambda limit: len(_UP_TO[limit]))
