"""Segments: which steps of a stage are fused into programs, and which the host runs between them."""

import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.compiler import ClientStage, ServerStage, plan, segments

VECTOR = fed.TensorType(np.float32, (3,))
AT_CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)


@fed.jax_computation(VECTOR)
def double(vector):
    return vector * 2


@fed.python_computation(VECTOR, VECTOR)
def sort(vector):
    return np.sort(vector)


def stages(function, *types):
    return plan(fed.federated_computation(function, *types)).stages


def shape_of(stage):
    """The segments as text: where each runs, how many steps, what it reads and hands out."""
    return [
        (
            "host" if segment.on_host else "program",
            len(segment.stage.body),
            len(getattr(segment.stage, "reductions", ())),
            len(segment.stage.outputs),
        )
        for segment in segments(stage)
    ]


def test_a_stage_without_host_work_is_one_program():
    (stage,) = stages(lambda x: fed.federated_mean(fed.federated_map(double, x)), AT_CLIENTS)
    assert segments(stage) == ()


def test_maps_between_two_host_calls_are_fused():
    def function(x):
        before = fed.federated_map(double, fed.federated_map(double, x))
        between = fed.federated_map(double, fed.federated_map(double, fed.federated_map(sort, before)))
        after = fed.federated_map(double, fed.federated_map(sort, between))
        return fed.federated_mean(after)

    (stage,) = stages(function, AT_CLIENTS)
    assert shape_of(stage) == [
        ("program", 2, 0, 1),
        ("host", 1, 0, 1),
        ("program", 2, 0, 1),
        ("host", 1, 0, 1),
        ("program", 1, 1, 0),
    ]


def test_segments_hand_on_exactly_what_later_ones_read():
    def function(x):
        before = fed.federated_map(double, x)
        return fed.federated_sum(fed.federated_map(double, fed.federated_map(sort, before))), before

    (stage,) = stages(function, AT_CLIENTS)
    first, host, last = segments(stage)
    assert first.stage.columns == stage.columns
    assert host.stage.columns == first.stage.outputs == stage.outputs
    assert last.stage.columns == host.stage.outputs
    assert last.stage.outputs == ()
    assert last.stage.reductions == stage.reductions


def test_what_no_host_step_needs_is_computed_with_the_reductions():
    def function(x):
        heavy = fed.federated_map(double, x)  # read by the mean alone
        return fed.federated_mean(heavy), fed.federated_map(sort, x)

    (stage,) = stages(function, AT_CLIENTS)
    assert shape_of(stage) == [("host", 1, 0, 1), ("program", 1, 1, 0)]


def test_a_stage_may_end_on_the_host():
    (stage,) = stages(lambda x: fed.federated_map(sort, fed.federated_map(double, x)), AT_CLIENTS)
    assert shape_of(stage) == [("program", 1, 0, 1), ("host", 1, 0, 1)]


def test_host_calls_that_do_not_depend_on_programs_share_one_segment():
    def function(x):
        return fed.federated_map(sort, fed.federated_map(sort, x)), fed.federated_map(sort, x)

    (stage,) = stages(function, AT_CLIENTS)
    assert shape_of(stage) == [("host", 3, 0, 2)]


def test_a_mapped_mixture_is_taken_apart():
    @fed.federated_computation(VECTOR)
    def mixture(vector):
        return double(sort(double(vector)))

    (stage,) = stages(lambda x: fed.federated_sum(fed.federated_map(mixture, x)), AT_CLIENTS)
    assert [place for place, *_ in shape_of(stage)] == ["program", "host", "program"]


def test_sequences_are_repeated_and_never_handed_on():
    @fed.federated_computation(fed.SequenceType(VECTOR), VECTOR)
    def pair(rows, vector):
        return rows, vector

    @fed.jax_computation(fed.SequenceType(VECTOR), VECTOR)
    def total(rows, vector):
        return rows.sum() + vector

    @fed.python_computation((fed.SequenceType(VECTOR), VECTOR), VECTOR)
    def count(rows, vector):
        return vector + sum(1 for _ in rows)

    def function(rows, x):
        both = fed.federated_map(pair, (rows, x))
        counted = fed.federated_map(count, both)
        return fed.federated_sum(fed.federated_map(total, (both[0], counted)))

    (stage,) = stages(function, fed.FederatedType(fed.SequenceType(VECTOR), fed.CLIENTS), AT_CLIENTS)
    host, last = segments(stage)
    assert (host.on_host, last.on_host) == (True, False)
    shared_steps = {step.name for step in host.stage.body} & {step.name for step in last.stage.body}
    assert shared_steps
    assert all(step.is_lazy for step in last.stage.body if step.name in shared_steps)
    assert not any(step.is_lazy for step in host.stage.body if step.name in host.stage.outputs)


def test_strings_and_undefined_sizes_are_work_for_the_host_at_the_clients():
    @fed.jax_computation(fed.TensorType(np.float32, (None,)))
    def total(values):
        return jnp.sum(values)

    (of_sizes,) = stages(
        lambda x: fed.federated_sum(fed.federated_map(total, x)),
        fed.FederatedType(fed.TensorType(np.float32, (None,)), fed.CLIENTS),
    )
    assert shape_of(of_sizes) == [("host", 1, 0, 1), ("program", 0, 1, 0)]
    (of_strings,) = stages(
        lambda s: fed.federated_map(fed.python_computation(np.str_, np.int32)(len), s),
        fed.FederatedType(np.str_, fed.CLIENTS),
    )
    assert shape_of(of_strings) == [("host", 1, 0, 1)]


def test_server_stages_are_split_too():
    def function(x):
        return double(double(sort(double(double(x)))))

    (stage,) = stages(function, VECTOR)
    assert isinstance(stage, ServerStage)
    assert shape_of(stage) == [("program", 2, 0, 1), ("host", 1, 0, 1), ("program", 2, 0, 1)]


def test_at_the_server_a_program_takes_any_size():
    @fed.jax_computation(fed.TensorType(np.float32, (None,)))
    def total(values):
        return jnp.sum(values)

    (stage,) = stages(lambda x: total(x), fed.TensorType(np.float32, (None,)))
    assert segments(stage) == ()


def test_segments_are_found_once():
    (stage,) = stages(lambda x: fed.federated_map(sort, x), AT_CLIENTS)
    assert isinstance(stage, ClientStage)
    assert segments(stage) is segments(stage)


def test_a_reduction_runs_no_python():
    add = fed.python_computation((VECTOR, VECTOR), VECTOR)(lambda left, right: left + right)

    def function(x):
        zero = np.zeros(3, np.float32)
        merge = fed.jax_computation(lambda left, right: left + right, [VECTOR, VECTOR])
        return fed.federated_aggregate(x, zero, add, merge, double)

    with pytest.raises(fed.UnsupportedError, match=r"in federated_aggregate_[0-9]+, found the Python computation"):
        stages(function, AT_CLIENTS)


def test_clients_results_have_one_shape():
    ragged = fed.FederatedType(fed.TensorType(np.float32, (None,)), fed.CLIENTS)
    positive = fed.python_computation(fed.TensorType(np.float32, (None,)), fed.TensorType(np.float32, (None,)))(
        lambda x: x[x > 0]
    )
    with pytest.raises(fed.UnsupportedError, match=r"results of known shape, found float32\[\?\] in federated_map_0"):
        stages(lambda x: fed.federated_map(positive, x), ragged)
