"""Masked image modeling in JAX: MAE, BEiT and its tokenizer, fine-tuning and probes."""

import os
from typing import Any

# Paths in buckets are read by gcsfs. By default they would import TensorFlow if it is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

__version__ = "0.1.0"


class UserError(ValueError):
    """A user error, reported in one sentence: what is wrong, where, and what to change.

    Commands print it without a traceback and exit with code 2.
    """


def load(
    source: Any,
    *,
    mean: tuple = (),
    std: tuple = (),
    heads: int = 0,
    image_size: int | tuple = 0,
) -> Any:
    """Loads an encoder: `encoder, params = mim_jax.load("runs/mae_base")`.

    encoder(params, images) -> tokens (b, 1 + n, d), the class token first. Images are an array
    (b, H, W, c), or a list of Pillow images, files and arrays of any size. The arguments are those
    of `mim_jax.embed.load`.
    """
    from mim_jax import embed  # late, so that `import mim_jax` is fast

    return embed.load(source, mean=mean, std=std, heads=heads, image_size=image_size)


def build(config: Any, changes: Any = None, **top_level: Any) -> Any:
    """Builds a run to train in Python: `mim_jax.build("mae_emoji", steps=100)`.

    Returns a `mim_jax.experiment.Experiment`; the arguments are those of
    `mim_jax.experiment.build`.
    """
    from mim_jax import experiment  # late, so that `import mim_jax` is fast

    return experiment.build(config, changes, **top_level)
