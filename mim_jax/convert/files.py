"""Weights where they lie: runs of ours, files of PyTorch and safetensors, Hugging Face folders."""

import hashlib
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import UserError
from mim_jax.convert.about import About, describe, extra
from mim_jax.convert.fit import fit
from mim_jax.convert.hugging_face import known_from, write
from mim_jax.convert.read import read
from mim_jax.convert.states import from_torch, to_torch
from mim_jax.convert.tables import LAYOUTS
from mim_jax.models.vit import vit

FOLDER = ("model.safetensors", "pytorch_model.bin")  # Hugging Face's, the better first
RELEASED = {  # MD5 sums begin so, as its README says
    *("8cad7c", "b8b06e", "9bdbb0"),
    *("1b25e9", "51f550", "2541f2"),
}
NOTED = ("heads", "decoder_heads", "facts")
FACTS = ("mean", "std", "target", "mask_ratio", "pooling")  # of an objective, that are kept


def load(path: str | Path, **known: Any) -> tuple[dict, About, dict[str, Any]]:
    """-> our parameters, what they are of, and what lay beside them, from whatever lies there.

    `known` is as for `from_torch`. Raises UserError for what cannot be read, or is no such network.
    """
    path, known = Path(path), {name: value for name, value in known.items() if value}
    if (path / "checkpoints").is_dir():
        known.pop("size", None)
        return load_run(path, known)
    if (path / "encoder.pkl").exists() and (path / "decoder.pkl").exists():
        halves = [from_torch(read(path / f"{half}.pkl")[0])[0] for half in ("encoder", "decoder")]
        params = halves[0] | halves[1]
        return params, describe(params, layout="dalle"), {}
    if path.is_dir():
        arrays, noted = read_folder(path), known_from(path)
        params, about = from_torch(arrays, **noted | known)
        return params, about, {}
    arrays, metadata = read(path)
    noted = beside(metadata.pop("mim_jax", "{}"))
    params, about = from_torch(arrays, **noted | known)
    return params, about, metadata


def beside(text: str) -> dict[str, Any]:
    """What `save` noted in a file that has no other place for it."""
    try:
        noted = json.loads(text)
        grid = {"grid": tuple(noted["grid"])} if "grid" in noted else {}
        return {name: noted[name] for name in NOTED if name in noted} | grid
    except (ValueError, TypeError):
        return {}


def read_folder(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder of Hugging Face, in one file or in several."""
    for name in FOLDER:
        if (path / name).exists():
            return read(path / name)[0]
        if (path / f"{name}.index.json").exists():
            parts = json.loads((path / f"{name}.index.json").read_text())["weight_map"].values()
            if any(Path(part).name != part for part in parts):
                raise UserError(f"{path}/{name}.index.json names files outside its folder.")
            return {k: x for part in sorted(set(parts)) for k, x in read(path / part)[0].items()}
    raise UserError(
        f"{path} is neither the folder of a run, with checkpoints, nor one of Hugging Face, with "
        f"{' or '.join(FOLDER)}."
    )


def load_run(path: Path, known: dict) -> tuple[dict, About, dict]:
    """The newest checkpoint of a run, or of what was converted to one."""
    from mim_jax import checkpoint

    params, buffers, metadata = checkpoint.load(str(path))
    frozen = {name: buffers[name] for name in ("encoder", "batch_statistics") if name in buffers}
    whole = flatten_dict(frozen) | flatten_dict(params)
    params, noted = unflatten_dict(whole), metadata["config"]
    facts = {name: noted["objective"][name] for name in FACTS if name in noted["objective"]}
    facts |= {"crop_fraction": noted["data"].get("crop_fraction", 0.875)}
    if "encoder" not in params:
        about, model = describe(params, facts=facts), noted["tokenizer"]
        model = {k: v for k, v in model.items() if k != "dtype" and (v or k == "layers")}
        return params, about._replace(model=about.model | model), metadata
    settings = {k: v for k, v in noted["model"].items() if k in inspect.signature(vit).parameters}
    model = vit(**settings | dict(dtype="float32"))
    size = noted["data"]["size"]
    size = (size, size) if isinstance(size, int) else size
    noted = dict(
        patch=model.patch,
        grid=(size[0] // model.patch[0], size[1] // model.patch[1]),
        heads=model.heads,
        decoder_heads=noted["objective"].get("decoder_heads", 0),
        positions=model.positions,
        facts=facts,
    )
    return params, describe(params, **noted | known), metadata


def story(params: dict, about: About) -> str:
    """What they are, in a line."""
    count = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))
    model, title = about.model, "ours" if about.layout == "mim_jax" else LAYOUTS[about.layout].title
    if about.kind == "dvae":
        return f"{title}: {model['kind']} dVAE, {model['vocabulary']} tokens, {count:,} parameters"
    words = [f"width {model['width']}", f"{model['depth']} blocks"]
    words += [f"{model['heads'] or 'unknown'} heads", "patches of {} x {}".format(*about.patch)]
    words[-1] += f" from a {model['stem']}" if model["stem"] != "none" else ""
    words += ["images of {} x {}".format(*about.size)] if about.grid else []
    words += [f"{model['positions']} positions"] if model["positions"] != "none" else []
    if model["relative_bias"] != "none":
        words.append(f"{model['relative_bias']} relative positions")
    if about.decoder:
        words.append(
            "decoder of width {width}, {depth} blocks, {heads} heads".format(**about.decoder)
        )
    if about.kind == "encoder" and not {"norm", "fc_norm"} & {*params, *params["encoder"]}:
        words.append("no norm at its end")
    head = params.get("head", {}).get("bias")
    if head is not None:
        words.append(f"{len(head)} {'values a patch' if about.kind == 'beit' else 'classes'}")
    return f"{title}, {about.kind}: {', '.join(words)}; {count:,} parameters"


def licence(path: str | Path) -> str:
    """What must be said of weights that others released, "" if they are not known."""
    path = Path(path)
    named = re.search(r"mae_(pretrain|finetuned|visualize)_vit|vit-mae-", str(path.absolute()))
    if not named and path.is_file():
        with path.open("rb") as file:
            named = hashlib.file_digest(file, "md5").hexdigest()[:6] in RELEASED
    return "MAE's released weights are CC-BY-NC-4.0: not for commercial use." if named else ""


def save(path: str | Path, params: dict, about: About, to: str) -> str:
    """Writes params in a family of layouts, or for us -> what was written, in a line.

    A file (.safetensors, .pth, .pt, .bin), or for hf and mim_jax a folder.
    """
    path = Path(path)
    if to == "mim_jax":
        return save_run(path, params, about)
    layout, taken = fit(params, about, to)
    state = to_torch(taken, about, layout=layout)
    title = f"{LAYOUTS[layout].title}, {len(state)} arrays"
    names = [part for part in params if part not in (*taken, "batch_statistics")]
    names += ["the mask token"] if has_mask_token(params) and not has_mask_token(taken) else []
    title += f"; left out: {', '.join(names)}" if names else ""
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        if not path.absolute().parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} to.")
        known = dict(heads=about.model.get("heads"), grid=about.grid, facts=about.facts)
        known |= dict(decoder_heads=about.decoder["heads"]) if about.decoder else {}
        metadata = json.dumps({name: value for name, value in known.items() if value})
        if path.suffix == ".safetensors":
            with extra():
                from safetensors.numpy import save_file

            save_file(state, path, metadata={"format": "pt", "mim_jax": metadata})
        else:
            with extra():
                from mim_jax.convert.torch_files import save_file

            save_file(state, path, metadata={"mim_jax": metadata})
    elif to == "hf" and not path.is_file():
        write(path, state, about, layout)
    else:
        raise UserError(f"{path}: say a file that ends with .safetensors or .pth.")
    return title


def has_mask_token(params: dict) -> bool:
    return "mask_token" in params.get("encoder", ())


def save_run(path: Path, params: dict, about: About) -> str:
    """A run's folder that init_from takes."""
    from mim_jax.checkpoint import Checkpoints
    from mim_jax.train import TrainState

    objective = {"name": about.kind} | {k: v for k, v in about.facts.items() if k in FACTS}
    if about.decoder:
        objective |= {f"decoder_{name}": value for name, value in about.decoder.items()}
    data = dict(crop_fraction=about.facts.get("crop_fraction", 0.875))
    if about.kind != "dvae":
        data |= dict(size=about.size, channels=about.channels)
    network = "tokenizer" if about.kind == "dvae" else "model"
    record = dict(
        config={network: about.model, "objective": objective, "data": data},
        trajectory={"converted from": about.layout},  # no training goes on from here
    )
    checkpoints = Checkpoints(str(path), keep=1, record=record)
    if checkpoints.latest is not None:
        checkpoints.close()
        raise UserError(f"{path} holds checkpoints already: choose another folder.")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    buffers = {k: params.pop(k) for k in ("batch_statistics",) if k in params}
    checkpoints.save(TrainState(np.zeros((), np.int32), params, buffers, ()))
    checkpoints.close()
    (path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    return f"a checkpoint of ours with {', '.join(params)}"
