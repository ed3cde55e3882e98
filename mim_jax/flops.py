"""Floating-point operations of a training step, and the peaks of chips.

The utilization (MFU) of a chip is the number of operations per second that the model requires,
divided by the chip's peak. Only matrix products and convolutions count, with two operations per
multiply-add, as in the PaLM paper (Chowdhery et al., 2022, appendix B).
"""

import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

# Dense bfloat16 operations per second of one JAX device, by a part of its name, from the vendors'
# data sheets. A device of TPU v2 and v3 is one of a chip's two cores.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p, whose name is "TPU v5"
    "TPU v6": 918e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
}


def peak(device_kind: str) -> float:
    """Returns the bfloat16 operations per second of a device, 0 if they are unknown."""
    return next((value for name, value in PEAKS.items() if name in device_kind), 0.0)


def step_flops(step: ClosedJaxpr) -> float:
    """Returns the operations of a traced step on each device.

    Unused results, such as the gradient of the images, do not count.
    """
    jaxpr = step.jaxpr
    return count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def count(jaxpr: Jaxpr) -> float:
    """Returns the operations of matrix products and convolutions in a program.

    Of a `cond` the most expensive branch counts, of a `while` one iteration.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = settings["dimension_numbers"]
            products = math.prod(shape_of(equation.invars[0])[axis] for axis in left)
            total += 2 * products * math.prod(shape_of(equation.outvars[0]))
        elif name == "conv_general_dilated":
            kernel = shape_of(equation.invars[1])
            products = math.prod(kernel) // kernel[settings["dimension_numbers"].rhs_spec[0]]
            outputs = math.prod(shape_of(equation.outvars[0]))
            total += 2 * products * outputs / math.prod(settings["lhs_dilation"])
        elif name == "cond":
            total += max(count(branch.jaxpr) for branch in settings["branches"])
        elif name != "pallas_call":  # the plain implementation counts instead
            rounds = settings["length"] if name == "scan" else 1
            total += rounds * sum(count(inner) for inner in inside(settings))
    return total


def shape_of(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a program."""
    return variable.aval.shape


def inside(settings: Mapping[str, Any]) -> list[Jaxpr]:
    """Returns the programs among the parameters of an operation."""
    programs = []
    for value in settings.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if isinstance(entry, ClosedJaxpr):
                programs.append(entry.jaxpr)
            elif isinstance(entry, Jaxpr):
                programs.append(entry)
    return programs
