"""Compares our network with PyTorch's on the same images, both in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.convert.fit import fit
from mim_jax.convert.network import Network, extra, full_module, kind_of, require_heads
from mim_jax.convert.states import to_torch
from mim_jax.masking import mask_by_noise
from mim_jax.models.patches import take

TOLERANCE = 1e-8  # relative to the largest value of an output
MASK_RATIO = 0.75  # used regardless of the ratio in training


def example(network: Network) -> dict[str, np.ndarray]:
    """Returns fixed inputs: image (2, H, W, c), masked (2, n), noise (2, n)."""
    height, width = network.size
    b, c, y, x = np.ogrid[:2, : network.channels, :height, :width]
    images = np.sin(0.3 * b + 0.7 * c + 0.11 * y + 0.23 * x).transpose(0, 2, 3, 1)
    n = height * width // np.prod(network.encoder.patch)
    noise = np.random.default_rng(0).permuted(np.tile(np.arange(n) / n, (2, 1)), axis=1)
    return dict(image=images, masked=noise > 0.6, noise=noise)


def differences(params: dict, network: Network, to: str) -> tuple[str, dict[str, float]]:
    """Returns the name of PyTorch's model, and the relative difference of each output.

    It is the largest absolute difference divided by the largest absolute value.
    """
    with extra():
        from mim_jax.convert.torch_models import outputs

    network = network._replace(metadata=network.metadata | dict(mask_ratio=MASK_RATIO))
    batch = example(network)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layout, fitted = fit(params, network, to)
    title, theirs = outputs(to_torch(fitted, network, layout=layout), network, layout, batch)
    # Our network runs unchanged, even if the layout folds a normalization or drops the key bias.
    ours = run(params if "head" in fitted else fitted, network, batch)
    return title, {
        name: float(np.abs(ours[name] - x).max() / np.abs(x).max()) for name, x in theirs.items()
    }


def run(params: dict, network: Network, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the outputs of our network in float64, by name, with patches in image order."""
    require_heads(network.encoder)
    if network.decoder and "decoder" in params:
        require_heads(network.decoder)
    with jax.enable_x64(True):
        module: Any = full_module(params, network, "float64")
        encoder: Any = network.encoder.clone(dtype="float64")
        params = jax.tree.map(jnp.asarray, params)
        inner = {"params": params["encoder"]}
        images, masked = jnp.asarray(batch["image"]), jnp.asarray(batch["masked"])
        if "decoder" in params:
            visible, hidden = mask_by_noise(jnp.asarray(batch["noise"]), MASK_RATIO)
            order = jnp.concatenate([visible, hidden], axis=1)
            predictions = module.apply(
                {"params": params}, images, visible, hidden, last=order.shape[1]
            )
            outputs = dict(
                latent=encoder.apply(inner, images, visible=visible),
                predictions=take(predictions, jnp.argsort(order, axis=1)),
            )
        elif kind_of(params) == "segment":
            variables = {"batch_statistics": params.pop("batch_statistics"), "params": params}
            logits, auxiliary = module.apply(variables, images)
            outputs = dict(logits=logits) | ({"auxiliary": auxiliary[0]} if auxiliary else {})
        elif "head" in params and "mask_token" in params["encoder"]:
            places = jnp.broadcast_to(jnp.arange(masked.shape[1]), masked.shape)
            outputs = dict(logits=module.apply({"params": params}, images, masked, places))
        else:
            layers = () if "norm" in params["encoder"] else (encoder.depth - 1,)
            tokens = encoder.apply(inner, images, layers=layers)
            outputs = dict(tokens=tokens[0] if layers else tokens)
            if "head" in params:
                statistics = dict(batch_statistics=params.pop("batch_statistics", {}))
                outputs["logits"] = module.apply({"params": params} | statistics, images)[:, 0]
        return jax.tree.map(np.asarray, outputs)
