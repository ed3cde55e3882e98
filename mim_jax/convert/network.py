"""Builds the modules that parameters belong to, from the shapes of the parameters.

Shapes: (p, q) patch, c channels, d width, h heads, n patches, v values.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mim_jax import UserError
from mim_jax.models.decoder import Decoder
from mim_jax.models.dvae import DVAE, dvae
from mim_jax.models.stem import STRIDE
from mim_jax.models.vit import SIZES, ViT
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.classify import Classifier
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.segment import Decoder as SegmentationDecoder
from mim_jax.objectives.segment import Segmenter, default_layers

HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
DECODER_HEADS = {512: 16}  # the official MAE
MAX_DEPTH = 256  # blocks of an encoder or decoder
MAX_BLOCKS = 16  # blocks of a layer of a dVAE


class Network(NamedTuple):
    """The modules that parameters belong to, with properties of their images and their origin."""

    model: ViT | DVAE  # a ViT with 0 heads if their number is unknown
    kind: str  # mae, beit, classify, segment, encoder, dvae
    decoder: Decoder | None = None  # MAE's
    grid: tuple[int, int] | None = None  # rows and columns of patches, None if unknown
    channels: int = 3
    layout: str = "mim_jax"  # a key of tables.LAYOUTS
    left_out: tuple[str, ...] = ()  # names of arrays that are not part of the network
    entry: str = ""  # the entry of the checkpoint, if it holds several networks
    metadata: dict[str, Any] = {}  # noqa: RUF012 - mean, std, crop_fraction, target, as in a config

    @property
    def encoder(self) -> ViT:
        """The encoder. Raises UserError for a dVAE."""
        if not isinstance(self.model, ViT):
            raise UserError("these are the weights of a dVAE, which has no ViT encoder.")
        return self.model

    @property
    def known_grid(self) -> tuple[int, int]:
        """The grid. Raises UserError if it is unknown."""
        if self.grid is None:
            raise UserError("the image size is unknown: set --image-size, for example 224.")
        return self.grid

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image. Raises UserError if they are unknown."""
        (rows, columns), (p, q) = self.known_grid, self.encoder.patch
        return rows * p, columns * q


def require_heads(module: ViT | Decoder) -> None:
    """Raises UserError if the number of heads of an encoder or decoder is unknown."""
    if not module.heads:
        option = "--heads" if isinstance(module, ViT) else "--decoder-heads"
        raise UserError(f"the number of heads for width {module.width} is unknown: set {option}=N.")


def describe(
    params: dict,
    *,
    patch: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    heads: int = 0,
    decoder_heads: int = 0,
    positions: Literal["sincos", "learned", "none", ""] = "",
    **options: Any,
) -> Network:
    """Returns the network of our parameters. Arguments take precedence over the shapes.

    `options` are other fields of `Network`. Raises UserError if the shapes do not determine it.
    """
    shapes = leaves(params)
    if "encoder" not in params:
        tokenizer = describe_dvae(shapes)
        return Network(tokenizer, "dvae", channels=tokenizer.channels, **options)
    kernel = shapes.get("encoder/embed/kernel", ())  # (p*q*c, d)
    if len(kernel) != 2:
        raise UserError("the weights have no patch embedding of shape (p*q*c, d).")
    values, width = kernel
    stem = shapes.get("encoder/stem/conv/kernel")
    if stem:  # its features are the patches
        patch = STRIDE, STRIDE
    elif patch is None:
        side = math.isqrt(values // 3)
        if 3 * side**2 != values:
            raise UserError(f"the size of a patch of {values} values is unknown: set patch=(p, q).")
        patch = side, side
    shared = shapes.get("encoder/relative_position_bias/table")  # (r, h)
    own = shapes.get("encoder/block_0/relative_position_bias/table")
    table, learned = shared or own, shapes.get("encoder/positions")
    if grid is None and learned:
        grid = square(learned[1] - 1, "positions")
    elif grid is None and table:
        side = (square(table[0] - 3, "relative positions")[0] + 1) // 2
        grid = side, side
    if grid:
        check_grid(grid, learned, table)
    encoder = ViT(
        patch=(patch[0], patch[1]),
        width=width,
        depth=depth_of(params["encoder"]),
        heads=heads or (table[-1] if table else HEADS.get(width, 0)),
        positions="learned" if learned else positions or ("none" if table else "sincos"),
        relative_bias="shared" if shared else "own" if own else "none",
        layer_scale=0.1 if "encoder/block_0/gamma_1" in shapes else 0.0,
        key_bias="encoder/block_0/q_bias" not in shapes,
        stem="resnet50" if stem else "none",
    )
    decoder = None
    if kernel := shapes.get("decoder/embed/kernel"):
        heads = decoder_heads or DECODER_HEADS.get(kernel[-1], 0)
        decoder = Decoder(kernel[-1], depth_of(params["decoder"]), heads, "float32", "none")
    channels = stem[-2] if stem else values // math.prod(patch)
    return Network(encoder, kind_of(params), decoder, grid, channels, **options)


def describe_dvae(shapes: dict[str, tuple]) -> DVAE:
    """Returns the dVAE of parameters of these shapes; one of its halves may be missing."""
    layers = {n for path in shapes for n in re.findall(r"(?:layer|group)_(\d+)", path)}
    blocks = {n for path in shapes for n in re.findall(r"block_(\d+)/", path)}
    dalle = any("group_" in path for path in shapes)
    encoder = shapes.get("tokenizer/output/kernel", ())
    decoder = shapes.get("decoder/output/kernel", ())
    known = 0 < len(layers) <= 10 and len(blocks) <= MAX_BLOCKS
    if not known or not (encoder or decoder):
        raise UserError("the weights belong to neither an encoder nor a dVAE.")
    codebook = shapes.get("decoder/input/kernel" if dalle else "decoder/codebook", (8192, 0))
    first = shapes.get("tokenizer/input/kernel") or shapes.get("tokenizer/layer_1/kernel")
    return dvae(
        kind="dalle" if dalle else "small",
        vocabulary=encoder[-1] if encoder else codebook[-2],
        width=first[-1] if first else decoder[-2],
        layers=len(layers) - dalle,
        blocks=len(blocks) or 1,
        codebook=codebook[-1],
        channels=first[-2] if first else decoder[-1] // (2 if dalle else 1),
        likelihood="logit_laplace" if dalle else "mse",
    )


def check_grid(grid: tuple[int, int], learned: tuple | None, table: tuple | None) -> None:
    """Raises UserError unless absolute (1, 1 + n, d) or relative (r, h) positions fit a grid.

    Also limits the number of patches, because tables grow with it.
    """
    (rows, columns), n = grid, grid[0] * grid[1]
    size = f"{rows} x {columns} patches"
    if learned and learned[1] != 1 + n:
        raise UserError(
            f"the positions are for {learned[1] - 1} patches, but the images have {size}."
        )
    if table and table[0] != (2 * rows - 1) * (2 * columns - 1) + 3:
        raise UserError(f"{table[0]} relative positions do not fit images of {size}.")
    if n > (2**13 if table else 2**16):
        raise UserError(f"images of {size} are too large.")


def kind_of(params: dict) -> str:
    """Returns the task of an encoder, given the other parts of the checkpoint."""
    if "decoder" in params:
        return "mae"
    if "head" not in params:
        return "encoder"
    if "classes" in params["head"]:
        return "segment"
    return "beit" if "mask_token" in params["encoder"] else "classify"


def depth_of(params: dict) -> int:
    """Returns the number of blocks; if one is missing, the last one counts as unexpected.

    Raises UserError if there are too many, because tracing a network takes time for each.
    """
    depth = sum(name.startswith("block_") for name in params)
    if depth > MAX_DEPTH:
        raise UserError(f"the network has {depth:,} blocks, more than {MAX_DEPTH}.")
    return depth


def square(count: int, what: str) -> tuple[int, int]:
    """Returns the square grid of `count` patches. Raises UserError if it is not a square."""
    side = math.isqrt(max(count, 0))
    if side**2 == count:
        return side, side
    if what == "positions" and math.isqrt(count + 1) ** 2 == count + 1:
        raise UserError(f"there are {count + 1} positions, but none for the class token.")
    raise UserError(f"{count} {what} do not form a square grid: set --image-size=HEIGHT,WIDTH.")


def full_module(params: dict, network: Network, dtype: str = "float32") -> nn.Module:
    """Returns the module of an encoder and its other parts: MAE, BEiT, Classifier, ... or ViT.

    An unknown number of heads is replaced by 1, which does not change shapes.
    """
    encoder, kind = network.encoder, kind_of(params)
    encoder = encoder.clone(heads=encoder.heads or 1, dtype=dtype)
    if network.decoder and kind == "mae":
        decoder = network.decoder.clone(heads=network.decoder.heads or 1, dtype=dtype)
        return MAE(encoder, decoder, vocabulary=outputs_of(params["decoder"], "pred"))
    if kind == "beit":
        return BEiT(encoder, vocabulary=outputs_of(params, "head"))
    if kind == "classify":
        return Classifier(
            encoder,
            num_labels=outputs_of(params, "head"),
            pooling="mean" if "fc_norm" in params else "cls",
            batch_norm="batch_statistics" in params,
            head_std=0.0,
        )
    if kind == "segment":
        return segmenter(params, network, encoder)
    return encoder


def segmenter(params: dict, network: Network, encoder: ViT) -> Segmenter:
    """Returns the module of an encoder and its segmentation decoders."""
    head, auxiliary = params["head"], params.get("auxiliary") or params.get("auxiliary_0")
    decoder: SegmentationDecoder
    if "pyramid" in params:
        decoder = "upernet"
    elif "conv_3" in head:
        decoder = "setr_pup"
    elif "conv_0" in head:
        decoder = "setr_naive"
    else:
        decoder = "linear"

    def channels(part: dict) -> int:
        return np.shape(part["classes"]["conv"]["kernel"])[0]

    return Segmenter(
        encoder,
        num_classes=outputs_of(head["classes"], "conv"),
        decoder=decoder,
        layers=tuple(network.metadata.get("layers") or default_layers(encoder.depth)),
        channels=channels(head),
        group=1,
        dropout=0.0,
        auxiliary_channels=channels(auxiliary) if auxiliary else 0,
    )


def outputs_of(params: dict, name: str) -> int:
    """Returns the number of outputs of a linear layer."""
    arrays = params.get(name, {})
    return np.shape(arrays.get("bias", arrays.get("kernel", np.empty(1))))[-1]


def expected(params: dict, network: Network) -> dict[str, tuple[int, ...]]:
    """Returns {"encoder/block_0/qkv/kernel": (192, 576), ...}: all arrays of the network."""
    rng = jax.random.key(0)
    if isinstance(tokenizer := network.model, DVAE):
        images = jax.ShapeDtypeStruct((1, *tokenizer.patch, tokenizer.channels), jnp.float32)
        shapes = jax.eval_shape(tokenizer.init, rng, images)
        return leaves({part: shapes[part] for part in params})
    (p, q), (rows, columns) = network.encoder.patch, network.grid or (2, 2)
    n = rows * columns
    images = jax.ShapeDtypeStruct((1, rows * p, columns * q, network.channels), jnp.float32)
    if network.kind == "segment":  # include blocks after the decoded ones
        last = network.encoder.depth - 1
        network = network._replace(metadata=network.metadata | dict(layers=(last,) * 4))
    module: Any = full_module(params, network)
    inputs: tuple[jax.Array, ...] = ()
    options: dict[str, Any] = {}
    if network.kind == "mae":
        inputs = jnp.zeros((1, 1), int), jnp.arange(n)[None]  # one visible, n hidden
    elif network.kind == "beit":
        inputs = jnp.ones((1, n), bool), jnp.arange(n)[None]
    elif network.kind == "encoder":
        if "mask_token" in params["encoder"]:
            options["masked"] = jnp.ones((1, n), bool)
        if "norm" not in params["encoder"] or "fc_norm" in params:
            options["layers"] = (network.encoder.depth - 1,)  # without a final norm
    variables = jax.eval_shape(lambda x: module.init(rng, x, *inputs, **options), images)
    shapes = dict(variables.pop("params"))
    if network.kind == "encoder":
        norm = np.empty(network.encoder.width)
        shapes = {"encoder": shapes}
        shapes |= {"fc_norm": dict(scale=norm, bias=norm)} if "fc_norm" in params else {}
    return leaves(shapes | variables)


@contextlib.contextmanager
def extra() -> Iterator[None]:
    """Reports a missing package of the extra [torch] as a UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'mim-jax[torch]'.") from error


def leaves(tree: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of arrays in nested dicts, by their joined names."""
    return {path: np.shape(x) for path, x in flatten_dict(tree, sep="/").items()}
