"""The products of matrices that the training of a round needs, counted by hand, and their floating-point operations.

A product of [m, k] and [k, n] takes 2 m k n. Training takes it three times: forwards, for the gradient of the kernel,
and for the gradient of what goes in, which the first layer does without when data go in. A convolution is a product of
each image's patches with the kernel. What is not counted is what a smarter program could save: elementwise operations,
examples that only fill up a batch, making patches.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and a round is loops of loops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from workloads import TextWorkload, Workload, cohort, texts


class Product(NamedTuple):
    """[m, k] by [k, n], `count` times in a step of SGD."""

    m: int
    k: int
    n: int
    count: int

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n * self.count


def of_round(workload: Workload | TextWorkload, number: int = 0) -> int:
    """Operations of the round `number`; only W3's rounds differ."""
    if isinstance(workload, TextWorkload):
        sequences = np.diff(texts().offsets)[cohort(workload, number)].sum()
        return int(sequences) * of_example(workload)
    return workload.clients * workload.examples * of_example(workload)


def steps(workload: Workload | TextWorkload, number: int = 0) -> int:
    """Steps of SGD in the round `number`, over all clients."""
    if isinstance(workload, TextWorkload):
        sequences = np.diff(texts().offsets)[cohort(workload, number)]
        return int((-(-sequences // workload.batch)).sum())
    return workload.clients * -(-workload.examples // workload.batch)


def of_example(workload: Workload | TextWorkload) -> int:
    """Operations of training on one example, or on one sequence."""
    return sum(product.operations for product in of_step(workload)) // workload.batch


def of_step(workload: Workload | TextWorkload) -> list[Product]:
    """The products of one step of SGD on a full batch."""
    if isinstance(workload, TextWorkload):
        return _of_text(workload)
    products = []
    height, width = workload.features[0], workload.features[1] if workload.convolutions else 1
    for number, (name, shape) in enumerate(workload.layers().items()):
        rows, inputs, times = workload.batch, shape[0], 1
        if name.startswith("conv"):
            height, width = height - 2, width - 2
            rows, inputs, times = height * width, int(np.prod(shape[:-1])), workload.batch
        products += _trained(rows, inputs, shape[-1], times, first=number == 0)
    return products


def _of_text(workload: TextWorkload) -> list[Product]:
    batch, units, gates = workload.batch, workload.units, 4 * workload.units
    rows = workload.steps * batch
    products = []
    for width in workload.widths()[:-1]:
        products += _trained(rows, width, gates)
        # The product with the recurrent kernel waits for the step before, in both directions; its gradient does not.
        products += [Product(batch, units, gates, workload.steps), Product(batch, gates, units, workload.steps)]
        products += [Product(units, rows, gates, 1)]
    return products + _trained(rows, units, workload.vocabulary)


def _trained(rows: int, inputs: int, outputs: int, count: int = 1, *, first: bool = False) -> list[Product]:
    """Forwards, the kernel's gradient, and the input's unless it is data."""
    there, of_kernel = Product(rows, inputs, outputs, count), Product(inputs, rows, outputs, count)
    return [there, of_kernel] if first else [there, of_kernel, Product(rows, outputs, inputs, count)]
