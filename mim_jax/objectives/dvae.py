"""The tokenizer (Ramesh et al., 2021, section 2.1): a discrete VAE, trained by Gumbel-softmax.

The loss is the negative evidence lower bound (ELBO) of an image, with two terms. `reconstruction`
is the negative log-likelihood of the pixels given the tokens. `kl` is the divergence of the tokens'
distribution from a uniform prior: ln v nats per token if their distribution is one-hot. BEiT is the
second stage of the same bound: with the tokens fixed, it learns a better prior (Bao et al., 2021,
section 2.4).

Shapes: b images, n tokens on a grid (h, w), v vocabulary, (p, q) patch, c channels.
"""

import dataclasses
import math
from collections import OrderedDict
from typing import Annotated, NamedTuple

import einops
import jax
import jax.numpy as jnp

from mim_jax import UserError
from mim_jax.keys import NOT_NEGATIVE, POSITIVE, Range
from mim_jax.models.dvae import DVAE, code_colors
from mim_jax.models.patches import not_blank, patchify
from mim_jax.normalize import unit
from mim_jax.objectives import objective_of, per_example


def logit_laplace(x: jax.Array, painted: jax.Array) -> jax.Array:
    """Returns ln f of x (..., c) in (0, 1), given painted (..., 2c): mean, ln scale (A.3)."""
    location, log_scale = jnp.split(painted, 2, axis=-1)
    distance = jnp.abs(jax.scipy.special.logit(x) - location) / jnp.exp(log_scale)
    return -jnp.log(2 * x * (1 - x)) - log_scale - distance


def smooth_l1(x: jax.Array, painted: jax.Array) -> jax.Array:
    """Returns the negative Huber loss with a threshold of 1."""
    distance = jnp.abs(x - painted)
    return -jnp.where(distance < 1, distance**2 / 2, distance - 0.5)


LIKELIHOODS = {
    "logit_laplace": logit_laplace,
    "mse": lambda x, painted: -((x - painted) ** 2),
    "smooth_l1": smooth_l1,
}


def cosine(start: float, end: float, steps: int, step: jax.Array) -> jax.Array:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, then constant."""
    done = jnp.clip(step / steps, 0, 1) if steps else 1.0
    return end + (start - end) * (1 + jnp.cos(jnp.pi * done)) / 2


def relax(logits: jax.Array, noise: jax.Array, temperature, hard) -> jax.Array:
    """Draws Gumbel-softmax samples (Jang et al., 2016): logits and noise (..., v) -> (..., v).

    If `hard`, samples are one-hot with the gradient of the soft ones (straight-through).
    """
    noisy = (logits + noise) / temperature
    soft = jax.nn.softmax(noisy)
    return soft + jnp.where(hard, jax.lax.stop_gradient(one_hot(noisy) - soft), 0)


def one_hot(logits: jax.Array) -> jax.Array:
    """Returns the most likely code as a one-hot vector (..., v)."""
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)


def perplexity(counts: jax.Array) -> jax.Array:
    """Returns the exponential of the entropy of counts (v,): the effective number of codes."""
    share = counts / counts.sum()
    return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())


class Forward(NamedTuple):
    """The results of a forward pass through encoder and decoder."""

    images: jax.Array  # (b, H, W, c) in [0, 1]
    logits: jax.Array  # (b, h, w, v)
    painted: jax.Array  # the likelihood's parameters for each pixel
    likelihood: jax.Array  # ln f, summed over the pixels of an image (b,)
    kl: jax.Array  # divergence from the uniform prior at each token (b, n)
    not_blank: jax.Array  # 1.0 where the pixels of a token differ, else 0.0 (b, n)


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteVAE:
    """A dVAE with the paper's cosine schedules (appendix A.2).

    The KL divergence is summed over the tokens of an image, as ln f is summed over its pixels. The
    use of codes is measured in cells with more than one color. `balance` is the weight of the
    divergence of this use from uniform, which is the part of the KL divergence that all images
    share (Hoffman & Johnson, 2016). It revives unused codes.
    """

    tokenizer: DVAE
    _: dataclasses.KW_ONLY
    temperature: Annotated[float, Range(0, above=True), "temperature of the first step"] = 1.0
    min_temperature: Annotated[float, Range(0, above=True), "temperature at the end"] = 0.0625
    temperature_steps: Annotated[int, NOT_NEGATIVE, "steps until min_temperature"] = 150_000
    kl_weight: Annotated[float, NOT_NEGATIVE, "weight of the KL divergence"] = 6.6
    kl_warmup_steps: Annotated[int, NOT_NEGATIVE, "steps over which kl_weight grows from 0"] = 5_000
    straight_through: Annotated[bool, "draw one-hot samples after soft_steps"] = False
    soft_steps: Annotated[int, NOT_NEGATIVE, "steps with soft samples"] = 0
    balance: Annotated[float, NOT_NEGATIVE, "weight of the penalty on uneven use of the codes"] = (
        0.0
    )
    window: Annotated[int, POSITIVE, "steps over which the use of codes is averaged"] = 100

    def __post_init__(self):
        if not 0 < self.min_temperature <= self.temperature:
            raise UserError(
                f"objective.min_temperature = {self.min_temperature} must be greater than 0 and at "
                f"most objective.temperature = {self.temperature}."
            )

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.encoder.vocabulary

    def init(self, rng, batch):
        images, v = unit(batch["image"]), self.vocabulary
        n = self.cells(images).shape[1]
        # The running statistics start uniform, so that a collapse shows within the window.
        buffers = dict(
            usage=jnp.full(v, n / v),
            kl=math.log(v),
            error_hard=0.0,
            temperature=self.temperature,
        )
        return self.tokenizer.init(rng, images), jax.tree.map(jnp.float32, buffers)

    def cells(self, images):
        """Returns the pixels of each token (b, n, p * q, c)."""
        patches = patchify(images, self.tokenizer.patch)
        return einops.rearrange(patches, "b n (p c) -> b n p c", c=images.shape[-1])

    def forward(self, params, batch, rng, temperature, hard) -> Forward:
        network, images = self.tokenizer, unit(batch["image"])
        logits = network.logits(params["tokenizer"], images)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))
        codes = relax(logits, noise(per_example(rng, batch["index"])), temperature, hard)
        painted = network.paint(params["decoder"], codes)
        density = LIKELIHOODS[network.likelihood]
        likelihood = density(network.map_pixels(images), painted).sum((1, 2, 3))
        log_q = jax.nn.log_softmax(logits)
        kl = (jnp.exp(log_q) * (log_q + math.log(self.vocabulary))).sum(-1)
        weight = not_blank(images, network.patch).astype(logits.dtype)
        return Forward(images, logits, painted, likelihood, kl.reshape(len(images), -1), weight)

    def squared_error(self, images, painted):
        """Returns the mean squared error of each image in [0, 1] (b,)."""
        return ((images - self.tokenizer.to_images(painted)) ** 2).mean((1, 2, 3))

    def hard_error(self, params, images, logits):
        """Returns the squared error of a reconstruction from the most likely codes (b,)."""
        return self.squared_error(images, self.tokenizer.paint(params["decoder"], one_hot(logits)))

    def histogram(self, logits, weights):
        """Counts the most likely codes, weighted by weights (b, n) -> (b, v)."""
        tokens = logits.argmax(-1).reshape(weights.shape)
        zeros = jnp.zeros(self.vocabulary, weights.dtype)
        return jax.vmap(lambda t, w: zeros.at[t].add(w))(tokens, weights)

    def loss(self, params, buffers, batch, rng, step):
        temperature = cosine(self.temperature, self.min_temperature, self.temperature_steps, step)
        kl_weight = cosine(0.0, self.kl_weight, self.kl_warmup_steps, step)
        hard = self.straight_through & (step >= self.soft_steps)
        x = self.forward(params, batch, rng, temperature, hard)
        share = buffers["usage"] / buffers["usage"].sum()
        surplus = jnp.log(0.99 * self.vocabulary * share + 0.01)  # above 0 for overused codes
        uneven = (jax.nn.softmax(x.logits) @ surplus).reshape(x.kl.shape) * x.not_blank
        penalties = kl_weight * x.kl.sum(1) + self.balance * uneven.sum(1)
        values = x.images[0].size
        total = (penalties - x.likelihood) / values  # (b,)

        frozen, logits = jax.lax.stop_gradient((params, x.logits))
        error_hard = jax.lax.cond(  # only a metric: computed every tenth step
            (step + 1) % 10 == 0,
            lambda: self.hard_error(frozen, x.images, logits).mean(),
            lambda: buffers["error_hard"],
        )
        now = dict(usage=self.histogram(logits, x.not_blank).mean(0), kl=x.kl.mean())
        moved = {name: buffers[name] + (now[name] - buffers[name]) / self.window for name in now}
        metrics = dict(
            reconstruction=-x.likelihood.mean() / values,
            kl=x.kl.mean(),
            perplexity=perplexity(buffers["usage"]),
            used=(self.vocabulary * share > 0.01).mean(),
            entropy=math.log(self.vocabulary) - buffers["kl"],
            error_soft=self.squared_error(x.images, x.painted).mean(),
            error_hard=error_hard,
            temperature=temperature,
            kl_weight=kl_weight,
        )
        buffers = moved | dict(error_hard=error_hard, temperature=temperature)
        return total.sum(), len(total), (metrics, jax.lax.stop_gradient(buffers))

    def evaluate(self, params, buffers, batch, rng):
        x = self.forward(params, batch, rng, buffers["temperature"], False)
        values = x.images[0].size
        return dict(
            loss=-(x.likelihood - self.kl_weight * x.kl.sum(1)) / values,
            reconstruction=-x.likelihood / values,
            kl=x.kl.mean(1),
            error_soft=self.squared_error(x.images, x.painted),
            error_hard=self.hard_error(params, x.images, x.logits),
            error_cell_means=self.cells(x.images).var(2).mean((1, 2)),
            codes=self.histogram(x.logits, jnp.ones_like(x.not_blank)),
            codes_not_blank=self.histogram(x.logits, x.not_blank),
        )

    def summarize(self, means):
        """Returns the means, and perplexities over the split: of all cells, of those not blank."""
        codes, not_blank_codes = means.pop("codes"), means.pop("codes_not_blank")
        return means | dict(
            error_hard_to_cell_means=means["error_hard"] / means["error_cell_means"],
            perplexity=float(perplexity(not_blank_codes)),
            perplexity_all=float(perplexity(codes)),
            used=float((codes > 0).mean()),
        )

    def warn(self, step, metrics):
        v = self.vocabulary
        if step < 10 * self.window:  # every codebook starts with few codes in use
            return ""
        if metrics["entropy"] > 0.95 * math.log(v):
            return (
                "the codebook has collapsed: all codes are equally likely, independently of the "
                "image. Lower objective.kl_weight or raise objective.kl_warmup_steps."
            )
        if metrics["perplexity"] < v / 8:
            state = "has collapsed" if metrics["perplexity"] < v / 32 else "is close to collapse"
            return (
                f"the codebook {state}: few codes are in use. Raise objective.balance or "
                "objective.kl_weight, lower the learning rate, or raise "
                "objective.temperature_steps."
            )
        return ""

    def pictures(self, params, buffers, batch, rng):
        network, images = self.tokenizer, unit(batch["image"])
        logits = network.logits(params["tokenizer"], images)
        p, q = network.patch
        colors = jnp.asarray(code_colors(self.vocabulary))[logits.argmax(-1)]
        colors = einops.repeat(colors, "b h w c -> b (h p) (w q) c", p=p, q=q)
        painted = network.to_images(network.paint(params["decoder"], one_hot(logits)))
        return OrderedDict(
            {"original": images, "from its tokens": painted, "its tokens, one color each": colors}
        )


objective = objective_of(DiscreteVAE)
