"""Plans: as few passes over the cohort as the data dependencies allow."""

import jax.numpy as jnp
import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.compiler import ClientStage, ServerStage, plan
from fedlens.errors import LanguageError, UnsupportedError

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


def built(parameter_type, uri, result_type):
    """A computation that is one called intrinsic, as hand-written building blocks have it."""
    intrinsic = framework.Intrinsic(uri, fed.FunctionType(parameter_type, result_type))
    parameter = framework.Reference("x", parameter_type)
    return framework.ConcreteComputation.from_building_block(
        framework.Lambda("x", parameter_type, framework.Call(intrinsic, parameter))
    )


@pytest.mark.parametrize("uri", ["federated_median", "federated_collect"])
def test_an_intrinsic_that_is_not_executed_is_named(uri):
    with pytest.raises(UnsupportedError, match=f"Expected an intrinsic that fedlens executes, found '{uri}'"):
        plan(built(AT_CLIENTS, uri, AT_SERVER))


def test_an_intrinsic_inside_a_mapped_function_is_named_too():
    number = fed.TensorType(np.float32)
    unknown = framework.Intrinsic("absolute_value", fed.FunctionType(number, number))
    mapped = framework.Lambda("x", number, framework.Call(unknown, framework.Reference("x", number)))
    whole = framework.create_federated_map(mapped, framework.Reference("values", AT_CLIENTS))
    with pytest.raises(UnsupportedError, match="found 'absolute_value'"):
        plan(framework.ConcreteComputation.from_building_block(framework.Lambda("values", AT_CLIENTS, whole)))


@pytest.mark.parametrize(
    ("uri", "dtype", "words"),
    [
        ("federated_sum", np.bool_, "numbers"),
        ("federated_mean", np.int32, "floating-point or complex numbers"),
        ("federated_min", np.complex64, "integers or floating-point numbers"),
        ("federated_max", np.bool_, "integers or floating-point numbers"),
    ],
)
def test_what_the_language_refuses_is_refused_in_hand_written_blocks_too(uri, dtype, words):
    type_ = fed.to_type([("a", np.float32), ("b", dtype)])
    computation = built(fed.FederatedType(type_, fed.CLIENTS), uri, fed.FederatedType(type_, fed.SERVER))
    with pytest.raises(LanguageError, match=rf"Expected {words} in {uri}_0, found {np.dtype(dtype).name} in leaf 'b'"):
        plan(computation)


SEQUENCES_AT_CLIENTS = fed.FederatedType(fed.SequenceType(np.float32), fed.CLIENTS)


def test_sequences_leave_no_stage_and_are_made_where_they_are_read():
    @fed.federated_computation(SEQUENCES_AT_CLIENTS)
    def twice_read(numbers):
        doubled = fed.sequence_map(double, numbers)
        mean = fed.federated_broadcast(fed.federated_mean(fed.sequence_sum(doubled)))
        return fed.federated_sum(fed.sequence_reduce(doubled, mean, add))

    first, second = client_stages(twice_read)
    [made] = {step.name for step in first.body} & {step.name for step in second.body}
    assert [step.is_lazy for step in first.body if step.name == made] == [True]
    assert (first.outputs, second.outputs) == ((), ())
    assert first.columns == second.columns == ("arg",)


def test_what_only_a_sequences_map_captures_is_no_output_of_the_same_pass():
    """A zip with the data is a sequence too: what else is in it stays in the pass."""

    @fed.federated_computation(SEQUENCES_AT_CLIENTS, AT_CLIENTS)
    def folded(numbers, values):
        inner = fed.federated_computation(
            lambda pair: fed.sequence_reduce(pair[0], pair[1], add),
            fed.to_type([fed.SequenceType(np.float32), np.float32]),
        )
        return fed.federated_sum(fed.federated_map(inner, (numbers, fed.federated_map(double, values))))

    [stage] = client_stages(folded)
    assert stage.outputs == ()


def test_a_select_that_is_handed_out_is_stacked():
    table = fed.FederatedType((np.float32, (5, 2)), fed.SERVER)
    row = fed.jax_computation(lambda table, key: {"row": table[key]}, (np.float32, (5, 2)), np.int32)
    keys = fed.FederatedType((np.int32, (3,)), fed.CLIENTS)

    @fed.federated_computation(keys, fed.FederatedType(np.int32, fed.SERVER), table)
    def selected(keys, max_key, table):
        return fed.federated_select(keys, max_key, table, row)

    [stage] = client_stages(selected)
    assert [step.operation for step in stage.body] == ["federated_select", "elements"]
    assert [str(type_) for type_ in stage.output_types] == ["<row=float32[3,2]>"]


def test_an_aggregate_ends_a_pass_and_its_zero_is_made_before():
    start = fed.jax_computation(lambda: jnp.float32(0))

    @fed.federated_computation(AT_CLIENTS)
    def aggregated(values):
        total = fed.federated_aggregate(values, start(), add, add, double)
        return fed.federated_max(fed.federated_map(add, (values, fed.federated_broadcast(total))))

    assert kinds(aggregated) == ["server", "clients", "server", "clients"]
    first, second = client_stages(aggregated)
    assert [step.operation for step in first.reductions] == ["federated_aggregate"]
    assert [step.operation for step in second.reductions] == ["federated_max"]
    assert len(first.shared) == 1


def test_generic_operators_of_federated_values_become_maps():
    type_ = fed.to_type([("a", AT_SERVER), ("b", AT_CLIENTS)])
    plus = built(fed.StructType([type_, type_]), "generic_plus", type_)
    assert kinds(plus) == ["server", "clients"]
    operations = [step.operation for stage in plan(plus).stages for step in stage.body]
    assert operations == ["federated_zip_at_server", "federated_apply", "federated_zip_at_clients", "federated_map"]


def test_an_intrinsic_whose_result_is_unused_is_none():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        fed.federated_min(x)
        return fed.federated_sum(x)

    assert kinds(computation) == ["clients"]


def test_strings_are_not_reduced():
    take_one = fed.python_computation((np.str_, np.str_), np.str_)(lambda first, second: first)
    same = fed.python_computation(np.str_, np.str_)(lambda text: text)
    with pytest.raises(UnsupportedError, match=r"in federated_aggregate_0, found the Python computation"):
        plan(
            fed.federated_computation(
                lambda texts: fed.federated_aggregate(texts, "", take_one, take_one, same),
                fed.FederatedType(np.str_, fed.CLIENTS),
            )
        )


def test_a_plan_of_a_proto_is_the_plan_of_the_computation():
    @fed.federated_computation(AT_CLIENTS)
    def computation(values):
        return fed.federated_mean(fed.federated_map(double, values))

    again = framework.ConcreteComputation.from_proto(computation.to_proto())
    assert [repr(stage) for stage in plan(again).stages] == [repr(stage) for stage in plan(computation).stages]
