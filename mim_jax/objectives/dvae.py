"""The tokenizer (Ramesh et al., 2021, section 2.1): images through a grid of discrete tokens.

Maximised is a bound on the likelihood of an image (ELBO) of two terms. `reconstruction` is what the
decoder makes of the tokens. `kl` is what they cost where any code is as likely as another: ln v
nats a token once they are certain. BEiT is the second stage of the same bound: it keeps the tokens
and learns a better prior, and its loss is what a token costs then (Bao et al., 2021, section 2.4).

Shapes: b images, n tokens on a grid (h, w), v vocabulary, (p, q) patch, c channels.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError
from mim_jax.models.dvae import dvae
from mim_jax.models.patches import busy, patchify
from mim_jax.normalize import unit
from mim_jax.objectives import Objective, per_example


def logit_laplace(x: jax.Array, painted: jax.Array) -> jax.Array:
    """ln f of x (..., c) in (0, 1) (appendix A.3); painted (..., 2c): locations, then ln scales."""
    location, log_scale = jnp.split(painted, 2, axis=-1)
    distance = jnp.abs(jax.scipy.special.logit(x) - location) / jnp.exp(log_scale)
    return -jnp.log(2 * x * (1 - x)) - log_scale - distance


def smooth_l1(x: jax.Array, painted: jax.Array) -> jax.Array:
    """Minus Huber's loss, which is quadratic up to a distance of 1."""
    distance = jnp.abs(x - painted)
    return -jnp.where(distance < 1, distance**2 / 2, distance - 0.5)


LIKELIHOODS = {
    "logit_laplace": logit_laplace,
    "mse": lambda x, painted: -((x - painted) ** 2),
    "smooth_l1": smooth_l1,
}


def cosine(start: float, end: float, steps: int, step: jax.Array) -> jax.Array:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, and that from there on."""
    done = jnp.clip(step / steps, 0, 1) if steps else 1.0
    return end + (start - end) * (1 + jnp.cos(jnp.pi * done)) / 2


def relax(logits: jax.Array, noise: jax.Array, temperature, hard) -> jax.Array:
    """Gumbel-softmax samples (Jang et al., 2016) of logits (..., v), noise (..., v) -> (..., v).

    Where `hard` they are straight-through: one-hot, with the gradient of the soft ones.
    """
    noisy = (logits + noise) / temperature
    soft = jax.nn.softmax(noisy)
    return soft + jnp.where(hard, jax.lax.stop_gradient(one_hot(noisy) - soft), 0)


def one_hot(logits: jax.Array) -> jax.Array:
    """The likeliest code (..., v)."""
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)


def perplexity(counts: jax.Array) -> jax.Array:
    """counts (v,): the codes are as hard to guess as so many that are used evenly."""
    share = counts / counts.sum()
    return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())


def palette(vocabulary: int) -> np.ndarray:
    """A colour for each code (v, 3) in [0, 1]: hues by the golden ratio, at several strengths."""
    code = np.arange(vocabulary)[:, None]
    hue = np.clip(np.abs((code * 0.618034 * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    strength, light = 0.45 + 0.55 * (code * 0.754878 % 1), 0.45 + 0.55 * (code * 0.569840 % 1)
    return light * (1 - strength * (1 - hue))


class Forward(NamedTuple):
    """What a pass through the network gives."""

    images: jax.Array  # (b, H, W, c) in [0, 1]
    logits: jax.Array  # (b, h, w, v)
    painted: jax.Array  # the parameters of the likelihood of each pixel
    likelihood: jax.Array  # ln f, summed over the pixels of an image (b,)
    kl: jax.Array  # from the uniform prior, at each token (b, n)
    busy: jax.Array  # 1 where the pixels of a token are not all of one colour, else 0 (b, n)


def objective(
    tokenizer: dict,
    *,
    temperature: float = 1.0,
    min_temperature: float = 0.0625,
    temperature_steps: int = 150_000,
    kl_weight: float = 6.6,
    kl_warmup_steps: int = 5_000,
    straight_through: bool = False,
    soft_steps: int = 0,
    balance: float = 0.0,
    window: int = 100,
) -> Objective:
    """A dVAE with the paper's schedules (appendix A.2), cosines of the step.

    The temperature falls over `temperature_steps`. The weight of the KL divergence, which is summed
    over an image's tokens as ln f is over its pixels, grows from 0 over `kl_warmup_steps`.
    Samples are soft; with `straight_through` they are hard after `soft_steps`.

    The use of the codes is watched over the last `window` steps, in cells that are not of one
    colour. `balance` weighs how far it is from even, as kl_weight does the KL divergence: of that
    it is the part that all images have in common (Hoffman & Johnson, 2016), and a remedy for codes
    that nothing uses.
    """
    network = dvae(**tokenizer)
    v, density = network.encoder.vocabulary, LIKELIHOODS[network.likelihood]
    if not 0 < min_temperature <= temperature:
        raise UserError(
            f"objective.min_temperature = {min_temperature} must lie above 0, and not above "
            f"objective.temperature = {temperature}."
        )

    def cells(images):
        """-> the pixels of each token (b, n, p * q, c)."""
        patches = patchify(images, network.patch)
        return einops.rearrange(patches, "b n (p c) -> b n p c", c=network.channels)

    def forward(params, batch, rng, temperature, hard) -> Forward:
        images = unit(batch["image"])
        logits = network.logits(params["tokenizer"], images)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))
        codes = relax(logits, noise(per_example(rng, batch["index"])), temperature, hard)
        painted = network.paint(params["decoder"], codes)
        likelihood = density(network.map_pixels(images), painted).sum((1, 2, 3))
        log_q = jax.nn.log_softmax(logits)
        kl = (jnp.exp(log_q) * (log_q + math.log(v))).sum(-1).reshape(len(images), -1)
        counts = busy(images, network.patch).astype(logits.dtype)
        return Forward(images, logits, painted, likelihood, kl, counts)

    def squared_error(images, painted):
        """-> of each image, in [0, 1] (b,)."""
        return ((images - network.to_images(painted)) ** 2).mean((1, 2, 3))

    def hard_error(params, images, logits):
        return squared_error(images, network.paint(params["decoder"], one_hot(logits)))

    def histogram(logits, weights):
        """-> how often each code is the likeliest, tokens counted by weights (b, n) -> (b, v)."""
        tokens = logits.argmax(-1).reshape(weights.shape)
        return jax.vmap(lambda t, w: jnp.zeros(v, w.dtype).at[t].add(w))(tokens, weights)

    def init(rng, batch):
        images = unit(batch["image"])
        # As if all were well before the first step: a collapse shows within the window.
        even = jnp.full(v, cells(images).shape[1] / v)
        watched = dict(usage=even, kl=math.log(v), error_hard=0.0, temperature=temperature)
        return network.init(rng, images), jax.tree.map(jnp.float32, watched)

    def loss(params, buffers, batch, rng, step):
        tau = cosine(temperature, min_temperature, temperature_steps, step)
        beta = cosine(0.0, kl_weight, kl_warmup_steps, step)
        x = forward(params, batch, rng, tau, straight_through & (step >= soft_steps))
        share = buffers["usage"] / buffers["usage"].sum()
        surplus = jnp.log(0.99 * v * share + 0.01)  # above 0 for codes used too often
        uneven = (jax.nn.softmax(x.logits) @ surplus).reshape(x.busy.shape) * x.busy
        values = x.images[0].size
        total = -(x.likelihood - beta * x.kl.sum(1) - balance * uneven.sum(1)) / values

        frozen, logits = jax.lax.stop_gradient((params, x.logits))
        error_hard = jax.lax.cond(  # for the log, which one step in ten will do
            (step + 1) % 10 == 0,
            lambda: hard_error(frozen, x.images, logits).mean(),
            lambda: buffers["error_hard"],
        )
        now = dict(usage=histogram(logits, x.busy).mean(0), kl=x.kl.mean())
        moved = {name: buffers[name] + (now[name] - buffers[name]) / window for name in now}
        metrics = dict(
            reconstruction=-x.likelihood.mean() / values,
            kl=x.kl.mean(),
            perplexity=perplexity(buffers["usage"]),
            used=(v * share > 0.01).mean(),
            entropy=math.log(v) - buffers["kl"],
            error_soft=squared_error(x.images, x.painted).mean(),
            error_hard=error_hard,
            temperature=tau,
            kl_weight=beta,
        )
        buffers = moved | dict(error_hard=error_hard, temperature=tau)
        return total.sum(), len(total), (metrics, jax.lax.stop_gradient(buffers))

    def evaluate(params, buffers, batch, rng):
        x = forward(params, batch, rng, buffers["temperature"], False)
        values = x.images[0].size
        return dict(
            loss=-(x.likelihood - kl_weight * x.kl.sum(1)) / values,
            reconstruction=-x.likelihood / values,
            kl=x.kl.mean(1),
            error_soft=squared_error(x.images, x.painted),
            error_hard=hard_error(params, x.images, x.logits),
            error_cell_means=cells(x.images).var(2).mean((1, 2)),
            codes=histogram(x.logits, jnp.ones_like(x.busy)),
            codes_busy=histogram(x.logits, x.busy),
        )

    def summarize(means):
        """Of the whole split: perplexity in cells that are not of one colour, and in all."""
        codes, busy = means.pop("codes"), means.pop("codes_busy")
        return means | dict(
            error_hard_to_cell_means=means["error_hard"] / means["error_cell_means"],
            perplexity=float(perplexity(busy)),
            perplexity_all=float(perplexity(codes)),
            used=float((codes > 0).mean()),
        )

    def warn(step, metrics):
        if step < 10 * window:  # every codebook begins with few codes
            return ""
        if metrics["entropy"] > 0.95 * math.log(v):
            return (
                "the codebook has collapsed: all codes are as likely everywhere, and say nothing "
                "of the images. Lower objective.kl_weight, or lengthen objective.kl_warmup_steps."
            )
        if metrics["perplexity"] < v / 8:
            state = "has collapsed" if metrics["perplexity"] < v / 32 else "is close to collapse"
            return (
                f"the codebook {state}: the tokens are few of its codes. Raise objective.balance "
                "or objective.kl_weight, lower the learning rate, or lengthen "
                "objective.temperature_steps."
            )
        return ""

    def pictures(params, buffers, batch, rng):
        images = unit(batch["image"])
        logits = network.logits(params["tokenizer"], images)
        p, q = network.patch
        colours = jnp.asarray(palette(v))[logits.argmax(-1)]
        painted = network.to_images(network.paint(params["decoder"], one_hot(logits)))
        return OrderedDict(
            {
                "original": images,
                "from its tokens": painted,
                "its tokens, a colour a code": einops.repeat(
                    colours, "b h w c -> b (h p) (w q) c", p=p, q=q
                ),
            }
        )

    return Objective(init, loss, evaluate, pictures, summarize, warn=warn)
