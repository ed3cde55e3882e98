"""How to step: optax transformations by the names that configs use."""

import functools
from typing import Literal

import jax
import optax

from mim_jax import UserError


def warmup_cosine(
    lr: float, *, min_lr: float, warmup_steps: int, steps: int, code: Literal["mae", "beit"]
) -> optax.Schedule:
    """Step (0, 1, ...) -> learning rate: linear from 0 to `lr`, then half a cosine to `min_lr`.

    The first rate is 0. By MAE's code (util/lr_sched.py, here at every step) the warm-up would
    reach `lr` with the cosine's first step; by BEiT's (utils.cosine_scheduler) it ends at `lr`, and
    the cosine begins there once more.
    """
    if not warmup_steps < steps:
        raise UserError(f"a warm-up of {warmup_steps} steps does not end before step {steps}.")
    if min_lr > lr:
        raise UserError(f"optimizer.min_lr = {min_lr:g} lies above the rate itself, {lr:g}.")
    warmup = optax.linear_schedule(0.0, lr, warmup_steps - (code == "beit"))
    cosine = optax.cosine_decay_schedule(lr, steps - warmup_steps, alpha=min_lr / lr)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def matrices(params: dict, but: tuple[str, ...] = ()) -> dict:
    """True where weight decay applies: not to biases, norms, and whatever has one axis.

    Class and mask tokens have three, so that they decay as in MAE's optimizer, `but` if named.
    """
    return jax.tree.map_with_path(lambda path, x: x.ndim > 1 and path[-1].key not in but, params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    undecayed: tuple = (),
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2017), equal to PyTorch's, decaying matrices alone.

    `undecayed` names some that do not decay either, as ("cls_token", "positions"). The rate of a
    block is `layer_decay` times that of the next (BEiT, appendix).
    """
    mask = functools.partial(matrices, but=undecayed)
    tx = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return tx if layer_decay == 1 else optax.chain(tx, scale_by_layer(layer_decay))


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Updates times decay^distance from the head, which with all else that is no layer has 1."""

    def update(updates, params):
        return jax.tree.map(lambda x, scale: x * scale, updates, layer_scales(params, decay))

    return optax.stateless(update)


def layer_scales(params: dict, decay: float) -> dict:
    """By which factor the rate of each parameter is smaller (MAE's and BEiT's code).

    Of the encoder, `block_i` is layer i + 1, and what is before the blocks layer 0.
    """
    blocks = [name for name in params.get("encoder", {}) if name.startswith("block_")]
    last = 1 + max((int(name.removeprefix("block_")) + 1 for name in blocks), default=0)

    def scale(path, _) -> float:
        name = path[1].key if path[0].key == "encoder" else ""
        if name in ("cls_token", "mask_token", "positions", "embed", "stem"):
            return decay**last
        behind = last - 1 - int(name.removeprefix("block_")) if name in blocks else 0
        return decay**behind

    return jax.tree.map_with_path(scale, params)


def lars(
    learning_rate: optax.Schedule,
    *,
    momentum: float = 0.9,
    trust: float = 0.001,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """LARS (You et al., 2017) as MAE's linear probe has it: optax's differs when the rate changes.

    A matrix's gradient, with its decay, gets the norm `trust` x the matrix's own before the
    momentum takes it up; the rate comes last.
    """
    decay = optax.add_decayed_weights(weight_decay)
    scaled = optax.chain(decay, optax.scale_by_trust_ratio(trust_coefficient=trust))
    return optax.chain(
        optax.masked(scaled, matrices),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(learning_rate: optax.Schedule, *, momentum: float = 0.9) -> optax.GradientTransformation:
    """Gradient descent with momentum, without weight decay, as ViT's fine-tuning has it."""
    return optax.sgd(learning_rate, momentum)


OPTIMIZERS = {"adamw": adamw, "lars": lars, "sgd": sgd}
