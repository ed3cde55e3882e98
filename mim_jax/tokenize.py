r"""Writes the visual tokens of a data set, by a trained tokenizer.

    mim-jax tokenize runs/dvae_emoji --to=tokens.npz
    mim-jax tokenize runs/dvae_emoji --to=tokens.npz \
        --config.data.evaluation_split=train

--config is the directory of a run that trained a tokenizer. The file has, for the evaluation views
of the evaluation split, `tokens` (images, h, w); `index` (images,), positions in the split;
`label`, if there are labels; and the size of the `vocabulary`. Exit codes: 0 done, 2 user error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mim_jax import UserError, cli, recipe, schema, workdir
from mim_jax.checkpoint.trees import abstract
from mim_jax.normalize import unit
from mim_jax.progress import images_in, track
from mim_jax.recipe import Run
from mim_jax.sharding import replicated, to_global
from mim_jax.start import source_run
from mim_jax.train import TrainState
from mim_jax.transfer import start_from


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("tokenize", __doc__)
    cli.add_config(parser, "a run directory")
    parser.add_argument("--to", required=True, help="the .npz file to write")
    options, overrides = cli.parse(parser, argv, cli.TRAINING_KEYS)
    cli.require_suffix(parser, options.to, ".npz")

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return write(options.config, recipe.fit_to_devices(config), options.to)

    return cli.exit_code(command, options.to)


def write(path: str, config: ConfigDict, to: str) -> int:
    """Writes the tokens of the evaluation split."""
    run = recipe.build(config)
    if run.tokenizer is None or run.model is not None:
        raise UserError(
            f"{path} did not train a tokenizer: it is a run of {config.objective.name}."
        )
    file_path = workdir.open_path(to)
    file_path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = run.tokenizer.encoder.vocabulary
    with file_path.open("wb") as file:  # opened early, in case it cannot be written
        arrays = tokens(run, config, source_run(path, config, "tokenizer"))
        np.savez_compressed(file, vocabulary=vocabulary, **arrays)  # type: ignore[arg-type]
    images, per_image = len(arrays["tokens"]), arrays["tokens"][0].size
    used = len(np.unique(arrays["tokens"]))
    print(f"{to}: {images:,} images of {per_image:,} tokens, {used:,} of {vocabulary:,} codes used")
    return 0


def tokens(run: Run, config: ConfigDict, source: str) -> dict[str, np.ndarray]:
    """Returns `tokens` (images, h, w), `index` and `label` (images,) of the evaluation split."""
    assert run.tokenizer is not None  # the caller checks it
    network = run.tokenizer.with_dtype("float32")
    image = unit(jnp.zeros(run.example["image"].shape, run.example["image"].dtype))
    everywhere = functools.partial(abstract, sharding=replicated(run.mesh))
    params = jax.tree.map(everywhere, jax.eval_shape(network.init, jax.random.key(0), image))
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, None)
    state = start_from(state, "tokenizer", source, config.to_dict())
    tokens_of = jax.jit(
        lambda images: network.tokens(state.params["tokenizer"], unit(images)),
        out_shardings=replicated(run.mesh),
    )
    names = ("tokens", "index", "label") if run.data.num_labels else ("tokens", "index")
    rows = []
    count = len(run.data.evaluation.examples)
    batches = run.data.evaluation_batches(run.rows)
    for batch in track(batches, "tokenizing", count, unit="images", count=images_in):
        images = to_global({"image": batch["image"]}, run.mesh)["image"]
        batch["tokens"] = np.asarray(tokens_of(images))
        rows.append({name: batch[name][batch["valid"] > 0] for name in names})
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in names}
    grid = (side // p for side, p in zip(run.data.image.size, network.patch, strict=True))
    return arrays | {"tokens": arrays["tokens"].reshape(-1, *grid)}


if __name__ == "__main__":
    cli.exit_with(main)
