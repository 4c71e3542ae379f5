"""What users write: computations, the sequences they fold over, and the types of both."""

from fedlens.language.host_computation import HostComputation as HostComputation
from fedlens.language.intrinsics import federated_map as federated_map
from fedlens.language.intrinsics import federated_zip as federated_zip
from fedlens.language.jax_computation import jax_computation as jax_computation
from fedlens.language.local_computation import LocalComputation as LocalComputation
from fedlens.language.local_computation import batch_type as batch_type
from fedlens.language.portable import to_portable as to_portable
from fedlens.language.python_computation import python_computation as python_computation
from fedlens.language.sequence import Sequence as Sequence
from fedlens.language.tensorflow_computation import tensorflow_computation as tensorflow_computation
from fedlens.language.types import type_of as type_of
