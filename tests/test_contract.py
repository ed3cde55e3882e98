"""What every objective in mim_jax/objectives keeps, a new one too: found in the folder, not named.

Each is run as the smoke run of one of its configs, the one on the emoji if there is one.
"""

import functools
import itertools
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import objectives, recipe
from mim_jax.command import Beginning
from mim_jax.sharding import make_mesh, to_global
from mim_jax.train import evaluate, train

OBJECTIVES = sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))
STEPS = 3
MESHES = {  # devices, of them to a copy of the state, parts of a batch
    "data": (8, 1, 1),
    "fsdp": (8, 8, 1),
    "both": (8, 4, 1),
    "parts": (2, 1, 4),
    "fsdp in parts": (4, 2, 2),
}


@functools.cache
def rehearsal(name: str):
    """-> config, run and the first batches of an objective."""
    paths = sorted(Path("configs").glob("*.py"), key=lambda path: ("emoji" not in path.stem, path))
    paths = (str(p) for p in paths if recipe.read(str(p))["objective"]["name"] == name)
    config = recipe.load(next(paths), ["batch_size=16"], smoke=True)
    this = recipe.build(config)
    batches = this.data.training_batches(16, seed=0, start=0, stop=STEPS)
    return config, this, list(itertools.islice(batches, STEPS))


def begin(name: str, devices: int = 1, fsdp: int = 1):
    """-> the state before the first step, its mesh."""
    config, this, _ = rehearsal(name)
    mesh = make_mesh(jax.devices()[:devices], fsdp=fsdp)
    return Beginning(this._replace(mesh=mesh), config).state(), mesh


@functools.cache
def history(name: str, devices: int = 1, fsdp: int = 1, accumulate: int = 1) -> np.ndarray:
    """-> loss and norm of the gradient at each step."""
    config, this, batches = rehearsal(name)
    state, mesh = begin(name, devices, fsdp)
    steps = train(
        this.objective, this.optimizer, lambda step: batches[step:], state=state, mesh=mesh,
        steps=STEPS, seed=0, accumulate=accumulate, ema=config.ema,
    )  # fmt: skip
    return np.array([[metrics["loss"], metrics["grad_norm"]] for _, _, metrics in steps])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_on_every_mesh(name, mesh):
    np.testing.assert_allclose(history(name, *MESHES[mesh]), history(name), rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_gets_a_gradient(name):
    _, this, batches = rehearsal(name)
    state, _ = begin(name)

    def loss(params):
        return this.objective.loss(
            params, state.buffers, batches[0], jax.random.key(0), jnp.int32(0)
        )[0]

    grads = jax.jit(jax.grad(loss))(state.params)
    zero = jax.tree.map(lambda x: not np.any(x), grads)
    silent = [jax.tree_util.keystr(path) for path, none in jax.tree.leaves_with_path(zero) if none]
    assert not silent


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_counts_every_example(name):
    """13 of them: the same on one device in one batch, on 8 of which the last see only padding."""
    _, this, _ = rehearsal(name)
    means = []
    for devices, fsdp, rows in ((1, 1, 13), (8, 4, 16)):
        state, mesh = begin(name, devices, fsdp)
        batches = this.data.evaluation_batches(rows, limit=13)
        means.append(evaluate(this.objective, state, batches, mesh=mesh, seed=0))
    alone, shared = means
    assert alone.keys() == shared.keys()
    for key, value in shared.items():
        np.testing.assert_allclose(value, alone[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pictures_can_be_seen(name):
    """Finite images of one size under every caption, in [0, 1] but for what a model paints."""
    _, this, _ = rehearsal(name)
    state, mesh = begin(name, 8)
    batch = to_global(next(iter(this.data.evaluation_batches(8, limit=8))), mesh)
    columns = jax.jit(this.objective.pictures)(
        state.params, state.buffers, batch, jax.random.key(0)
    )
    assert len({images.shape[:3] for images in columns.values()}) == 1
    for images in columns.values():
        assert np.isfinite(images).all()
        assert -1 < images.min() <= images.max() < 2
