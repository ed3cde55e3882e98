"""The proof: the same images through our network and through PyTorch's, both in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.convert.about import About, extra
from mim_jax.convert.fit import fit
from mim_jax.convert.states import to_torch
from mim_jax.masking import mask_by_noise
from mim_jax.models.decoder import Decoder
from mim_jax.models.patches import take
from mim_jax.models.vit import vit
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.classify import Classifier
from mim_jax.objectives.mae import MAE

TOLERANCE = 1e-8  # of the largest value of an output
MASK_RATIO = 0.75  # of the images here, whatever was trained with


def example(about: About) -> dict[str, np.ndarray]:
    """The fixed images: image (2, H, W, c), masked (2, n), noise (2, n)."""
    b, c, y, x = np.ogrid[:2, : about.channels, : about.size[0], : about.size[1]]
    images = np.sin(0.3 * b + 0.7 * c + 0.11 * y + 0.23 * x).transpose(0, 2, 3, 1)
    n = about.grid[0] * about.grid[1]
    noise = np.random.default_rng(0).permuted(np.tile(np.arange(n) / n, (2, 1)), axis=1)
    return dict(image=images, masked=noise > 0.6, noise=noise)


def differences(params: dict, about: About, to: str) -> tuple[str, dict[str, float]]:
    """-> what PyTorch ran, and of each output the largest difference by its largest value."""
    with extra():
        from mim_jax.convert.torch_models import outputs

    about = about._replace(facts=about.facts | dict(mask_ratio=MASK_RATIO))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layout, taken = fit(params, about, to)
    batch = example(about)
    title, theirs = outputs(to_torch(taken, about, layout=layout), about, layout, batch)
    # A linear probe is run as it is, whatever became of its normalisation.
    ours = run(params if "batch_statistics" in params else taken, about, batch)
    return title, {
        name: float(np.abs(ours[name] - x).max() / np.abs(x).max()) for name, x in theirs.items()
    }


def run(params: dict, about: About, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What our network gives of a batch in float64, by name, patches in the image's order."""
    with jax.enable_x64(True):
        encoder = vit(**about.model | dict(heads=about.encoder.heads, dtype="float64"))
        params = jax.tree.map(jnp.asarray, params)
        images, masked = jnp.asarray(batch["image"]), jnp.asarray(batch["masked"])
        if "decoder" in params:
            decoder = Decoder(**about.decoder, dtype="float64", remat="none")
            visible, hidden = mask_by_noise(jnp.asarray(batch["noise"]), MASK_RATIO)
            order = jnp.concatenate([visible, hidden], axis=1)
            whole = MAE(encoder, decoder, vocabulary=len(params["decoder"]["pred"]["bias"]))
            painted = whole.apply({"params": params}, images, visible, hidden, last=order.shape[1])
            inner = {"params": params["encoder"]}
            return jax.tree.map(np.asarray, dict(
                latent=encoder.apply(inner, images, visible=visible),
                predictions=take(painted, jnp.argsort(order, axis=1)),
            ))  # fmt: skip
        if "head" in params and "mask_token" in params["encoder"]:
            head = params["head"]
            network = BEiT(encoder, vocabulary=len(head["bias"]))
            places = jnp.broadcast_to(jnp.arange(masked.shape[1]), masked.shape)
            logits = network.apply({"params": params}, images, masked, places)
            return {"logits": np.asarray(logits)}
        mean, depth = "fc_norm" in params, about.model["depth"]
        layers = () if "norm" in params["encoder"] else (depth - 1,)
        tokens = encoder.apply({"params": params["encoder"]}, images, layers=layers)
        found = {"tokens": np.asarray(tokens[0] if layers else tokens)}
        if "head" in params:
            statistics = params.get("batch_statistics")
            network = Classifier(
                encoder, len(params["head"]["bias"]), "mean" if mean else "cls",
                statistics is not None, 0.0,
            )  # fmt: skip
            variables = {"params": {k: x for k, x in params.items() if k != "batch_statistics"}}
            variables |= {"batch_statistics": statistics} if statistics else {}
            found["logits"] = np.asarray(network.apply(variables, images)[:, 0])
        return found
