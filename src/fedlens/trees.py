"""Pytrees as named leaves: flatten a nested Python value in the order of its own fields, and build it up again.

JAX sorts the keys of a plain `dict`; Google's Federated Language addresses fields by position in the order they were
written. fedlens therefore walks containers itself: `dict` and other mappings, `list`, `tuple`, `NamedTuple`,
dataclasses, attrs classes and `None` (an empty container) are nodes, everything else is a leaf. A leaf's path joins the
field names and positions with "/": `dense/kernel`, `layers/0/bias`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from fedlens.errors import StructureError

PyTree = Any  # nested containers with arrays as leaves
Skeleton = Any  # the containers alone, as JSON: see `skeleton`


def fields_of(node: object) -> list[tuple[str | None, Any]] | None:
    """The fields of a container as (name, value), names being None in a list or tuple; None when `node` is a leaf."""
    if node is None:
        return []
    if isinstance(node, Mapping):
        return [(_field_name(key), value) for key, value in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return [(None, value) for value in node]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    if hasattr(type(node), "__attrs_attrs__"):
        return [(field.name, getattr(node, field.name)) for field in getattr(type(node), "__attrs_attrs__")]  # noqa: B009
    return None


def _field_name(key: object) -> str:
    if not isinstance(key, str):
        raise StructureError(f"Expected the keys of a mapping to be strings, found {key!r}, a {type(key).__name__}.")
    return key


def build(container: type | None, items: Iterable[tuple[str | None, Any]]) -> Any:
    """Builds one container from its fields; without a class, a dict if they are named, else a tuple.

    Raises:
      StructureError: `container` is a class that cannot be built from fields.
    """
    pairs = list(items)
    if container is type(None):
        return None
    if container is None:
        named = bool(pairs) and all(name is not None for name, _ in pairs)
        return dict(pairs) if named else tuple(value for _, value in pairs)
    if issubclass(container, Mapping):
        return container(pairs)  # type: ignore[call-arg]
    if hasattr(container, "_fields") or dataclasses.is_dataclass(container) or hasattr(container, "__attrs_attrs__"):
        return container(**{str(name): value for name, value in pairs})
    if issubclass(container, list | tuple):
        return container(value for _, value in pairs)
    raise StructureError(f"Expected a container class that fields can build, found {container.__name__}.")


def items(tree: PyTree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of `tree` with their paths, in field order. A leaf at the root has the path ""."""
    fields = fields_of(tree)
    if fields is None:
        yield prefix, tree
        return
    for position, (name, value) in enumerate(fields):
        step = str(position) if name is None else name
        yield from items(value, f"{prefix}/{step}" if prefix else step)


def leaves(tree: PyTree) -> list[Any]:
    """The leaves of `tree` in field order."""
    return [leaf for _, leaf in items(tree)]


def map(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Applies `function` to each leaf of `tree` and to the leaves of `rest` in the same places; keeps containers."""
    fields = fields_of(tree)
    if fields is None:
        return function(tree, *rest)
    others = [fields_of(other) for other in rest]
    if any(other is None or len(other) != len(fields) for other in others):
        raise StructureError("Expected trees of one structure, found different containers.")
    return build(
        type(tree),
        [
            (name, map(function, value, *(other[position][1] for other in others if other is not None)))
            for position, (name, value) in enumerate(fields)
        ],
    )


def get(tree: PyTree, path: str) -> Any:
    """The part of `tree` at `path`.

    Raises:
      KeyError: there is no such path.
    """
    node = tree
    for step in path.split("/") if path else []:
        fields = fields_of(node)
        if fields is None:
            raise KeyError(path)
        by_step = {str(position) if name is None else name: value for position, (name, value) in enumerate(fields)}
        if step not in by_step:
            raise KeyError(path)
        node = by_step[step]
    return node


def skeleton(tree: PyTree) -> Skeleton:
    """The containers of `tree` as JSON, to rebuild it from its leaves alone.

    A leaf is `null`, a list or tuple a JSON array, everything with named fields an array of [name, skeleton] pairs
    under "fields", which keeps their order. Classes are not named: what was a NamedTuple or dataclass comes back as a
    dict, so that nothing which a file says decides which code runs.
    """
    fields = fields_of(tree)
    if fields is None:
        return None
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return [skeleton(value) for _, value in fields]
    return {"fields": [[name, skeleton(value)] for name, value in fields]}


def from_skeleton(shape: Skeleton, leaves_in_order: Sequence[Any]) -> PyTree:
    """Rebuilds a tree of dicts and lists from its `skeleton` and its leaves in field order.

    Raises:
      StructureError: there are more or fewer leaves than the skeleton has places.
    """
    remaining = iter(leaves_in_order)

    def rebuild(node: Skeleton) -> Any:
        if node is None:
            try:
                return next(remaining)
            except StopIteration:
                raise StructureError(f"Expected more leaves than {len(leaves_in_order)} for this structure.") from None
        if isinstance(node, list):
            return [rebuild(child) for child in node]
        return {name: rebuild(child) for name, child in node["fields"]}

    tree = rebuild(shape)
    if next(remaining, remaining) is not remaining:
        raise StructureError(f"Expected fewer leaves than {len(leaves_in_order)} for this structure.")
    return tree


def size(tree: PyTree) -> int:
    """The number of scalars in all leaves (arrays with a `shape`)."""
    return sum(reduce(operator.mul, leaf.shape, 1) for leaf in leaves(tree))
