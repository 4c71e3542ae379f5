"""Portable computations: proto bytes alone are enough to run one, in any process that imports fedlens.

In process a local computation's payload is a registry key. `to_portable` replaces each by StableHLO that `jax.export`
serialised, lowered as JAX itself does it, for several platforms. Reading such a payload runs no Python of whoever made
it. An exported program has no batching rule: under `vmap` it runs one client after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import federated_language as fl
import jax
from federated_language import framework
from federated_language.proto import computation_pb2
from jax import export
from jax.custom_batching import sequential_vmap

from fedlens.errors import LanguageError, UnsupportedError
from fedlens.language import portable_form
from fedlens.language.host_computation import HostComputation
from fedlens.language.local_computation import LocalComputation, from_proto
from fedlens.language.portable_payload import PORTABLE, Payload, decode, encode
from fedlens.language.types import from_positional, tensor_types

_CUSTOM_CALL = re.compile(r'custom_call\s*@"?([^\s"(]+)|call_target_name\s*=\s*"([^"]+)"')


def to_portable(
    computation: framework.ConcreteComputation, *, platforms: Sequence[str] = ("cpu", "cuda")
) -> framework.ConcreteComputation:
    """The same computation with all of its local computations embedded as StableHLO.

    Example:
      >>> @fed.jax_computation(np.float32)
      ... def double(x):
      ...     return 2 * x
      >>> data = fed.to_portable(double).to_proto().SerializeToString()

    and in another process, with `computation_pb2` from `federated_language.proto`:

      >>> proto = computation_pb2.Computation.FromString(data)
      >>> float(fed.framework.ConcreteComputation.from_proto(proto)(np.float32(4)))
      8.0

    Results equal those of the original up to rounding, but for their containers when they come from a proto, which
    knows names and positions only: dicts and tuples.

    Args:
      computation: a computation with concrete types; what is portable in it already stays as it is.
      platforms: where it shall run, as JAX names them.

    Returns:
      A computation of the same type. Here, its results keep their containers.

    Raises:
      LanguageError: `computation` has no types yet, or is no computation.
      UnsupportedError: a local computation cannot be exported, and is named: it calls back into Python
        (`python_computation`, `jax.pure_callback`, `jax.debug.print`), or uses an operation that some platform lacks or
        whose form JAX does not keep stable.
    """
    if not isinstance(computation, framework.ConcreteComputation):
        raise LanguageError(
            f"Expected a computation with concrete types, found {type(computation).__name__}. "
            "Give the types of its arguments to the decorator."
        )
    proto = computation_pb2.Computation()
    proto.CopyFrom(computation.to_proto())
    exported: dict[bytes, bytes] = {}  # a local computation that occurs several times is exported once
    for payload in _local_payloads(proto):
        if payload.WhichOneof("computation") == "xla" and payload.xla.hlo_module.type_url != PORTABLE:
            key = payload.SerializeToString(deterministic=True)
            if key not in exported:
                exported[key] = encode(_export(from_proto(payload), tuple(platforms)))
            payload.xla.hlo_module.value = exported[key]
            payload.xla.hlo_module.type_url = PORTABLE
    return framework.ConcreteComputation(
        computation_proto=proto,
        context_stack=framework.get_context_stack(),
        annotated_type=computation.type_signature,
    )


def _local_payloads(message: Any) -> Iterator[computation_pb2.Computation]:
    """The computations inside a proto that are opaque payloads, wherever they stand."""
    if isinstance(message, computation_pb2.Computation) and message.WhichOneof("computation") in ("xla", "tensorflow"):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _local_payloads(child)


def _export(local: LocalComputation | HostComputation, platforms: tuple[str, ...]) -> Payload:
    if isinstance(local, HostComputation):
        raise UnsupportedError(
            f"Expected a computation of JAX operations to make portable, found the Python computation {local.name!r}, "
            "which is never traced. Declare it again in the process that runs it."
        )
    parameter, result = local.type_signature.parameter, local.type_signature.result
    for tensor in [*(tensor_types(parameter) if parameter is not None else ()), *tensor_types(result)]:
        if tensor.shape is None or None in tensor.shape or tensor.dtype.kind in "US":
            raise UnsupportedError(
                f"Expected numbers in arrays of known shape in a computation to make portable, found {tensor} in "
                f"{local.name!r}. Use batches of one size with a mask (fed.batch_type)."
            )
    with jax.enable_x64(local.wide):
        programs = {_key(form): _export_form(local, form, platforms) for form in portable_form.forms(parameter)}
    return Payload(local.name, local.wide, programs, unchanged=local.unchanged, mechanism=local.mechanism)


def _export_form(local: LocalComputation, form: portable_form.Form, platforms: tuple[str, ...]) -> bytes:
    parameter = local.type_signature.parameter

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        argument = () if parameter is None else (portable_form.unflatten(arrays, parameter, form),)
        return jax.tree.leaves(local(*argument))

    try:
        exporting = export.export(jax.jit(flat), platforms=platforms)
        return bytes(exporting(*portable_form.arguments(parameter, form)).serialize())
    except Exception as error:  # it was traced when it was written: what fails now is the export, in many classes
        first_line = next(iter(str(error).splitlines()), "")
        raise UnsupportedError(
            f"Expected a function that jax.export serialises for {' and '.join(platforms)}, found {local.name!r}, "
            f"which fails with {type(error).__name__}: {first_line} Callbacks into Python (jax.debug.print, "
            "jax.pure_callback) cannot travel, nor Python code that depends on how many rows a sequence has; "
            'platforms=("cpu",) helps where another platform lacks an operation.'
        ) from error


def _key(form: portable_form.Form) -> str:
    return ", ".join(map(str, form))


def from_portable_proto(proto: computation_pb2.Computation) -> LocalComputation:
    """The local computation in a portable payload; read once, however often it is asked for.

    Raises:
      UnsupportedError: the payload is damaged, does not fit its type, calls into Python, or needs a newer JAX.
    """
    return _load(proto.xla.hlo_module.value, proto.type.SerializeToString(deterministic=True))


@lru_cache(maxsize=1024)
def _load(value: bytes, type_bytes: bytes) -> LocalComputation:
    payload = decode(value)
    type_signature = fl.FunctionType.from_proto(computation_pb2.Type.FromString(type_bytes))
    parameter, result = type_signature.parameter, type_signature.result
    keys = {_key(form): form for form in portable_form.forms(parameter)}
    if keys.keys() != payload.programs.keys():
        raise _unfit(payload, f"programs for {sorted(keys)}", f"programs for {sorted(payload.programs)}")
    with jax.enable_x64(payload.wide):
        programs = {key: _load_program(payload, key, type_signature, form) for key, form in keys.items()}

    def function(*argument: Any) -> Any:
        form, arrays = portable_form.flatten(argument[0] if argument else (), parameter)
        returned = programs[_key(form)](*arrays)
        return from_positional(portable_form.nested(iter(returned), result), result)

    return LocalComputation(payload.name, function, type_signature, payload.wide, payload.unchanged, payload.mechanism)


def _load_program(
    payload: Payload, key: str, type_signature: fl.FunctionType, form: portable_form.Form
) -> Callable[..., Any]:
    try:
        program = export.deserialize(bytearray(payload.programs[key]))
        text = program.mlir_module()  # fails here, not in the middle of a round, on StableHLO that this JAX cannot read
        newest = export.maximum_supported_calling_convention_version
        if program.calling_convention_version > newest:
            raise ValueError(f"calling convention {program.calling_convention_version} is newer than {newest}")
    except Exception as error:  # whatever a parser meets in bytes that it does not know
        raise UnsupportedError(
            f"Expected an exported program that JAX {jax.__version__} reads in the portable computation "
            f"{payload.name!r}, found one written by JAX {payload.jax_version} ({type(error).__name__}: {error}). "
            "Update JAX here, or make the computation portable again with the version that is here."
        ) from error
    targets = {target for found in _CUSTOM_CALL.findall(text) for target in found}
    if any("callback" in target for target in targets):
        raise UnsupportedError(
            f"Expected a portable computation that computes with StableHLO alone, found {payload.name!r}, which calls "
            f"back into Python through {', '.join(sorted(target for target in targets if 'callback' in target))}."
        )
    expected = (
        portable_form.arguments(type_signature.parameter, form),
        portable_form.results(type_signature.result),
    )
    found = program.in_avals, program.out_avals
    if [_kinds(part) for part in expected] != [_kinds(part) for part in found]:
        raise _unfit(payload, *(" -> ".join(map(str, map(_kinds, sides))) for sides in (expected, found)))
    return jax.jit(sequential_vmap(program.call))


def _kinds(arrays: Sequence[Any]) -> list[str]:
    """Shapes and dtypes, for comparison; dimensions that depend on the cohort are "?"."""
    return [
        f"{array.dtype}[{','.join(str(size) if isinstance(size, int) else '?' for size in array.shape)}]"
        for array in arrays
    ]


def _unfit(payload: Payload, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"Expected the portable computation {payload.name!r} to fit its type, {expected}, found {found}. "
        "Make the computation portable again with fed.to_portable."
    )
