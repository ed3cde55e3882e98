"""The training loop of every objective: `for step, state, metrics in train(...)`."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mim_jax.conditional import update_if
from mim_jax.objectives import Objective
from mim_jax.sharding import all_gather, over_devices, replicated, to_global

NO_LIMITS = np.full(2, np.finfo(np.float32).max)  # of finite losses and norms


class TrainState(NamedTuple):
    """The state of a run, updated in every step."""

    step: jax.Array  # number of updates so far
    params: dict  # updated by the optimizer
    buffers: dict  # part of the state, but not trained
    opt_state: optax.OptState
    ema: dict | None = None  # moving average of params, if the recipe has one

    @property
    def averaged(self) -> dict:
        """The parameters used for evaluation."""
        return self.params if self.ema is None else self.ema


def initialize(objective: Objective, optimizer, example: dict, seed: int, ema: bool = False):
    """Returns the state before the first step; `example` is a batch, {name: ShapeDtypeStruct}."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    params, buffers = objective.init(jax.random.key(seed), batch)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params), average)


def gradient_of(state: TrainState, batch: dict, rng, *, objective, accumulate, mesh):
    """Computes the gradient, the metrics {name: ()} and the changed buffers of a step."""
    rng = jax.random.fold_in(rng, state.step)

    def total_loss(params, buffers, rows):
        total, weight, (metrics, after) = objective.loss(params, buffers, rows, rng, state.step)
        sums = {"weight": jnp.asarray(weight, total.dtype), "loss": total}
        sums |= {name: mean * weight for name, mean in metrics.items()}
        # Only buffers that changed are averaged over devices, which spares a frozen tokenizer.
        return total, (sums, {name: x for name, x in after.items() if x is not buffers[name]})

    gradient = over_devices(jax.grad(total_loss, has_aux=True), mesh, accumulate)
    grads, (sums, changed) = gradient(state.params, state.buffers, batch)
    weight = sums.pop("weight")
    grads, metrics = jax.tree.map(lambda x: x / weight, (grads, sums))
    metrics["grad_norm"] = optax.tree.norm(grads)
    return grads, metrics, changed


def train_step(
    state, batch, rng, limits=NO_LIMITS, *, objective, optimizer, accumulate, mesh, ema=0.0
):
    """Performs one update: state, batch, limits (2,) -> state, metrics {name: ()}.

    If the absolute loss or the norm of the gradient is over its limit or not a number, the update
    is skipped and only counters advance. With limits=None every update is applied.
    """
    grads, metrics, changed = gradient_of(
        state, batch, rng, objective=objective, accumulate=accumulate, mesh=mesh
    )

    def update():
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.ema, 1 - ema) if ema else None
        buffers = objective.after(params, state.buffers | changed, state.step)
        return TrainState(state.step + 1, params, buffers, opt_state, average)

    if limits is None:
        return update(), metrics
    usable = (jnp.abs(jnp.stack([metrics["loss"], metrics["grad_norm"]])) <= limits).all()
    return update_if(usable, update, state), metrics


def jit_step(objective, optimizer, state: TrainState, *, mesh: Mesh, accumulate=1, ema=0.0):
    """Returns `train_step` as a jitted function (state, batch, rng, limits) -> state, metrics.

    The state is donated. It keeps the shardings of `state`, which may consist of shapes only.
    """
    settings = dict(objective=objective, optimizer=optimizer, accumulate=accumulate, mesh=mesh)
    return jax.jit(
        functools.partial(train_step, **settings, ema=ema),
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
    limits: Callable[[int], np.ndarray | None] = lambda step: NO_LIMITS,
) -> Iterator[tuple[int, TrainState, dict]]:
    """Trains an objective: yields (step, state, metrics {name: ()}) after every update.

    A yielded state is valid until the next one is requested, which reuses its memory.

    Args:
        objective: the losses to minimize.
        optimizer: the update rule.
        batches_from: step -> iterator over this process's rows of the batches after `step`
            updates, as dicts of host arrays.
        state: the state to continue from; its memory is reused.
        mesh: the devices.
        steps: number of updates after which training ends.
        seed: seed of the random numbers drawn in the loss.
        accumulate: number of parts of a batch that are processed one after another.
        ema: decay of the moving average of the parameters; 0: no average.
        limits: step -> largest loss and norm of an update that is applied (2,), or None.
    """
    rng = jax.random.key(seed)
    step_fn = jit_step(objective, optimizer, state, mesh=mesh, accumulate=accumulate, ema=ema)
    start, previous = int(state.step), None
    batches = (to_global(batch, mesh) for batch in batches_from(start))
    batch = next(batches)
    for step in range(start + 1, steps + 1):
        state, metrics = step_fn(state, batch, rng, limits(step))
        if step < steps:
            batch = next(batches)  # transferred while the step runs
        jax.block_until_ready(previous)  # at most two steps in flight, to bound device memory
        previous = metrics
        yield step, state, metrics


@functools.cache
def evaluate_step(objective: Objective, mesh: Mesh) -> Callable:
    """Returns a function (params, buffers, batch, rng) -> sums and count of valid examples."""

    def sums(params, buffers, batch, rng):
        valid = batch["valid"] > 0
        pick = jax.vmap(jnp.where, (0, 0, None))  # multiplying by `valid` would keep NaN in padding
        values = objective.evaluate(params, buffers, batch, rng)
        return jax.tree.map(lambda x: pick(valid, x, 0).sum(0), values), valid.sum()

    return jax.jit(sums, out_shardings=replicated(mesh))


def evaluate(
    objective: Objective, state: TrainState, batches: Iterable[dict], *, mesh: Mesh, seed: int
) -> dict[str, float]:
    """Returns the metrics of an evaluation: means over all valid examples of the batches.

    The result does not depend on the batch size or the number of devices. Parameters are those of
    the moving average if the state has one.
    """
    rng, step = jax.random.key(seed), evaluate_step(objective, mesh)
    params, buffers = all_gather((state.averaged, state.buffers), mesh)
    count, totals = 0, dict[str, np.ndarray]()
    for batch in batches:
        sums, rows = step(params, buffers, to_global(batch, mesh), rng)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = jax.tree.map(np.add, totals, sums) if totals else sums
        count += int(rows)
    return objective.summarize({name: total / count for name, total in totals.items()})
