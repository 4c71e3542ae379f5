"""Results: what a plan computed, in the form in which a caller gets it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import federated_language as fl
import jax
import numpy as np
from federated_language import framework

from fedlens import trees
from fedlens.runtime.replicas import on_one_device
from fedlens.runtime.sequences import elements


def client_results(block: Any, type_: fl.Type, path: str = "") -> Iterator[tuple[str, str, fl.Type]]:
    """The clients-placed parts of a result: path, name of the step, member type."""
    if isinstance(type_, fl.FederatedType):
        if type_.placement is fl.CLIENTS and not type_.all_equal:
            yield path, block.name, type_.member
    elif isinstance(type_, fl.StructType) and isinstance(block, framework.Struct):
        for position, ((name, field), (_, child)) in enumerate(zip(type_.items(), block.items(), strict=True)):
            yield from client_results(child, field, f"{path}/{position if name is None else name}".lstrip("/"))


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
