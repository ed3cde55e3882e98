"""The contract of every objective in mim_jax/objectives, which are discovered, not listed.

Each is run as the rehearsal of one of its configs, the one for the emoji if there is one. With
`--config=PATH` the objective of that config is tested instead, which may lie outside the package.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config_files, objectives, recipe, schema
from mim_jax.sharding import make_mesh, to_global
from mim_jax.start import Start
from mim_jax.train import evaluate, train

STEPS = 3
MESHES = {  # devices, devices that share a copy of the state, parts of a batch
    "data": (8, 1, 1),
    "fsdp": (8, 8, 1),
    "both": (8, 4, 1),
    "parts": (2, 1, 4),
    "fsdp in parts": (4, 2, 2),
}


def config_of(name: str) -> str:
    """Returns the path of a config of an objective."""
    names = sorted(config_files.names(), key=lambda config: ("emoji" not in config, config))
    return next(x for x in names if schema.read(x)["objective"]["name"] == name)


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        path = metafunc.config.getoption("--config")
        paths = [path] if path else [config_of(name) for name in objectives.names()]
        metafunc.parametrize("path", paths, ids=lambda path: Path(path).stem)


@functools.cache
def rehearsal(path: str):
    """Returns config, run and the first batches of a config's rehearsal."""
    config = schema.load(path, ["batch_size=16"], smoke=True)
    run = recipe.build(config)
    batches = run.data.training_batches(16, seed=0, start=0, stop=STEPS)
    return config, run, list(itertools.islice(batches, STEPS))


def start(path: str, devices: int = 1, fsdp: int = 1):
    """Returns the state before the first step and its mesh."""
    config, run, _ = rehearsal(path)
    mesh = make_mesh(jax.devices()[:devices], fsdp=fsdp)
    return Start(run._replace(mesh=mesh), config).state(), mesh


@functools.cache
def history(path: str, devices: int = 1, fsdp: int = 1, accumulate: int = 1) -> np.ndarray:
    """Returns the loss and the norm of the gradient at each step."""
    config, run, batches = rehearsal(path)
    state, mesh = start(path, devices, fsdp)
    steps = train(
        run.objective,
        run.optimizer,
        lambda step: batches[step:],
        state=state,
        mesh=mesh,
        steps=STEPS,
        seed=0,
        accumulate=accumulate,
        ema=config.ema,
    )
    return np.array([[metrics["loss"], metrics["grad_norm"]] for _, _, metrics in steps])


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_do_not_depend_on_the_mesh(path, mesh):
    np.testing.assert_allclose(history(path, *MESHES[mesh]), history(path), rtol=1e-5)


def test_every_parameter_gets_a_gradient(path):
    _, run, batches = rehearsal(path)
    state, _ = start(path)

    def loss(params):
        rng, step = jax.random.key(0), jnp.int32(0)
        return run.objective.loss(params, state.buffers, batches[0], rng, step)[0]

    grads = jax.jit(jax.grad(loss))(state.params)
    zero = jax.tree.map(lambda x: not np.any(x), grads)
    silent = [jax.tree_util.keystr(name) for name, none in jax.tree.leaves_with_path(zero) if none]
    assert not silent


def test_evaluation_counts_every_example(path):
    """13 examples: the same on one device in one batch, and on 8 with padding."""
    _, run, _ = rehearsal(path)
    means = []
    for devices, fsdp, rows in ((1, 1, 13), (8, 4, 16)):
        state, mesh = start(path, devices, fsdp)
        batches = run.data.evaluation_batches(rows, limit=13)
        means.append(evaluate(run.objective, state, batches, mesh=mesh, seed=0))
    alone, shared = means
    assert alone.keys() == shared.keys()
    for key, value in shared.items():
        np.testing.assert_allclose(value, alone[key], rtol=1e-5, err_msg=key)


def test_pictures_can_be_drawn(path):
    """Images are finite, of one size under every caption, and about in [0, 1]."""
    _, run, _ = rehearsal(path)
    state, mesh = start(path, 8)
    batch = to_global(next(iter(run.data.evaluation_batches(8, limit=8))), mesh)
    columns = jax.jit(run.objective.pictures)(state.params, state.buffers, batch, jax.random.key(0))
    assert len({images.shape[:3] for images in columns.values()}) == 1
    for images in columns.values():
        assert np.isfinite(images).all()
        assert -1 < images.min() <= images.max() < 2
