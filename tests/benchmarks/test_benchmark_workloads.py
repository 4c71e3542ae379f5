"""What the benchmarks run: sizes as published, operations as XLA counts them, the reference's LSTM in both forms."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed


@pytest.mark.parametrize(("name", "parameters"), [("W1", 1_206_590), ("W2", 209_662), ("W4", 650), ("W5", 1_206_590)])
def test_models_have_the_published_sizes(name, parameters):
    from workloads import WORKLOADS

    assert WORKLOADS[name].parameters() == parameters


def test_a_cohort_repeats_nobody_and_is_the_same_everywhere():
    from workloads import choose, cohort

    fifth = choose("W5", 0.2)
    assert (fifth.clients, fifth.pool) == (200, 200)
    drawn = cohort(choose("W2"), 3)
    assert len(set(drawn.tolist())) == 50
    np.testing.assert_array_equal(drawn, np.random.default_rng(1003).choice(100, 50, replace=False))


def counted_by_xla(loss, *arguments):
    """Operations of a loss's gradient with respect to its first argument, as XLA counts them before it optimises."""
    return jax.jit(jax.grad(loss)).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_operations_of_a_batch_are_those_that_xla_counts(name):
    import operations
    from workloads import WORKLOADS

    workload = replace(WORKLOADS[name], dropout=(0.0, 0.0))
    shapes = workload.layers()

    def loss(kernels, x):
        for layer, kernel in kernels.items():
            if layer.startswith("conv"):
                x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            else:
                if x.ndim == 4:
                    x = x[:, ::2, ::2].reshape(len(x), -1)  # in place of pooling, which is no product
                x = x @ kernel
        return x.sum()

    batch = 8
    kernels = {layer: jnp.ones(shape) for layer, shape in shapes.items()}
    found = counted_by_xla(loss, kernels, jnp.ones((batch, *workload.features)))
    assert found == pytest.approx(batch * operations.of_example(workload), rel=0.03)


def test_operations_of_a_sequence_are_those_that_xla_counts():
    import operations
    from workloads import TextWorkload

    workload = TextWorkload(steps=3, units=64, embedding=32, vocabulary=50)
    widths = workload.widths()

    def loss(weights, x):
        for kernel, recurrent in weights["layers"]:
            states = [jnp.zeros(workload.units)]
            for step in x:  # XLA counts the body of a loop once
                states.append((step @ kernel + states[-1] @ recurrent).reshape(4, -1).sum(0))
            x = states[1:]
        return sum((step @ weights["dense"]).sum() for step in x) + sum(part.sum() for part in weights["inputs"])

    def of_everything(weights):
        return loss(weights, list(weights["inputs"]))

    gates = 4 * workload.units
    layers = [(jnp.ones((width, gates)), jnp.ones((workload.units, gates))) for width in widths[:-1]]
    weights = {
        "layers": layers,
        "dense": jnp.ones((workload.units, workload.vocabulary)),
        "inputs": jnp.ones((workload.steps, workload.embedding)),  # the embedding is trained: they have gradients
    }
    found = counted_by_xla(of_everything, weights)
    assert found == pytest.approx(operations.of_example(workload), rel=0.05)


def test_both_forms_of_the_references_lstm_have_the_same_gradients():
    import reference_text
    from workloads import TextWorkload

    workload = TextWorkload(steps=7, units=6, embedding=5, vocabulary=11)
    parameters = reference_text.initialize(workload)
    x, y = np.random.default_rng(0).integers(0, workload.vocabulary, (2, 3, workload.steps))
    counts = jnp.array([True, True, False])
    gradients = {
        form: jax.jit(jax.grad(partial(reference_text.loss, workload, layer)))(parameters, x, y, counts)
        for form, layer in reference_text.FORMS.items()
    }
    for name, expected in gradients["naive"].items():
        found = gradients["fast"][name]
        assert float(jnp.linalg.norm(found - expected)) <= 1e-5 * float(jnp.linalg.norm(expected)), name


def test_every_client_is_dealt_once_and_loads_differ_by_one_client_at_most():
    import reference_text

    lengths = np.random.default_rng(0).integers(1, 41, 10)
    dealt = reference_text.deal(lengths, batch=4, devices=2)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(10))
    loads = [sum(-(-lengths[client] // 4) for client in share if client >= 0) for share in dealt]
    assert max(loads) - min(loads) <= -(-lengths.max() // 4)


def test_stage_lines_split_the_time_of_a_round():
    import stage_lines

    written = []

    class Kept(logging.Handler):
        def emit(self, record):
            written.append(f"{record.name} {record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("fedlens"), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        mean = fed.federated_computation(
            lambda values: fed.federated_mean(values), fed.FederatedType(np.float32, fed.CLIENTS)
        )
        for _ in range(2):
            mean([np.float32(1), np.float32(3)])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    calls = stage_lines.rounds(["noise", *written])
    assert len(calls) == 2
    assert all(call["packing"] > 0 and call["computing"] > 0 and call["arguments"] > 0 for call in calls)
    assert set(stage_lines.medians(calls)) == set(stage_lines.PARTS)


def test_what_ends_a_round_of_a_ledger_is_writing():
    import stage_lines

    line = "fedlens DEBUG stage={} clients=3 seconds={} packing=0 computing=0 writing=0 compiling=0"
    (call,) = stage_lines.rounds([line.format("arguments", 0.5), line.format("ledger", 0.25)])
    assert (call["arguments"], call["writing"], call["server"]) == (0.5, 0.25, 0.0)
