"""`min_clients`: how few clients an aggregate may be over before it is refused.

An aggregate over one client is that client's own value, whatever it is called; `fed.disclosure` cannot see how large a
cohort is. Every reduction that an output depends on is counted, whether it runs in the open or as a secure sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import federated_language as fl

from fedlens.compiler import ClientStage, Plan, ServerStage, Step
from fedlens.compiler.normalize import referenced_names
from fedlens.compiler.stages import result_parts
from fedlens.errors import ConfigError, DisclosureError


def checked_min_clients(min_clients: int) -> int:
    """`min_clients` as it is, if it is a number of clients.

    Raises:
      ConfigError: it is no integer of at least 1.
    """
    if isinstance(min_clients, bool) or not isinstance(min_clients, int) or min_clients < 1:
        raise ConfigError(f"Expected min_clients to be an integer of at least 1, found {min_clients!r}.")
    return min_clients


def refuse_few(
    plan: Plan,
    stages: Sequence[ServerStage | ClientStage],
    result_type: fl.Type,
    count: int,
    dropped: int,
    minimum: int,
) -> None:
    """Refuses the reductions of stages if too few clients are in them.

    Args:
      plan: what runs.
      stages: those of its stages that it is about.
      result_type: the type of the result.
      count: how many clients take part; 0 of a computation that has none, and no aggregate that it could run.
      dropped: how many of them were left out because their values were not finite.
      minimum: how many have to be in an aggregate.

    Raises:
      DisclosureError: there are fewer, and something is reduced.
    """
    # A minimum of 1 is none: where everybody was left out, the aggregate over nobody tells about nobody.
    if minimum == 1 or count == 0 or count - dropped >= minimum:
        return
    reduced = {step.name for stage in stages if isinstance(stage, ClientStage) for step in stage.reductions}
    if not reduced:
        return
    names = _computed_from(plan, reduced)
    parts = result_parts(plan.result, result_type)
    outputs = [path or "result" for path, block, _ in parts if referenced_names(block) & names]
    what = f"output{'s' * (len(outputs) > 1)} {', '.join(map(repr, outputs))}" if outputs else "the aggregates"
    left_out = f", as the values of {dropped} more were not finite" if dropped else ""
    raise DisclosureError(
        f"Expected at least {minimum} clients in {what}, found {count - dropped}{left_out}. "
        "An aggregate over few clients tells about each of them: take a larger cohort, or lower min_clients."
    )


def _computed_from(plan: Plan, names: set[str]) -> set[str]:
    """`names`, and the names of all steps that depend on one of them."""
    found = set(names)
    for stage in plan.stages:
        for step in (*stage.body, *(stage.reductions if isinstance(stage, ClientStage) else ())):
            if _read(step) & found:
                found.add(step.name)
    return found


def _read(step: Step) -> set[str]:
    blocks = [block for block in (step.operand, step.function) if block is not None]
    return set[str]().union(*map(referenced_names, blocks))
