"""The Vision Transformer, the encoder of every objective.

Shapes: b images, n patches, k visible patches, d width, h heads, (p, q) patch, c channels.
"""

import functools
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.keys import BELOW_ONE, DEPTH, FREE, NOT_NEGATIVE, POSITIVE, WIDTH, Dtype, Range, Smoke
from mim_jax.models.layers import Dense
from mim_jax.models.patches import patchify, sincos2d, take
from mim_jax.models.stem import STRIDE, Stem
from mim_jax.models.transformer import (
    INITS,
    Initializer,
    RelativePositionBias,
    drop_paths,
    transform,
)

SIZES = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
}


class ViT(nn.Module):
    """The Vision Transformer: a transformer over image patches (Dosovitskiy et al., 2020)."""

    patch: tuple[int, int]
    width: int
    depth: int
    heads: int
    positions: Annotated[
        Literal["sincos", "learned", "none"], "absolute positions: fixed, learned or none"
    ] = "sincos"
    relative_bias: Annotated[
        Literal["none", "shared", "own"], "relative position bias: none, shared, or one per block"
    ] = "none"
    layer_scale: Annotated[float, NOT_NEGATIVE, "initial gain of LayerScale; 0: none"] = 0.0
    key_bias: Annotated[bool, "bias of the attention keys; BEiT has none"] = True
    drop_path: Annotated[float, BELOW_ONE, "stochastic depth: drop rate of the last block"] = 0.0
    initializer: Annotated[Initializer, "codebase whose initialization is used"] = "mae"
    stem: Annotated[
        Literal["none", "resnet50"], "network before the patch embedding (hybrid ViT)"
    ] = "none"
    dtype: Annotated[Dtype, "dtype of matrix products; auto: bfloat16, or float32 on a CPU"] = (
        "float32"
    )
    remat: Annotated[
        str, FREE, "rematerialization of blocks: none, full, or one of jax.checkpoint_policies"
    ] = "none"

    def grid(self, images: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, int]:
        """Returns the rows and columns of patches of images (b, H, W, c)."""
        return images.shape[1] // self.patch[0], images.shape[2] // self.patch[1]

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        visible: jax.Array | None = None,
        masked: jax.Array | None = None,
        drop_keys: jax.Array | None = None,
        layers: tuple[int, ...] = (),
    ) -> Any:  # an array, or a tuple with `layers`
        """images (b, H, W, c), normalized -> tokens (b, 1 + n, d), the class token first.

        Args:
            images: normalized images.
            visible: (b, k), indices of the only patches to encode, in this order (MAE). The
                result is (b, 1 + k, d).
            masked: (b, n), true where a learned token replaces the patch (BEiT).
            drop_keys: (b,), keys for stochastic depth; without them no branch is dropped.
            layers: blocks, from 0, whose outputs are returned as a tuple, before the final norm.

        Raises UserError if the arguments do not fit the network or the image size.
        """
        if visible is not None and self.relative_bias != "none":
            raise UserError("model.relative_bias needs all patches: set it to none for MAE.")
        grid, patches = self.grid(images), patchify(images, self.patch)
        if self.stem != "none":
            if visible is not None or masked is not None:
                raise UserError("model.stem mixes visible and hidden patches: set it to none.")
            features = Stem(self.dtype, name="stem")(images)
            patches = features.reshape(*patches.shape[:2], -1)
        if visible is not None:  # before the embedding, which then skips hidden patches
            patches = take(patches, visible)
        bound = patches.shape[-1] ** -0.5  # PyTorch's default, which MAE keeps
        uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        bias_init = uniform if self.initializer == "mae" else nn.initializers.zeros
        init: dict[str, Any] = dict(kernel_init=INITS[self.initializer], bias_init=bias_init)
        x = Dense(self.width, **init, dtype=self.dtype, wide=True, name="embed")(patches)
        if masked is not None:
            x = jnp.where(masked[..., None], self.token("mask_token").astype(x.dtype), x)
        cls = self.token("cls_token").astype(x.dtype)
        if self.positions != "none":
            table = self.position_table(grid).astype(x.dtype)
            cls, table = cls + table[:, :1], table[:, 1:]
            x = x + (table if visible is None else take(table, visible))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)), x], axis=1)
        bias = keep = None
        if self.relative_bias == "shared":
            bias = RelativePositionBias(self.heads, name="relative_position_bias")(grid)
        if self.drop_path and drop_keys is not None:
            keep = drop_paths(drop_keys, self.drop_path, self.depth)
        options: dict[str, Any] = dict(heads=self.heads, dtype=self.dtype, remat=self.remat)
        options |= dict(initializer=self.initializer, layer_scale=self.layer_scale)
        options |= dict(key_bias=self.key_bias, grid=grid if self.relative_bias == "own" else None)
        return transform(x, self.depth, bias=bias, keep=keep, layers=layers, **options)

    def token(self, name: str, count: int = 1) -> jax.Array:
        """Returns learned vectors (1, count, d)."""
        draw = INITS["timm" if self.initializer == "mae" else self.initializer]
        return self.param(name, draw, (1, count, self.width))

    def position_table(self, grid: tuple[int, int]) -> jax.Array:
        """Returns positions (1, 1 + n, d), the class token's first (zero for fixed ones)."""
        fixed = jnp.pad(jnp.asarray(sincos2d(grid, self.width)), ((0, 0), (1, 0), (0, 0)))
        return fixed if self.positions == "sincos" else self.token("positions", fixed.shape[1])


def vit(
    *,
    size: Annotated[
        Literal["", "Ti", "S", "B", "L", "H"], Smoke(""), "width, depth and heads, by name"
    ] = "",
    patch: Annotated[int | tuple, POSITIVE, "side of a patch in pixels, or (rows, columns)"] = 16,
    width: Annotated[int, Range(0, WIDTH.high), Smoke(64), "width of the tokens; 0: by size"] = 0,
    depth: Annotated[int, Range(0, DEPTH.high), Smoke(2), "number of blocks; 0: by size"] = 0,
    heads: Annotated[int, NOT_NEGATIVE, Smoke(2), "attention heads; 0: by size"] = 0,
    **options: Any,
) -> ViT:
    """Builds a ViT from the name of its size, or from width, depth and heads.

    `options` are other fields of `ViT`. Raises UserError if the size is not determined, or if a
    stem does not fit the patch size.
    """
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if options.get("stem", "none") != "none" and patch != (STRIDE, STRIDE):
        raise UserError(f"model.stem needs model.patch = {STRIDE}: its features have that stride.")
    given = {k: v for k, v in dict(width=width, depth=depth, heads=heads).items() if v}
    shape: dict[str, Any] = {**SIZES.get(size, {}), **given}
    if len(shape) < 3:
        raise UserError("set model.size, or model.width, model.depth and model.heads.")
    return ViT(patch=patch, **shape, **options)
