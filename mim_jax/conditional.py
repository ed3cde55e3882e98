"""Conditional updates of a state, in the form that is fastest on each device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def update_if(usable: jax.Array, update: Callable[[], Any], state: Any) -> Any:
    """Returns update() if `usable` (), otherwise `state` with the counters of update().

    Counters are all arrays that do not consist of floating-point numbers. On a CPU, a branch takes
    less time and memory than a selection. On a TPU it would keep the compiler from fusing updates
    with other operations: a step of BEiT-B would take 6 % longer.
    """
    branch = functools.partial(by_branch, update=update, state=state)
    selection = functools.partial(by_selection, update=update, state=state)
    return jax.lax.platform_dependent(usable, cpu=branch, default=selection)


def by_branch(usable: jax.Array, update: Callable[[], Any], state: Any) -> Any:
    """Computes one of the two results."""

    def skip() -> Any:
        def advance(old: jax.Array, new: jax.Array) -> jax.Array:
            return new if is_counter(old) else old

        return jax.tree.map(advance, state, update())  # only counters are computed

    return jax.lax.cond(usable, update, skip)


def by_selection(usable: jax.Array, update: Callable[[], Any], state: Any) -> Any:
    """Computes the update, and selects between the old and the new value of every number."""

    def select(old: jax.Array, new: jax.Array) -> jax.Array:
        return new if is_counter(old) else jnp.where(usable, new, old)

    return jax.tree.map(select, state, update())


def is_counter(x: jax.Array) -> bool:
    """Returns whether an array does not consist of floating-point numbers."""
    return not jnp.issubdtype(x.dtype, jnp.inexact)
