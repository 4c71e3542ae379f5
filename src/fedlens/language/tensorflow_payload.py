"""Runs TensorFlow payloads, from whoever made them, as host computations: one call is one instantiation of the graph.

The proto's own semantics: the graph is instantiated, its parameter is bound, the initialising operation runs, and all
components of the result are evaluated together. So a call leaves nothing to the next: variables start anew, and an
operation with a seed draws the same numbers at every client and in every call. It runs on the CPU, in
64-bit types where the payload has them, whatever devices the engine computes on.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import federated_language as fl
from federated_language.proto import computation_pb2

from fedlens.language.host_computation import HostComputation
from fedlens.language.tensorflow_feeds import Feed, Fetch, batches_of, feed, fetch, leaves_of
from fedlens.language.tensorflow_graph import embed, graph_of, leaves, nodes_of
from fedlens.language.tensorflow_library import tensorflow

# Operations that TensorFlow calls stateful, and that leave nothing in a session which initialises its variables.
_LEAVES_NOTHING = re.compile(
    r"\w*Dataset(V\d)?|Dummy\w+|(Stateful)?PartitionedCall|If|While|Case|Assert|Print(V2)?|(Eager)?PyFunc"
    r"|VarHandleOp|VarIsInitializedOp|(Read|Assign|AssignAdd|AssignSub)VariableOp|Resource(Apply|Gather|Scatter)\w*"
)


def from_tensorflow_proto(proto: computation_pb2.Computation) -> HostComputation:
    """The host computation that a TensorFlow payload is; read once, however often it is asked for.

    Raises:
      UnsupportedError: its bindings do not fit its type. What the graph is, its first run finds out.
    """
    return _load(
        proto.tensorflow.SerializeToString(deterministic=True), proto.type.SerializeToString(deterministic=True)
    )


@lru_cache(maxsize=1024)
def _load(payload_bytes: bytes, type_bytes: bytes) -> HostComputation:
    payload = computation_pb2.TensorFlow.FromString(payload_bytes)
    type_signature = fl.FunctionType.from_proto(computation_pb2.Type.FromString(type_bytes))
    leaves(payload.parameter, type_signature.parameter)
    names = [leaf.tensor for leaf in leaves(payload.result, type_signature.result)]
    program = _Program(payload, type_signature)

    def run(*argument: Any) -> Any:
        found = program(leaves_of(argument[0], type_signature.parameter) if argument else [])
        return _positional(type_signature.result, iter(found))

    return HostComputation(_name_of(names), run, type_signature, "TensorFlow")


def _name_of(results: list[str]) -> str:
    """What plans and errors call a payload: the scope of its results, where fedlens puts the function's name."""
    scopes = {name.partition("/")[0] for name in results if "/" in name}
    return scopes.pop() if len(scopes) == 1 and all("/" in name for name in results) else "tensorflow"


class _Program:
    """A payload's graph with what feeds it and what is fetched, made when it first runs."""

    def __init__(self, payload: computation_pb2.TensorFlow, type_signature: fl.FunctionType):
        self._payload = payload
        self._type = type_signature
        self._lock = threading.Lock()  # one session holds the variables of one call

    def __call__(self, argument: list[Any]) -> list[Any]:
        """The leaves of the result for those of an argument: arrays and strings of NumPy, and sequences."""
        with self._lock:
            graph = self._graph
            session = self._session
            if session is not None:
                return graph.run(session, argument)
            with _new_session(graph.graph) as fresh:
                return graph.run(fresh, argument)

    @cached_property
    def _graph(self) -> _Graph:
        tf = tensorflow()
        graph = tf.Graph()
        with graph.as_default():
            feeds = [feed(leaf.type) for leaf in leaves(self._payload.parameter, self._type.parameter)]
            outputs, initialize = embed(self._payload, self._type, [feed.value for feed in feeds])
            types = [leaf.type for leaf in leaves(self._payload.result, self._type.result)]
            fetches = tuple(fetch(output, type_) for output, type_ in zip(outputs, types, strict=True))
        graph.finalize()
        return _Graph(graph, tuple(feeds), fetches, initialize)

    @cached_property
    def _session(self) -> Any:
        """The session of all calls; None if each needs one of its own: 1 to 10 ms more."""
        graph, graph_def = self._graph.graph, graph_of(self._payload)
        functions = {function.signature.name for function in graph_def.library.function}
        for operation in {node.op for node in nodes_of(graph_def)} - functions:
            is_variable = operation == "VarHandleOp" and not self._payload.initialize_op
            if is_variable or (
                graph.op_def_for_type(operation).is_stateful and not _LEAVES_NOTHING.fullmatch(operation)
            ):
                return None
        return _new_session(graph)


def _new_session(graph: Any) -> Any:
    tf = tensorflow()
    config = tf.compat.v1.ConfigProto(device_count={"GPU": 0}, allow_soft_placement=True)
    # Grappler would optimise what a data set is reduced with anew in each call: 3 ms of 5, for a fold of 5 batches.
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return tf.compat.v1.Session(graph=graph, config=config)


@dataclass(frozen=True)
class _Graph:
    graph: Any
    feeds: tuple[Feed, ...]
    fetches: tuple[Fetch, ...]
    initialize: Any

    def run(self, session: Any, argument: list[Any]) -> list[Any]:
        fed: dict[Any, Any] = {}
        for entrance, value in zip(self.feeds, argument, strict=True):
            fed |= zip(entrance.placeholders, entrance.arrays(value), strict=True)
        if self.initialize is not None:
            session.run(self.initialize, fed)
        found = session.run([fetch.fetched for fetch in self.fetches], fed)
        return [
            value if fetch.batch is None else batches_of(session, fetch.batch, fetch.type.element)
            for fetch, value in zip(self.fetches, found, strict=True)
        ]


def _positional(type_: fl.Type, found: Any) -> Any:
    if isinstance(type_, fl.StructType):
        return tuple(_positional(field, found) for _, field in type_.items())
    return next(found)
