"""What an error says: stage, step, function, client and leaf; what was expected and found; the user's own line."""

from __future__ import annotations

import re
import traceback
from typing import NamedTuple

import federated_language as fl
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.data import FederatedData
from fedlens.runtime import Context, Debug, Local

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
VECTORS = fed.FederatedType(fed.TensorType(np.float32, (3,)), fed.CLIENTS)
VECTOR = np.ones(3, np.float32)


class Layer(NamedTuple):
    kernel: object
    bias: object


MODEL = fed.type_of({"dense": Layer(np.zeros((2, 3), np.float32), np.zeros(3, np.float32)), "steps": np.int32(0)})
GOOD = {"dense": Layer(np.ones((2, 3), np.float32), np.ones(3, np.float32)), "steps": 1}


def at_clients(function, type_=VECTORS):
    return fed.federated_computation(lambda values: fed.federated_map(function, values), type_)


# ---- a value that is not of its type


def dense(**changes):
    return {**GOOD, "dense": GOOD["dense"]._replace(**changes)}


WRONG = {
    "shape": (dense(bias=np.ones(4, np.float32)), "Expected float32[3] at 'dense/bias', found float32[4]"),
    "rank": (dense(bias=np.float32(1)), "Expected float32[3] at 'dense/bias', found float32[]"),
    "dtype": (dense(kernel=np.ones((2, 3))), "Expected float32[2,3] at 'dense/kernel', found float64[2,3]"),
    "scalar": ({**GOOD, "steps": 0.5}, "Expected int32 at 'steps', found the Python scalar 0.5"),
    "too large": ({**GOOD, "steps": 2**40}, "Expected a value that fits int32 at 'steps', found 1099511627776"),
    "text": ({**GOOD, "steps": "one"}, "Expected int32 at 'steps', found str"),
    "field": (
        {"dense": {"kernel": VECTOR, "scale": VECTOR}, "steps": 1},
        "Expected a field 'bias' at 'dense', found fields kernel, scale",
    ),
    "too few fields": (
        {"dense": GOOD["dense"]},
        "Expected fields dense, steps, found fields dense: 2 fields against 1",
    ),
    "no container": (
        {**GOOD, "dense": VECTOR},
        "Expected a container <kernel=float32[2,3],bias=float32[3]> at 'dense', ",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_value_of_the_wrong_type_names_client_and_leaf(engine, kind):
    value, message = WRONG[kind]
    computed = []

    @fed.jax_computation(MODEL)
    def remember(model):
        computed.append(model)
        return model["steps"]

    computation = at_clients(remember, fed.FederatedType(MODEL, fed.CLIENTS))
    computed.clear()  # what inferring the type saw
    with fed.use(engine), pytest.raises(fed.CohortError) as error:
        computation(fed.Cohort({"ann": GOOD, "bob": value, "eve": GOOD}))
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(", in client 'bob'.")
    assert computed == []  # nothing ran


SEQUENCES = fed.FederatedType(fed.SequenceType(fl.StructType([("x", fl.TensorType(np.float32, (2,)))])), fed.CLIENTS)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": np.ones(2, np.float32)}, {"x": VECTOR}], "Expected float32[2] at 'batch 1/x', found float32[3]"),
        ([{"x": np.ones(2)}], "Expected float32[2] at 'batch 0/x', found float64[2]"),
        (7, "Expected a list of batches of type <x=float32[2]> in client 'bob', found int"),
        ({"x": VECTOR}, "Expected a list of batches of type <x=float32[2]> in client 'bob', found dict"),
    ],
)
def test_a_wrong_batch_names_client_batch_and_leaf(engine, batches, message):
    computation = at_clients(lambda batches: batches.num_batches, SEQUENCES)
    with fed.use(engine), pytest.raises(fed.CohortError, match=re.escape(message)) as error:
        computation(fed.Cohort({"ann": [], "bob": batches}))
    assert "in client 'bob'" in str(error.value)


def test_a_data_sets_field_of_the_wrong_type_is_named(engine):
    data = FederatedData.from_clients({"ann": {"x": np.ones((4, 3), np.float32)}})
    batches = fed.FederatedType(fed.SequenceType(fed.batch_type(fl.StructType([("x", np.float64)]), 2)), fed.CLIENTS)
    computation = at_clients(lambda batches: batches.num_batches, batches)
    with fed.use(engine), pytest.raises(fed.CohortError, match=r"with float64 in field 'x', found float32\[3\]"):
        computation(data.cohort(0))


def test_values_of_another_computation_that_do_not_fit(engine):
    with fed.use(engine):
        doubled = at_clients(lambda x: x * 2)(fed.Cohort({"ann": VECTOR}))
        computation = at_clients(lambda x: x, AT_CLIENTS)
        with pytest.raises(fed.CohortError, match=r"Expected client values of type float32, found float32\[3\]\."):
            computation(doubled)
        model = at_clients(lambda model: {**model, "steps": model["steps"] / 2}, fed.FederatedType(MODEL, fed.CLIENTS))
        with pytest.raises(fed.CohortError, match=r": int32 against float32 at 'steps', in all clients\.$"):
            model(model(fed.Cohort({"ann": GOOD})))


def test_a_servers_value_of_the_wrong_type_names_argument_and_leaf(engine):
    computation = fed.federated_computation(lambda value: value, fed.FederatedType(MODEL, fed.SERVER))
    with fed.use(engine), pytest.raises(fed.StructureError) as error:
        computation(dense(bias=np.ones(4, np.float32)))
    assert str(error.value) == "Expected float32[3] at 'dense/bias', found float32[4], in the argument arg."


# ---- a user's function that fails


class OwnError(Exception):
    """A user's own exception, which `except OwnError` has to catch."""


class Failing:
    """Functions that are fine when their type is inferred, and fail when they run."""

    def __init__(self):
        self.calls = 0

    def raises(self, x):
        self.calls += 1
        if self.calls > 1:
            raise OwnError("no luck")  # the user's line
        return x

    def multiplies(self, x):
        self.calls += 1
        return x @ jnp.zeros((3, 3) if self.calls == 1 else (4, 4))  # the user's line

    def applies_a_layer(self, x):
        self.calls += 1
        kernel = jnp.zeros((3, 5) if self.calls == 1 else (4, 5))
        return nn.Dense(5, use_bias=False).apply({"params": {"kernel": kernel}}, x)  # the user's line

    def scans(self, x):
        def step(carry, row):
            self.calls += 1
            return (carry if self.calls == 1 else carry[:2]), row

        return jax.lax.scan(step, x, x)[0]  # the user's line


FAILURES = {
    "raises": OwnError,
    "multiplies": TypeError,
    "applies_a_layer": flax.errors.ScopeParamShapeError,
    "scans": TypeError,
}


def notes_of(error):
    return "\n".join(error.__notes__)


def line_of(frame):
    return frame.line.partition("#")[2].strip()


@pytest.mark.parametrize("name", FAILURES)
def test_a_traced_function_that_fails_names_stage_step_and_function(engine, name):
    if isinstance(engine, Debug):
        pytest.skip("it traces nothing")
    computation = at_clients(getattr(Failing(), name))
    with fed.use(engine), pytest.raises(FAILURES[name]) as error:
        computation(fed.Cohort({"ann": VECTOR, "bob": VECTOR}))
    note = (
        f"This happened while client stage 0 was traced, in step 'federated_map_0', function '{name}'; it is the same "
        'for all clients. Run it inside of fed.use("debug"): the traceback then ends at your own line, and a note '
        "names the client."
    )
    assert note in error.value.__notes__


@pytest.mark.parametrize("name", FAILURES)
def test_the_debug_engines_traceback_ends_at_the_users_own_line_and_names_the_client(name):
    failing = Failing()
    computation = at_clients(getattr(failing, name))
    with fed.use("debug"), pytest.raises(FAILURES[name]) as error:
        computation(fed.Cohort({"ann": VECTOR, "bob": VECTOR}))
    assert f"This happened in client 'ann', client stage 0, step 'federated_map_0', function '{name}'." in (
        error.value.__notes__
    )
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.filename == __file__
    assert line_of(last) == "the user's line"


def test_the_debug_engine_names_the_client_whose_value_it_was():
    def positive(x):
        if not isinstance(x, jax.core.Tracer) and x.sum() < 0:
            raise OwnError("negative")
        return x

    with fed.use("debug"), pytest.raises(OwnError, match="negative") as error:
        at_clients(positive)(fed.Cohort({"ann": VECTOR, "bob": -VECTOR, "eve": -VECTOR}))
    assert "in client 'bob', client stage 0, step 'federated_map_0', function 'positive'." in notes_of(error.value)


def test_a_function_in_a_later_stage(engine):
    failing = Failing()

    @fed.federated_computation(VECTORS)
    def computation(values):
        mean = fed.federated_broadcast(fed.federated_mean(values))
        return fed.federated_map(fed.jax_computation(lambda x, m: failing.raises(x - m)), (values, mean))

    with fed.use(engine), pytest.raises(OwnError) as error:
        computation(fed.Cohort({"ann": VECTOR}))
    assert re.search(r"client stage 1.*function 'lambda@test_errors_name_clients\.py:\d+'", notes_of(error.value))


@pytest.mark.parametrize("part", ["accumulate", "merge", "report"])
def test_a_function_of_an_aggregate(engine, part):
    failing = Failing()

    def add(x, y):
        return failing.raises(x + y) if part == "accumulate" else x + y

    def merge(x, y):
        return failing.raises(x + y) if part == "merge" else x + y

    def report(x):
        return failing.raises(x) if part == "report" else x

    @fed.federated_computation(AT_CLIENTS)
    def computation(values):
        one, two = [fed.TensorType(np.float32)], [fed.TensorType(np.float32)] * 2
        functions = [
            fed.jax_computation(function, *types) for function, types in ((add, two), (merge, two), (report, one))
        ]
        return fed.federated_aggregate(values, np.float32(0), *functions)

    with fed.use(engine), pytest.raises(OwnError) as error:
        computation(fed.Cohort([1.0, 2.0], chunk_size=1))
    assert re.search(
        r"client stage 0.* step 'federated_aggregate_\d', functions 'add', 'merge', 'report'", notes_of(error.value)
    )


def test_a_function_at_the_server(engine):
    computation = at_clients(Failing().raises, fed.FederatedType(np.float32, fed.SERVER))
    with fed.use(engine), pytest.raises(OwnError) as error:
        computation(np.float32(1))
    assert re.search(r"server.* in step 'federated_apply_0', function 'raises'", notes_of(error.value))


def test_a_function_that_has_no_type_names_itself_and_its_argument():
    def multiplies(x):
        return x @ jnp.zeros((4, 4))  # the user's line

    with pytest.raises(TypeError) as error:
        at_clients(multiplies)
    assert (
        "This happened in 'multiplies', traced with an argument float32[3] to find the type of its result; it is the "
        "same for all clients."
    ) in error.value.__notes__
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, line_of(last)) == (__file__, "the user's line")


def test_jaxs_own_setting_keeps_the_whole_traceback():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with fed.use("debug"), pytest.raises(TypeError) as error:
            at_clients(Failing().multiplies)(fed.Cohort({"ann": VECTOR}))
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert traceback.extract_tb(error.value.__traceback__)[-1].filename != __file__


# ---- infinities and NaNs


@fed.federated_computation(fed.FederatedType(MODEL, fed.CLIENTS))
def two_stages(models):
    biases = fed.federated_map(lambda model: {"inner": [model["dense"].bias]}, models)
    mean = fed.federated_broadcast(fed.federated_mean(biases))
    return fed.federated_mean(
        fed.federated_map(
            fed.jax_computation(lambda b, m: {"log": jnp.log(b["inner"][0] - m["inner"][0])}), (biases, mean)
        )
    )


@pytest.fixture(scope="module")
def engines():
    """All engines, each with the programs that it has compiled."""
    one, two = (jax.local_devices()[:count] for count in (1, 2))
    return Debug(), Local(one), Local(two), Local(two, clients_per_step=16)


def nonfinite_message(engine, values, chunk_size):
    with pytest.raises(fed.NonFiniteError) as error:
        Context(engine).run(two_stages, fed.Cohort(values, chunk_size=chunk_size), on_nonfinite="raise")
    return str(error.value)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    ("bob", "eve", "client", "leaf", "stage"),
    [
        (np.nan, 1, "bob", "inner/0", 0),
        (1, np.inf, "eve", "inner/0", 0),
        (-np.inf, np.nan, "bob", "inner/0", 0),
        (3, 3, "ann", "log", 1),  # the logarithm of what is below the mean
    ],
)
def test_all_engines_say_the_same_of_infinities(engines, chunk_size, bob, eve, client, leaf, stage):
    biases = {"ann": 1, "bob": bob, "dan": 2, "eve": eve}
    values = {name: dense(bias=np.full(3, bias, np.float32)) for name, bias in biases.items()}
    messages = {nonfinite_message(each, values, chunk_size) for each in engines}
    assert len(messages) == 1
    assert f"infinity or NaN in client {client!r}, leaf {leaf!r}, client stage {stage}" in messages.pop()
