"""Metrics as sums that finalise: what can be added over batches, clients and devices, and what it means in the end.

A metric measures each example, and fedlens sums the measurements and the examples. A mean over clients is then the mean
over all their examples, whoever holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedlens.errors import StructureError

LOSS, EXAMPLES = "loss", "num_examples"

Sums = Mapping[str, Array]  # metric name -> sum over examples; "num_examples" -> how many


@dataclass(frozen=True)
class Metric:
    """A mean over examples.

    Attributes:
      name: how results call it.
      measure: `measure(outputs, targets)` gives one number for each example of a batch.
    """

    name: str
    measure: Callable[[Array, Array], Float[Array, " batch"]]


def _correct(
    logits: Float[Array, "batch *steps classes"], labels: Int[Array, "batch *steps"]
) -> Float[Array, " batch"]:
    hits = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    return hits.reshape(hits.shape[0], -1).mean(axis=1)


accuracy = Metric("accuracy", _correct)
"""The share of labels that the largest logit names; over the steps of a sequence the mean."""


def sums_of_batch(
    metrics: Sequence[Metric],
    losses: Float[Array, " batch"],
    outputs: Array,
    targets: Array,
    mask: Bool[Array, " batch"],
) -> dict[str, Array]:
    """The sums over the examples of one batch, rows that only fill it up left out.

    Raises:
      StructureError: a metric does not measure each example.
    """
    measured = {LOSS: losses, **{metric.name: metric.measure(outputs, targets) for metric in metrics}}
    for name, values in measured.items():
        if jnp.shape(values) != mask.shape:  # a mean over the batch would broadcast, and count what only fills it up
            raise StructureError(
                f"Expected the metric {name!r} to measure each of {mask.shape[0]} examples of a batch, "
                f"found the shape {jnp.shape(values)}. Return one number an example; fedlens takes the mean."
            )
    sums = {name: jnp.where(mask, values, 0).sum(dtype=jnp.float32) for name, values in measured.items()}
    return {**sums, EXAMPLES: mask.sum(dtype=jnp.int32)}


def zero_sums(metrics: Sequence[Metric]) -> dict[str, Array]:
    """The sums over no example."""
    names = [LOSS, *(metric.name for metric in metrics)]
    return {**{name: jnp.zeros((), jnp.float32) for name in names}, EXAMPLES: jnp.zeros((), jnp.int32)}


def finalize(sums: Sums) -> dict[str, Array]:
    """The means over examples; NaN over none."""
    count = sums[EXAMPLES].astype(jnp.float32)
    return {name: total / count for name, total in sums.items() if name != EXAMPLES}
