"""How much a client counts in a mean."""

from __future__ import annotations

import enum


class ClientWeighting(enum.Enum):
    """`tff.learning.ClientWeighting`: each client by its number of examples, or all the same."""

    NUM_EXAMPLES = "num_examples"
    UNIFORM = "uniform"
