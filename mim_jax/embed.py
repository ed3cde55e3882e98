r"""Writes what a trained encoder makes of a data set: features for whatever comes next.

    python -m mim_jax.embed --config=runs/mae_base --to=features.npz
    python -m mim_jax.embed --config=runs/mae_base --to=train.npz \
        --config.data.evaluation_split=train

--config is the folder of a run. Written are, for the evaluation views of its evaluation split,
nothing hidden: `cls` (images, d), the class token; `mean` (images, d), of the patches; `index`
(images,), their places in the split; `label`, where there are labels. Exit codes: 0 done, 2 a
mistake in what was asked for.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mim_jax import command, recipe
from mim_jax.checkpoint import read_part
from mim_jax.sharding import replicated, to_global


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.embed", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the folder of a run")
    parser.add_argument("--to", required=True, help="the .npz to write")
    options, overrides = command.parse(parser, argv)
    return command.exit_code(lambda: write(options.config, overrides, options.to), options.to)


def load(run: str) -> tuple[Callable, dict]:
    """The encoder of a run: `encoder, params = load(run)`.

    encoder(params, images (b, H, W, c)) -> tokens (b, 1 + n, d), the class token first. Images are
    integers in their type's range or floats in [0, 1]. Tokens are normalised where the encoder has
    a last norm; one that was fine-tuned with the mean of the patches has none.
    """
    encoder = recipe.encoder(recipe.load(run))
    saved, _ = read_part(run, "encoder")
    return encoder, jax.tree.map(jnp.asarray, unflatten_dict(saved, sep="/"))


def write(run: str, overrides: list[str], to: str) -> int:
    """Writes the features of the evaluation split."""
    config = recipe.load(run, overrides)
    this, (encoder, params) = recipe.build(config), load(run)
    params = jax.device_put(params, replicated(this.mesh))

    def pooled(images):
        tokens = encoder(params, images)
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}

    pooled = jax.jit(pooled, out_shardings=replicated(this.mesh))
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(to, "wb") as file:  # before the work, which is lost if this cannot be
        for batch in this.data.evaluation_batches(config.batch_size):
            images = to_global({"image": batch["image"]}, this.mesh)["image"]
            features = jax.tree.map(np.asarray, pooled(images))
            notes = {name: batch[name] for name in ("index", "label") if name in batch}
            counts = batch["mask"] > 0
            rows.append({name: x[counts] for name, x in (features | notes).items()})
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        np.savez_compressed(file, **found)
    print(f"{to}: {len(found['cls']):,} images, {found['cls'].shape[1]} numbers each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
