"""What `explain` says of a computation, against what the language's types and the user's own functions say."""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from html.parser import HTMLParser

import federated_language as fl
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_language import framework

import fedlens as fed
from fedlens.compiler import explain
from fedlens.language.type_summaries import size_of, summarize

AT_CLIENTS = fed.FederatedType(np.float32, fed.CLIENTS)
AT_SERVER = fed.FederatedType(np.float32, fed.SERVER)
MODEL = fed.type_of({"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)})


@fed.jax_computation
def halve(weights):
    return {"kernel": weights["kernel"] / 2, "bias": weights["bias"] / 2}


@fed.federated_computation(fed.FederatedType(MODEL, fed.CLIENTS))
def extraction(model_weights):
    halved = fed.federated_map(halve, model_weights)
    return {"global": fed.federated_mean(halved), "clients": halved, "raw": model_weights}


@fed.federated_computation(AT_CLIENTS, AT_SERVER)
def two_passes(values, offset):
    @fed.jax_computation
    def shift(value, offset):
        return value + offset

    shifted = fed.federated_map(shift, (values, fed.federated_broadcast(offset)))
    mean = fed.federated_broadcast(fed.federated_mean(shifted))
    return fed.federated_sum(fed.federated_map(shift, (shifted, mean))), mean


def test_the_text_of_a_plan():
    assert (
        str(explain(extraction))
        == """\
1 pass over the cohort, 2 values of each client handed out

inputs
    argument, per client                 <kernel=float32[4,2],bias=float32[2]>

client stage 0, one pass over the cohort
    each client runs
      halve(argument)                    <kernel=float32[4,2],bias=float32[2]>
    reduces over all clients
      mean of halve                      <kernel=float32[4,2],bias=float32[2]>
    hands out, client by client
!     halve                              <kernel=float32[4,2],bias=float32[2]>

result
    global = mean(halve), at the server  <kernel=float32[4,2],bias=float32[2]>
!   clients = halve, per client          <kernel=float32[4,2],bias=float32[2]>
!   raw = argument, per client           <kernel=float32[4,2],bias=float32[2]>

! one value for each client: it leaves the client as it is, not aggregated."""
    )


def test_several_passes_arguments_by_name_and_what_is_kept():
    found = explain(two_passes)
    assert [(value.name, value.placement) for value in found.inputs] == [
        ("values", "per client"),
        ("offset", "at the server"),
    ]
    kinds = [(stage.place, stage.index) for stage in found.stages]
    assert kinds == [("server", 0), ("clients", 0), ("server", 1), ("clients", 1)]
    sends, first, again, second = found.stages
    assert [value.source for value in sends.sends] == ["offset"]
    assert [(call.function, call.arguments) for call in first.calls] == [("shift", "values, offset")]
    assert [value.source for value in first.kept] == ["shift"]
    assert [value.source for value in again.sends] == ["mean(shift)"]
    assert [(call.function, call.arguments) for call in second.calls] == [("shift", "shift, mean(shift)")]
    assert [(each.operation, each.of) for each in second.reductions] == [("sum", "shift#2")]
    assert [(value.source, value.placement) for value in found.result] == [
        ("sum(shift#2)", "at the server"),
        ("mean(shift)", "equal at all clients"),
    ]
    assert found.leaves_clients == ()
    assert "2 passes over the cohort, no value leaves a client" in str(found)
    assert "\n!" not in str(found)


def placements_of(type_, path=""):
    """The federated parts of a type, by the language alone."""
    if isinstance(type_, fl.FederatedType):
        where = "at the server" if type_.placement is fl.SERVER else "per client"
        return {path: "equal at all clients" if type_.all_equal and where == "per client" else where}
    return {
        leaf: where
        for position, (name, field) in enumerate(type_.items())
        for leaf, where in placements_of(field, f"{path}/{position if name is None else name}".lstrip("/")).items()
    }


@fed.federated_computation(AT_CLIENTS, AT_SERVER)
def many_results(values, offset):
    mapped = fed.federated_map(lambda x: {"a": x, "b": x * 2}, values)
    sent = fed.federated_broadcast(offset)
    constant = fed.federated_value(np.float32(3), fed.CLIENTS)
    zipped = fed.federated_zip({"mapped": mapped, "sent": sent})
    ones = fed.federated_eval(fed.jax_computation(lambda: jnp.float32(1)), fed.CLIENTS)
    return [{"x": [mapped, fed.federated_sum(values)], "sent": sent}, (zipped, constant, ones), {"b": mapped.b}, offset]


@pytest.mark.parametrize("computation", [extraction, two_passes, many_results], ids=["extraction", "two", "many"])
def test_what_leaves_a_client_is_what_the_result_type_places_there(computation):
    found = explain(computation)
    expected = placements_of(computation.type_signature.result)
    assert {value.name: value.placement for value in found.result} == expected
    handed_out = [path for path, where in expected.items() if where == "per client"]
    assert [value.name for value in found.leaves_clients] == handed_out
    marked = [line for line in str(found).partition("\nresult")[2].splitlines() if line.startswith("!   ")]
    assert [line.split()[1] for line in marked] == handed_out


def test_lambdas_are_found_by_file_and_line():
    doubled = fed.federated_computation(lambda x: fed.federated_map(lambda y: y * 2, x), AT_CLIENTS)
    line = inspect.currentframe().f_lineno - 1
    (call,) = explain(doubled).stages[0].calls
    assert call.function == f"lambda@test_explain.py:{line}"


def test_functions_on_the_host_say_so():
    @fed.python_computation(np.float32, np.float32)
    def median(x):
        return x

    found = explain(fed.federated_computation(lambda x: fed.federated_map(median, x), AT_CLIENTS))
    assert found.stages[0].calls[0].on_host
    assert "median(argument), on the host" in str(found)


def test_every_reduction_is_named_with_what_decides_it():
    integers = fed.FederatedType(np.int32, fed.CLIENTS)

    @fed.jax_computation(np.int32, np.int32)
    def add(total, value):
        return total + value

    @fed.jax_computation(np.int32)
    def report(total):
        return total

    @fed.federated_computation(integers, AT_CLIENTS)
    def reduced(counts, values):
        return {
            "sum": fed.federated_sum(counts),
            "mean": fed.federated_mean(values, counts),
            "min": fed.federated_min(values),
            "max": fed.federated_max(values),
            "aggregate": fed.federated_aggregate(counts, np.int32(0), add, add, report),
            "secure": fed.federated_secure_sum(counts, 7),
            "bits": fed.federated_secure_sum_bitwidth(counts, 5),
        }

    (stage,) = [stage for stage in explain(reduced).stages if stage.place == "clients"]
    found = {each.operation: each for each in stage.reductions if each.operation != "secure sum"}
    assert {name: each.of for name, each in found.items()} == {
        "sum": "counts",
        "weighted mean": "values",
        "min": "values",
        "max": "values",
        "aggregate": "counts",
    }
    assert found["weighted mean"].how == "weighted by counts"
    assert found["aggregate"].how == "from 0, accumulated by add, merged by add, reported by report"
    secure = [each.how for each in stage.reductions if each.operation == "secure sum"]
    assert secure == ["each at most 7", "bits of each: 5"]


@pytest.fixture(scope="module")
def process():
    data = fed.data.digits()
    model = fed.models.from_functions(
        init=lambda key: {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)},
        apply=lambda weights, x: x.reshape(x.shape[0], 64) @ weights["kernel"] + weights["bias"],
        inputs=data.element_type,
        loss=fed.losses.cross_entropy,
    )
    return fed.learning.build_weighted_fed_avg(model, optax.sgd(0.1))


def test_a_round_of_learning(process):
    found = explain(process.with_local_models().next_computation)
    assert [value.name for value in found.inputs] == ["state", "keys", "data"]
    (clients,) = [stage for stage in found.stages if stage.place == "clients"]
    assert (clients.calls[0].function, clients.calls[0].arguments) == ("train", "state.weights, keys, data")
    assert [(each.operation, each.of, each.how) for each in clients.reductions] == [
        ("weighted mean", "train.update", "weighted by train.num_examples"),
        ("sum", "_contribution", ""),
    ]
    leaving = ["train.weights", "train.num_examples", "train.sums"]
    assert [value.source for value in clients.leaves] == [value.source for value in found.leaves_clients] == leaving
    names = ["1/client_work.weights", "1/client_work.num_examples", "1/client_work.sums"]
    assert [value.name for value in found.leaves_clients] == names


def test_a_round_without_local_models_hands_out_nothing(process):
    assert explain(process.next_computation).leaves_clients == ()


def test_a_local_computation():
    found = explain(fed.jax_computation(lambda x: x, np.float32))
    assert [value.placement for value in (*found.inputs, *found.result)] == ["without placement"] * 2
    assert [stage.place for stage in found.stages] == ["server"]


def test_a_computation_without_arguments():
    found = explain(fed.federated_computation(lambda: fed.federated_value(3, fed.SERVER)))
    assert found.inputs == ()
    assert [(value.source, value.placement, value.type) for value in found.result] == [("3", "at the server", "int32")]


def test_a_computation_from_a_proto_says_the_same():
    again = framework.ConcreteComputation.from_proto(extraction.to_proto())
    assert str(explain(again)) == str(explain(extraction))


def test_a_function_of_another_process_has_no_name_here():
    proto = extraction.to_proto()
    data = proto.SerializeToString()
    key = re.search(rb"halve-\d+", data).group(0)
    foreign = type(proto).FromString(data.replace(key, b"?" * len(key)))
    (call,) = explain(framework.ConcreteComputation.from_proto(foreign)).stages[0].calls
    assert call.function == "(a function of another process)"


def test_as_data_it_is_json():
    found = explain(extraction).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["stages"][0]["calls"] == [
        {
            "function": "halve",
            "arguments": "argument",
            "type": "<kernel=float32[4,2],bias=float32[2]>",
            "on_host": False,
        }
    ]
    assert [value["name"] for value in found["result"]] == ["global", "clients", "raw"]


class Page(HTMLParser):
    """The tags of a page, and its text; fails on a tag that is not closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_table_of_a_notebook_escapes_everything():
    def evil(x):
        return x

    evil.__name__ = "<script>alert('&')</script>"
    computation = fed.federated_computation(lambda x: fed.federated_map(evil, x), AT_CLIENTS)
    page = Page()
    page.feed(explain(computation)._repr_html_())
    assert page.open == []
    assert page.tags == {"p", "table", "tbody", "tr", "th", "td", "code"}
    assert any(evil.__name__ in text for text in page.text)


@pytest.mark.parametrize("computation", [extraction, two_passes, many_results], ids=["extraction", "two", "many"])
def test_the_table_has_the_rows_of_the_text(computation):
    found = explain(computation)
    page = Page()
    page.feed(found._repr_html_())
    words = " ".join(" ".join(page.text).replace("⚠", "").split())
    for line in str(found).splitlines():
        left = " ".join(re.split(r" {2,}", line.lstrip("! "))[0].split())
        assert left in words


def test_long_types_are_leaves_and_bytes():
    arrays = {f"layer_{i}": {"w": np.zeros((20, 30 + i), np.float32), "n": np.zeros(3, np.int64)} for i in range(4)}
    total = sum(array.nbytes for layer in arrays.values() for array in layer.values())
    type_ = fed.type_of(arrays)
    assert size_of(type_) == total
    assert summarize(type_) == f"8 leaves, {total / 1000:.1f} kB"
    assert summarize(fed.FederatedType(type_, fed.CLIENTS)) == summarize(type_)
    assert summarize(fl.SequenceType(type_)) == f"batches of {summarize(type_)}"
    assert summarize(MODEL) == str(MODEL)


def test_a_size_that_nobody_knows_is_left_out():
    fields = [(f"text_{i}", fl.TensorType(np.str_)) for i in range(9)]
    assert summarize(fl.StructType(fields)) == "9 leaves"
    assert size_of(fl.TensorType(np.float32, (None, 3))) is None
    assert size_of(fl.SequenceType(np.float32)) is None


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(fed.LanguageError, match=r"with types, found one whose types depend.*Give the types"):
        explain(halve)
    with pytest.raises(fed.LanguageError, match=r"Expected a computation, .* found int"):
        explain(3)


def test_explain_prints(capsys, process):
    assert fed.explain(extraction) is None
    assert capsys.readouterr().out == f"{explain(extraction)}\n"
    fed.explain(process)
    assert capsys.readouterr().out == f"{explain(process.next_computation)}\n"


@pytest.mark.parametrize(("shell", "shown"), [({"kernel": 1}, True), ({}, False)], ids=["notebook", "terminal"])
def test_explain_displays_in_a_notebook_alone(monkeypatch, capsys, shell, shown):
    displayed = []
    package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.get_ipython = lambda: types.SimpleNamespace(**shell)
    package.display, display.display = display, displayed.append
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    fed.explain(extraction)
    assert displayed == ([explain(extraction)] if shown else [])
    assert bool(capsys.readouterr().out) != shown
