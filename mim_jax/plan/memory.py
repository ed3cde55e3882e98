"""The memory of a traced step by arithmetic, for devices that the step is not compiled for."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mim_jax.flops import inside

BLOCKS = ("shard_map", "scan", "while", "cond")  # what runs on its own arrays, not fused


def peak(jaxpr: Jaxpr) -> float:
    """Returns the bytes of the arrays of a program that exist at the same time, at most.

    Operations run in their order, and an array exists until its last use. Of the alternatives of a
    `cond`, that with the smallest peak counts: of attention, a kernel that stores no weights.
    """
    last: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        last |= {variable: i for variable in equation.invars if not isinstance(variable, Literal)}
    last |= {variable: len(jaxpr.eqns) for variable in jaxpr.outvars if is_variable(variable)}
    inputs = [*jaxpr.invars, *jaxpr.constvars]
    live: dict[Any, int] = {variable: size(variable) for variable in inputs}
    total = highest = sum(live.values())
    for i, equation in enumerate(jaxpr.eqns):
        made = {variable: size(variable) for variable in equation.outvars if variable in last}
        live |= made
        total += sum(made.values())
        highest = max(highest, total, total - sum(made.values()) + extra(equation))
        for variable in filter(is_variable, [*equation.invars, *equation.outvars]):
            if last.get(variable, -1) <= i:
                total -= live.pop(variable, 0)
    return highest


def extra(equation: Any) -> float:
    """Returns the bytes that the programs inside an operation take besides its operands."""
    inner = inside(equation.params)
    if not inner or equation.primitive.name == "pallas_call":
        return 0.0
    sizes = [peak(each) - sum(map(size, each.invars)) for each in inner]
    return min(sizes) if equation.primitive.name == "cond" else max(sizes)


def step_peak(step: ClosedJaxpr) -> float:
    """Returns the bytes on each device of the gradient of a traced step: of its shard_map.

    That is what exists besides the state that only the optimizer uses.
    """
    bodies = [
        each
        for equation in step.jaxpr.eqns
        if equation.primitive.name == "shard_map"
        for each in inside(equation.params)
    ]
    return max(map(peak, bodies), default=peak(step.jaxpr))


def is_variable(x: Any) -> bool:
    """Returns whether an operand is a variable, not a literal."""
    return not isinstance(x, Literal)


def size(x: Any) -> int:
    """Returns the bytes of a variable."""
    return getattr(x.aval, "size", 0) * getattr(x.aval.dtype, "itemsize", 8)
