"""Outputs that go around a secure sum or a mechanism, and how a disclosure reads."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from disclosed import AT_CLIENTS, AT_SERVER, CLIENT_KEYS, SERVER_KEY, VECTOR, double, plus

import fedlens as fed
from fedlens.errors import LanguageError


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
    @fed.federated_computation(AT_CLIENTS, AT_SERVER)
    def public(x, at_server):
        return at_server

    assert fed.disclosure(public).level is fed.Level.PUBLIC
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
