"""The Vision Transformer: the one encoder that every objective trains.

Shapes: b images, n patches, k visible patches, d width, h heads, (p, q) patch, c channels.
"""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.models.patches import patchify, sincos2d, take

SIZES = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
}


def one_product(x, kernel, *_, **__):
    """x (..., d), kernel (d, e): as one matrix product, which takes a quarter off a CPU's step."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
Dense = functools.partial(Dense, dot_general=one_product)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q (b, m, h, d), k and v (b, n, h, d) -> (b, m, h, d); softmax in float32 or better."""
    scores = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bmhd,bnhd->bhmn", q, k, preferred_element_type=scores)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.einsum("bhmn,bnhd->bmhd", weights, v)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of four times the width."""

    heads: int
    dtype: str
    last: int | None = None  # compute only the last tokens; all others are still attended to

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (b, n, d) -> (b, n or last, d)."""
        n, width = x.shape[1:]
        start = 0 if self.last is None else n - self.last
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype)
        qkv = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        q, k, v = einops.rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
        y = einops.rearrange(attention(q[:, start:], k, v), "b n h d -> b n (h d)")
        x = x[:, start:] + dense(width, name="proj")(y)
        y = dense(4 * width, name="fc1")(norm(name="norm2")(x))
        return x + dense(width, name="fc2")(nn.gelu(y, approximate=False))


def transform(x: jax.Array, depth: int, heads: int, dtype: str, remat: str, last=None) -> jax.Array:
    """x (b, n, d) through blocks `block_0` ... and the final `norm` of the calling module.

    A loop, not a scan: names stay names, and scan took 1.7 times the memory (ViT-L on v5e).
    """
    if x.shape[-1] % heads:
        raise UserError(f"{heads} heads do not divide a width of {x.shape[-1]}.")
    block = Block if remat == "none" else rematerialize(remat)
    for i in range(depth):
        x = block(heads, dtype, last if i == depth - 1 else None, name=f"block_{i}")(x)
    return LayerNorm(dtype=dtype, name="norm")(x)


def rematerialize(remat: str) -> type[Block]:
    """Block, computing again for its gradient what a policy of this name does not keep."""
    policy = "nothing_saveable" if remat == "full" else remat
    if not hasattr(jax.checkpoint_policies, policy):
        raise UserError(f"model.remat = {remat!r}: say none, full or a jax.checkpoint_policies.")
    return nn.remat(Block, policy=getattr(jax.checkpoint_policies, policy))


class ViT(nn.Module):
    """An image as a sequence of patches through a transformer (Dosovitskiy et al., 2020)."""

    patch: tuple[int, int]
    width: int
    depth: int
    heads: int
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        """images (b, H, W, c), normalised -> tokens (b, 1 + n, d), the class token first.

        With visible (b, k), only these patches are encoded, in this order: (b, 1 + k, d) (MAE).
        """
        grid = tuple(side // p for side, p in zip(images.shape[1:3], self.patch, strict=True))
        patches = patchify(images, self.patch)
        positions = jnp.asarray(sincos2d(grid, self.width), self.dtype)
        if visible is not None:  # before embedding: what is hidden costs nothing
            patches, positions = take(patches, visible), take(positions, visible)
        bound = patches.shape[-1] ** -0.5  # torch's default, at which MAE leaves this bias
        bias_init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        embed = Dense(self.width, dtype=self.dtype, bias_init=bias_init, name="embed")
        x = embed(patches) + positions
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
        return transform(x, self.depth, self.heads, self.dtype, self.remat)


def vit(
    *,
    size: str = "",
    patch: int | tuple = 16,
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    dtype: str = "float32",
    remat: str = "none",
) -> ViT:
    """A ViT by its `size` in the papers (Ti, S, B, L, H), or by its width, depth and heads."""
    if size and size not in SIZES:
        raise UserError(f"model.size = {size!r} is unknown; there are {', '.join(SIZES)}.")
    given = {k: v for k, v in dict(width=width, depth=depth, heads=heads).items() if v}
    shape = {**SIZES.get(size, {}), **given}
    if len(shape) < 3:
        raise UserError("the config must say model.size, or model.width, depth and heads.")
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return ViT(patch=patch, dtype=dtype, remat=remat, **shape)
