"""Transformer blocks, used by the encoder and by MAE's decoder.

Shapes: b images, n tokens, d width, h heads.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.models.attention import attention
from mim_jax.models.layers import Dense, LayerNorm, at_least_float32, gelu
from mim_jax.models.patches import relative_index

Initializer = Literal["mae", "beit", "beit_finetune", "timm"]
# Initializers of kernels, named after the code that uses them.
INITS: dict[Initializer, Callable] = {
    "mae": nn.initializers.xavier_uniform(),
    "beit": nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0),  # std 0.0108
    "beit_finetune": nn.initializers.normal(0.02),  # BEiT's classifier without pretraining
    "timm": nn.initializers.normal(0.02),
}


class RelativePositionBias(nn.Module):
    """A learned bias of attention by the relative position of query and key (BEiT's code)."""

    heads: int

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> jax.Array:
        """Returns the bias (h, 1 + n, 1 + n) by query and key, the class token first."""
        index = relative_index(grid)
        table = self.param("table", nn.initializers.zeros, (index.max() + 1, self.heads))
        return jnp.moveaxis(table[index], -1, 0)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of four times the width.

    Both branches read the residual stream in the compute dtype and add to it in at least float32:
    in bfloat16, most of the output of deep blocks would be lost by rounding.
    """

    heads: int
    dtype: str
    index: int = 0  # position among the blocks
    last: int | None = None  # number of output tokens, from the end; all tokens are attended to
    initializer: Initializer = "mae"
    layer_scale: float = 0.0  # initial gain of both branches; 0: no LayerScale
    key_bias: bool = True
    grid: tuple[int, int] | None = None  # of patches, for a relative position bias of this block

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None, keep: jax.Array | None = None):
        """x (b, n, d), bias (h, n, n), factors of branches keep (2, b) -> (b, n or last, d)."""
        n, width = x.shape[1:]
        last = n if self.last is None else self.last
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=INITS[self.initializer])
        ends = functools.partial(dense, kernel_init=self.init_of_ends)

        def add(x, y, branch):
            y = y.astype(x.dtype)
            if self.layer_scale:
                gain = nn.initializers.constant(self.layer_scale)
                y = y * self.param(f"gamma_{branch + 1}", gain, (width,))
            return x + (y if keep is None else y * keep[branch, :, None, None])

        x = x.astype(at_least_float32(x.dtype))
        qkv_bias = None
        if not self.key_bias:  # a key bias has no effect on the softmax
            zeros = nn.initializers.zeros
            q, v = self.param("q_bias", zeros, (width,)), self.param("v_bias", zeros, (width,))
            qkv_bias = jnp.concatenate([q, jnp.zeros_like(q), v])
        qkv = dense(3 * width, use_bias=self.key_bias, name="qkv")(norm(name="norm1")(x), qkv_bias)
        if self.grid:
            own = RelativePositionBias(self.heads, name="relative_position_bias")(self.grid)
            bias = own if bias is None else bias + own
        y = ends(width, name="proj")(attention(qkv, self.heads, bias, last))
        x = add(x[:, n - last :], y, 0)
        y = gelu(dense(4 * width, name="fc1")(norm(name="norm2")(x)))
        return add(x, ends(width, name="fc2")(y), 1)

    def init_of_ends(self, *args):
        """Initializes the last kernel of a branch, which BEiT scales down by depth."""
        scale = (2 * (self.index + 1)) ** -0.5 if self.initializer.startswith("beit") else 1.0
        return scale * INITS[self.initializer](*args)


def transform(
    x: jax.Array,
    depth: int,
    *,
    heads: int,
    dtype: str,
    remat: str,
    bias: jax.Array | None = None,
    keep: jax.Array | None = None,
    last: int | None = None,
    layers: tuple[int, ...] = (),
    **options,
) -> Any:  # an array, or a tuple with `layers`
    """Applies the blocks `block_0`, `block_1`, ... and the final `norm` of the calling module.

    A Python loop keeps one name per block; `scan` took 1.7 times the memory (ViT-L on TPU v5e).

    Args:
        x: tokens (b, n, d).
        depth: number of blocks.
        heads: number of attention heads.
        dtype: the compute dtype.
        remat: none, full, or a name of `jax.checkpoint_policies`.
        bias: (h, n, n), added to the attention logits of every block.
        keep: (depth, 2, b), factors of the branches, see `drop_paths`.
        last: number of tokens, from the end, that the last block computes; None: all.
        layers: blocks, from 0, whose outputs are returned instead, without a norm.
        options: other fields of `Block`.

    Returns:
        Tokens (b, n or last, d), or with `layers` a tuple of tokens in at least float32.

    Raises:
        UserError: if the heads do not divide the width, or `remat` is unknown.
    """
    if x.shape[-1] % heads:
        raise UserError(
            f"{heads} heads do not divide a width of {x.shape[-1]}: set model.heads (of a decoder: "
            "objective.decoder_heads) to a divisor."
        )
    block = Block if remat == "none" else rematerialize(remat)
    outputs = {}
    for i in range(max(layers, default=depth - 1) + 1):
        options |= dict(index=i, last=last if i == depth - 1 else None, name=f"block_{i}")
        x = block(heads, dtype, **options)(x, bias, None if keep is None else keep[i])
        outputs[i] = x
    if layers:
        return tuple(outputs[i] for i in layers)
    return LayerNorm(dtype=dtype, name="norm")(x)


def drop_paths(rngs: jax.Array, rate: float, depth: int) -> jax.Array:
    """Draws the factors of stochastic depth (Huang et al., 2016): keys (b,) -> (depth, 2, b).

    Each branch is dropped independently, with a probability that grows linearly with depth from 0
    to `rate`. Kept branches are divided by the probability of keeping them.
    """
    kept = 1 - jnp.linspace(0, rate, depth)[:, None]
    draw = jax.vmap(lambda rng: jax.random.bernoulli(rng, kept, (depth, 2)), out_axes=-1)
    return draw(rngs) / kept[..., None]


def rematerialize(remat: str) -> type[Block]:
    """Returns Block with rematerialization under the checkpoint policy `remat`."""
    policy = "nothing_saveable" if remat == "full" else remat
    if not hasattr(jax.checkpoint_policies, policy):
        raise UserError(
            f"model.remat = {remat!r}: set it to none, full or a name of jax.checkpoint_policies."
        )
    return nn.remat(Block, policy=getattr(jax.checkpoint_policies, policy))
