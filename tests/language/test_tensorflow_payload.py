"""TensorFlow payloads that others made: graphs with bindings by hand, as the proto defines them."""

import numpy as np
import pytest
from federated_language.proto import computation_pb2

import fedlens as fed
from fedlens.errors import UnsupportedError

pytestmark = pytest.mark.tensorflow

Binding = computation_pb2.TensorFlow.Binding


def tensor(name):
    return Binding(tensor={"tensor_name": name})


def struct(*elements):
    return Binding(struct={"element": elements})


def sequence(name):
    return Binding(sequence={"variant_tensor_name": name})


def computation(graph_def, type_, parameter, result, **fields):
    """A computation whose payload is a graph, as another process would send it."""
    payload = computation_pb2.TensorFlow(result=result, **fields)
    if parameter is not None:
        payload.parameter.CopyFrom(parameter)
    payload.graph_def.type_url = "type.googleapis.com/tensorflow.GraphDef"
    payload.graph_def.value = graph_def.SerializeToString()
    proto = computation_pb2.Computation(type=type_.to_proto(), tensorflow=payload)
    return fed.framework.ConcreteComputation.from_proto(
        computation_pb2.Computation.FromString(proto.SerializeToString())
    )


def test_a_graph_of_version_one(tf):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None,), name="x")
        factor = tf.compat.v1.placeholder(tf.float32, (), name="factor")
        tf.identity(x * factor, name="scaled")
        tf.size(x, name="size")
    type_ = fed.FunctionType(
        [("x", fed.TensorType(np.float32, (None,))), ("factor", np.float32)],
        [
            ("size", np.int32),
            ("inner", [("scaled", fed.TensorType(np.float32, (None,))), ("x", fed.TensorType(np.float32, (None,)))]),
        ],
    )
    scale = computation(
        graph.as_graph_def(),
        type_,
        struct(tensor("x:0"), tensor("factor:0")),
        struct(tensor("size:0"), struct(tensor("scaled:0"), tensor("x:0"))),  # an argument handed back as it is
    )
    found = scale(np.arange(4, dtype=np.float32), np.float32(3))
    assert found["size"] == 4
    np.testing.assert_array_equal(found["inner"]["scaled"], [0, 3, 6, 9])
    np.testing.assert_array_equal(found["inner"]["x"], [0, 1, 2, 3])


def test_a_concrete_function(tf):
    @tf.function
    def norm(a, b):
        return tf.sqrt(tf.reduce_sum(a * a) + tf.reduce_sum(b * b))

    concrete = norm.get_concrete_function(tf.TensorSpec((2,)), tf.TensorSpec((3,)))
    names = [parameter.name for parameter in concrete.inputs]
    norms = computation(
        concrete.graph.as_graph_def(),
        fed.FunctionType([fed.TensorType(np.float32, (2,)), fed.TensorType(np.float32, (3,))], np.float32),
        struct(*map(tensor, names)),
        tensor(concrete.outputs[0].name),
    )
    a, b = np.array([3, 0], np.float32), np.array([0, 4, 0], np.float32)
    assert norms(a, b) == 5


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_the_initialising_operation_runs_before_each_call(tf, suffix):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.int32, (), name="x")
        total = tf.compat.v1.get_variable("total", initializer=10, use_resource=False)
        tf.compat.v1.assign_add(total, x, name="sum")
        initialize = tf.compat.v1.global_variables_initializer()
    add = computation(
        graph.as_graph_def(),
        fed.FunctionType(np.int32, np.int32),
        tensor("x:0"),
        tensor("sum:0"),
        initialize_op=initialize.name + suffix,
    )
    assert [add(1), add(2), add(2)] == [11, 12, 12]


def test_sequences_by_their_variant(tf):
    element = {"b": tf.TensorSpec((2,), tf.int64), "a": tf.TensorSpec((), tf.string)}
    with tf.Graph().as_default() as graph:
        variant = tf.compat.v1.placeholder(tf.variant, (), name="data")
        data = tf.data.experimental.from_variant(variant, element)
        data.reduce("", lambda state, row: tf.strings.join([state, row["a"], tf.strings.as_string(row["b"][0])]))
        reduced = graph.get_operations()[-1].outputs[0].name
        doubled = data.map(lambda row: {"b": 2 * row["b"], "a": row["a"]}).skip(1)
        result = tf.identity(tf.data.experimental.to_variant(doubled)).name
    batch = [("b", fed.TensorType(np.int64, (2,))), ("a", np.str_)]  # in an order that tf.data sorts
    both = computation(
        graph.as_graph_def(),
        fed.FunctionType(fed.SequenceType(batch), [np.str_, fed.SequenceType(batch)]),
        sequence("data:0"),
        struct(tensor(reduced), sequence(result)),
    )
    rows = [{"b": np.array([i, 2**40]), "a": name} for i, name in enumerate(["x", "y", "z"])]
    text, tail = both(rows)
    assert text == b"x0y1z2"
    assert [row["a"] for row in tail] == [b"y", b"z"]
    np.testing.assert_array_equal([row["b"] for row in tail], [[2, 2**41], [4, 2**41]])
    text, tail = both([])
    assert (text, tail) == (b"", [])


def test_sequences_by_the_graph_that_makes_them(tf):
    with tf.Graph().as_default() as graph:
        serialized = tf.compat.v1.placeholder(tf.string, (), name="data")
        variant = tf.raw_ops.DatasetFromGraph(graph_def=serialized)
        data = tf.data.experimental.from_variant(variant, tf.TensorSpec((), tf.int32))
        total = data.reduce(0, lambda state, row: state + row).name
    binding = Binding(sequence={"graph_def_tensor_name": "data:0"})
    type_ = fed.FunctionType(fed.SequenceType(np.int32), [np.int32, fed.SequenceType(np.int32)])
    both = computation(graph.as_graph_def(), type_, binding, struct(tensor(total), binding))
    assert both([1, 2, 4]) == (7, [1, 2, 4])


def test_a_token_of_the_session_is_fed(tf):
    with tf.Graph().as_default() as graph:
        token = tf.compat.v1.placeholder(tf.string, (), name="token")
        tf.strings.length(token, name="length")
    length = computation(
        graph.as_graph_def(),
        fed.FunctionType(None, np.int32),
        None,
        tensor("length:0"),
        session_token_tensor_name="token:0",
    )
    assert length() > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"type_url": "type.googleapis.com/tensorflow.MetaGraphDef"}, "with a tensorflow.GraphDef, found 'type"),
        ({"value": b"\xff\xff\xff"}, "found 3 bytes that are none"),
        ({"op": "NoSuchOperation"}, r"that TensorFlow 2\.21.* reads.*NoSuchOperation"),
        ({"result": struct(tensor("y:0"))}, "with a binding for the type int32, found struct"),
        ({"result": tensor("z:0")}, "that TensorFlow .* reads.*z:0"),
        ({"result": tensor("y:7")}, "that TensorFlow .* reads"),
        ({"result": tensor("name:0")}, "whose result 'name:0' is of type int32, found string"),
        ({"parameter": Binding()}, "with a binding for the type int32, found none"),
    ],
)
def test_damaged_payloads_are_refused(tf, damage, message):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.int32, (), name="x")
        tf.negative(x, name="y")
        tf.strings.as_string(x, name="name")
    graph_def = graph.as_graph_def()
    if "op" in damage:
        graph_def.node.add(name="extra", op=damage["op"])
    made = computation(
        graph_def,
        fed.FunctionType(np.int32, np.int32),
        damage.get("parameter", tensor("x:0")),
        damage.get("result", tensor("y:0")),
    )
    proto = made.to_proto()
    for field in ("type_url", "value"):
        if field in damage:
            setattr(proto.tensorflow.graph_def, field, damage[field])
    with pytest.raises(UnsupportedError, match=message):
        fed.framework.ConcreteComputation.from_proto(proto)(3)
