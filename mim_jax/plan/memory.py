"""Estimates the memory of a traced step, for devices that the step is not compiled for."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mim_jax.flops import inside

BLOCKS = ("shard_map", "scan", "while", "cond")  # not fused with other operations


def peak(jaxpr: Jaxpr) -> float:
    """Returns the largest number of bytes of a program's arrays that exist at the same time.

    Operations run in order, and an array exists until its last use. The branch of a `cond` with the
    smallest peak counts: for attention, it is a kernel that does not store the weights.
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
    """Returns the bytes that the programs inside an operation need in addition to its operands."""
    inner = inside(equation.params)
    if not inner or equation.primitive.name == "pallas_call":
        return 0.0
    sizes = [peak(each) - sum(map(size, each.invars)) for each in inner]
    return min(sizes) if equation.primitive.name == "cond" else max(sizes)


def step_peak(step: ClosedJaxpr) -> float:
    """Returns the peak bytes per device of a traced step's gradient computation, its shard_map.

    It does not include the part of the state that only the optimizer uses.
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
