"""Disclosure: every rule of docs/disclosure.md with the smallest computation that it decides."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedlens as fed
from fedlens.errors import LanguageError

F = np.float32
VECTOR = fed.TensorType(F, (3,))
KEY = fed.TensorType(np.uint32, (2,))
AT_CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)
AT_SERVER = fed.FederatedType(VECTOR, fed.SERVER)
SERVER_KEY = fed.FederatedType(KEY, fed.SERVER)
CLIENT_KEYS = fed.FederatedType(KEY, fed.CLIENTS)
PAGE = Path(__file__).parents[2] / "docs" / "disclosure.md"


@fed.jax_computation(VECTOR)
def double(x):
    return 2 * x


@fed.jax_computation(VECTOR, VECTOR)
def plus(x, y):
    return x + y


@fed.jax_computation(VECTOR, VECTOR)
def subtract(x, y):
    return x - y


def levels_of(computation):
    return {
        output.name: " and ".join(level.value for level in (output.level, *output.also))
        for output in fed.disclosure(computation).outputs
    }


def reasons_of(computation, name=""):
    return next(output.reasons for output in fed.disclosure(computation).outputs if output.name == name)


def input_at_clients():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return x

    return computation, {"": "raw data"}


def input_of_the_server():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER, VECTOR, fed.FederatedType(VECTOR, fed.CLIENTS, True))
    def computation(x, at_server, unplaced, shared):
        return {"server": at_server, "unplaced": unplaced, "shared": shared}

    return computation, {"server": "public", "unplaced": "public", "shared": "public"}


def constant():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        made = fed.federated_eval(fed.jax_computation(lambda: jnp.ones(3)), fed.CLIENTS)
        return {"made": made, "literal": fed.federated_value(1.0, fed.SERVER)}

    return computation, {"made": "public", "literal": "public"}


def move():
    @fed.federated_computation(
        fed.FederatedType(fed.StructType([("a", VECTOR), ("b", VECTOR)]), fed.CLIENTS), AT_SERVER
    )
    def computation(x, w):
        both = fed.federated_zip((fed.federated_map(double, x.a), fed.federated_broadcast(w), x.b))
        return {"both": both, "picked": both[1]}

    return computation, {"both/0": "per-client", "both/1": "public", "both/2": "raw data", "picked": "public"}


def computed():
    @fed.jax_computation(VECTOR, VECTOR)
    def mixed(x, w):
        return {"of_x": 2 * x, "of_w": 2 * w}

    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_map(mixed, (x, fed.federated_broadcast(w))), fed.federated_map(double, w)

    return computation, {"0": "per-client", "1": "public"}


def unchanged():
    @fed.jax_computation(VECTOR, VECTOR)
    def passing(x, w):
        return {"new": x + w, "same": x}

    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_map(passing, (x, fed.federated_broadcast(w)))

    return computation, {"new": "per-client", "same": "raw data"}


def sum_and_mean():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return {
            "sum": fed.federated_sum(x),
            "mean": fed.federated_mean(fed.federated_map(double, x)),
            "again": fed.federated_map(double, fed.federated_broadcast(fed.federated_mean(x))),
        }

    return computation, {"sum": "aggregate", "mean": "aggregate", "again": "aggregate"}


def weighted_mean():
    @fed.federated_computation(AT_CLIENTS, fed.FederatedType(F, fed.CLIENTS), AT_SERVER)
    def computation(x, n, w):
        shared = fed.federated_broadcast(w)
        return fed.federated_mean(x, n), fed.federated_mean(shared, n), fed.federated_mean(shared)

    return computation, {"0": "aggregate", "1": "aggregate", "2": "public"}


def secure_sum():
    @fed.federated_computation(fed.FederatedType(np.int32, fed.CLIENTS))
    def computation(x):
        return fed.federated_secure_sum_bitwidth(x, 8), fed.federated_secure_sum(x, 100)

    return computation, {"0": "aggregate", "1": "aggregate"}


def extremes():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(x, w):
        return fed.federated_min(x), fed.federated_max(x), fed.federated_max(fed.federated_broadcast(w))

    return computation, {"0": "per-client", "1": "per-client", "2": "public"}


def aggregate(accumulate, merge=plus):
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return fed.federated_aggregate(x, np.zeros(3, F), accumulate, merge, double)

    return computation


def aggregate_that_is_a_sum():
    return aggregate(plus), {"": "aggregate"}


def aggregate_that_is_no_sum():
    return aggregate(subtract), {"": "per-client"}


def sequences():
    rows = fed.SequenceType(VECTOR)

    @fed.jax_computation(rows)
    def fold(batches):
        return batches.reduce(jnp.zeros(3), lambda total, row: total + row)

    @fed.federated_computation(fed.FederatedType(rows, fed.CLIENTS))
    def computation(x):
        mapped = fed.federated_map(lambda_over(double, rows), x)
        return {"folded": fed.federated_map(fold, mapped), "rows": mapped}

    return computation, {"folded": "per-client", "rows": "raw data"}


def lambda_over(function, rows):
    @fed.federated_computation(rows)
    def mapped(sequence):
        return fed.sequence_map(function, sequence)

    return mapped


def select(operator):
    @fed.federated_computation(
        fed.FederatedType(fed.TensorType(np.int32, (2,)), fed.CLIENTS),
        fed.FederatedType(fed.TensorType(F, (5,)), fed.SERVER),
    )
    def computation(keys, table):
        pick = fed.jax_computation(lambda table, key: table[key], fed.TensorType(F, (5,)), np.int32)
        return operator(keys, fed.federated_value(5, fed.SERVER), table, pick)

    return computation


def open_select():
    return select(fed.federated_select), {"": "per-client", "select.0.keys": "raw data"}


def secure_select():
    return select(fed.federated_secure_select), {"": "per-client"}


def clip():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return fed.federated_map(fed.privacy.clip(1.0), x)

    return computation, {"": "per-client"}


def noised(norm=1.0, sensitivity=1.0, reduce=None, before=None, key_of=None):
    """Noise on what `reduce` makes of clipped values, with hooks for what can go wrong."""
    reduce = reduce or fed.federated_sum

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        clipped = fed.federated_map(fed.privacy.clip(norm), x)
        total = reduce(clipped if before is None else fed.federated_map(before, clipped))
        noise = fed.privacy.gaussian_noise(2.0, sensitivity=sensitivity)
        return fed.federated_map(noise, (total, key if key_of is None else key_of(key, keys)))

    return computation


def central_noise():
    return noised(norm=0.5), {"": "central-dp"}


def local_noise(key_of=None):
    @fed.federated_computation(AT_CLIENTS, CLIENT_KEYS, SERVER_KEY)
    def computation(x, keys, key):
        of_client = keys if key_of is None else key_of(keys, key)
        private = fed.federated_map(
            fed.privacy.local_gaussian(4.0, norm=1.0), (fed.federated_map(double, x), of_client)
        )
        return private, fed.federated_mean(private), fed.federated_map(double, private)

    return computation


def local_noise_with_own_keys():
    return local_noise(), {"0": "local-dp", "1": "local-dp and aggregate", "2": "local-dp"}


def post_processing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS, AT_SERVER)
    def computation(x, key, keys, w):
        private = inner(x, key, keys)
        return {
            "with_public": fed.federated_map(plus, (private, w)),
            "with_aggregate": fed.federated_map(plus, (private, fed.federated_sum(x))),
            "with_data": fed.federated_map(plus, (fed.federated_broadcast(private), x)),
        }

    return computation, {"with_public": "central-dp", "with_aggregate": "aggregate", "with_data": "per-client"}


RULES = {
    "input at the clients": input_at_clients,
    "input of the server": input_of_the_server,
    "constant": constant,
    "move": move,
    "computation": computed,
    "array returned unchanged": unchanged,
    "sequence": sequences,
    "sum, mean": sum_and_mean,
    "weighted mean": weighted_mean,
    "secure sum": secure_sum,
    "min, max": extremes,
    "aggregate that is a sum": aggregate_that_is_a_sum,
    "aggregate that is no sum": aggregate_that_is_no_sum,
    "select": open_select,
    "secure select": secure_select,
    "clip": clip,
    "gaussian noise": central_noise,
    "local gaussian noise": local_noise_with_own_keys,
    "what is computed from it": post_processing,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    computation, expected = RULES[rule]()
    assert levels_of(computation) == expected


def test_the_page_has_these_rules_and_no_others():
    table = PAGE.read_text().split("## The rules")[1].split("\n##")[0]
    named = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert named == ["value", "---", *RULES]


def weight_of(clipped):
    return fed.federated_mean(clipped, fed.federated_value(1.0, fed.CLIENTS))


def of_client_keys(key, keys):
    return fed.federated_sum(keys)


def constant_key(key, keys):
    return fed.federated_eval(fed.jax_computation(lambda: jax.random.PRNGKey(0)), fed.SERVER)


@pytest.mark.parametrize(
    ("computation", "level", "why"),
    [
        (noised(norm=1.5), "aggregate", "moves its value by up to 1.5, which is more than the sensitivity"),
        (noised(reduce=fed.federated_mean), "aggregate", "its value is no sum of clients' values"),
        (noised(reduce=weight_of), "aggregate", "its value is no sum of clients' values"),
        (noised(before=double), "aggregate", "its value is no sum of clients' values"),
        (noised(reduce=fed.federated_max), "per-client", "its value is no sum of clients' values"),
        (noised(key_of=of_client_keys), "aggregate", "its key depends on the clients"),
        (noised(key_of=constant_key), "aggregate", "its key is a constant"),
    ],
    ids=[
        "clip above sensitivity",
        "mean",
        "weighted mean",
        "function between",
        "max",
        "key of clients",
        "constant key",
    ],
)
def test_noise_that_hides_nothing_counts_for_nothing_and_says_why(computation, level, why):
    assert levels_of(computation) == {"": level}
    assert why in reasons_of(computation)[-1]


@pytest.mark.parametrize(
    ("key_of", "why"),
    [
        (lambda keys, key: fed.federated_broadcast(key), "its key is not the client's own"),
        (
            lambda keys, key: fed.federated_map(
                fed.jax_computation(lambda own, shared: own ^ shared, KEY, KEY), (keys, fed.federated_broadcast(key))
            ),
            "its key is not the client's own",
        ),
    ],
    ids=["the server's key", "a key that the server has a part in"],
)
def test_local_noise_that_the_server_can_take_off_counts_for_nothing(key_of, why):
    computation = local_noise(key_of)
    assert levels_of(computation) == {"0": "per-client", "1": "aggregate", "2": "per-client"}
    assert why in reasons_of(computation, "0")[-1]


def test_a_key_that_serves_twice_serves_nobody():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), inner(fed.federated_map(double, x), key, keys)

    assert levels_of(computation) == {"0": "aggregate", "1": "aggregate"}
    assert "its key serves another mechanism too" in reasons_of(computation, "0")[-1]


def test_a_key_that_is_handed_out_hides_nothing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), key

    assert levels_of(computation)["0"] == "aggregate"
    assert "its key is handed out" in reasons_of(computation, "0")[-1]


def test_a_key_that_another_function_reads_hides_nothing():
    inner = noised()

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        return inner(x, key, keys), fed.federated_map(fed.jax_computation(lambda key: key + 1, KEY), key)

    assert levels_of(computation)["0"] == "aggregate"


def test_keys_that_are_summed_too_hide_nothing():
    inner = local_noise()

    @fed.federated_computation(AT_CLIENTS, CLIENT_KEYS, SERVER_KEY)
    def computation(x, keys, key):
        return inner(x, keys, key)[0], fed.federated_sum(keys)

    assert levels_of(computation) == {"0": "per-client", "1": "aggregate"}
    assert "its key is read by something else too" in reasons_of(computation, "0")[-1]


def test_two_keys_split_from_one_serve_two_mechanisms():
    inner = noised()
    split = fed.jax_computation(lambda key: tuple(jax.random.split(key)), KEY)

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        first, second = fed.federated_map(split, key)
        return inner(x, first, keys), inner(fed.federated_map(double, x), second, keys)

    assert levels_of(computation) == {"0": "central-dp", "1": "central-dp"}


def test_noise_inside_of_a_function_counts_for_nothing():
    secret_noise = fed.jax_computation(lambda x, key: x + 100 * jax.random.normal(key, (3,)), VECTOR, KEY)

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY)
    def computation(x, key):
        return fed.federated_map(secret_noise, (fed.federated_sum(x), key))

    assert levels_of(computation) == {"": "aggregate"}


def test_the_path_leads_from_the_input_over_the_functions_to_the_output():
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def computation(data, weights):
        trained = fed.federated_map(plus, (data, fed.federated_broadcast(weights)))
        return {"average": fed.federated_map(double, fed.federated_mean(trained))}

    (output,) = fed.disclosure(computation).outputs
    assert output.path == ("data", "plus", "mean", "double", "average")
    assert output.reasons == ("plus computes it from the data", "mean over all clients")


def test_of_several_inputs_the_path_begins_at_the_data():
    @fed.federated_computation(CLIENT_KEYS, fed.FederatedType(fed.SequenceType(VECTOR), fed.CLIENTS))
    def computation(keys, data):
        def last(keys, data):
            return data.reduce(jnp.zeros(3), lambda _, row: row)

        return fed.federated_map(last, (keys, data))

    assert fed.disclosure(computation).outputs[0].path == ("data", "last", "result")


def test_the_reason_of_a_user_written_aggregate_names_its_function():
    assert "subtract is not shown to be a sum" in reasons_of(aggregate(subtract))[0]


@pytest.mark.parametrize(
    ("function", "level"),
    [
        (lambda total, x: total + x, "aggregate"),
        (lambda total, x: x + total, "aggregate"),
        (lambda total, x: total + 2 * x, "per-client"),
        (lambda total, x: x + x, "per-client"),
        (lambda total, x: jnp.maximum(total, x), "per-client"),
        (lambda total, x: x, "per-client"),
        (lambda total, x: total + x + 1e9 * x[::-1], "per-client"),
    ],
)
def test_an_accumulation_is_a_sum_if_it_adds_and_does_nothing_else(function, level):
    assert levels_of(aggregate(fed.jax_computation(function, VECTOR, VECTOR))) == {"": level}


def test_partial_sums_that_are_merged_in_another_way_are_no_sum():
    assert levels_of(
        aggregate(plus, merge=fed.jax_computation(lambda one, other: jnp.maximum(one, other), VECTOR, VECTOR))
    ) == {"": "per-client"}


def test_an_accumulation_in_the_language_is_looked_into():
    adding = fed.federated_computation(lambda total, x: plus(total, x), [VECTOR, VECTOR])
    doubling = fed.federated_computation(lambda total, x: plus(x, x), [VECTOR, VECTOR])
    assert levels_of(aggregate(adding)) == {"": "aggregate"}
    assert levels_of(aggregate(doubling)) == {"": "per-client"}


def training_with_secure_sum():
    @fed.jax_computation(VECTOR)
    def train(x):
        return {"steps": jnp.int32(x), "loss": jnp.sum(x), "size": jnp.float32(3)}

    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        trained = fed.federated_map(train, x)
        total = fed.federated_secure_sum_bitwidth(trained.steps, 8)
        return {"total": total, "steps": trained.steps, "loss": trained.loss, "all": trained}

    return computation


def bypasses_of(computation):
    return {output.name: output.bypasses for output in fed.disclosure(computation).outputs}


def test_an_output_that_also_enters_a_secure_sum_bypasses_it_and_its_neighbours_do_not():
    secure = ("secure sum of train.steps",)
    assert bypasses_of(training_with_secure_sum()) == {"total": (), "steps": secure, "loss": (), "all": secure}


def test_a_bypass_is_found_after_serialisation():
    computation = training_with_secure_sum()
    portable = fed.to_portable(computation)
    again = fed.framework.ConcreteComputation.from_proto(portable.to_proto())
    assert str(fed.disclosure(again)) == str(fed.disclosure(computation))


def test_mechanisms_and_unchanged_arrays_are_known_after_serialisation():
    for rule in ("gaussian noise", "local gaussian noise", "array returned unchanged"):
        computation, expected = RULES[rule]()
        again = fed.framework.ConcreteComputation.from_proto(fed.to_portable(computation).to_proto())
        assert levels_of(again) == expected


def test_what_is_computed_before_or_from_a_clipped_value_bypasses_the_noise():
    @fed.federated_computation(AT_CLIENTS, SERVER_KEY)
    def computation(x, key):
        update = fed.federated_map(double, x)
        clipped = fed.federated_map(fed.privacy.clip(1.0), update)
        private = fed.federated_map(fed.privacy.gaussian_noise(1.0, 1.0), (fed.federated_sum(clipped), key))
        return {
            "private": private,
            "clipped": clipped,
            "update": update,
            "more": fed.federated_map(plus, (update, update)),
        }

    noise = ("gaussian noise on the sum of double",)
    assert bypasses_of(computation) == {"private": (), "clipped": noise, "update": noise, "more": noise}


def test_what_a_local_mechanism_returns_does_not_bypass_it():
    @fed.federated_computation(AT_CLIENTS, CLIENT_KEYS)
    def computation(x, keys):
        update = fed.federated_map(double, x)
        private = fed.federated_map(fed.privacy.local_gaussian(4.0, norm=1.0), (update, keys))
        return {"private": private, "mean": fed.federated_mean(private), "update": update}

    assert bypasses_of(computation) == {"private": (), "mean": (), "update": ("local gaussian noise of double",)}


def test_an_earlier_round_that_only_reaches_a_secure_sum_as_a_mean_does_not_bypass_it():
    @fed.jax_computation(VECTOR, VECTOR)
    def steps(x, mean):
        return jnp.int32(x - mean)

    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        first = fed.federated_map(double, x)
        second = fed.federated_map(steps, (x, fed.federated_broadcast(fed.federated_mean(first))))
        return {"first": first, "total": fed.federated_secure_sum_bitwidth(second, 8)}

    assert bypasses_of(computation)["first"] == ()


def test_the_level_of_all_is_that_of_the_outputs_together():
    computation, _ = input_of_the_server()
    assert fed.disclosure(computation).level is fed.Level.PUBLIC
    assert fed.disclosure(training_with_secure_sum()).level is fed.Level.PER_CLIENT


def test_the_text_says_level_path_reasons_and_bypasses():
    text = str(fed.disclosure(training_with_secure_sum()))
    assert text.splitlines()[0] == "4 outputs, per-client in all"
    assert "!   steps, per-client" in text
    assert "argument -> train.steps -> secure sum -> total" in text
    assert "bypasses: secure sum of train.steps" in text


def test_the_table_of_a_notebook_has_an_entry_for_each_output_and_escapes_names():
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return fed.federated_map(fed.jax_computation(lambda x: 2 * x, VECTOR), x)

    html = fed.disclosure(computation)._repr_html_()
    assert html.count("<tr>") == 1
    assert "argument -&gt; lambda@" in html


def test_a_learning_process_is_its_round():
    class Process:
        next_computation = training_with_secure_sum()

    assert fed.disclosure(Process()) == fed.disclosure(Process.next_computation)


def test_what_is_no_computation_is_refused():
    with pytest.raises(LanguageError, match="Expected a computation"):
        fed.disclosure(lambda x: x)
