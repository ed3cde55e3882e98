"""Masked image modelling in JAX: MAE, BEiT, their tokenizer, and what is done with them."""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake that its maker can mend, told in one sentence: what, where, what to do.

    `python -m mim_jax.main` prints it without a traceback and exits with code 2.
    """
