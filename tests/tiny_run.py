"""A tiny run of MAE on random images, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import optim
from mim_jax.models.vit import vit
from mim_jax.objectives import mae
from mim_jax.sharding import make_mesh, place
from mim_jax.train import initialize, train

SIZE, ROWS = 16, 16
EXAMPLE = {
    "image": jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8),
    "index": jax.ShapeDtypeStruct((1,), jnp.int32),
}
STEPS = 5
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
OBJECTIVE = mae.objective(vit(width=16, depth=1, heads=2, patch=4), **DECODER)
OPTIMIZER = optim.adamw(
    optim.warmup_and_decay(1e-2, min_lr=0.0, warmup_steps=1, steps=STEPS, code="mae")
)


def batches_from(step):
    for i in range(step, STEPS):
        images = np.random.default_rng(i).integers(0, 256, (ROWS, SIZE, SIZE, 3), np.uint8)
        yield {"image": images, "index": np.arange(ROWS, dtype=np.int32)}


def start(mesh, objective=OBJECTIVE, seed=0):
    begin = functools.partial(initialize, objective, OPTIMIZER, EXAMPLE, seed)
    return jax.jit(begin, out_shardings=place(jax.eval_shape(begin), mesh))()


def run(
    devices=1,
    *,
    fsdp=1,
    state=None,
    accumulate=1,
    objective=OBJECTIVE,
    batches=batches_from,
    **more,
):
    """Trains for STEPS steps -> [(step, state on the host, loss, norm of the gradient), ...]."""
    mesh = make_mesh(jax.devices()[:devices], fsdp=fsdp)
    state = start(mesh, objective) if state is None else state
    steps = train(
        objective,
        OPTIMIZER,
        batches,
        state=state,
        mesh=mesh,
        steps=STEPS,
        seed=0,
        accumulate=accumulate,
        **more,
    )
    return [
        (step, jax.device_get(state), float(metrics["loss"]), float(metrics["grad_norm"]))
        for step, state, metrics in steps
    ]


def numbers(history):
    return np.array([row[2:] for row in history])
