"""The intrinsics of the language, by where they run and what a plan does with them.

The names are those of `federated_language.framework`'s intrinsic definitions. Whatever is in none of these sets is
refused by name.
"""

from __future__ import annotations

import federated_language as fl
import numpy as np

from fedlens.errors import LanguageError, UnsupportedError
from fedlens.language.types import contains_sequence, leaf_paths, tensor_types

MAP, EVAL, ZIP = "federated_map", "federated_eval_at_clients", "federated_zip_at_clients"
SELECTS = {"federated_select", "federated_secure_select"}
AT_CLIENTS = {MAP, EVAL, ZIP} | SELECTS
# Clients-placed and equal at all: computed once, at the server, and its value serves every client.
SHARED = {"federated_broadcast", "federated_value_at_clients", "federated_map_all_equal"}
AT_SERVER = {"federated_apply", "federated_eval_at_server", "federated_value_at_server", "federated_zip_at_server"}

# The same at either placement, or equal at all clients.
MAPS = {MAP, "federated_map_all_equal", "federated_apply"}
EVALS = {EVAL, "federated_eval_at_server"}

MEANS = {"federated_mean", "federated_weighted_mean"}
EXTREMES = {"federated_min", "federated_max"}
SECURE_SUMS = {"federated_secure_sum", "federated_secure_sum_bitwidth"}
REDUCTIONS = {"federated_sum", "federated_aggregate"} | MEANS | EXTREMES | SECURE_SUMS

SEQUENCES = {"sequence_map", "sequence_reduce", "sequence_sum"}
GENERIC = {"generic_zero", "generic_plus", "generic_multiply", "generic_divide"}
UNPLACED = SEQUENCES | GENERIC  # they run wherever their operands are

LOCAL_CALL = "local"  # the call of a local computation outside of any placement
ELEMENTS = "elements"  # the elements of a select, stacked: how a sequence leaves a client

_REDUCIBLE = {  # what the language lets each reduction reduce, said in words and as kinds of NumPy's dtypes
    "federated_sum": ("numbers", "iufc"),
    "federated_mean": ("floating-point or complex numbers", "fc"),
    "federated_weighted_mean": ("floating-point or complex numbers", "fc"),
    "federated_min": ("integers or floating-point numbers", "iuf"),
    "federated_max": ("integers or floating-point numbers", "iuf"),
    "federated_secure_sum": ("integers", "iu"),
    "federated_secure_sum_bitwidth": ("integers", "iu"),
}


def unsupported(uri: str) -> UnsupportedError:
    """The error for an intrinsic that has no place here."""
    return UnsupportedError(f"Expected an intrinsic that fedlens executes, found {uri!r}.")


def check_reducible(operation: str, name: str, type_: fl.Type) -> None:
    """Checks that a reduction can reduce values of a type; the language's operators do, hand-written IR may not.

    Args:
      operation: the URI of a reduction.
      name: what errors call the step.
      type_: the type of what is reduced; of the accumulator, for an aggregate.

    Raises:
      LanguageError: a dtype that the language refuses in this reduction.
      UnsupportedError: a sequence, or a tensor whose shape is not known.
    """
    if contains_sequence(type_):
        raise UnsupportedError(f"Expected tensors to reduce in {name}, found {type_}. Fold the sequences first.")
    words, kinds = _REDUCIBLE.get(operation, ("", ""))
    for path, tensor in zip(leaf_paths(type_), tensor_types(type_), strict=True):
        if tensor.shape is None or None in tensor.shape:
            raise UnsupportedError(
                f"Expected a value of known shape in {name}, found {tensor} in leaf {path or 'value'!r}. "
                "Give every dimension: an accumulator keeps its shape from client to client."
            )
        kind = "f" if tensor.dtype.name == "bfloat16" else np.dtype(tensor.dtype).kind
        if kinds and kind not in kinds:
            raise LanguageError(f"Expected {words} in {name}, found {tensor} in leaf {path or 'value'!r}.")
