"""Masked image modelling in JAX: MAE, BEiT, their tokenizer, and what is done with them."""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake that its maker can mend, reported in one sentence: what, where, what to do.

    `python -m mim_jax.main` prints it without a traceback and exits with code 2.
    """


def load(source, **known):
    """The encoder of a run or of a file: `encoder, params = mim_jax.load("runs/mae_base")`.

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d), the class token first. `known` is
    what the source does not say, as for `mim_jax.embed.load`.
    """
    from mim_jax.embed import load  # here, so that importing mim_jax costs nothing

    return load(source, **known)
