"""Plans: as few passes over the cohort as the data dependencies allow."""

import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.compiler import ClientStage, ServerStage, plan
from fedlens.errors import UnsupportedError

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)

double = fed.jax_computation(lambda x: x + x, np.float32)
add = fed.jax_computation(lambda x, y: x + y, np.float32, np.float32)
zero = fed.jax_computation(lambda: jnp.float32(0))


def kinds(computation):
    return ["clients" if isinstance(stage, ClientStage) else "server" for stage in plan(computation).stages]


def client_stages(computation):
    return [stage for stage in plan(computation).stages if isinstance(stage, ClientStage)]


def test_maps_and_reductions_of_one_phase_are_one_pass():
    @fed.federated_computation(AT_CLIENTS, AT_CLIENTS, AT_SERVER)
    def one_phase(values, weights, offset):
        shifted = fed.federated_map(add, (values, fed.federated_broadcast(offset)))
        more = fed.federated_map(double, shifted)
        return fed.federated_sum(more), fed.federated_mean(more, weights), fed.federated_mean(values), shifted

    [stage] = client_stages(one_phase)
    assert kinds(one_phase) == ["server", "clients"]
    assert [step.operation for step in stage.body].count("federated_map") == 2
    assert [step.operation for step in stage.reductions] == [
        "federated_sum",
        "federated_weighted_mean",
        "federated_mean",
    ]
    assert stage.columns == ("arg[0]", "arg[1]")
    assert len(stage.outputs) == 1


def test_what_depends_on_a_reduction_is_another_pass():
    @fed.federated_computation(AT_CLIENTS)
    def two_phases(values):
        mean = fed.federated_mean(values)
        distances = fed.federated_map(add, (values, fed.federated_broadcast(mean)))
        return fed.federated_sum(distances), mean

    @fed.federated_computation(AT_CLIENTS)
    def three_phases(values):
        first = fed.federated_sum(fed.federated_map(double, values))
        second = fed.federated_sum(fed.federated_map(add, (values, fed.federated_broadcast(first))))
        third = fed.federated_sum(fed.federated_map(add, (values, fed.federated_broadcast(second))))
        return first, second, third, fed.federated_mean(values)

    assert len(client_stages(two_phases)) == 2
    assert len(client_stages(three_phases)) == 3
    assert [stage.index for stage in client_stages(three_phases)] == [0, 1, 2]
    # A mean of the argument needs no other pass than the first.
    assert [len(stage.reductions) for stage in client_stages(three_phases)] == [2, 1, 1]


def test_what_depends_on_several_reductions_of_a_pass_waits_for_that_pass_alone():
    @fed.federated_computation(AT_CLIENTS)
    def computation(values):
        mean, total = fed.federated_mean(values), fed.federated_sum(values)
        both = fed.federated_broadcast(fed.federated_map(add, (mean, total)))
        of_both = fed.federated_sum(fed.federated_map(add, (values, both)))
        of_one = fed.federated_sum(fed.federated_map(add, (values, fed.federated_broadcast(mean))))
        return of_both, of_one

    assert [len(stage.reductions) for stage in client_stages(computation)] == [2, 2]


def test_what_a_later_pass_needs_is_an_output_of_the_earlier_and_a_column_of_the_later():
    @fed.federated_computation(AT_CLIENTS)
    def kept(values):
        doubled = fed.federated_map(double, values)
        mean = fed.federated_broadcast(fed.federated_mean(doubled))
        return fed.federated_sum(fed.federated_map(add, (doubled, mean)))

    first, second = client_stages(kept)
    assert len(first.outputs) == 1
    assert second.columns == first.outputs
    assert second.outputs == ()


def test_without_clients_there_is_no_client_stage():
    @fed.federated_computation(AT_SERVER)
    def at_server(x):
        return fed.federated_map(double, x), fed.federated_eval(zero, fed.SERVER), fed.federated_value(1.0, fed.SERVER)

    assert kinds(at_server) == ["server"]
    assert all(isinstance(stage, ServerStage) for stage in plan(at_server).stages)


def test_an_identity_needs_no_stage():
    identity = fed.federated_computation(lambda x: x, AT_CLIENTS)
    assert plan(identity).stages == ()
    assert [each.at_clients for each in plan(identity).inputs] == [True]


def test_cohorts_that_nothing_reads_are_inputs_in_the_order_of_the_argument():
    @fed.federated_computation([AT_CLIENTS, [("x", AT_SERVER), ("y", AT_CLIENTS)], AT_SERVER])
    def only_the_second(argument):
        return fed.federated_sum(argument[1].y)

    found = plan(only_the_second)
    assert [(each.name, each.path, each.at_clients) for each in found.inputs] == [
        ("arg[0]", (0,), True),
        ("arg[1][1]", (1, 1), True),
    ]


def test_an_all_equal_argument_is_no_column():
    everywhere = fed.FederatedType(np.float32, fed.CLIENTS, all_equal=True)

    @fed.federated_computation(AT_CLIENTS, everywhere)
    def shifted(values, offset):
        return fed.federated_map(add, (values, offset))

    [stage] = client_stages(shifted)
    assert (stage.columns, stage.shared) == (("arg[0]",), ("arg[1]",))


def mapped_over_sequences(operator):
    inner = fed.federated_computation(operator, fed.SequenceType(np.float32))
    return fed.federated_computation(
        lambda x: fed.federated_map(inner, x), fed.FederatedType(fed.SequenceType(np.float32), fed.CLIENTS)
    )


UNSUPPORTED = {
    "federated_aggregate": lambda: fed.federated_computation(
        lambda x: fed.federated_aggregate(x, np.float32(0), add, add, double), AT_CLIENTS
    ),
    "federated_min": lambda: fed.federated_computation(lambda x: fed.federated_min(x), AT_CLIENTS),
    "federated_max": lambda: fed.federated_computation(lambda x: fed.federated_max(x), AT_CLIENTS),
    "federated_secure_sum": lambda: fed.federated_computation(
        lambda x: fed.federated_secure_sum(x, 10), fed.FederatedType(np.int32, fed.CLIENTS)
    ),
    "federated_secure_sum_bitwidth": lambda: fed.federated_computation(
        lambda x: fed.federated_secure_sum_bitwidth(x, 8), fed.FederatedType(np.int32, fed.CLIENTS)
    ),
    "federated_select": lambda: fed.federated_computation(
        lambda keys, most, values: fed.federated_select(
            keys, most, values, fed.jax_computation(lambda values, key: values, np.float32, np.int32)
        ),
        [fed.FederatedType((np.int32, [2]), fed.CLIENTS), fed.FederatedType(np.int32, fed.SERVER), AT_SERVER],
    ),
    "sequence_sum": lambda: mapped_over_sequences(lambda x: fed.sequence_sum(x)),
    "sequence_map": lambda: mapped_over_sequences(lambda x: fed.sequence_sum(fed.sequence_map(double, x))),
    "sequence_reduce": lambda: mapped_over_sequences(lambda x: fed.sequence_reduce(x, np.float32(0), add)),
}


@pytest.mark.parametrize("uri", UNSUPPORTED)
def test_an_intrinsic_that_is_not_executed_is_named(uri):
    with pytest.raises(UnsupportedError, match=f"Expected an intrinsic that fedlens executes, found '{uri}'"):
        plan(UNSUPPORTED[uri]())


def test_an_intrinsic_whose_result_is_unused_is_none():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        fed.federated_min(x)
        return fed.federated_sum(x)

    assert kinds(computation) == ["clients"]


def test_strings_are_refused_with_their_place():
    with pytest.raises(UnsupportedError, match=r"numbers, found strings in arg\[1\]"):
        plan(fed.federated_computation(lambda x, y: (x, y), [AT_SERVER, fed.FederatedType(np.str_, fed.SERVER)]))
    with pytest.raises(UnsupportedError, match="numbers, found strings in federated_value_at_server_0"):
        plan(fed.federated_computation(lambda: fed.federated_value("text", fed.SERVER)))


def test_a_plan_of_a_proto_is_the_plan_of_the_computation():
    @fed.federated_computation(AT_CLIENTS)
    def computation(values):
        return fed.federated_mean(fed.federated_map(double, values))

    again = framework.ConcreteComputation.from_proto(computation.to_proto())
    assert [repr(stage) for stage in plan(again).stages] == [repr(stage) for stage in plan(computation).stages]
