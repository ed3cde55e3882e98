"""Optimizers and learning rate schedules, by the names that configs use."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import optax

from mim_jax import UserError
from mim_jax.keys import BELOW_ONE, NOT_NEGATIVE, Range

B1 = Annotated[float, BELOW_ONE, "decay of the first moment"]
B2 = Annotated[float, BELOW_ONE, "decay of the second moment"]
Momentum = Annotated[float, BELOW_ONE, "momentum coefficient"]
Schedule = Literal["mae", "beit", "mmseg"]
WeightDecay = Annotated[float, NOT_NEGATIVE, "decoupled weight decay of matrices"]


def warmup_and_decay(
    lr: float, *, min_lr: float, warmup_steps: int, steps: int, code: Schedule
) -> optax.Schedule:
    """Returns a learning rate schedule: a warm-up from 0 to `lr`, then a decay to `min_lr`.

    Args:
        lr: the rate after the warm-up.
        min_lr: the rate at the end.
        warmup_steps: length of the warm-up.
        steps: length of warm-up and decay.
        code: "mae" or "beit", see `warmup_cosine`; or "mmseg", see `warmup_linear`.

    Raises:
        UserError: if the warm-up is not shorter than `steps`, or `min_lr` exceeds `lr`.
    """
    if not warmup_steps < steps:
        raise UserError(
            f"the warm-up of {warmup_steps} steps must end before step {steps}: lower "
            "optimizer.warmup_steps or optimizer.warmup_epochs."
        )
    if min_lr > lr:
        raise UserError(f"optimizer.min_lr = {min_lr:g} must not exceed the learning rate {lr:g}.")
    settings: dict[str, Any] = dict(min_lr=min_lr, warmup_steps=warmup_steps, steps=steps)
    if code == "mmseg":
        return warmup_linear(lr, **settings)
    return warmup_cosine(lr, **settings, code=code)


def warmup_cosine(
    lr: float, *, min_lr: float, warmup_steps: int, steps: int, code: Schedule
) -> optax.Schedule:
    """Returns a schedule that is linear from 0 to `lr`, then half a cosine to `min_lr`.

    In MAE's code (util/lr_sched.py) the warm-up reaches `lr` at the first step of the cosine; in
    BEiT's (utils.cosine_scheduler) one step earlier, so that two steps have `lr`.
    """
    warmup = optax.linear_schedule(0.0, lr, warmup_steps - (code == "beit"))
    cosine = optax.cosine_decay_schedule(lr, steps - warmup_steps, alpha=min_lr / lr)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def warmup_linear(lr: float, *, min_lr: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Returns a schedule that is linear from `lr` to `min_lr`, multiplied by a linear warm-up.

    This is mmsegmentation's policy "poly" with power 1 and linear warm-up, in which the decay
    starts at the first step. There the warm-up starts at 1e-6 of the rate, here at 0.
    """
    line = optax.linear_schedule(lr, min_lr, steps)
    warmup = optax.linear_schedule(0.0 if warmup_steps else 1.0, 1.0, warmup_steps)
    return lambda step: line(step) * warmup(step)


def matrices(params: dict, but: tuple[str, ...] = ()) -> dict:
    """Returns a tree of flags: whether weight decay applies to each parameter.

    It applies to parameters with two or more axes, except those named in `but`. Class and mask
    tokens have three axes, so they decay as in MAE's code.
    """
    return jax.tree.map_with_path(lambda path, x: x.ndim > 1 and path[-1].key not in but, params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: B1 = 0.9,
    b2: B2 = 0.999,
    eps: Annotated[float, NOT_NEGATIVE, "added to the root of the second moment"] = 1e-8,
    weight_decay: WeightDecay = 0.05,
    undecayed: Annotated[
        tuple, "names of parameters without weight decay, for example ('cls_token',)"
    ] = (),
    layer_decay: Annotated[
        float, Range(0, 1, above=True), "factor of the learning rate from a block to the one before"
    ] = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2017), equal to PyTorch's, with layer decay (BEiT, appendix).

    Args:
        learning_rate: step -> rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay of the parameters that `matrices` selects.
        undecayed: names of parameters without weight decay.
        layer_decay: factor of the rate from each block to the previous one, see `layer_scales`.
    """
    mask = functools.partial(matrices, but=undecayed)
    tx = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return tx if layer_decay == 1 else optax.chain(tx, scale_by_layer(layer_decay))


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by decay^distance from the head."""

    def update(updates, params):
        return jax.tree.map(lambda x, scale: x * scale, updates, layer_scales(params, decay))

    return optax.stateless(update)


def layer_scales(params: dict, decay: float) -> dict:
    """Returns the factor of each parameter's rate, as in MAE's and BEiT's code.

    In the encoder, `block_i` is layer i + 1 and everything before the blocks is layer 0. Parameters
    outside the encoder have the factor 1.
    """
    blocks = [name for name in params.get("encoder", {}) if name.startswith("block_")]
    last = 1 + max((int(name.removeprefix("block_")) + 1 for name in blocks), default=0)

    def scale(path, _) -> float:
        name = path[1].key if path[0].key == "encoder" else ""
        if name in ("cls_token", "mask_token", "positions", "embed", "stem"):
            return decay**last
        distance = last - 1 - int(name.removeprefix("block_")) if name in blocks else 0
        return decay**distance

    return jax.tree.map_with_path(scale, params)


def lars(
    learning_rate: optax.Schedule,
    *,
    momentum: Momentum = 0.9,
    trust: Annotated[float, NOT_NEGATIVE, "ratio of the norms of an update and its matrix"] = 0.001,
    weight_decay: WeightDecay = 0.0,
) -> optax.GradientTransformation:
    """LARS (You et al., 2017) as in MAE's linear probe.

    The gradient of a matrix plus weight decay is scaled to `trust` times the norm of the matrix;
    then momentum and the learning rate are applied. optax.lars applies the rate before momentum,
    which differs if the rate changes.

    Args:
        learning_rate: step -> rate.
        momentum: momentum coefficient.
        trust: ratio of the norms of an update and its matrix.
        weight_decay: weight decay of matrices.
    """
    decay = optax.add_decayed_weights(weight_decay)
    scaled = optax.chain(decay, optax.scale_by_trust_ratio(trust_coefficient=trust))
    return optax.chain(
        optax.masked(scaled, matrices),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(learning_rate: optax.Schedule, *, momentum: Momentum = 0.9) -> optax.GradientTransformation:
    """Gradient descent with momentum and without weight decay, as in ViT's fine-tuning."""
    return optax.sgd(learning_rate, momentum)


OPTIMIZERS: dict[str, Callable] = {"adamw": adamw, "lars": lars, "sgd": sgd}
