r"""Writes the tokens of a data set, as a trained tokenizer sees them.

    python -m mim_jax.tokenize --config=runs/dvae_emoji --to=tokens.npz
    python -m mim_jax.tokenize --config=runs/dvae_emoji --to=tokens.npz \
        --config.data.evaluation_split=train

--config is the folder of a run of the dVAE. Written are, for the evaluation views of its evaluation
split: `tokens` (images, h, w); `index` (images,), their places in the split; `label`, where there
are labels; the size of the `vocabulary`. Exit codes: 0 done, 2 a mistake in what was asked for.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mim_jax import UserError, command, recipe
from mim_jax.checkpoint import abstract
from mim_jax.models.dvae import dvae
from mim_jax.normalize import unit
from mim_jax.sharding import replicated, to_global
from mim_jax.train import TrainState
from mim_jax.transfer import begin_from


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.tokenize", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the folder of a run of the dVAE")
    parser.add_argument("--to", required=True, help="the .npz to write")
    options, overrides = command.parse(parser, argv)
    return command.exit_code(lambda: write(options.config, overrides, options.to), options.to)


def write(run: str, overrides: list[str], to: str) -> int:
    """Writes the tokens that the tokenizer of a run gives."""
    config = command.here(recipe.load(run, overrides))
    if config.objective.name != "dvae":
        raise UserError(f"{run} is no run of the dVAE, but of {config.objective.name}.")
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    with open(to, "wb") as file:  # before the work, which is lost if this cannot be
        found = tokens(config, command.trained(run, config, "tokenizer"))
        np.savez_compressed(file, **found, vocabulary=config.tokenizer.vocabulary)
    images, per_image = len(found["tokens"]), found["tokens"][0].size
    used, codes = len(np.unique(found["tokens"])), config.tokenizer.vocabulary
    print(f"{to}: {images:,} images of {per_image:,} tokens, {used:,} of {codes:,} codes")
    return 0


def tokens(config: ConfigDict, run: str) -> dict[str, np.ndarray]:
    """-> `tokens` (images, h, w), `index` and `label` (images,) of the evaluation split."""
    this = recipe.build(config)
    network = dvae(**config.tokenizer.to_dict() | {"dtype": "float32"})
    image = unit(jnp.zeros(this.example["image"].shape, this.example["image"].dtype))
    everywhere = functools.partial(abstract, sharding=replicated(this.mesh))
    params = jax.tree.map(everywhere, jax.eval_shape(network.init, jax.random.key(0), image))
    state = begin_from(TrainState(0, params, {}, None), "tokenizer", run, config)
    tokens_of = jax.jit(
        lambda images: network.tokens(state.params["tokenizer"], unit(images)),
        out_shardings=replicated(this.mesh),
    )
    names = ("tokens", "index", "label") if this.data.num_labels else ("tokens", "index")
    rows = []
    for batch in this.data.evaluation_batches(this.rows):
        images = to_global({"image": batch["image"]}, this.mesh)["image"]
        batch["tokens"] = np.asarray(tokens_of(images))
        rows.append({name: batch[name][batch["mask"] > 0] for name in names})
    found = {name: np.concatenate([row[name] for row in rows]) for name in names}
    height, width = (side // p for side, p in zip(image.shape[1:3], network.patch, strict=True))
    return found | {"tokens": found["tokens"].reshape(-1, height, width)}


if __name__ == "__main__":
    sys.exit(main())
