"""The generic operators (zero, plus, multiply, divide) over federated values: the same operator, mapped at each place.

The language's Python operators never emit them; other compilers and hand-written building blocks do. Structs are taken
apart until a federated value is reached, so that `generic_plus` of `<a=int32@SERVER,b={int32}@CLIENTS>` becomes one
`federated_apply` and one `federated_map` of an unplaced `generic_plus`.
"""

from __future__ import annotations

from typing import TypeAlias

import federated_language as fl
from federated_language import framework

from fedlens.compiler.operations import unsupported
from fedlens.errors import UnsupportedError

Block: TypeAlias = framework.ComputationBuildingBlock


def holds_federated(type_: fl.Type) -> bool:
    """Whether a federated value occurs in a type."""
    return framework.type_contains(type_, lambda part: isinstance(part, fl.FederatedType))


def placed_zero(uri: str, type_: fl.Type) -> Block:
    """The zero of a type with federated values in it; at the clients it is equal at all."""
    if isinstance(type_, fl.StructType):
        return framework.Struct([(name, placed_zero(uri, field)) for name, field in type_.items()])
    if isinstance(type_, fl.FederatedType):
        return framework.create_federated_value(
            framework.Intrinsic(uri, _computable(uri, type_.member)), type_.placement
        )
    return framework.Intrinsic(uri, _computable(uri, type_))


def placed(uri: str, type_: fl.Type, first: Block, second: Block) -> Block:
    """An operator of two operands with federated values in them.

    Args:
      uri: which operator.
      type_: the type of its result.
      first: its first operand.
      second: its second operand, of the same structure.

    Raises:
      UnsupportedError: operands that are equal at all clients, or not made of tensors.
    """
    if isinstance(type_, fl.StructType):
        return framework.Struct(
            [
                (
                    name,
                    placed(
                        uri, field, framework.Selection(first, index=index), framework.Selection(second, index=index)
                    ),
                )
                for index, (name, field) in enumerate(type_.items())
            ]
        )
    both = framework.Struct([first, second])
    if not isinstance(type_, fl.FederatedType):
        operands = fl.StructType([_computable(uri, first.type_signature), _computable(uri, second.type_signature)])
        return framework.Call(framework.Intrinsic(uri, fl.FunctionType(operands, type_)), both)
    if type_.placement is fl.CLIENTS and type_.all_equal:
        raise UnsupportedError(
            f"Expected {uri} of values at the server or of clients' own values, found {type_}, which is "
            "equal at all clients. Apply it at the server, before the broadcast."
        )
    members = fl.StructType([_computable(uri, each.type_signature.member) for each in (first, second)])
    function = framework.Intrinsic(uri, fl.FunctionType(members, type_.member))
    return framework.create_federated_map_or_apply(function, framework.create_federated_zip(both))


def _computable(uri: str, type_: fl.Type) -> fl.Type:
    if not framework.is_generic_op_compatible_type(type_):
        raise unsupported(f"{uri} of {type_}")
    return type_
