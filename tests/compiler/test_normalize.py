"""Normal form: named calls in order and a result that selects from them, meaning what the computation meant."""

import numpy as np
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.compiler import normalize
from fedlens.compiler.normalize import referenced_names

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)
COHORT = {"a": 1.0, "b": 2.0, "c": 6.0}

double = fed.jax_computation(lambda x: x + x, np.float32)
subtract = fed.jax_computation(lambda x, y: x - y, np.float32, np.float32)


def calls(block):
    """The let-list of a normal form: (name, what is called)."""
    body = block.result
    called = body.locals if isinstance(body, framework.Block) else []
    return [
        (name, call.function.uri if isinstance(call.function, framework.Intrinsic) else "local")
        for name, call in called
    ]


def names_bound_in(block):
    own = {
        framework.Block: lambda: [name for name, _ in block.locals],
        framework.Lambda: lambda: [block.parameter_name],
    }
    bound = own.get(type(block), list)()
    return [*(name for name in bound if name), *(name for child in block.children() for name in names_bound_in(child))]


def assert_is_normal(block):
    """Only calls of intrinsics and local computations, one inside another in functions alone; names are unique."""
    names = names_bound_in(block)
    assert len(set(names)) == len(names)
    framework.check_contains_no_unbound_references(block)
    _assert_function_is_normal(block)


def _assert_function_is_normal(function):
    body = function.result
    if isinstance(body, framework.Block):
        for _, call in body.locals:
            assert isinstance(call, framework.Call)
            assert isinstance(call.function, framework.Intrinsic | framework.CompiledComputation)
            if call.argument is not None:
                _assert_value_is_normal(call.argument)
        body = body.result
    _assert_value_is_normal(body)


def _assert_value_is_normal(value):
    match value:
        case framework.Struct():
            for _, field in value.items():
                _assert_value_is_normal(field)
        case framework.Selection():
            assert isinstance(value.source, framework.Reference | framework.Selection)
            _assert_value_is_normal(value.source)
        case framework.Lambda():
            _assert_function_is_normal(value)
        case _:
            assert isinstance(value, framework.Reference | framework.Literal | framework.CompiledComputation)


@fed.federated_computation(AT_CLIENTS)
def spread(values):
    """The mean, and each client's distance from it."""
    mean = fed.federated_mean(values)
    pairs = fed.federated_zip((values, fed.federated_broadcast(mean)))
    return {"mean": mean, "distances": fed.federated_map(subtract, pairs)}


@fed.federated_computation(AT_CLIENTS, AT_SERVER)
def nested(values, offset):
    """Computations inside computations, structs selected from, and captured values."""

    @fed.federated_computation(AT_CLIENTS)
    def inner(inner_values):
        return fed.federated_map(double, inner_values), fed.federated_sum(inner_values)

    @fed.federated_computation(np.float32)
    def four_times(x):
        return double(double(x))

    doubled, total = inner(values)
    again, _ = inner(doubled)
    structure = {"a": {"b": [again, total]}, "unused": fed.federated_mean(values)}
    return structure["a"]["b"][0], fed.federated_map(four_times, offset), structure["a"]["b"][1]


@fed.federated_computation(np.float32)
def unplaced(x):
    return {"first": double(x), "second": subtract(double(x), x)}


@fed.federated_computation(AT_CLIENTS)
def capturing(values):
    """The function that is mapped uses a value from around it."""
    constant = double(np.float32(1.5))
    return fed.federated_map(fed.federated_computation(lambda x: subtract(x, constant), np.float32), values)


@fed.federated_computation(fed.FederatedType([("x", np.float32), ("y", [np.int32])], fed.CLIENTS))
def selecting(values):
    return fed.federated_sum(values.y[0])


ALL = {
    "spread": (spread, lambda: [fed.Cohort(COHORT)]),
    "nested": (nested, lambda: [fed.Cohort(COHORT), 5.0]),
    "unplaced": (unplaced, lambda: [3.0]),
    "capturing": (capturing, lambda: [fed.Cohort(COHORT)]),
    "selecting": (selecting, lambda: [fed.Cohort([{"x": 0.5, "y": [1]}, {"x": 0.5, "y": [4]}])]),
    "a local computation": (double, lambda: [2.0]),
    "several arguments": (subtract, lambda: [2.0, 7.0]),
}


@pytest.fixture(params=ALL, scope="module")
def example(request):
    return ALL[request.param]


def plain(value):
    """A result without containers, for comparison."""
    if isinstance(value, fed.ClientValues):
        return {client: plain(of_client) for client, of_client in value.items()}
    if isinstance(value, dict):
        return [plain(field) for field in value.values()]
    return [plain(field) for field in value] if isinstance(value, list | tuple) else float(value)


def test_it_is_normal(example):
    assert_is_normal(normalize(example[0]))


def test_it_has_the_type_of_the_computation(example):
    computation, _ = example
    normal_form = normalize(computation)
    assert normal_form.type_signature.is_equivalent_to(computation.type_signature)


def test_its_normal_form_has_the_same_structure(example):
    once = normalize(example[0])
    twice = normalize(once)
    assert_is_normal(twice)
    assert [what for _, what in calls(twice)] == [what for _, what in calls(once)]
    assert normalize(twice).compact_representation() == twice.compact_representation()


def test_it_runs_and_gives_the_same(example):
    computation, arguments = example
    normal = framework.ConcreteComputation.from_building_block(normalize(computation))
    with fed.use("debug"):
        assert plain(normal(*arguments())) == plain(computation(*arguments()))


def test_it_survives_serialisation(example):
    computation, arguments = example
    proto = normalize(computation).to_proto()
    again = framework.ConcreteComputation.from_proto(type(proto).FromString(proto.SerializeToString()))
    with fed.use("debug"):
        assert plain(again(*arguments())) == plain(computation(*arguments()))


def test_what_it_means_is_right():
    with fed.use("debug"):
        result = spread(fed.Cohort(COHORT))
        assert result["mean"] == 3.0
        assert dict(result["distances"].items()) == {"a": -2.0, "b": -1.0, "c": 3.0}
        again, offset, total = nested(fed.Cohort(COHORT), 5.0)
        assert list(again) == [4.0, 8.0, 24.0]
        assert (offset, total) == (20.0, 9.0)
        assert list(capturing(fed.Cohort(COHORT))) == [-2.0, -1.0, 3.0]


def test_calls_come_in_the_order_in_which_they_happen():
    assert [what for _, what in calls(normalize(spread))] == [
        "federated_mean",
        "federated_broadcast",
        "federated_zip_at_clients",
        "federated_map",
    ]


def test_nested_computations_are_inlined_and_unused_calls_are_dropped():
    uris = [what for _, what in calls(normalize(nested))]
    assert sorted(uris) == ["federated_apply", "federated_map", "federated_map", "federated_sum"]


def test_a_function_called_three_times_gives_three_calls():
    @fed.federated_computation(np.float32)
    def thrice(x):
        twice = fed.federated_computation(lambda y: double(y), np.float32)
        return twice(twice(twice(x)))

    assert [what for _, what in calls(normalize(thrice))] == ["local"] * 3


def test_only_called_computations_are_evaluated():
    @fed.federated_computation(AT_CLIENTS)
    def identity(values):
        fed.federated_sum(values)
        return values

    normal_form = normalize(identity)
    assert calls(normal_form) == []
    assert normal_form.compact_representation() == "(arg -> arg)"


def test_blocks_and_shadowed_names_are_resolved():
    # (x -> (let y=<x,x>, x=y[1] in (x -> <x,y[0]>)(x))): each x is another
    number = fed.TensorType(np.float32)
    outer = framework.Reference("x", number)
    pair = framework.Struct([outer, outer])
    y = framework.Reference("y", pair.type_signature)
    inner = framework.Lambda("x", number, framework.Struct([outer, framework.Selection(y, index=0)]))
    block = framework.Block([("y", pair), ("x", framework.Selection(y, index=1))], framework.Call(inner, outer))
    normal_form = normalize(framework.Lambda("x", number, block))
    assert normal_form.compact_representation() == "(arg -> <arg,arg>)"


def test_functions_that_are_mapped_do_not_capture_each_others_parameters():
    # map((x -> map-free function of x and a captured x), ...) where both are called x in the source
    number = fed.TensorType(np.float32)
    x = framework.Reference("x", number)
    subtract_block = framework.CompiledComputation(subtract.to_proto(), type_signature=subtract.type_signature)

    def applied(left, right):
        return framework.Call(subtract_block, framework.Struct([("x", left), ("y", right)]))

    values = framework.Reference("values", AT_CLIENTS)
    captured = framework.Reference("captured", number)
    function = framework.Lambda("x", number, applied(x, captured))
    mapped = framework.create_federated_map(function, values)
    whole = framework.Lambda(
        "argument",
        fed.to_type([AT_CLIENTS, number]),
        framework.Block(
            [
                ("argument_2", framework.Reference("argument", fed.to_type([AT_CLIENTS, number]))),
                (
                    "values",
                    framework.Selection(framework.Reference("argument", fed.to_type([AT_CLIENTS, number])), index=0),
                ),
                (
                    "captured",
                    framework.Selection(framework.Reference("argument", fed.to_type([AT_CLIENTS, number])), index=1),
                ),
            ],
            mapped,
        ),
    )
    assert_is_normal(normalize(whole))
    computation = framework.ConcreteComputation.from_building_block(whole)
    with fed.use("debug"):
        assert list(computation(fed.Cohort(COHORT), 1.0)) == [0.0, 1.0, 5.0]


def test_references_are_found_in_every_block():
    function = normalize(spread)
    assert {name for name, _ in calls(function)} | {"arg"} <= referenced_names(function)


def test_an_unknown_building_block_is_refused():
    from federated_language.proto import computation_pb2
    from google.protobuf import any_pb2

    number = fed.TensorType(np.float32)
    proto = computation_pb2.Computation(type=number.to_proto(), data=computation_pb2.Data(content=any_pb2.Any()))
    data = framework.ComputationBuildingBlock.from_proto(proto)
    with pytest.raises(fed.UnsupportedError, match="building block that fedlens executes, found Data"):
        normalize(framework.Lambda("x", number, data))
