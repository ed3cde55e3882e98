"""The training loop: the same run on any devices, in any number of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

<<<<<<< HEAD
from benchmarks.pod import collectives
from mim_jax import UserError, optim
from mim_jax.checkpoint import Checkpoints, abstract, newest
from mim_jax.models.vit import vit
from mim_jax.objectives import Objective, mae, per_example
from mim_jax.sharding import by_row, make_mesh, place, replicated
from mim_jax.train import evaluate, initialize, jit_step, train

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
=======
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
>>>>>>> e2a0b99 (Split the tests of the loop by module; read the collectives of jax 0.12; compare eight devices in float64)
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


<<<<<<< HEAD
# --- How to step. ---


def test_learning_rates_are_the_recipes():
    """The golden values of the reference at 312 steps an epoch, 800 epochs, 40 of warm-up."""
    schedule = optim.warmup_and_decay(
        2.4e-3, min_lr=0.0, warmup_steps=40 * 312, steps=800 * 312, code="mae"
    )
    with jax.enable_x64(True):
        for epoch, lr in {
            0: 0.0,
            0.5: 3e-5,
            20: 0.0012,
            40: 0.0024,
            41: 0.002399989748,
            100: 0.002363280319,
            400: 0.001299095215,
            420: 0.0012,
            799: 1.0252344e-8,
        }.items():
            assert float(schedule(jnp.float64(epoch * 312))) == pytest.approx(lr, rel=1e-6)
    with pytest.raises(UserError, match="must end before"):
        optim.warmup_and_decay(1.0, min_lr=0.0, warmup_steps=5, steps=5, code="mae")


def test_schedule_of_mmsegmentation():
    """mmcv's policy "poly" with power 1 and linear warm-up, but for a ratio of 1e-6 at step 0."""
    lr, least, warmup, steps = 7e-4, 1e-6, 1500, 160_000
    schedule = optim.warmup_and_decay(
        lr, min_lr=least, warmup_steps=warmup, steps=steps, code="mmseg"
    )
    for step in (0, 1, 750, 1499, 1500, 80_000, 159_999):
        regular = (lr - least) * (1 - step / steps) + least
        expected = regular * (1 - (1 - step / warmup) * (1 - 1e-6)) if step < warmup else regular
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    constant = optim.warmup_and_decay(lr, min_lr=lr, warmup_steps=0, steps=9, code="mmseg")
    assert float(constant(0)) == float(constant(8)) == pytest.approx(lr)


def test_learning_rates_are_beit_s():
    """The golden values of the reference's table: 100 steps, 20 of warm-up."""
    schedule = optim.warmup_and_decay(1.5e-3, min_lr=1e-5, warmup_steps=20, steps=100, code="beit")
    golden = {0: 0.0, 1: 7.8947e-5, 19: 0.0015, 20: 0.0015, 21: 0.00149943, 99: 1.05744e-5}
    for step, lr in golden.items():
        assert float(schedule(step)) == pytest.approx(lr, rel=1e-5)


def test_what_decays():
    """ViT-B: of the reference's 252 trainable tensors 85 decay, class and mask token among them."""
    objective = mae.objective(vit(size="B"))
    example = {
        "image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), example)
    decays = optim.matrices(params)
    counts = np.unique(jax.tree.leaves(decays), return_counts=True)[1].tolist()
    assert counts == [167, 85]
    assert decays["encoder"]["cls_token"]
    assert decays["decoder"]["mask_token"]
    assert not decays["encoder"]["norm"]["scale"]


def test_adamw_decays_by_the_learning_rate():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optim.adamw(lambda step: 0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jnp.allclose(new["kernel"], 1 - 0.1 * 0.5)
    assert (new["bias"] == 1).all()


def test_named_matrices_do_not_decay():
    params = {"encoder": {"cls_token": jnp.ones((1, 1, 4)), "kernel": jnp.ones((4, 4))}}
    decays = optim.matrices(params, but=("cls_token", "positions"))
    assert decays == {"encoder": {"cls_token": False, "kernel": True}}


=======
>>>>>>> e2a0b99 (Split the tests of the loop by module; read the collectives of jax 0.12; compare eight devices in float64)
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
