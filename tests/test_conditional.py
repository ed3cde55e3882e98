"""Both forms of a conditional update give the same, and CPUs and TPUs have their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conditional import by_branch, by_selection, update_if

STATE = {"weights": jnp.array([1.0, 2.0]), "count": jnp.array(7)}


def advanced(loss):
    return {"weights": STATE["weights"] - loss, "count": STATE["count"] + 1}


@pytest.mark.parametrize("function", [by_branch, by_selection, update_if])
@pytest.mark.parametrize(
    ("loss", "weights"), [(0.5, [0.5, 1.5]), (np.nan, [1.0, 2.0]), (np.inf, [1.0, 2.0])]
)
def test_an_update_is_applied_or_only_counters_advance(function, loss, weights):
    def step(loss):
        return function(jnp.isfinite(loss), lambda: advanced(loss), STATE)

    state = jax.jit(step)(loss)
    np.testing.assert_array_equal(state["weights"], weights)
    assert state["count"] == 8


@pytest.mark.parametrize(("platform", "selects"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_only_programs_for_cpus_branch(platform, selects):
    def step(loss):
        return update_if(jnp.isfinite(loss), lambda: advanced(loss), STATE)

    text = jax.jit(step).trace(0.5).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.select" in text) == selects
