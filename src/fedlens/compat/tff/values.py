"""Values as TFF hands them out and takes them: structs with attributes, lists of client values, NumPy leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np

from fedlens import trees
from fedlens.runtime import ClientValues


class AttributeDict(dict[str, Any]):
    """A struct with names: `result.client_weights` is `result["client_weights"]`.

    A pytree of JAX whose fields keep their order. A field that is called like a method of dict is reached by its key.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"Expected one of the fields {', '.join(self) or 'of an empty struct'}, found {name!r}.")


jax.tree_util.register_pytree_with_keys(
    AttributeDict,
    lambda struct: ([(jax.tree_util.DictKey(name), value) for name, value in struct.items()], tuple(struct)),  # type: ignore[arg-type, return-value]
    lambda names, children: AttributeDict(zip(names, children, strict=True)),
)


class ClientList(Sequence[Any]):
    """One value for each client, in cohort order: TFF's list, which also knows the clients' ids.

    Example:
      >>> for number, weights in enumerate(result.client_weights): ...
      >>> result.client_weights[0].kernel, result.client_weights["alice"].kernel

    Attributes:
      ids: the client ids; "0" to "n-1" where the argument was a list.
      values: the same as fedlens's `ClientValues`, for `stacked` and as an argument of other computations.
    """

    def __init__(self, values: ClientValues):
        """Takes what the clients returned."""
        self.values = values
        self.ids = values.ids

    @overload
    def __getitem__(self, key: int | str) -> Any: ...

    @overload
    def __getitem__(self, key: slice) -> list[Any]: ...

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, str):
            return in_tff_form(self.values[key])
        if isinstance(key, slice):
            return [self[client_id] for client_id in self.ids[key]]
        return self[self.ids[key]]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Any]:
        return map(in_tff_form, self.values)

    def items(self) -> Iterator[tuple[str, Any]]:
        """The client ids with their values, in cohort order."""
        return zip(self.ids, self, strict=True)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | ClientList) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"ClientList{repr(self.values).removeprefix('ClientValues')}"


def in_tff_form(value: Any) -> Any:
    """A result of fedlens as TFF would hand it out.

    Args:
      value: containers of arrays and client values.

    Returns:
      Dicts as `AttributeDict`, client values as `ClientList`, JAX arrays as NumPy's; other containers as they are.
    """
    if isinstance(value, ClientValues):
        return ClientList(value)
    if isinstance(value, jax.Array):
        return np.asarray(value)[()]  # a scalar is one of NumPy's
    fields = trees.fields_of(value)
    if fields is None:
        return value
    container = AttributeDict if isinstance(value, dict) else type(value)
    return trees.build(container, [(name, in_tff_form(child)) for name, child in fields])


def from_tff_form(value: Any) -> Any:
    """An argument of a TFF program as fedlens takes it: client values in place of client lists, wherever they are."""
    if isinstance(value, ClientList):
        return value.values
    fields = trees.fields_of(value)
    if fields is None or not any(_holds_client_list(child) for _, child in fields):
        return value
    return trees.build(type(value), [(name, from_tff_form(child)) for name, child in fields])


def _holds_client_list(value: Any) -> bool:
    return isinstance(value, ClientList) or any(_holds_client_list(child) for _, child in trees.fields_of(value) or ())
