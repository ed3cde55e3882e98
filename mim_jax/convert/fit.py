"""What a network of ours must become to be said by others: its layout, its parts, its size."""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.convert.about import About, expected, kind_of
from mim_jax.convert.tables import LAYOUTS
from mim_jax.models import resize

FAMILIES = ("mae", "beit", "timm", "hf")


def fit(params: dict, about: About, to: str) -> tuple[str, dict]:
    """-> the layout of a family, and what of params it takes. LAYOUTS' own names stand as they are.

    Raises UserError, with what to say instead, where no layout of the family has such a network.
    """
    if about.kind == "dvae":
        return fit_dvae(params, about, to)
    model, kind = about.model, about.kind
    mean, relative = "fc_norm" in params, model["relative_bias"] != "none"
    if to not in (*FAMILIES, *LAYOUTS):
        raise UserError(f"there is no layout {to!r}; there are {', '.join(FAMILIES)}.")
    if to in LAYOUTS and to not in FAMILIES:
        return to, params
    if model["key_bias"] and relative:
        raise UserError(
            f"--to={to}: relative positions beside a bias of the keys are in no other code; train "
            "with --config.model.key_bias=False, or keep it with --to=mim_jax."
        )
    if model["stem"] != "none" and not (to == "timm" and model["key_bias"]):
        instead = "timm" if model["key_bias"] else "mim_jax"
        raise UserError(
            f"--to={to}: a ResNet before the encoder is in timm's ViT alone, whose keys have a "
            f"bias: say --to={instead}."
        )
    if to == "timm":
        params = encoder_only(params, about)[0] if kind in ("mae", "beit", "encoder") else params
        return "timm_vit" if model["key_bias"] else "timm_beit", folded(params)
    if to == "mae":
        if not model["key_bias"]:
            raise UserError(
                "--to=mae: in MAE keys have a bias, in BEiT and here they have none: say --to=beit."
            )
        if model["layer_scale"]:
            raise UserError("--to=mae: the official MAE has no LayerScale: say --to=timm.")
        if kind == "mae" and "mask_token" in params["encoder"]:
            raise UserError(
                "--to=mae: the official MAE has no mask tokens in its encoder: say --to=timm for "
                "the encoder alone."
            )
        named = "mae_linear" if "batch_statistics" in params else "timm_vit"
        return "mae" if kind == "mae" else named, params
    if to == "beit":
        if model["key_bias"]:
            raise UserError("--to=beit: BEiT has no bias of the keys: say --to=mae or --to=timm.")
        return "beit" if kind == "beit" else "beit_finetuned", folded(params)
    if about.grid and about.grid[0] != about.grid[1]:
        raise UserError("--to=hf: Hugging Face's positions are of square images: say --to=timm.")
    if not model["key_bias"]:
        return "hf_beit_mim" if kind == "beit" else "hf_beit", folded(params)
    if mean:
        raise UserError(
            "--to=hf: Hugging Face's ViT classifies by the class token, this one by the mean of "
            "the patches: say --to=timm or --to=mae."
        )
    if model["layer_scale"]:
        raise UserError("--to=hf: Hugging Face's ViT has no LayerScale: say --to=timm.")
    if "norm" not in params["encoder"]:
        raise UserError("--to=hf: Hugging Face's ViT has a norm at its end: say --to=timm.")
    if kind == "beit":
        raise UserError(
            "--to=hf: Hugging Face's BEiT has no bias of the keys: say --to=timm for the encoder "
            "alone."
        )
    return "hf_vit_mae" if kind == "mae" else "hf_vit", folded(params)


def fit_dvae(params: dict, about: About, to: str) -> tuple[str, dict]:
    """The same of a dVAE."""
    if about.model.get("stem", 1) != 1:
        raise UserError("a dVAE with model.stem is in no other code: keep it with --to=mim_jax.")
    dalle, layers = about.model["kind"] == "dalle", about.model["layers"]
    layout = "dalle" if dalle else f"small_dvae_{layers}"
    if to not in (layout, "beit"):
        raise UserError(f"--to={to} has no tokenizers: say --to=beit.")
    if dalle and len(params) > 1:
        raise UserError("DALL-E keeps its encoder and its decoder in two files: one at a time.")
    if not dalle and (layout not in LAYOUTS or about.model["blocks"] != 1):
        raise UserError("BEiT's dVAE has up to four layers of one block: say --to=mim_jax.")
    return layout, params


def encoder_only(params: dict, about: About) -> tuple[dict, About]:
    """The encoder without its mask token: what is taken from pretraining to anything else."""
    if "encoder" not in params:
        raise UserError("a dVAE has no encoder in this sense: leave out --encoder-only.")
    encoder = {name: x for name, x in params["encoder"].items() if name != "mask_token"}
    params = {"encoder": encoder} | {k: params[k] for k in ("fc_norm",) if k in params}
    return params, about._replace(kind=kind_of(params), decoder=None)


def resized(params: dict, about: About, size: tuple[int, int]) -> tuple[dict, About]:
    """For images of another size: positions are interpolated, as in fine-tuning.

    Fixed positions become learned ones. Raises UserError where MAE's decoder is among params.
    """
    (height, width), (p, q) = size, about.patch
    if "decoder" in params:
        raise UserError("MAE's decoder is for its own size alone: say --encoder-only.")
    if min(size) < 1 or height % p or width % q:
        raise UserError(f"patches of {p} x {q} do not divide images of {height} x {width}.")
    fixed = about.model["positions"] == "sincos"
    model = about.model | (dict(positions="learned") if fixed else {})
    larger = about._replace(model=model, grid=(height // p, width // q))
    shapes = {
        path.removeprefix("encoder/"): shape
        for path, shape in expected(params, larger).items()
        if path.startswith("encoder/")
    }
    grids = dict(before=about.size and about.grid, after=larger.grid)
    encoder = resize.fit(flatten_dict(params["encoder"], sep="/"), shapes, **grids, fixed=fixed)
    return params | {"encoder": unflatten_dict(encoder, sep="/")}, larger


def folded(params: dict) -> dict:
    """A linear probe with the normalisation of its features folded into its head."""
    if "batch_statistics" not in params:
        return params
    params = dict(params)
    statistics = params.pop("batch_statistics")["head_norm"]
    gain = (statistics["variance"] + 1e-6) ** -0.5
    kernel = params["head"]["kernel"] * gain[:, None]
    bias = params["head"]["bias"] - statistics["mean"] @ kernel
    params["head"] = {"kernel": np.asarray(kernel), "bias": np.asarray(bias)}
    return params
