"""TFF's names on fedlens: `import fedlens.compat.tff as tff` in a program that was written for TensorFlow Federated.

Computations made here are ordinary ones of the language; what is TFF's is how they are written down, called, and what
they hand out. `docs/tff.md` maps every public name of TFF to one of these, to one of fedlens, or says that there is
none.
"""

from federated_language import Computation as Computation
from federated_language import Value as Value
from federated_language import federated_aggregate as federated_aggregate
from federated_language import federated_broadcast as federated_broadcast
from federated_language import federated_eval as federated_eval
from federated_language import federated_max as federated_max
from federated_language import federated_mean as federated_mean
from federated_language import federated_min as federated_min
from federated_language import federated_secure_select as federated_secure_select
from federated_language import federated_secure_sum as federated_secure_sum
from federated_language import federated_secure_sum_bitwidth as federated_secure_sum_bitwidth
from federated_language import federated_select as federated_select
from federated_language import federated_sum as federated_sum
from federated_language import federated_value as federated_value
from federated_language import framework as framework
from federated_language import program as program
from federated_language import sequence_map as sequence_map
from federated_language import sequence_reduce as sequence_reduce
from federated_language import sequence_sum as sequence_sum
from federated_language import to_value as to_value
from federated_language.common_libs import structure as structure

import fedlens.runtime as _runtime  # asks for the devices, and becomes the language's default context
from fedlens.compat.tff import aggregators as aggregators
from fedlens.compat.tff import backends as backends
from fedlens.compat.tff import jax as jax
from fedlens.compat.tff import learning as learning
from fedlens.compat.tff import templates as templates
from fedlens.compat.tff import tensorflow as tensorflow
from fedlens.compat.tff import types as types
from fedlens.compat.tff.absent import refusing as _refusing
from fedlens.compat.tff.computations import federated_computation as federated_computation
from fedlens.compat.tff.computations import jax_computation as jax_computation
from fedlens.compat.tff.computations import tf_computation as tf_computation
from fedlens.compat.tff.types import CLIENTS as CLIENTS
from fedlens.compat.tff.types import SERVER as SERVER
from fedlens.compat.tff.types import FederatedType as FederatedType
from fedlens.compat.tff.types import FunctionType as FunctionType
from fedlens.compat.tff.types import SequenceType as SequenceType
from fedlens.compat.tff.types import StructType as StructType
from fedlens.compat.tff.types import StructWithPythonType as StructWithPythonType
from fedlens.compat.tff.types import TensorType as TensorType
from fedlens.compat.tff.types import Type as Type
from fedlens.compat.tff.types import TypedObject as TypedObject
from fedlens.compat.tff.types import to_type as to_type
from fedlens.language import federated_map as federated_map
from fedlens.language import federated_zip as federated_zip

del _runtime

# Names of earlier versions of TFF.
federated_average, federated_apply = federated_mean, federated_map
type_at_clients, type_at_server = types.at_clients, types.at_server

__getattr__ = _refusing(__name__)
