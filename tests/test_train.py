"""The training loop: the same run on any devices, in any number of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.objectives import Objective, per_example
from mim_jax.sharding import make_mesh, place
from mim_jax.train import evaluate, initialize, train
from tests.tiny_run import (
    EXAMPLE,
    OBJECTIVE,
    OPTIMIZER,
    ROWS,
    STEPS,
    batches_from,
    numbers,
    run,
    start,
)


@pytest.fixture(scope="module")
def reference():
    return run(1)


def test_the_loss_falls(reference):
    assert [row[0] for row in reference] == [1, 2, 3, 4, 5]
    losses = numbers(reference)[:, 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("devices", "fsdp", "accumulate"),
    [(2, 1, 1), (8, 1, 1), (1, 1, 4), (2, 1, 8), (8, 1, 2), (8, 8, 1), (8, 4, 2)],
)
def test_devices_and_parts_change_nothing(reference, devices, fsdp, accumulate):
    other = run(devices, fsdp=fsdp, accumulate=accumulate)
    np.testing.assert_allclose(numbers(other), numbers(reference), rtol=1e-5)


def test_every_step_draws_new_masks():
    """The same images in every batch and a step of length zero: only the masks differ."""

    def loss(params, buffers, batch, rng, step):
        total, _, rest = OBJECTIVE.loss(params, buffers, batch, rng, step)
        return total * 0 + jax.random.uniform(per_example(rng, batch["index"])[3]), 1, rest

    def same_batches(step):
        yield from [next(batches_from(0))] * (STEPS - step)

    seen = numbers(run(objective=OBJECTIVE._replace(loss=loss), batches=same_batches))[:, 0]
    assert len(set(seen.tolist())) == STEPS


@pytest.mark.parametrize(("devices", "rows"), [(1, 7), (2, 8), (8, 16)])
def test_evaluation_counts_each_example_once(devices, rows):
    """13 examples in batches of any size: the mean is over 13, and padding of NaN never counts."""
    values = np.arange(13, dtype=np.float32)

    def batches():
        for first in range(0, 13, rows):
            index = np.arange(first, first + rows)
            value = np.where(index < 13, values[np.minimum(index, 12)], np.nan)
            yield {"value": value.astype(np.float32), "valid": (index < 13).astype(np.float32)}

    def measure(params, buffers, batch, rng):
        return {"mean": batch["value"], "pair": jnp.stack([batch["value"], 2 * batch["value"]], 1)}

    objective = Objective(None, None, measure, None, lambda means: means | {"more": 1.0})
    mesh = make_mesh(jax.devices()[:devices])
    state = start(mesh)
    means = evaluate(objective, state, batches(), mesh=mesh, seed=0)
    assert means["mean"] == 6.0
    assert means["pair"].tolist() == [6.0, 12.0]
    assert means["more"] == 1.0


def test_the_average_follows_the_parameters_and_is_what_is_evaluated():
    mesh = make_mesh(jax.devices()[:1])
    begin = functools.partial(initialize, OBJECTIVE, OPTIMIZER, EXAMPLE, 0, True)
    state = jax.jit(begin, out_shardings=place(jax.eval_shape(begin), mesh))()
    expected = jax.device_get(state.params)
    steps = train(
        OBJECTIVE, OPTIMIZER, batches_from, state=state, mesh=mesh, steps=STEPS, seed=0, ema=0.9
    )
    for _, after, _ in steps:
        now = jax.device_get(after.params)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, now)
        state = jax.device_get(after)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        state.ema,
        expected,
    )
    assert state.averaged is state.ema
    batch = dict(next(iter(batches_from(0))), valid=np.ones(ROWS, np.float32))
    whole = evaluate(OBJECTIVE, state, [batch], mesh=mesh, seed=0)
    plain = evaluate(OBJECTIVE, state._replace(ema=None), [batch], mesh=mesh, seed=0)
    assert whole["loss"] != plain["loss"]
