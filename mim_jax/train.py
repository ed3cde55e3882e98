"""The one loop for every objective: `for step, state, metrics in train(...)`."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mim_jax.objectives import Objective
from mim_jax.sharding import over_devices, replicated, to_global, whole


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # updates done
    params: dict  # what the optimizer moves
    buffers: dict  # what it does not
    opt_state: optax.OptState
    ema: dict | None = None  # the params' moving average, where the recipe asks for one

    @property
    def averaged(self) -> dict:
        """The parameters to be evaluated."""
        return self.params if self.ema is None else self.ema


def initialize(objective: Objective, optimizer, example: dict, seed: int, ema: bool = False):
    """The state before the first step. `example` {name: ShapeDtypeStruct} is a batch's shape."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    params, buffers = objective.init(jax.random.key(seed), batch)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params), average)


def train_step(
    state: TrainState, batch: dict, rng, *, objective, optimizer, accumulate, mesh, ema=0.0
):
    """One update, the same for every objective: state, batch -> state, metrics {name: ()}."""
    rng = jax.random.fold_in(rng, state.step)

    def total_loss(params, buffers, rows):
        total, weight, (metrics, after) = objective.loss(params, buffers, rows, rng, state.step)
        sums = {"weight": jnp.asarray(weight, total.dtype), "loss": total}
        sums |= {name: mean * weight for name, mean in metrics.items()}
        # What is frozen, as a tokenizer, must not travel between devices.
        return total, (sums, {name: x for name, x in after.items() if x is not buffers[name]})

    gradient = over_devices(jax.grad(total_loss, has_aux=True), mesh, accumulate)
    grads, (sums, changed) = gradient(state.params, state.buffers, batch)
    weight = sums.pop("weight")
    grads, metrics = jax.tree.map(lambda x: x / weight, (grads, sums))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = optax.incremental_update(params, state.ema, 1 - ema) if ema else None
    metrics["grad_norm"] = optax.tree.norm(grads)
    buffers = state.buffers | changed
    return TrainState(state.step + 1, params, buffers, opt_state, average), metrics


def jit_step(objective, optimizer, state: TrainState, *, mesh: Mesh, accumulate=1, ema=0.0):
    """`train_step` for jit, its state donated and left where `state` (or its shapes) is placed."""
    settings = dict(objective=objective, optimizer=optimizer, mesh=mesh)
    settings |= dict(accumulate=accumulate, ema=ema)
    return jax.jit(
        functools.partial(train_step, **settings),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )


def train(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batches_from: Callable[[int], Iterable[dict]],
    *,
    state: TrainState,
    mesh: Mesh,
    steps: int,
    seed: int,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Iterator[tuple[int, TrainState, dict]]:
    """Yields (step, state, metrics) after every update from where `state` stands up to `steps`.

    `batches_from(step)` yields this process's rows of the batches after `step` updates. A yielded
    state is good until the next one is asked for: its memory is then used again.
    """
    rng = jax.random.key(seed)
    step_fn = jit_step(objective, optimizer, state, mesh=mesh, accumulate=accumulate, ema=ema)
    start, before = int(state.step), None
    batches = (to_global(batch, mesh) for batch in batches_from(start))
    batch = next(batches)
    for step in range(start + 1, steps + 1):
        state, metrics = step_fn(state, batch, rng)
        if step < steps:
            batch = next(batches)  # travels while this step runs
        jax.block_until_ready(before)  # two steps in flight, no more: batches take memory
        before = metrics
        yield step, state, metrics


@functools.cache
def evaluate_step(objective: Objective, mesh: Mesh) -> Callable:
    """-> (params, buffers, batch, rng) -> sums over the rows that count, and how many they are."""

    def sums(params, buffers, batch, rng):
        counts = batch["mask"] > 0
        pick = jax.vmap(jnp.where, (0, 0, None))  # padding never counts, not even as NaN * 0
        values = objective.evaluate(params, buffers, batch, rng)
        return jax.tree.map(lambda x: pick(counts, x, 0).sum(0), values), counts.sum()

    return jax.jit(sums, out_shardings=replicated(mesh))


def evaluate(
    objective: Objective, state: TrainState, batches: Iterable[dict], *, mesh: Mesh, seed: int
) -> dict[str, float]:
    """Means over exactly the examples with batch["mask"], whatever the batches and devices."""
    rng, step = jax.random.key(seed), evaluate_step(objective, mesh)
    params, buffers = whole((state.averaged, state.buffers), mesh)
    totals, count = None, 0
    for batch in batches:
        sums, rows = step(params, buffers, to_global(batch, mesh), rng)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = jax.tree.map(np.add, totals, sums) if totals else sums
        count += int(rows)
    return objective.summarize({name: total / count for name, total in totals.items()})
