"""Schedules, weight decay and the optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import UserError, optim
from mim_jax.models.vit import vit
from mim_jax.objectives import mae


def test_learning_rates_equal_the_recipe():
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


def test_learning_rates_equal_beit():
    """The golden values of the reference's table: 100 steps, 20 of warm-up."""
    schedule = optim.warmup_and_decay(1.5e-3, min_lr=1e-5, warmup_steps=20, steps=100, code="beit")
    golden = {0: 0.0, 1: 7.8947e-5, 19: 0.0015, 20: 0.0015, 21: 0.00149943, 99: 1.05744e-5}
    for step, lr in golden.items():
        assert float(schedule(step)) == pytest.approx(lr, rel=1e-5)


def test_which_parameters_decay():
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
