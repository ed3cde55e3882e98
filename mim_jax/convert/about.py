"""What weights are of, by their shapes, and which arrays a network of this kind must have."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mim_jax import UserError
from mim_jax.models.decoder import Decoder
from mim_jax.models.dvae import dvae
from mim_jax.models.stem import STRIDE
from mim_jax.models.vit import SIZES, ViT, vit

HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
DECODER_HEADS = {512: 16}  # the official MAE's


class About(NamedTuple):
    """What the shapes of parameters say of their network, and what lay beside them."""

    kind: str  # mae, beit, classify, encoder, dvae
    model: dict[str, Any]  # keyword arguments of `vit`; of a dVAE, those of `dvae`
    grid: tuple[int, int] | None = None  # rows and columns of patches; None: unknown
    channels: int = 3
    decoder: dict[str, int] | None = None  # MAE's: width, depth, heads
    layout: str = "mim_jax"  # a key of tables.LAYOUTS
    left_out: tuple[str, ...] = ()  # arrays that are no part of the network, by their names
    facts: dict[str, Any] = {}  # noqa: RUF012 - mean, std, crop_fraction, target, as in a config

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of pixels of a patch."""
        return self.model["patch"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image. Raises UserError where it is unknown."""
        if self.grid is None:
            raise UserError("the images' size is unknown: say --image-size=224.")
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def encoder(self) -> ViT:
        """The network. Raises UserError where its number of heads is not known."""
        width = self.model["width"]
        if not self.model["heads"]:
            raise UserError(f"the number of heads of a width of {width} is unknown: say --heads=N.")
        return vit(**self.model)


def describe(
    params: dict,
    *,
    patch: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    heads: int = 0,
    decoder_heads: int = 0,
    positions: str = "",
    **known: Any,
) -> About:
    """What our parameters are of; what the arguments say stands over what shapes say."""
    flat = {path: np.shape(x) for path, x in flatten_dict(params, sep="/").items()}
    if "encoder" not in params:
        return describe_dvae(flat, **known)
    try:
        values, width = flat["encoder/embed/kernel"]
    except (KeyError, ValueError):
        raise UserError(
            "the weights have no embedding of patches of the shape (p*q*c, d)."
        ) from None
    stem = flat.get("encoder/stem/conv/kernel")
    if stem:  # patches are its features, whatever embeds them
        patch = STRIDE, STRIDE
    if patch is None:
        side = math.isqrt(values // 3)
        if 3 * side**2 != values:
            raise UserError(f"a patch of {values} values: say patch=(p, q).")
        patch = side, side
    table = flat.get("encoder/relative_position_bias/table")
    own = flat.get("encoder/block_0/relative_position_bias/table")
    learned = flat.get("encoder/positions")
    if grid is None:  # square, as nothing says otherwise
        if learned:
            grid = square(learned[1] - 1, "positions")
        elif table or own:
            side = square((table or own)[0] - 3, "relative positions")[0]
            grid = (side + 1) // 2, (side + 1) // 2
    if not positions:
        positions = "none" if table or own else "sincos"
    bias = "shared" if table else "own" if own else "none"
    decoder = None
    if (kernel := flat.get("decoder/embed/kernel")) and "decoder" in params:
        decoder_heads = decoder_heads or DECODER_HEADS.get(kernel[-1], 0)
        decoder = dict(width=kernel[-1], depth=depth_of(params["decoder"]), heads=decoder_heads)
    return About(
        kind=kind_of(params),
        model=dict(
            patch=tuple(patch),
            width=width,
            depth=depth_of(params["encoder"]),
            heads=heads or (table or own or (0, HEADS.get(width, 0)))[-1],
            positions="learned" if learned else positions,
            relative_bias=bias,
            layer_scale=0.1 if "encoder/block_0/gamma_1" in flat else 0.0,
            key_bias="encoder/block_0/q_bias" not in flat,
            stem="resnet50" if stem else "none",
        ),
        grid=grid,
        channels=stem[-2] if stem else values // math.prod(patch),
        decoder=decoder,
        **known,
    )


def describe_dvae(flat: dict[str, tuple], **known: Any) -> About:
    """The same of a dVAE, or of one half of it."""
    layers = [int(n) for path in flat for n in re.findall(r"(?:layer|group)_(\d+)", path)]
    blocks = [int(n) for path in flat for n in re.findall(r"block_(\d+)/", path)]
    dalle = any("group_" in path for path in flat)
    encoder, painted = flat.get("tokenizer/output/kernel"), flat.get("decoder/output/kernel")
    if not layers or not (encoder or painted):
        raise UserError("these are not the weights of an encoder or of a dVAE.")
    codebook = flat.get("decoder/input/kernel" if dalle else "decoder/codebook", (8192, 0))
    first = flat.get("tokenizer/input/kernel") or flat.get("tokenizer/layer_1/kernel")
    model = dict(
        kind="dalle" if dalle else "small",
        vocabulary=encoder[-1] if encoder else codebook[-2],
        width=first[-1] if first else painted[-2],
        layers=max(layers) - dalle,
        blocks=max(blocks, default=1),
        codebook=codebook[-1],
        channels=first[-2] if first else painted[-1] // (2 if dalle else 1),
        likelihood="logit_laplace" if dalle else "mse",
    )
    return About("dvae", model, channels=model["channels"], **known)


def kind_of(params: dict) -> str:
    """By what there is beside the encoder."""
    if "decoder" in params:
        return "mae"
    if "head" not in params:
        return "encoder"
    return "beit" if "mask_token" in params["encoder"] else "classify"


def depth_of(params: dict) -> int:
    """How many blocks there are, by the highest number."""
    return 1 + max((int(name[6:]) for name in params if name.startswith("block_")), default=-1)


def square(count: int, of: str) -> tuple[int, int]:
    """The grid of so many, which must be square."""
    side = math.isqrt(max(count, 0))
    if side**2 != count:
        raise UserError(f"{count} {of} are not of a square grid: say --image-size=HEIGHT,WIDTH.")
    return side, side


def expected(params: dict, about: About) -> dict[str, tuple[int, ...]]:
    """{"encoder/block_0/qkv/kernel": (192, 576), ...}: all that a network of this kind has."""

    def init(module, *inputs, **options):
        return module.init(jax.random.key(0), *inputs, **options)

    if about.kind == "dvae":
        network, side = dvae(**about.model), 2 ** about.model["layers"]
        whole = jax.eval_shape(lambda: init(network, jnp.zeros((1, side, side, about.channels))))
        return leaves({part: whole[part] for part in params})

    def vector(module, name):
        """The shape of a bias that decides how much is predicted."""
        return np.shape(module.get(name, {}).get("bias", ()))

    width, (rows, columns) = about.model["width"], about.grid or (1, 1)
    encoder = vit(**about.model | dict(heads=about.model["heads"] or 1))
    (p, q), n = about.patch, rows * columns
    images, options = jnp.zeros((1, rows * p, columns * q, about.channels)), {}
    if "mask_token" in params["encoder"]:
        options["masked"] = jnp.zeros((1, n), bool)
    bare = about.kind == "encoder" and "norm" not in params["encoder"]  # of a segmentation
    if bare or "fc_norm" in params:  # which takes the place of the norm
        options["layers"] = (about.model["depth"] - 1,)
    found = {"encoder": jax.eval_shape(lambda: init(encoder, images, **options)["params"])}
    if about.kind == "mae":
        shape = about.decoder | dict(heads=about.decoder["heads"] or 1)
        decoder = Decoder(**shape, dtype="float32", remat="none")
        latent, order = jnp.zeros((1, 1, width)), jnp.zeros((1, n), int)
        (values,) = vector(params["decoder"], "pred") or (1,)
        options = dict(grid=(rows, columns), values=values, last=n)
        found["decoder"] = jax.eval_shape(lambda: init(decoder, latent, order, **options)["params"])
    head, width = vector(params, "head"), np.empty(width)
    beside = {
        "fc_norm": dict(scale=width, bias=width),
        "head": dict(kernel=np.empty((len(width), *head)), bias=np.empty(head)),
        "batch_statistics": {"head_norm": dict(mean=width, variance=width)},
    }
    return leaves(found | {name: tree for name, tree in beside.items() if name in params})


@contextlib.contextmanager
def extra() -> Iterator[None]:
    """Around imports of what only the extra [torch] installs."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"this needs {error.name}: pip install 'mim-jax[torch]'.") from error


def leaves(tree: dict) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in flatten_dict(tree, sep="/").items()}
