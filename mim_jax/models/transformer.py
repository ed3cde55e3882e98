"""The transformer that encoders and decoders are made of.

Shapes: b images, n tokens, m of them, d width, h heads.
"""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.models.attention import attention
from mim_jax.models.patches import relative_index


def one_product(x, kernel, *_, **__):
    """x (..., d), kernel (d, e): as one matrix product, which takes a quarter off a CPU's step."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


# Norms and gelu are computed again for their gradients, from what goes into them: that is cheaper,
# on a CPU faster too, than keeping what lies between.
LayerNorm = functools.partial(nn.remat(nn.LayerNorm), epsilon=1e-6, use_fast_variance=False)
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
Dense = functools.partial(Dense, dot_general=one_product)
INITS = {  # of all matrices, by the code that they are from
    "mae": nn.initializers.xavier_uniform(),
    "beit": nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0),  # deviation 0.0108
    "timm": nn.initializers.normal(0.02),
}


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """The exact one."""
    return nn.gelu(x, approximate=False)


class RelativePositionBias(nn.Module):
    """What attention adds for where a token lies from where another does (BEiT, its code)."""

    heads: int

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> jax.Array:
        """-> (h, 1 + n, 1 + n): by query and key, the class token first."""
        index = relative_index(grid)
        table = self.param("table", nn.initializers.zeros, (index.max() + 1, self.heads))
        return jnp.moveaxis(table[index], -1, 0)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of four times the width."""

    heads: int
    dtype: str
    index: int = 0  # its place among the blocks
    last: int | None = None  # compute only the last tokens; all others are still attended to
    initializer: str = "mae"
    layer_scale: float = 0.0  # what the gains of both branches begin with; 0: there are none
    key_bias: bool = True
    grid: tuple[int, int] | None = None  # of the patches, for a relative position bias of its own

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None, keep: jax.Array | None = None):
        """x (b, n, d), bias (h, n, n), factors of the branches keep (2, b) -> (b, n or last, d)."""
        n, width = x.shape[1:]
        start = 0 if self.last is None else n - self.last
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=INITS[self.initializer])
        ends = functools.partial(dense, kernel_init=self.init_of_ends)

        def add(x, y, branch):
            if self.layer_scale:
                gain = nn.initializers.constant(self.layer_scale)
                y = y * self.param(f"gamma_{branch + 1}", gain, (width,)).astype(y.dtype)
            return x + (y if keep is None else y * keep[branch, :, None, None].astype(y.dtype))

        qkv = dense(3 * width, use_bias=self.key_bias, name="qkv")(norm(name="norm1")(x))
        if not self.key_bias:  # it changes nothing: the softmax takes it out again
            zeros = nn.initializers.zeros
            q, v = self.param("q_bias", zeros, (width,)), self.param("v_bias", zeros, (width,))
            qkv = qkv + jnp.concatenate([q, jnp.zeros_like(q), v]).astype(qkv.dtype)
        q, k, v = einops.rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.grid:
            own = RelativePositionBias(self.heads, name="relative_position_bias")(self.grid)
            bias = own if bias is None else bias + own
        y = attention(q[:, :, start:], k, v, bias if bias is None else bias[:, start:])
        y = ends(width, name="proj")(einops.rearrange(y, "b h n d -> b n (h d)"))
        x = add(x[:, start:], y, 0)
        y = gelu(dense(4 * width, name="fc1")(norm(name="norm2")(x)))
        return add(x, ends(width, name="fc2")(y), 1)

    def init_of_ends(self, *args):
        """Of the matrices that branches end with, which BEiT makes smaller block by block."""
        scale = (2 * (self.index + 1)) ** -0.5 if self.initializer == "beit" else 1.0
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
) -> jax.Array | tuple[jax.Array, ...]:
    """x (b, n, d) through blocks `block_0` ... and the final `norm` of the calling module.

    With `layers`, what these blocks give is returned instead, and there is no norm. `keep`
    (depth, 2, b) are the branches' factors. A loop, not a scan: names stay names, and scan took
    1.7 times the memory (ViT-L on v5e).
    """
    if x.shape[-1] % heads:
        raise UserError(f"{heads} heads do not divide a width of {x.shape[-1]}.")
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
    """Stochastic depth (Huang et al., 2016): a key an image (b,) -> factors (depth, 2, b).

    A branch is left out with a probability that grows from 0 to `rate`, each for itself; one that
    is kept counts for those that are not.
    """
    kept = 1 - jnp.linspace(0, rate, depth)[:, None]
    draw = jax.vmap(lambda rng: jax.random.bernoulli(rng, kept, (depth, 2)), out_axes=-1)
    return draw(rngs) / kept[..., None]


def rematerialize(remat: str) -> type[Block]:
    """Block, computing again for its gradient what a policy of this name does not keep."""
    policy = "nothing_saveable" if remat == "full" else remat
    if not hasattr(jax.checkpoint_policies, policy):
        raise UserError(f"model.remat = {remat!r}: say none, full or a jax.checkpoint_policies.")
    return nn.remat(Block, policy=getattr(jax.checkpoint_policies, policy))
