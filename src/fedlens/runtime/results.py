"""Results: what a plan computed, in the form in which a caller gets it."""

from __future__ import annotations

from typing import Any

import federated_language as fl
import jax
import numpy as np

from fedlens import trees
from fedlens.compiler.normalize import Block
from fedlens.compiler.stages import result_parts
from fedlens.language.types import is_at_clients
from fedlens.runtime.replicas import on_one_device
from fedlens.runtime.sequences import elements


def client_results(block: Block, type_: fl.Type) -> list[tuple[str, str, fl.Type]]:
    """The clients-placed parts of a result: path, name of the step, member type."""
    return [
        (path, part.name, part_type.member)
        for path, part, part_type in result_parts(block, type_)
        if is_at_clients(part_type)
    ]


def handed_out(value: Any, type_: fl.Type) -> Any:
    """A positional value in the containers of its type, a sequence as a list of its elements.

    Arrays are ordinary ones: on one device, and in NumPy where JAX outside of 64-bit mode would narrow them.
    """
    if isinstance(type_, fl.SequenceType):
        return [handed_out(element, type_.element) for element in elements(value, type_.element)]
    if isinstance(type_, fl.StructType):
        fields = zip(type_.items(), value, strict=True)
        return trees.build(
            type_.python_container, [(name, handed_out(child, field)) for (name, field), child in fields]
        )
    if not isinstance(value, jax.Array):
        return value
    if value.dtype.itemsize > (8 if value.dtype.kind == "c" else 4):
        return np.asarray(value)
    return on_one_device(value) if len(value.sharding.device_set) > 1 else value
