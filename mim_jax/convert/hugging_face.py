"""Reads and writes Hugging Face folders: config.json and preprocessor_config.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mim_jax import UserError
from mim_jax.convert.names import printable
from mim_jax.convert.network import Network, require_heads
from mim_jax.convert.tables import POOLS
from mim_jax.objectives.segment import default_layers

EPS = 1e-6  # the value of MAE, BEiT and mim_jax; transformers' default is 1e-12
MODELS = {  # layout: model_type, class with a head, class without
    "hf_vit_mae": ("vit_mae", "ViTMAEForPreTraining", ""),
    "hf_vit": ("vit", "ViTForImageClassification", "ViTModel"),
    "hf_beit_mim": ("beit", "BeitForMaskedImageModeling", ""),
    "hf_beit": ("beit", "BeitForImageClassification", "BeitModel"),
    "hf_beit_segment": ("beit", "BeitForSemanticSegmentation", ""),
    "hf_upernet": ("beit", "UperNetForSemanticSegmentation", ""),
}
MAX_JSON = 2**24  # bytes
NEEDED = ("hidden_size", "num_attention_heads", "image_size", "patch_size")
STATISTICS = {"mean": "image_mean", "std": "image_std"}  # ours: theirs


def config_of(state: dict[str, np.ndarray], network: Network, layout: str) -> dict[str, Any]:
    """Returns the config.json of a state dict in one of Hugging Face's layouts."""
    encoder, (kind, whole, bare) = network.encoder, MODELS[layout]
    if encoder.patch[0] != encoder.patch[1] or network.size[0] != network.size[1]:
        raise UserError("--to=hf: Hugging Face's images and patches are square: use --to=timm.")
    require_heads(encoder)
    is_bare = "embeddings.cls_token" in state
    config = dict(
        architectures=[bare if is_bare else whole],
        model_type=kind,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=4 * encoder.width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=EPS,
        image_size=network.size[0],
        patch_size=encoder.patch[0],
        num_channels=network.channels,
    )
    head = "decode_head." if network.kind == "segment" else ""
    labels = len(state.get(f"{head}classifier.bias", ()))
    if labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    if kind != "beit":
        config["qkv_bias"] = True
    else:
        relative = encoder.relative_bias
        config |= dict(
            use_mask_token=any(name.endswith("mask_token") for name in state),
            use_absolute_position_embeddings=any("position_embeddings" in name for name in state),
            use_relative_position_bias=relative == "own",
            use_shared_relative_position_bias=relative == "shared",
            layer_scale_init_value=float(encoder.layer_scale),
            use_mean_pooling=not {"layernorm.weight", "beit.layernorm.weight"} & set(state)
            or "lm_head.weight" in state,
            drop_path_rate=0.0,
        )
        if "lm_head.bias" in state:
            config["vocab_size"] = len(state["lm_head.bias"])
    if decoder := network.decoder:
        require_heads(decoder)
        config |= dict(
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=4 * decoder.width,
            mask_ratio=network.metadata.get("mask_ratio", 0.75),
            norm_pix_loss=network.metadata.get("target") == "normalized_pixels",
        )
    return with_decoder(config, state, network, layout) if network.kind == "segment" else config


def with_decoder(
    config: dict[str, Any], state: dict[str, np.ndarray], network: Network, layout: str
) -> dict[str, Any]:
    """Returns the config of BEiT with UPerNet, given that of its encoder.

    `out_indices` count the embeddings as 0. BeitForSemanticSegmentation uses the state before each
    index, UperNetForSemanticSegmentation the state at the index.
    """
    auxiliary = state.get("auxiliary_head.classifier.weight")
    decoder: dict[str, Any] = dict(
        use_auxiliary_head=auxiliary is not None, pool_scales=list(POOLS.values())
    )
    if auxiliary is not None:
        decoder |= dict(auxiliary_channels=auxiliary.shape[1])
    layers = network.metadata.get("layers") or default_layers(network.encoder.depth)
    if layout == "hf_beit_segment":
        return config | decoder | dict(out_indices=[layer + 2 for layer in layers])
    labels = {name: config.pop(name) for name in ("id2label", "label2id")}
    indices = [layer + 1 for layer in layers]
    config |= dict(out_indices=indices, add_fpn=True, reshape_hidden_states=True)
    return dict(
        architectures=config.pop("architectures"),
        model_type="upernet",
        backbone_config=config,
        hidden_size=state["decode_head.classifier.weight"].shape[1],
        auxiliary_in_channels=network.encoder.width,
        **decoder,
        **labels,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file is something else."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{printable(path)} is not a file.")
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{printable(path)} is longer than {MAX_JSON / 2**20:.0f} MiB.")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {printable(path)}: {printable(error)}.") from error
    if not isinstance(entries, dict):
        raise UserError(f"{printable(path)} must be a JSON object, not a {type(entries).__name__}.")
    return entries


def number(name: str, value: Any, least: float = 1, most: float = 2**20) -> Any:
    """Returns `value` if it is a number in the range, and an integer if `least` is an integer.

    Raises UserError for other values.
    """
    kind = "a whole number" if isinstance(least, int) else "a number"
    types = int if isinstance(least, int) else int | float
    if not isinstance(value, types) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(
            f"{name} = {printable(value)} must be {kind} between {least:g} and {most:g}."
        )
    return value


def numbers(name: str, value: Any) -> list[float]:
    """Returns `value` if it is a list of numbers. Raises UserError for other values."""
    if not isinstance(value, list):
        raise UserError(f"{name} = {printable(value)} must be a list of numbers.")
    return [number(name, x, least=-1e6, most=1e6) for x in value]


def pair(name: str, value: Any) -> tuple[int, int]:
    """Returns two sizes, given as one number or two. Raises UserError for other values."""
    sizes = value if isinstance(value, list) else [value, value]
    if len(sizes) != 2:
        raise UserError(f"{name} = {printable(value)} must be one whole number, or two.")
    return number(name, sizes[0]), number(name, sizes[1])


def read_metadata(entries: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries that belong in a network's metadata.

    Raises UserError if one is of an unexpected type.
    """
    metadata: dict[str, Any] = {}
    for name, value in entries.items():
        if name in ("mean", "std"):
            metadata[name] = numbers(name, value)
        elif name in ("crop_fraction", "mask_ratio", "layer_norm_eps"):
            metadata[name] = number(name, value, least=0.0, most=1.0)
        elif name == "layers":
            if not isinstance(value, list):
                raise UserError(f"layers = {printable(value)} must be a list of whole numbers.")
            metadata[name] = tuple(number(name, x, least=0) for x in value)
        elif name in ("target", "pooling") and isinstance(value, str):
            metadata[name] = value
    return metadata


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json and preprocessor_config.json. Returns keyword arguments of `describe`.

    Raises UserError if an entry is missing or of an unexpected type.
    """
    entries = read_json(folder / "config.json")
    backbone = entries.get("backbone_config")
    if isinstance(backbone, dict):
        if backbone.get("model_type") != "beit":
            kind = printable(backbone.get("model_type"))
            raise UserError(f"{printable(folder)} has a backbone of type {kind}, not beit.")
        own = {name: entries[name] for name in ("model_type", "pool_scales") if name in entries}
        entries = backbone | own
    processor = folder / "preprocessor_config.json"
    images = read_json(processor) if processor.exists() else {}
    if missing := [name for name in NEEDED if name not in entries]:
        raise UserError(
            f"{printable(folder)}/config.json is not the config of a ViT: it lacks {missing[0]}."
        )
    if entries.get("hidden_act", "gelu") != "gelu":
        activation = printable(entries["hidden_act"])
        raise UserError(f"{printable(folder)}/config.json: hidden_act = {activation} must be gelu.")
    size, patch = (pair(name, entries[name]) for name in ("image_size", "patch_size"))
    metadata = {ours: images[theirs] for ours, theirs in STATISTICS.items() if images.get(theirs)}
    metadata["layer_norm_eps"] = entries.get("layer_norm_eps", 1e-12)
    if entries.get("model_type") == "vit_mae":
        metadata["target"] = "normalized_pixels" if entries.get("norm_pix_loss") else "pixels"
        metadata["mask_ratio"] = entries.get("mask_ratio", 0.75)
    if layers := decoded_layers(folder, entries):
        metadata["layers"] = layers
    decoder_heads = entries.get("decoder_num_attention_heads")
    return dict(
        heads=number("num_attention_heads", entries["num_attention_heads"]),
        decoder_heads=number("decoder_num_attention_heads", decoder_heads) if decoder_heads else 0,
        grid=(size[0] // patch[0], size[1] // patch[1]),
        metadata=read_metadata(metadata),
    )


def decoded_layers(folder: Path, entries: dict[str, Any]) -> list[int]:
    """Returns the blocks that a segmentation model decodes, from 0; [] for other models.

    Raises UserError for a decoder with arrays of the same shapes that computes something else.
    """
    names, indices = entries.get("architectures"), entries.get("out_indices")
    scales = entries.get("pool_scales", list(POOLS.values()))
    segments = isinstance(names, list) and "BeitForSemanticSegmentation" in names
    shift = 1 if entries.get("model_type") == "upernet" else 2 if segments else 0
    if not shift or not (isinstance(indices, list) and isinstance(scales, list)):
        return []
    if not len(indices) == len(scales) == len(POOLS):
        return []
    if scales != list(POOLS.values()):
        raise UserError(
            f"{printable(folder)}/config.json: pool_scales = {printable(scales)} must be "
            f"{list(POOLS.values())}."
        )
    layers = [number("out_indices", index, least=0) - shift for index in indices]
    if min(layers) < 0:
        raise UserError(
            f"{printable(folder)}/config.json: out_indices = {indices} select the patch "
            f"embeddings, before any block: they must be at least {shift}."
        )
    return layers


def write(
    folder: Path, state: dict[str, np.ndarray], network: Network, layout: str
) -> dict[str, Any]:
    """Writes a folder that from_pretrained reads. Returns its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(state, network, layout)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    images: dict[str, Any] = dict(
        image_processor_type="BeitImageProcessor" if "beit" in layout else "ViTImageProcessor",
        do_resize=True,
        size=dict(height=network.size[0], width=network.size[1]),
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
    )
    if "mean" in network.metadata:
        for ours, theirs in STATISTICS.items():
            values = list(network.metadata[ours])
            images[theirs] = values * network.channels if len(values) == 1 else values
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    return config
