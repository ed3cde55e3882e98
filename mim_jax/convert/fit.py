"""Chooses a layout for a network, and changes parameters where the layout requires it."""

import itertools
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.convert.network import Network, expected, kind_of, segmenter
from mim_jax.convert.tables import LAYOUTS
from mim_jax.models import resize
from mim_jax.models.dvae import DVAE, DalleEncoder

FAMILIES = ("mae", "beit", "timm", "hf")


def fit(params: dict, network: Network, to: str) -> tuple[str, dict]:
    """Returns a layout of a family that can hold a network, and the parameters for it.

    Args:
        params: the parameters of the network.
        network: its description.
        to: a family, or a key of LAYOUTS, which is returned unchanged.

    Raises UserError, with an alternative, if no layout of the family can hold the network.
    """
    if isinstance(network.model, DVAE):
        return fit_dvae(params, network.model, to)
    if to not in (*FAMILIES, *LAYOUTS):
        raise UserError(f"there is no layout {to!r}; choose one of {', '.join(FAMILIES)}.")
    if to not in FAMILIES:
        return to, params
    if reason := obstacle(params, network, to):
        raise UserError(f"--to={to}: {reason}.")
    kind, key_bias = network.kind, network.encoder.key_bias
    if kind == "segment" and to == "hf":
        layout = "hf_beit_segment" if fits_beit(params, network) else "hf_upernet"
        return layout, without_key_bias(params)
    if to == "timm":
        with_head = kind == "classify"
        params = params if with_head else encoder_only(params, network)[0]
        return "timm_vit" if key_bias else "timm_beit", folded(params)
    if to == "mae":
        without = "mae_linear" if "batch_statistics" in params else "timm_vit"
        return "mae" if kind == "mae" else without, params
    if to == "beit":
        return "beit" if kind == "beit" else "beit_finetuned", folded(params)
    if key_bias:
        return "hf_vit_mae" if kind == "mae" else "hf_vit", folded(params)
    return "hf_beit_mim" if kind == "beit" else "hf_beit", folded(params)


def obstacle(params: dict, network: Network, to: str) -> str:
    """Returns the reason why no layout of a family can hold an encoder and its head, or ""."""
    encoder, kind, key_bias = network.encoder, network.kind, network.encoder.key_bias
    stem, scaled, relative = encoder.stem != "none", encoder.layer_scale > 0, encoder.relative_bias
    segments = kind == "segment"
    vit = to == "hf" and key_bias and not segments
    square = not network.grid or len({*network.grid}) == 1
    rules = [
        (
            segments and to in ("mae", "beit"),
            "the official MAE and BEiT have no decoder for segmentation: use --to=hf, or "
            "--encoder-only",
        ),
        (
            segments and to == "hf" and "pyramid" not in params,
            "Hugging Face has BEiT with UPerNet only: use --encoder-only",
        ),
        (
            segments and to == "hf" and not is_increasing(network.metadata.get("layers", ())),
            "Hugging Face's out_indices must increase, and so must objective.layers",
        ),
        (
            key_bias and relative != "none" and not (segments and to == "hf"),
            "no other library has relative positions and a key bias: use --to=mim_jax",
        ),
        (
            stem and not key_bias,
            "no other library has a ResNet stem without key bias: use --to=mim_jax",
        ),
        (stem and to != "timm", "only timm's ViT has a ResNet stem: use --to=timm"),
        (to == "mae" and not key_bias, "MAE has a key bias, unlike this network: use --to=beit"),
        (to == "mae" and scaled, "the official MAE has no LayerScale: use --to=timm"),
        (
            to == kind == "mae" and "mask_token" in params["encoder"],
            "the official MAE has no mask token in its encoder: use --to=timm for the encoder",
        ),
        (to == "beit" and key_bias, "BEiT has no key bias: use --to=mae or --to=timm"),
        (to == "hf" and not square, "Hugging Face's images are square: use --to=timm"),
        (
            vit and "fc_norm" in params,
            "Hugging Face's ViT pools the class token, but this network the mean of the patches: "
            "use --to=timm or --to=mae",
        ),
        (vit and scaled, "Hugging Face's ViT has no LayerScale: use --to=timm"),
        (
            vit and "norm" not in params["encoder"],
            "Hugging Face's ViT has a final norm: use --to=timm",
        ),
        (vit and kind == "beit", "Hugging Face's BEiT has no key bias: use --to=timm"),
    ]
    return next((reason for applies, reason in rules if applies), "")


def is_increasing(numbers: Sequence[int]) -> bool:
    """Returns whether each number is larger than the one before."""
    return all(a < b for a, b in itertools.pairwise(numbers))


def fits_beit(params: dict, network: Network) -> bool:
    """Returns whether transformers' BeitForSemanticSegmentation can hold a segmenter.

    Its decoder has the width of the encoder, and it cannot decode the last block: its `out_indices`
    are at most the depth, and index i selects block i - 2, counted from 0.
    """
    module = segmenter(params, network, network.encoder)
    return (
        module.channels == module.encoder.width and max(module.layers) <= module.encoder.depth - 2
    )


def without_key_bias(params: dict) -> dict:
    """Returns parameters whose attention has no key bias.

    A key bias adds the same number to all logits of a query, which does not change the softmax.
    """
    encoder = dict(params["encoder"])
    for name, block in encoder.items():
        if name.startswith("block_") and "bias" in block["qkv"]:
            q_bias, _, v_bias = np.split(np.asarray(block["qkv"]["bias"]), 3)
            qkv = {"kernel": block["qkv"]["kernel"]}
            encoder[name] = block | dict(qkv=qkv, q_bias=q_bias, v_bias=v_bias)
    return params | {"encoder": encoder}


def fit_dvae(params: dict, tokenizer: DVAE, to: str) -> tuple[str, dict]:
    """Returns the layout of a dVAE, and its parameters."""
    encoder = tokenizer.encoder
    if encoder.stem != 1:
        raise UserError("no other library has a dVAE with tokenizer.stem: use --to=mim_jax.")
    dalle = isinstance(encoder, DalleEncoder)
    layout = "dalle" if dalle else f"small_dvae_{encoder.layers}"
    if to not in (layout, "beit"):
        raise UserError(f"--to={to} has no tokenizers: use --to=beit.")
    if dalle and len(params) > 1:
        raise UserError("DALL-E keeps its encoder and decoder in two files: convert one at a time.")
    if not dalle and (layout not in LAYOUTS or encoder.blocks != 1):
        raise UserError("BEiT's dVAE has one to four layers of one block: use --to=mim_jax.")
    return layout, params


def encoder_only(params: dict, network: Network) -> tuple[dict, Network]:
    """Returns the encoder without its mask token, for tasks after pretraining."""
    network.encoder  # noqa: B018 - raises UserError for a dVAE
    encoder = {name: x for name, x in params["encoder"].items() if name != "mask_token"}
    params = {"encoder": encoder} | {k: params[k] for k in ("fc_norm",) if k in params}
    return params, network._replace(kind=kind_of(params), decoder=None)


def resized(params: dict, network: Network, size: tuple[int, int]) -> tuple[dict, Network]:
    """Returns the network for images of another size, with interpolated positions.

    Fixed positions become learned ones. Raises UserError if params include MAE's decoder.
    """
    encoder = network.encoder
    (height, width), (p, q) = size, encoder.patch
    if network.decoder:
        raise UserError("MAE's decoder cannot be resized: set --encoder-only.")
    if min(size) < 1 or height % p or width % q:
        raise UserError(f"patches of {p} x {q} do not divide images of {height} x {width}.")
    fixed = encoder.positions == "sincos"
    larger = network._replace(
        model=encoder.clone(positions="learned") if fixed else encoder,
        grid=(height // p, width // q),
    )
    shapes = {
        path.removeprefix("encoder/"): shape
        for path, shape in expected(params, larger).items()
        if path.startswith("encoder/")
    }
    arrays = flatten_dict(params["encoder"], sep="/")
    network.size  # noqa: B018 - raises UserError if it is unknown
    arrays = resize.fit(arrays, shapes, before=network.grid, after=larger.grid, fixed=fixed)
    return params | {"encoder": unflatten_dict(arrays, sep="/")}, larger


def folded(params: dict) -> dict:
    """Returns a linear probe with the normalization of its features folded into its head."""
    if "batch_statistics" not in params:
        return params
    params = dict(params)
    statistics = params.pop("batch_statistics")["head_norm"]
    gain = (statistics["variance"] + 1e-6) ** -0.5
    kernel = params["head"]["kernel"] * gain[:, None]
    bias = params["head"]["bias"] - statistics["mean"] @ kernel
    params["head"] = {"kernel": np.asarray(kernel), "bias": np.asarray(bias)}
    return params
