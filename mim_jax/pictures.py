r"""Draws what a checkpoint computes for images, as a PNG file or as arrays in a notebook.

    mim-jax pictures reconstruct runs/mae_emoji cat.png dog.png --mask-ratio=0.5
    mim-jax pictures attend mae_pretrain_vit_base.pth cat.png --query=14,10 --layer=-1
    mim-jax pictures tokenize runs/dvae_emoji cat.png
    mim-jax pictures segment runs/ade20k_beit_base street.jpg

CKPT is a run directory, converted weights, a file of weights or a Hugging Face folder.

reconstruct: hides patches at random, as in training, and predicts them.
attend: draws the attention of the class token, and of each patch given by --query, to all patches,
    averaged over the heads and for each head (as in DINO's and BEiT's figures). Positions are
    interpolated to --size.
tokenize: draws the visual tokens of a dVAE, each code in a color, and the images decoded from them.
segment: draws the predicted class of every pixel, and lists the most frequent classes of an image.

--config.KEY=VALUE changes a key of the checkpoint's config: --config.objective.target=pixels.
Exit codes: 0 done, 2 user error.
"""

import argparse
import functools
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from mim_jax import UserError, cli, objectives, optim, recipe, schema, workdir
from mim_jax.attend import attention_maps, heat, marked, rows_of
from mim_jax.checkpoint import saved
from mim_jax.checkpoint.files import has_checkpoints
from mim_jax.convert import files
from mim_jax.convert.fit import encoder_only, resized
from mim_jax.convert.network import require_heads, segmenter
from mim_jax.data.classes import palette
from mim_jax.data.images import Images, batch_of, decoded, dtype_of
from mim_jax.data.segmentation import fitted
from mim_jax.data.transforms import resize, width_and_height
from mim_jax.embed import statistics_of
from mim_jax.models.batch_norm import COLLECTION
from mim_jax.models.dvae import DVAE, code_colors
from mim_jax.normalize import normalize, unit
from mim_jax.sheets import draw_sheet, to_rgb

Columns = dict[str, np.ndarray]  # {caption: images (b, H, W, c) in [0, 1]}
ATTENTION_SIZE, TOKENIZER_SIZE = 480, 224  # default sides of images
MASK_RATIO = 0.4  # BEiT's, for weights that do not record it


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("pictures", __doc__)
    functions = {f.__name__: f for f in (reconstruct, attend, tokenize, segment)}
    parser.add_argument("what", choices=functions, help="what to draw")
    parser.add_argument("checkpoint", metavar="CKPT", help="a run or weights")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument("--to", default="", help="the PNG file to write; default: WHAT.png")
    parser.add_argument("--mask-ratio", type=float, help="share of the patches that are hidden")
    parser.add_argument("--seed", type=int, help="seed of the hidden patches")
    parser.add_argument("--tokenizer", help="a dVAE, for a BEiT without its own")
    parser.add_argument(
        "--query", dest="queries", type=place_of, action="append", help="a patch, ROW,COLUMN"
    )
    parser.add_argument("--layer", type=int, help="a block, from 0; default: the last")
    parser.add_argument("--head", type=head_of, help="a head, from 0, or average; default: all")
    parser.add_argument("--heads", type=int, help="number of heads, if the file does not record it")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--trust-code", action="store_true", default=None, help="as in train")
    options, overrides = cli.parse(parser, argv)
    cli.require_suffix(parser, options.to, ".png")
    function = functions[options.what]
    given = {k: x for k, x in vars(options).items() if x is not None and k not in POSITIONAL}
    given |= {"overrides": overrides} if overrides else {}
    if wrong := given.keys() - inspect.signature(function).parameters:
        name = min(wrong).replace("queries", "query").replace("_", "-")
        parser.error(f"--{name.replace('overrides', 'config')} does not apply to {options.what}")
    to = options.to or f"{options.what}.png"

    def command() -> int:
        columns = function(options.checkpoint, options.images, **given)
        draw_sheet(to, columns, f"{options.what}: {options.checkpoint}", pairs=1)
        print(f"{to}: {', '.join(columns)}")
        return 0

    return cli.exit_code(command, to)


POSITIONAL = ("what", "checkpoint", "images", "to")


def place_of(text: str) -> tuple[int, int]:
    """Parses "ROW,COLUMN"."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be ROW,COLUMN, for example 7,10") from None
    return row, column


def head_of(text: str) -> int | str:
    """Parses the number of a head, or "average"."""
    if text == "average" or text.isdigit():
        return text if text == "average" else int(text)
    raise argparse.ArgumentTypeError(f"{text} must be a number from 0, or average")


# --- Drawings. Each function returns columns of images. ---


def reconstruct(
    source: str | Path,
    images: Images,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    tokenizer: str | Path = "",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Columns:
    """Hides patches of images at random, as in training, and predicts them.

    Args:
        source: a run, a file of weights or a Hugging Face folder.
        images: files, Pillow images or arrays (H, W, c).
        mask_ratio: share of the patches that are hidden; default: that of training.
        seed: seed of the hidden patches.
        tokenizer: a dVAE, if the target is tokens and the source does not hold their dVAE.
        overrides: other keys of the config, for example "objective.target=pixels".
        trust_code: allow a run to import its objective from outside mim_jax.

    Returns:
        The objective's pictures by caption, for example "masked", "painted" and "original".

    Raises:
        UserError: if the source does not predict hidden patches.
    """
    config, params, buffers = read_checkpoint(source, tokenizer)
    if config["objective"]["name"] not in objectives.names():
        schema.load_objective(config, str(source), False, trust_code)
    given, config = config["objective"], complete(config, source, overrides)
    networks = schema.networks(config.to_dict())
    count = sorted({"mask_ratio", "num_masked"} & set(config.objective))
    if "model" not in networks or not count:
        raise UserError(f"{source} does not predict hidden patches: it cannot reconstruct images.")
    grid = np.broadcast_to(config.data.size, 2) // networks["model"].patch
    keys = schema.keys_of(config)
    if mask_ratio is None and count[0] not in given:  # converted weights do not record it
        mask_ratio = MASK_RATIO if count[0] == "num_masked" else None
    if mask_ratio is not None:
        value = mask_ratio if count[0] == "mask_ratio" else round(mask_ratio * math.prod(grid))
        schema.set_key(config, keys, f"objective.{count[0]}", value)
    if tokenizer:
        size = tuple((grid * networks["tokenizer"].patch).tolist())
        schema.set_key(config, keys, "data.tokenizer_size", size)
    config.init_from.tokenizer = str(tokenizer or source)
    function = objectives.find(config.objective.name)
    objective = recipe.build_objective(config, function, networks, None)
    if missing := sorted(set(objective.needs) - buffers.keys()):
        raise UserError(f"{source} does not hold its {missing[0]}: set --{missing[0]}=CKPT.")
    batch = batch_of(images, config.data)
    columns = jax.jit(objective.pictures)(params, buffers, batch, jax.random.key(seed))
    return {caption: np.asarray(x) for caption, x in columns.items()}


def attend(
    source: str | Path,
    images: Images,
    *,
    queries: Sequence[tuple[int, int]] = (),
    layer: int = -1,
    head: int | str | None = None,
    size: int = ATTENTION_SIZE,
    heads: int = 0,
) -> Columns:
    """Draws attention maps of the class token and of the patches in `queries`.

    Each image has a row for the class token, then one for each query, whose patch is framed in the
    image. Each map is scaled by its maximum.

    Args:
        source: a run, a file of weights or a Hugging Face folder.
        images: files, Pillow images or arrays (H, W, c).
        queries: patches by row and column of the grid, from 0.
        layer: the block, from 0; negative numbers count from the last.
        head: one head, from 0, or "average"; default: the average and each head.
        size: side of the images in pixels, to which positions are interpolated.
        heads: number of heads, if the source does not record it.

    Raises:
        UserError: if the source has no encoder, or no such layer, head or patch.
    """
    params, network, _ = files.load_weights(source, heads=heads, encoder_only=True)
    encoder = network.encoder
    require_heads(encoder)
    if head not in (None, "average", *range(encoder.heads)):
        raise UserError(f"there is no head {head}: the encoder has {encoder.heads} heads.")
    p, q = encoder.patch
    sides = size // p * p, size // q * q
    if network.grid is None or sides != network.size:
        params, network = resized(*encoder_only(params, network), sides)
    data = dict(size=sides, channels=network.channels)
    pixels = batch_of(images, data)["image"]
    statistics = statistics_of(source, network.metadata)
    grid = (sides[0] // p, sides[1] // q)
    rows, drawn = [], to_rgb(np.asarray(unit(pixels))) / 255
    tile = sides if head is not None else (sides[0] // 2, sides[1] // 2)
    maps_of = jax.jit(functools.partial(attention_maps, network.encoder), static_argnums=2)
    for i in range(len(pixels)):  # one at a time, to bound the memory of large maps
        one = normalize(pixels[i : i + 1], statistics["mean"], statistics["std"])
        maps = np.asarray(maps_of(params["encoder"], one, layer))
        for query in (None, *queries):
            values = rows_of(maps, grid, query)[0]
            picture = drawn[i : i + 1]
            framed = picture if query is None else marked(picture, query, encoder.patch)
            rows.append((framed[0], heat(np.stack([values.mean(0), *values]), tile)))
    columns = {"image, the query framed" if queries else "image": [x for x, _ in rows]}
    for number, name in enumerate(["average", *range(encoder.heads)]):
        if head in (None, name):
            caption = "average over heads" if name == "average" else f"head {name}"
            columns[caption] = [maps[number] for _, maps in rows]
    return {caption: np.stack([shrunk(x, tile) for x in xs]) for caption, xs in columns.items()}


def tokenize(source: str | Path, images: Images, *, size: int = 0) -> Columns:
    """Draws the visual tokens of images, and the images decoded from them.

    Args:
        source: a dVAE, or a run that predicts the tokens of one.
        images: files, Pillow images or arrays (H, W, c).
        size: side of the images in pixels; default: that of training, or 224.

    Raises:
        UserError: if the source has no tokenizer.
    """
    network, parts, data = tokenizer_of(source, size)
    pixels = np.asarray(unit(batch_of(images, data)["image"]))
    rows, columns = (side // p for side, p in zip(data["size"], network.patch, strict=True))
    tokens = np.asarray(jax.jit(network.tokens)(parts["tokenizer"], pixels))
    colors = code_colors(network.encoder.vocabulary)[tokens.reshape(-1, rows, columns)]
    colors = colors.repeat(network.patch[0], axis=1).repeat(network.patch[1], axis=2)
    drawn = {"original": pixels, "its tokens, one color each": colors}
    if "decoder" in parts:
        decode = jax.jit(network.decode, static_argnums=2)
        drawn["from its tokens"] = np.asarray(decode(parts["decoder"], tokens, (rows, columns)))
    return drawn


def tokenizer_of(source: str | Path, size: int | tuple = 0) -> tuple[DVAE, dict, dict]:
    """Returns the dVAE of a checkpoint, its parameters, and the size and channels of its images.

    Raises:
        UserError: if the checkpoint has none.
    """
    config, params, buffers = read_checkpoint(source)
    parts = next((tree for tree in (params, buffers) if "tokenizer" in tree), None)
    if parts is None:
        raise UserError(f"{source} holds no tokenizer.")
    networks = schema.networks({"tokenizer": config["tokenizer"] | {"dtype": "float32"}})
    network, data = networks["tokenizer"], {"tokenizer_size": 0, "size": 0} | config["data"]
    size = size or data["tokenizer_size"] or data["size"] or TOKENIZER_SIZE
    sides = np.broadcast_to(size, 2) // network.patch * network.patch
    return network, parts, dict(size=tuple(sides.tolist()), channels=network.channels)


def segment(
    source: str | Path,
    images: Images,
    *,
    size: int = 0,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Columns:
    """Draws the predicted class of every pixel, and the most frequent classes of an image.

    Args:
        source: a run that classifies pixels, or weights; the classes of weights are numbers.
        images: files, Pillow images or arrays (H, W, c), of any size.
        size: shorter side of the resized images in pixels; default: that of the run.
        overrides: other keys of the config, for example "objective.mirror=true".
        trust_code: allow a run to import its objective from outside mim_jax.

    Returns:
        The images, their classes in colors, and a legend, padded to a common size.

    Raises:
        UserError: if the source does not classify pixels.
    """
    params, buffers, record = read_segmenter(source)
    schema.load_objective(record["config"], str(source), False, trust_code)
    config = complete(record["config"], source, overrides)
    function, names = objectives.find(config.objective.name), workdir.class_names_of(record)
    if "segmentation_classes" not in inspect.signature(function).parameters:
        raise UserError(f"{source} does not classify pixels.")
    window = tuple(np.broadcast_to(config.data.size, 2).tolist())
    colors = record.get("data", {}).get("class_colors") or palette(len(names))
    dataset = SimpleNamespace(
        segmentation_classes=tuple(names), segmentation_colors=colors, image_size=window
    )
    networks = schema.networks(config.to_dict())
    objective = recipe.build_objective(config, function, networks, dataset)
    draw, rows = jax.jit(objective.pictures), []
    short = size or config.data.short_side or min(window)
    for image in images:
        pixels = decoded(image, config.data.channels, dtype_of(image))
        shape = fitted(width_and_height(pixels)[::-1], short, config.data.long_side or 4 * short)
        pixels = resize(pixels, shape, config.data.evaluation_interpolation)[None]
        labels = np.full((1, *shape), len(names), np.int32)  # not a class: labels are unknown
        batch = dict(image=pixels, segmentation=labels, index=np.zeros(1, np.int32))
        drawn = draw(params, buffers, batch, jax.random.key(0))
        drawn = {k: np.asarray(x)[0, : shape[0], : shape[1]] for k, x in drawn.items()}
        plain = to_rgb(drawn["image"][None])[0] / 255
        rows.append((plain, drawn["prediction"], legend(drawn["prediction"], names, colors)))
    tiles = padded([tile for row in rows for tile in row])
    return {
        caption: tiles[column :: len(rows[0])]
        for column, caption in enumerate(("image", "its classes", "largest classes"))
    }


def read_segmenter(source: str | Path) -> tuple[dict, dict, dict]:
    """Returns the parameters, the buffers and the record of a run, or of weights that segment.

    Raises UserError if the weights do not classify pixels.
    """
    if has_checkpoints(str(source)):
        params, buffers, record = saved.load(str(source))
        if not workdir.is_converted(record):
            return params, buffers, record
    params, network, _ = files.load_weights(source)
    if "classes" not in params.get("head", {}):
        raise UserError(f"{source} does not classify pixels.")
    module, config = segmenter(params, network, network.encoder), files.config_of(network)
    for key in ("decoder", "layers", "channels", "auxiliary_channels"):
        config["objective"][key] = getattr(module, key)
    del config["data"]["crop_fraction"]  # segmentation does not use it
    config["objective"] |= statistics_of(source, network.metadata)
    buffers = {COLLECTION: params.pop(COLLECTION)}
    names = [f"class {i}" for i in range(module.num_classes)]
    return params, buffers, {"config": config, "data": {"class_names": names}}


def legend(
    prediction: np.ndarray, names: Sequence[str], colors: Sequence[Sequence[int]]
) -> np.ndarray:
    """Returns an image (H, W, 3) that names the colors of a prediction (H, W, 3)."""
    pixels = (prediction * 255).round().astype(int)
    shares = [(np.all(pixels == color, axis=-1)).mean() for color in colors]
    order = [i for i in np.argsort(shares)[::-1] if shares[i] > 0]
    height, width = max(144, prediction.shape[0]), max(240, prediction.shape[1])
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for row, i in enumerate(order[: height // 24]):
        draw.rectangle((4, 24 * row + 4, 24, 24 * row + 20), tuple(colors[i]), "gray")
        draw.text((32, 24 * row + 4), f"{names[i]} {shares[i]:.0%}", "black", font)
    return np.asarray(picture) / 255


def padded(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns images (H, W, 3) of several sizes with a white border, as one array."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    borders = [((0, height - x.shape[0]), (0, width - x.shape[1]), (0, 0)) for x in images]
    whitened = [
        np.pad(x, border, constant_values=1) for x, border in zip(images, borders, strict=True)
    ]
    return np.stack(whitened)


# --- Reading checkpoints and images. ---


def read_checkpoint(source: str | Path, tokenizer: str | Path = "") -> tuple[dict, dict, dict]:
    """Returns the config, the parameters and the buffers of a checkpoint of any kind.

    If `tokenizer` names a dVAE, the buffers and the config include it.
    """
    if (workdir.open_path(source) / "checkpoints").is_dir():
        params, buffers, record = saved.load(str(source))
        config = record["config"]
    else:
        params, network, _ = files.load_weights(source)
        config = files.config_of(network)
        buffers = {}
    if tokenizer:
        held, network, _ = files.load_weights(tokenizer)
        if "tokenizer" not in held:
            raise UserError(f"--tokenizer={tokenizer} holds no dVAE.")
        buffers = buffers | held
        config = config | {"tokenizer": files.config_of(network)["tokenizer"]}
    return config, params, buffers


def complete(config: dict, source: str | Path, overrides: Sequence[str]) -> ConfigDict:
    """Returns the complete config of a checkpoint, in float32, changed by overrides "key=value"."""
    name = config["objective"]["name"]
    if name not in objectives.names():
        raise UserError(f"{source} holds only an encoder: it cannot reconstruct images.")
    takes = inspect.signature(objectives.find(name)).parameters
    given = dict(batch_size=1, optimizer={"name": min(optim.OPTIMIZERS)}) | config
    given["objective"] = {k: x for k, x in config["objective"].items() if k in takes or k == "name"}
    given["data"] = {"name": ""} | config["data"]
    for block in schema.NETWORKS.keys() & given:
        given[block] = given[block] | {"dtype": "float32"}
    completed = schema.complete(given)
    for override in overrides:
        key, _, text = override.partition("=")
        schema.set_key(completed, schema.keys_of(completed), key, text, typed=True)
    return completed


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns an image (H, W, 3) in [0, 1] at another size."""
    if image.shape[:2] == size:
        return image
    small = Image.fromarray((image * 255).round().astype(np.uint8)).resize(size[::-1])
    return np.asarray(small) / 255


if __name__ == "__main__":
    cli.exit_with(main)
