"""The discrete VAE, which maps images to grids of tokens from a vocabulary, and back.

There are two kinds: `dalle` is OpenAI's network, whose tokens BEiT predicts (Ramesh et al., 2021,
appendix A.1); `small` is that of BEiT's code, with strided convolutions (DALLE-pytorch).

Shapes: b images, n tokens on a grid (h, w), v vocabulary, d width, (p, q) patch, c channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError
from mim_jax.keys import DEPTH, NOT_NEGATIVE, POSITIVE, WIDTH, Dtype, Range, Smoke
from mim_jax.models.layers import add_bias, at_least_float32


class Conv(nn.Module):
    """A convolution that keeps the resolution, or changes it by a factor of `stride`.

    Without a dtype it computes in at least float32, with three bfloat16 products for each float32
    one on a TPU, and TF32 products on a GPU. The default initialization is OpenAI's: zero biases,
    and kernels that preserve the variance.
    """

    width: int
    side: int  # side of the kernel in pixels
    dtype: str | None
    stride: int = 1
    enlarge: bool = False  # use a transposed convolution
    kernel_init: Callable = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (b, h, w, c) -> (b, h/stride, w/stride, width), or h*stride and w*stride."""
        shape = (self.side, self.side, x.shape[-1], self.width)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, (self.width,))
        dtype = self.dtype or at_least_float32(x.dtype)
        convolve = jax.lax.conv_transpose if self.enlarge else jax.lax.conv_general_dilated
        y = convolve(
            x.astype(dtype),
            kernel.astype(dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=None if self.dtype else "high",
        )
        return add_bias(y, bias)


def space_to_depth(images: jax.Array, side: int) -> jax.Array:
    """Moves squares of pixels into channels: (b, H, W, c) -> (b, H/side, W/side, side*side*c)."""
    return einops.rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=side, q=side)


def depth_to_space(x: jax.Array, side: int) -> jax.Array:
    """Inverts `space_to_depth`: x (b, h, w, side*side*c) -> (b, h*side, w*side, c)."""
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=side, q=side)


def max_pool(x: jax.Array) -> jax.Array:
    """x (b, h, w, d) -> the largest of each 2 x 2 pixels (b, h/2, w/2, d).

    The default takes maxima of pairs: the gradient of a maximum over axes divides by the number of
    pixels that equal it, which is 0 if XLA computes them a second time with another rounding. On a
    TPU the slices would be copied into another layout.
    """

    def by_pairs(x: jax.Array) -> jax.Array:
        x = jnp.maximum(x[:, ::2], x[:, 1::2])
        return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])

    windows = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    return jax.lax.platform_dependent(x, tpu=windows, default=by_pairs)


class Block(nn.Module):
    """A residual block of four convolutions, each after a ReLU, with a quarter of the width inside.

    The residual stream and the convolution that widens it are in float32 or better, because
    rounding them to bfloat16 would change tokens. The branch, which the gain scales down, is in
    `dtype`.
    """

    width: int
    sides: tuple[int, int, int, int]  # sides of the kernels in pixels
    gain: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, side in enumerate(self.sides, 1):
            width = self.width if i == len(self.sides) else self.width // 4
            y = Conv(width, side, self.dtype, name=f"conv_{i}")(nn.relu(y))
        if x.shape[-1] != self.width:
            x = Conv(self.width, 1, None, name="id_path")(x)
        return x + self.gain * y.astype(x.dtype)


class DalleEncoder(nn.Module):
    """Groups of blocks with 2 x 2 max pooling between them; each group doubles the width."""

    vocabulary: int
    width: int
    layers: int
    blocks: int
    stem: int
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images (b, H, W, c), mapped -> logits (b, h, w, v)."""
        gain = ((self.layers + 1) * self.blocks) ** -2
        x = space_to_depth(images, self.stem)
        side = 7 if self.stem == 1 else 3  # a stem enlarges the receptive field
        x = Conv(self.width, side, None, name="input")(x)
        for group in range(self.layers + 1):
            if group:
                x = max_pool(x)
            for i in range(self.blocks):
                name = f"group_{group + 1}_block_{i + 1}"
                x = Block(self.width << group, (3, 3, 3, 1), gain, self.dtype, name=name)(x)
        return Conv(self.vocabulary, 1, None, name="output")(nn.relu(x))


class DalleDecoder(nn.Module):
    """The encoder in reverse, with 2 x 2 nearest upsampling between groups."""

    values: int  # a pixel
    width: int
    layers: int
    blocks: int
    stem: int
    codebook: int  # the width of a code: the kernel of `input` is the codebook
    dtype: str

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """codes (b, h, w, v), a distribution per token -> pixel values (b, H, W, ...)."""
        gain = ((self.layers + 1) * self.blocks) ** -2
        x = Conv(self.codebook, 1, None, name="input")(codes)
        for group in range(self.layers + 1):
            if group:
                x = einops.repeat(x, "b h w d -> b (h p) (w q) d", p=2, q=2)
            width = self.width << (self.layers - group)
            for i in range(self.blocks):
                name = f"group_{group + 1}_block_{i + 1}"
                x = Block(width, (1, 3, 3, 3), gain, self.dtype, name=name)(x)
        values = self.values * self.stem**2
        x = Conv(values, 1, self.dtype, name="output")(nn.relu(x))
        return depth_to_space(x, self.stem)


def small_conv(width: int, side: int, dtype: str | None, fan_in: int, **settings) -> Conv:
    """Returns a convolution with torch's default initialization."""
    bound = fan_in**-0.5
    init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    return Conv(width, side, dtype, kernel_init=init, bias_init=init, **settings)


class SmallBlock(nn.Module):
    """A residual block of three convolutions with ReLUs between them."""

    dtype: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, width = x, x.shape[-1]
        for i, side in enumerate((3, 3, 1), 1):
            y = small_conv(width, side, self.dtype, width * side**2, name=f"conv_{i}")(y)
            y = y if i == 3 else nn.relu(y)
        return x + y


class SmallEncoder(nn.Module):
    """Convolutions of stride two, each followed by residual blocks.

    They compute in at least float32 regardless of `dtype`, because their branches are not scaled
    down.
    """

    vocabulary: int
    width: int
    layers: int
    blocks: int
    stem: int
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images (b, H, W, c), mapped -> logits (b, h, w, v)."""
        x = space_to_depth(images, self.stem)
        for layer in range(1, self.layers + 1):
            name, fan_in = f"layer_{layer}", 16 * x.shape[-1]
            x = nn.relu(small_conv(self.width, 4, None, fan_in, stride=2, name=name)(x))
            for i in range(1, self.blocks + 1):
                x = SmallBlock(None, name=f"layer_{layer}_block_{i}")(x)
        return small_conv(self.vocabulary, 1, None, self.width, name="output")(x)


class SmallDecoder(nn.Module):
    """The codebook, then the encoder in reverse with transposed convolutions."""

    values: int  # a pixel
    width: int
    layers: int
    blocks: int
    stem: int
    codebook: int  # the width of a code
    dtype: str

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """codes (b, h, w, v), a distribution per token -> pixel values (b, H, W, ...)."""
        shape = codes.shape[-1], self.codebook
        codebook = self.param("codebook", nn.initializers.normal(1.0), shape)
        codes = codes.astype(at_least_float32(codes.dtype))
        x = jnp.matmul(codes, codebook, precision="high")
        for layer in range(1, self.layers + 1):
            fan_in = 16 * self.width  # torch counts the outputs of a transposed convolution
            settings = dict(stride=2, enlarge=True, name=f"layer_{layer}")
            x = nn.relu(small_conv(self.width, 4, self.dtype, fan_in, **settings)(x))
            for i in range(1, self.blocks + 1):
                x = SmallBlock(self.dtype, name=f"layer_{layer}_block_{i}")(x)
        values = self.values * self.stem**2
        x = small_conv(values, 1, self.dtype, self.width, name="output")(x)
        return depth_to_space(x, self.stem)


KINDS = {
    "dalle": (DalleEncoder, DalleDecoder, dict(blocks=2, codebook=128)),
    "small": (SmallEncoder, SmallDecoder, dict(blocks=1, codebook=512)),
}
Likelihood = Literal["logit_laplace", "mse", "smooth_l1"]


class DVAE(NamedTuple):
    """A dVAE: encoder and decoder as pure functions of their parameters.

    The parameters of the encoder are called `tokenizer`, those of the decoder `decoder`.
    """

    encoder: Any  # an encoder module
    decoder: Any
    patch: tuple[int, int]  # the pixels of a token
    channels: int
    likelihood: Likelihood

    @property
    def dtype(self) -> str:
        """The dtype of convolutions."""
        return self.encoder.dtype

    def with_dtype(self, dtype: str) -> "DVAE":
        """Returns the same network with convolutions in another dtype."""
        return self._replace(
            encoder=self.encoder.clone(dtype=dtype), decoder=self.decoder.clone(dtype=dtype)
        )

    def init(self, rng: jax.Array, images: jax.Array) -> dict:
        """Returns parameters {"tokenizer": of the encoder, "decoder": of the decoder}."""
        rng_tokenizer, rng_decoder = jax.random.split(rng)
        self.check(images)
        logits, variables = self.encoder.init_with_output(rng_tokenizer, self.map_pixels(images))
        decoder = self.decoder.init(rng_decoder, logits)
        return {"tokenizer": variables["params"], "decoder": decoder["params"]}

    def map_pixels(self, images: jax.Array) -> jax.Array:
        """Maps images in [0, 1] to the range in which they are encoded and compared.

        It is [0.1, 0.9] for logit_laplace, for a finite logit (appendix A.3), else [-1, 1].
        """
        return 0.1 + 0.8 * images if self.likelihood == "logit_laplace" else 2 * images - 1

    def check(self, images: jax.Array) -> None:
        """Raises UserError if images (b, H, W, c) cannot be cut into tokens."""
        (p, q), (height, width, channels) = self.patch, images.shape[1:]
        if height % p or width % q or channels != self.channels:
            raise UserError(
                f"the dVAE makes a token of {p} x {q} pixels with {self.channels} channels: images "
                f"of {height} x {width} x {channels} do not fit; change their size, or "
                "tokenizer.layers, stem and channels."
            )

    def logits(self, tokenizer: dict, images: jax.Array) -> jax.Array:
        """Encodes images (b, H, W, c) in [0, 1] -> logits (b, h, w, v) in float32 or better."""
        self.check(images)
        return self.encoder.apply({"params": tokenizer}, self.map_pixels(images))

    def tokens(self, tokenizer: dict, images: jax.Array) -> jax.Array:
        """Encodes images (b, H, W, c) in [0, 1] -> most likely tokens (b, n) int32, row by row."""
        tokens = jnp.argmax(self.logits(tokenizer, images), axis=-1).astype(jnp.int32)
        return tokens.reshape(len(tokens), -1)

    def paint(self, decoder: dict, codes: jax.Array) -> jax.Array:
        """Decodes codes (b, h, w, v), a distribution per token -> parameters of the likelihood.

        For logit_laplace (b, H, W, 2c), locations and logarithms of scales, else (b, H, W, c).
        """
        painted = self.decoder.apply({"params": decoder}, codes)
        return painted.astype(at_least_float32(painted.dtype))

    def to_images(self, painted: jax.Array) -> jax.Array:
        """Converts the result of `paint` to images (b, H, W, c) in [0, 1]."""
        if self.likelihood == "logit_laplace":
            images = (jax.nn.sigmoid(painted[..., : self.channels]) - 0.1) / 0.8
        else:
            images = (painted + 1) / 2
        return jnp.clip(images, 0, 1)

    def decode(
        self, decoder: dict, tokens: jax.Array, grid: tuple[int, int] | None = None
    ) -> jax.Array:
        """Decodes tokens (b, n) on a grid (h, w), by default a square -> images (b, H, W, c)."""
        h, w = grid or (math.isqrt(tokens.shape[1]),) * 2
        codes = jax.nn.one_hot(tokens.reshape(-1, h, w), self.encoder.vocabulary)
        return self.to_images(self.paint(decoder, codes))


def code_colors(vocabulary: int) -> np.ndarray:
    """Returns a color for each code (v, 3) in [0, 1]: hues by the golden ratio."""
    code = np.arange(vocabulary)[:, None]
    hue = np.clip(np.abs((code * 0.618034 * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    strength, light = 0.45 + 0.55 * (code * 0.754878 % 1), 0.45 + 0.55 * (code * 0.569840 % 1)
    return light * (1 - strength * (1 - hue))


def dvae(
    *,
    kind: Annotated[
        Literal["dalle", "small"], "OpenAI's network, or that of BEiT's code"
    ] = "dalle",
    vocabulary: Annotated[int, WIDTH, Smoke(64), "number of codes"] = 8192,
    width: Annotated[int, WIDTH, Smoke(8), "channels of the first group"] = 256,
    layers: Annotated[int, Range(0, 10), "number of times that the resolution is halved"] = 3,
    blocks: Annotated[int, Range(0, DEPTH.high), Smoke(1), "blocks per layer; 0: by kind"] = 0,
    stem: Annotated[
        int, POSITIVE, "side of the squares of pixels that are first moved into channels"
    ] = 1,
    codebook: Annotated[int, NOT_NEGATIVE, Smoke(8), "dimension of a code; 0: by kind"] = 0,
    channels: Annotated[int, POSITIVE, "channels of the images"] = 3,
    likelihood: Annotated[Likelihood, "likelihood of a pixel"] = "logit_laplace",
    dtype: Annotated[
        Dtype, "dtype of convolutions; auto: bfloat16, or float32 on a CPU"
    ] = "float32",
) -> DVAE:
    """Builds a dVAE with one token per square of stem * 2**layers pixels a side.

    `dalle` with its defaults is OpenAI's network; `small` with likelihood="mse" is that of BEiT's
    code. A `stem` makes convolutions cheaper on a CPU.
    """
    if kind == "dalle" and width % 4:
        raise UserError(f"tokenizer.width = {width} must be a multiple of 4 for kind 'dalle'.")
    encoder, decoder, sizes = KINDS[kind]
    values = channels * (2 if likelihood == "logit_laplace" else 1)
    shape: dict[str, Any] = dict(
        width=width, layers=layers, blocks=blocks or sizes["blocks"], stem=stem
    )
    side = stem * 2**layers
    return DVAE(
        encoder(vocabulary=vocabulary, dtype=dtype, **shape),
        decoder(values=values, codebook=codebook or sizes["codebook"], dtype=dtype, **shape),
        (side, side),
        channels,
        likelihood,
    )
