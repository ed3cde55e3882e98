"""Loads and saves weights: runs, PyTorch and safetensors files, Hugging Face folders."""

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import numpy as safetensors

from mim_jax import UserError, workdir
from mim_jax.convert.fit import fit
from mim_jax.convert.hugging_face import (
    number,
    pair,
    read_config,
    read_json,
    read_metadata,
    write,
)
from mim_jax.convert.names import printable
from mim_jax.convert.network import (
    Network,
    depth_of,
    describe,
    expected,
    extra,
    kind_of,
    leaves,
    segmenter,
)
from mim_jax.convert.read import FREE, read, read_file
from mim_jax.convert.states import from_torch, to_torch
from mim_jax.convert.tables import LAYOUTS
from mim_jax.models.decoder import Decoder
from mim_jax.models.dvae import DVAE, KINDS, dvae
from mim_jax.models.vit import ViT, vit
from mim_jax.objectives.segment import default_layers

FOLDER = ("model.safetensors", "pytorch_model.bin")  # Hugging Face's, in order of preference
RELEASED = {  # the first digits of the MD5 sums in MAE's README
    *("8cad7c", "b8b06e", "9bdbb0"),
    *("1b25e9", "51f550", "2541f2"),
}
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")  # of single files
HEADS = ("heads", "decoder_heads")
OBJECTIVE_KEYS = ("mean", "std", "target", "mask_ratio", "pooling", "layers")  # kept in metadata


def load_weights(path: str | Path, **options: Any) -> tuple[dict, Network, dict[str, Any]]:
    """Loads a run, a file of weights or a Hugging Face folder.

    Args:
        path: the source, or the name of a model in the local cache of the Hugging Face Hub.
        options: arguments of `from_torch`, which take precedence over those in the source. False
            values are ignored, and `encoder_only` has no effect on a run.

    Returns:
        Our parameters, their network, and the other entries of the source.

    Raises:
        UserError: if the source cannot be read or holds another network.
    """
    options = {name: value for name, value in options.items() if value}
    for name in HEADS:
        if name in options:
            number(name, options[name])
    if (workdir.open_path(path) / "checkpoints").is_dir():
        options.pop("encoder_only", None)
        return load_run(path, **options)
    path = cached(path)
    if (path / "encoder.pkl").exists() and (path / "decoder.pkl").exists():
        halves = [from_torch(read(path / f"{half}.pkl")[0])[0] for half in ("encoder", "decoder")]
        params = halves[0] | halves[1]
        return params, describe(params, layout="dalle"), {}
    if path.is_dir():
        return *from_torch(read_folder(path), **read_config(path) | options), {}
    contents = read_file(path, options.pop("entry", ""))
    recorded = read_record(contents.entries.pop("mim_jax", "{}"))
    params, network = from_torch(contents.arrays, **recorded | options)
    left_out = contents.left_out + network.left_out
    entry = contents.entry or network.entry
    return params, network._replace(left_out=left_out, entry=entry), contents.entries


def read_record(text: str) -> dict[str, Any]:
    """Reads the options of `from_torch` that `save_file` recorded in a file."""
    try:
        entries = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    record = {name: number(name, entries[name]) for name in HEADS if name in entries}
    record |= {"grid": pair("grid", entries["grid"])} if "grid" in entries else {}
    facts = entries.get("facts")  # the name of the metadata in files
    return record | {"metadata": read_metadata(facts if isinstance(facts, dict) else {})}


def read_folder(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a Hugging Face folder, in one file or in several."""
    for name in FOLDER:
        if (path / name).exists():
            return read_file(path / name, whole=True).arrays
        if (path / f"{name}.index.json").exists():
            index = read_json(path / f"{name}.index.json").get("weight_map")
            parts = list(index.values()) if isinstance(index, dict) else []
            if not parts or any(not isinstance(x, str) or Path(x).name != x for x in parts):
                raise UserError(
                    f"{printable(path / name)}.index.json must have a weight_map with the names of "
                    "files in its folder."
                )
            parts = sorted(set(parts))
            free = FREE // len(parts)
            files = [read_file(path / part, whole=True, free=free) for part in parts]
            return {name: x for file in files for name, x in file.arrays.items()}
    raise UserError(
        f"{printable(path)} is neither a run with checkpoints nor a Hugging Face folder with "
        f"{' or '.join(FOLDER)}."
    )


def cached(source: str | Path) -> Path:
    """Returns the folder of a Hugging Face Hub model such as "facebook/vit-mae-base".

    Nothing is downloaded: it must be in the Hub's local cache. Any other source is a path.

    Raises:
        UserError: if there is neither a path nor a cached model of this name.
    """
    path = workdir.fetched(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), local_files_only=True))
    except (ImportError, OSError):  # not installed, or not in the cache
        raise UserError(
            f"there is no file {source}, and no such model in the local cache of the Hugging Face "
            f"Hub: if it is a model there, run `hf download {source}` first."
        ) from None


def load_run(path: str | Path, **options: Any) -> tuple[dict, Network, dict]:
    """Loads the newest checkpoint of a run, or of converted weights."""
    from mim_jax.checkpoint import saved
    from mim_jax.schema import require_networks

    params, buffers, metadata = saved.load(str(path))
    frozen = {name: buffers[name] for name in ("encoder", "batch_statistics") if name in buffers}
    params = unflatten_dict(flatten_dict(frozen) | flatten_dict(params))
    require_networks(metadata["config"], "model" if "encoder" in params else "tokenizer")
    network = network_of_run(params, metadata["config"], **options)
    if "encoder" in params:
        require_encoder(path, params["encoder"], network)
    return params, network, metadata


def require_encoder(path: str | Path, encoder: dict, network: Network) -> None:
    """Raises UserError unless a run has the arrays of the encoder that its config describes."""
    part = {"encoder": encoder}
    given, wanted = leaves(part), expected(part, network._replace(kind="encoder", decoder=None))
    for name, shape in wanted.items():
        if given.get(name) != shape:
            problem = f"has the shape {given[name]}, not {shape}" if name in given else "is missing"
            raise UserError(f"{path} does not hold the encoder of its config: {name} {problem}.")


def network_of_run(
    params: dict, config: dict, *, heads: int = 0, decoder_heads: int = 0, size: Any = None
) -> Network:
    """Returns the network of a run's parameters, given its config and the image `size`."""
    objective, data = config["objective"], config["data"]
    metadata = {name: objective[name] for name in OBJECTIVE_KEYS if name in objective}
    metadata["crop_fraction"] = data.get("crop_fraction", 0.875)
    if "encoder" not in params:
        tokenizer = build(dvae, config["tokenizer"])
        return Network(tokenizer, "dvae", channels=tokenizer.channels, metadata=metadata)
    encoder = build(vit, config["model"], heads=heads)
    if kind_of(params) == "segment":
        metadata["layers"] = tuple(objective["layers"]) or default_layers(encoder.depth)
        encoder = encoder.clone(depth=depth_of(params["encoder"]))  # blocks that are decoded
    height, width = np.broadcast_to(data["size"], 2).tolist()
    grid = height // encoder.patch[0], width // encoder.patch[1]
    decoder = None
    if "decoder" in params:
        width, depth = objective["decoder_width"], objective["decoder_depth"]
        heads = decoder_heads or objective["decoder_heads"]
        decoder = Decoder(width, depth, heads, "float32", "none")
    channels = data.get("channels", 3)
    return Network(encoder, kind_of(params), decoder, grid, channels, metadata=metadata)


def build(function: Callable, settings: dict, **options: Any) -> Any:
    """Calls `vit` or `dvae`, in float32, with the settings of a config that it accepts."""
    names = keys_of(function)
    settings = {name: value for name, value in settings.items() if name in names}
    settings |= {name: value for name, value in options.items() if value}
    return function(**settings | {"dtype": "float32"})


def keys_of(function: Callable) -> set[str]:
    """Returns the config keys of `vit`, some of which are fields of ViT, or of `dvae`."""
    functions = (vit, ViT) if function is vit else (function,)
    names = {name for f in functions for name in inspect.signature(f).parameters}
    return names - {"options", "parent", "name"}


def summarize(params: dict, network: Network) -> str:
    """Summarizes a network in one line of text."""
    count = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))
    title = "ours" if network.layout == "mim_jax" else LAYOUTS[network.layout].title
    title += f" from its entry {printable(network.entry)}" if network.entry else ""
    if isinstance(model := network.model, DVAE):
        tokens = model.encoder.vocabulary
        return f"{title}: {kind_of_dvae(model)} dVAE, {tokens} tokens, {count:,} parameters"
    words = [f"width {model.width}", f"{model.depth} blocks", f"{model.heads or 'unknown'} heads"]
    words.append("patches of {} x {}".format(*model.patch))
    if model.stem != "none":
        words[-1] += f" from a {model.stem}"
    if network.grid:
        words.append("images of {} x {}".format(*network.size))
    if model.positions != "none":
        words.append(f"{model.positions} positions")
    if model.relative_bias != "none":
        words.append(f"{model.relative_bias} relative positions")
    if decoder := network.decoder:
        words.append(
            f"decoder of width {decoder.width}, {decoder.depth} blocks, "
            f"{decoder.heads or 'unknown'} heads"
        )
    if network.kind == "encoder" and not {"norm", "fc_norm"} & {*params, *params["encoder"]}:
        words.append("no final norm")
    bias = params.get("head", {}).get("bias")
    if bias is not None:
        words.append(f"{len(bias)} {'values a patch' if network.kind == 'beit' else 'classes'}")
    if network.kind == "segment":
        module = segmenter(params, network, model)
        blocks = ", ".join(map(str, module.layers))
        words.append(f"{module.decoder} on blocks {blocks}, {module.num_classes} classes")
    return f"{title}, {network.kind}: {', '.join(words)}; {count:,} parameters"


def kind_of_dvae(tokenizer: DVAE) -> str:
    """Returns the kind of a dVAE, a key of KINDS."""
    return next(kind for kind, parts in KINDS.items() if isinstance(tokenizer.encoder, parts[0]))


def license_note(path: str | Path) -> str:
    """Returns a note on the license of MAE's released weights, "" for other weights."""
    path = Path(path)
    named = re.search(r"mae_(pretrain|finetuned|visualize)_vit|vit-mae-", str(path.absolute()))
    if not named and path.is_file():
        with path.open("rb") as file:
            named = hashlib.file_digest(file, "md5").hexdigest()[:6] in RELEASED
    return "MAE's released weights are CC-BY-NC-4.0: not for commercial use." if named else ""


def save_weights(path: str | Path, params: dict, network: Network, to: str) -> str:
    """Saves parameters in a family of layouts, or as a run, and describes what was written.

    Args:
        path: a file (.safetensors, .pth, .pt, .bin), or for hf and mim_jax a folder.
        params: our parameters.
        network: their network.
        to: a family of layouts, or mim_jax.

    Raises:
        UserError: if the family cannot hold the network, or if the path has another suffix.
    """
    if to == "mim_jax":
        if Path(path).suffix in (*SUFFIXES, ".npz"):
            raise UserError(f"{printable(path)}: --to=mim_jax writes a folder, not such a file.")
        return save_run(path, params, network)
    path = workdir.open_path(path)
    if (path / "checkpoints").is_dir():  # config.json of a run would be overwritten
        raise UserError(f"{printable(path)} is a run directory: choose another folder.")
    layout, fitted = fit(params, network, to)
    state = to_torch(fitted, network, layout=layout)
    title = f"{LAYOUTS[layout].title}, {len(state)} arrays"
    names = [part for part in params if part not in (*fitted, "batch_statistics")]
    names += ["the mask token"] if has_mask_token(params) and not has_mask_token(fitted) else []
    title += f"; left out: {', '.join(names)}" if names else ""
    if path.suffix in SUFFIXES:
        with workdir.staged(path.parent) as folder:
            save_file(folder / path.name, state, network)
    elif to == "hf" and not path.is_file():
        with workdir.staged(path) as folder:
            write(folder, state, network, layout)
    else:
        raise UserError(f"{printable(path)} must end with .safetensors or .pth.")
    return title


def has_mask_token(params: dict) -> bool:
    """Returns whether an encoder has a mask token."""
    return "mask_token" in params.get("encoder", ())


def save_file(path: Path, state: dict[str, np.ndarray], network: Network) -> None:
    """Saves a state dict, together with the record that `read_record` reads."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {printable(path.parent)} for {printable(path.name)}.")
    heads = network.model.heads if isinstance(network.model, ViT) else 0
    decoder_heads = network.decoder.heads if network.decoder else 0
    record = {
        "heads": heads,
        "decoder_heads": decoder_heads,
        "grid": network.grid,
        "facts": network.metadata,
    }
    text = json.dumps({name: value for name, value in record.items() if value})
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.save(state, metadata={"format": "pt", "mim_jax": text}))
        return
    with extra():
        from mim_jax.convert import torch_files
    torch_files.save_file(state, path, metadata={"mim_jax": text})


def save_run(path: str | Path, params: dict, network: Network) -> str:
    """Saves a run directory that init_from accepts."""
    from mim_jax.checkpoint import Checkpoints
    from mim_jax.train import TrainState

    record = dict(config=config_of(network), trajectory={"converted from": network.layout})
    checkpoints = Checkpoints(str(path), keep=1, record=record)
    if checkpoints.latest is not None:
        checkpoints.close()
        raise UserError(f"{printable(path)} already holds checkpoints: choose another folder.")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    buffers = {k: params.pop(k) for k in ("batch_statistics",) if k in params}
    step = jax.device_put(np.zeros((), np.int32))
    checkpoints.save(TrainState(step, params, buffers, ()))
    checkpoints.close()
    workdir.write(path, record)
    return f"a checkpoint of mim_jax with {', '.join(params)}"


def config_of(network: Network) -> dict[str, dict[str, Any]]:
    """Returns the config of a network, as `network_of_run` reads it."""
    model, metadata = network.model, network.metadata
    objective = {"name": network.kind} | {k: metadata[k] for k in OBJECTIVE_KEYS if k in metadata}
    data = dict(channels=network.channels, crop_fraction=metadata.get("crop_fraction", 0.875))
    if isinstance(model, DVAE):
        names = ("vocabulary", "width", "layers", "blocks", "stem")
        tokenizer = {name: getattr(model.encoder, name) for name in names}
        tokenizer |= dict(
            kind=kind_of_dvae(model),
            codebook=model.decoder.codebook,
            channels=model.channels,
            likelihood=model.likelihood,
        )
        return dict(tokenizer=tokenizer, objective=objective, data=data)
    if decoder := network.decoder:
        sizes = dict(width=decoder.width, depth=decoder.depth, heads=decoder.heads)
        objective |= {f"decoder_{name}": value for name, value in sizes.items()}
    names = keys_of(vit)
    encoder = {name: value for name, value in vars(model).items() if name in names}
    return dict(model=encoder, objective=objective, data=data | dict(size=network.size))
