"""How to step: optax transformations by the names that configs use."""

import functools

import jax
import optax

from mim_jax import UserError


def warmup_cosine(lr: float, *, min_lr: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Step (0, 1, ...) -> learning rate: linear from 0 to `lr`, then half a cosine to `min_lr`.

    MAE's schedule at every step instead of every epoch; the first step's rate is 0.
    """
    if not warmup_steps < steps:
        raise UserError(f"a warm-up of {warmup_steps} steps does not end before step {steps}.")
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup_steps, steps, min_lr)


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
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2017), equal to PyTorch's, decaying matrices alone.

    `undecayed` names some that do not decay either, as ("cls_token", "positions").
    """
    mask = functools.partial(matrices, but=undecayed)
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)


OPTIMIZERS = {"adamw": adamw}
