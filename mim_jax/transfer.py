"""Starts a run from other runs: copies parts of their newest checkpoints into its state."""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError, workdir
from mim_jax.checkpoint.restore import arrays
from mim_jax.checkpoint.saved import open_run, weights_in
from mim_jax.checkpoint.trees import flat
from mim_jax.models.resize import POSITIONS, RELATIVE, fit
from mim_jax.models.vit import ViT, vit
from mim_jax.train import TrainState

# By key of init_from. The first part is in the params, in the buffers or, if some of it is frozen,
# in both; the others are next to it.
PARTS = {"encoder": ("encoder",), "tokenizer": ("tokenizer", "decoder")}
# Arrays of a head whose last axis is over the classes.
CLASSIFIER = re.compile(r"(^head(_\d+)?|/classes/conv)/(kernel|bias)$")
# Arrays of an encoder that one of two runs may lack: a head may bring its own norm.
OPTIONAL = ("mask_token", "norm/bias", "norm/scale")


class Encoder(NamedTuple):
    """Settings of an encoder that the shapes of its arrays do not determine."""

    objective: str = ""
    model: ViT | None = None
    grid: tuple[int, int] | None = None  # rows and columns of patches
    statistics: Mapping[str, tuple] = {}
    bands: tuple[str, ...] = ()  # names of the images' channels, () if unknown

    @property
    def fixed_positions(self) -> bool:
        return self.model is not None and self.model.positions == "sincos"


def encoder_in(config: Mapping[str, Any]) -> Encoder:
    """Reads an encoder's settings from the config of a run or of converted weights."""
    if "model" not in config:
        return Encoder()
    objective, block = config["objective"], dict(config["model"])
    unknown_heads = not (block["heads"] or block.get("size"))
    model = vit(**block | (dict(heads=1) if unknown_heads else {}))
    height, width = np.broadcast_to(config["data"]["size"], 2) // model.patch
    return Encoder(
        objective=objective["name"],
        model=model.clone(heads=0) if unknown_heads else model,
        grid=(int(height), int(width)),
        statistics={name: tuple(objective[name]) for name in ("mean", "std") if name in objective},
        bands=tuple(config["data"].get("bands", ())),
    )


def start_from(
    state: TrainState,
    key: str,
    source: str,
    config: Mapping[str, Any],
    head: tuple[str, ...] = (),
    class_names: Sequence[str] = (),
    strict: bool = False,
) -> TrainState:
    """Returns `state` with the encoder or tokenizer (`key`) of the run in `source`.

    Prints which arrays are resized, new or ignored. If both runs have the same objective, arrays
    whose names begin with `head` are copied if their shapes fit, with the classes in the order of
    `class_names`; a classifier of other classes stays random. If both runs name the bands of their
    images, the patch embedding is matched by these names; weights of new bands stay random.
    `config` is that of the run that starts.

    Raises:
        UserError: if the networks differ or, with `strict`, if any parameter stays random.
    """
    fields = {f: x for f in ("params", "buffers") if PARTS[key][0] in (x := getattr(state, f))}
    if not fields:
        names = ", ".join(sorted(state.params.keys() | state.buffers))
        raise UserError(f"init_from.{key}: this objective has no {key}; it has {names}.")
    saved, step = read_parts(source, key, head)
    record = workdir.read(source)
    ours, theirs = encoder_in(config), encoder_in(record.get("config", {}))
    taken: dict[str, np.ndarray] = {}
    for part in PARTS[key]:
        initial = {name: x for tree in fields.values() for name, x in flatten_part(tree, part)}
        wanted = {name: x.shape for name, x in initial.items()}
        if wanted:
            arrays = {name: x for tree in saved.values() for name, x in flatten_part(tree, part)}
            if ours.bands and theirs.bands and ours.bands != theirs.bands:
                arrays |= fit_bands(part, arrays, initial, ours, theirs, source)
            fitted, changes = fit_part(part, arrays, wanted, ours, theirs, source)
            if part == "encoder":
                compare(ours, theirs, source, bands_fitted=True)
            print(f"{part}: {len(fitted)} arrays from step {step} of {source}{changes}")
            taken |= {f"{part}/{name}": x for name, x in fitted.items()}
    if key == "encoder" and head and ours.objective == theirs.objective:
        fields = {"params": state.params, "buffers": state.buffers}
        head_arrays = fit_head(saved, fields, head)
        their_classes = workdir.class_names_of(record)
        head_arrays, change = fit_classes(head_arrays, class_names, their_classes)
        taken |= head_arrays
        print(f"head: {summary_of(head_arrays)}{change}")
    elif key == "encoder" and ours.objective == theirs.objective:  # all of it may be expected
        others = sorted({name.split("/")[0] for name in flat(state.params)} - {"encoder"})
        print(f"not taken from {source}, but random: {', '.join(others)}")
    names = flat(state.params) | flat(state.buffers)
    if strict and (missing := sorted(names.keys() - taken)):
        raise UserError(f"cannot evaluate: {source} has no {missing[0]}, which this model needs.")

    def value(path, x):
        array = taken.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return x if array is None else jax.device_put(array.astype(x.dtype), x.sharding)

    state = state._replace(**{f: jax.tree.map_with_path(value, x) for f, x in fields.items()})
    # A copy, because the step overwrites the average in place.
    return state if state.ema is None else state._replace(ema=jax.tree.map(jnp.copy, state.params))


def fit_part(
    part: str, saved: dict, wanted: dict, ours: Encoder, theirs: Encoder, source: str
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of a part, fitted to this run's network, and text about the changes."""
    fixed = theirs.fixed_positions and part == "encoder"
    fitted = fit(saved, wanted, before=theirs.grid, after=ours.grid, fixed=fixed)
    new, ignored = sorted(wanted.keys() - fitted), sorted(saved.keys() - wanted - {RELATIVE})
    different = [name for name, x in fitted.items() if x.shape != wanted[name]]
    different += [name for name in new if name not in OPTIONAL and not name.endswith(RELATIVE)]
    different += [name for name in ignored if name not in OPTIONAL]
    if RELATIVE in saved and not any(name.endswith(RELATIVE) for name in wanted):
        different.append(RELATIVE)
    if different:
        first = min(different, key=lambda name: (not name.startswith("embed"), name))
        count = "1 array differs" if len(different) == 1 else f"{len(different)} arrays differ"
        raise UserError(
            f"init_from: the {part} of {source} is a different network: {count}, first {first}: "
            f"{wanted.get(first)} in this run, {saved[first].shape if first in saved else None} in "
            f"{source}{how_to_match(ours, theirs) if part == 'encoder' else ''}."
        )
    resized = [n for n in fitted if ours.grid != theirs.grid and n.endswith((POSITIONS, RELATIVE))]
    changes = dict(resized=resized, new=new, ignored=ignored)
    return fitted, "".join(f"; {change}: {', '.join(x)}" for change, x in changes.items() if x)


def how_to_match(ours: Encoder, theirs: Encoder) -> str:
    """Returns advice that names the keys of the model that differ, "" if none does."""
    if ours.model is None or theirs.model is None:
        return ""
    keys = {
        name: getattr(theirs.model, name)
        for name in ("width", "depth", "heads", "patch", "positions")
        if getattr(theirs.model, name) not in (0, getattr(ours.model, name))
    }
    text = " ".join(f"--config.model.{name}={shlex.quote(str(x))}" for name, x in keys.items())
    return f": to use its network, set {text}" if keys else ""


def compare(ours: Encoder, theirs: Encoder, source: str, bands_fitted: bool = False) -> None:
    """Raises UserError if our encoder would compute something else with the same arrays.

    With `bands_fitted` the patch embedding is already fitted to our bands.
    """
    if ours.model is None or theirs.model is None:
        return
    for name in ("patch", "heads", "positions"):
        our, their = getattr(ours.model, name), getattr(theirs.model, name)
        compatible = our == their or (their, our) == ("sincos", "learned")
        if our and their and not compatible:
            raise UserError(
                f"the encoder of {source} is a different network: its model.{name} is {their!r}, "
                f"this run's is {our!r}."
            )
    fixed = ours.fixed_positions and theirs.fixed_positions
    if fixed and ours.grid and theirs.grid and ours.grid != theirs.grid:
        raise UserError(
            f"the encoder of {source} has fixed positions for {theirs.grid[0]} x "
            f"{theirs.grid[1]} patches, but this run has {ours.grid[0]} x {ours.grid[1]}: set "
            "--config.model.positions=learned, which are initialized by interpolation."
        )
    if not bands_fitted:
        require_bands(ours, theirs, source)
    compare_statistics(ours, theirs, source)


def require_bands(ours: Encoder, theirs: Encoder, source: str) -> None:
    """Raises UserError if both encoders name the bands of their images and the names differ."""
    if ours.bands and theirs.bands and ours.bands != theirs.bands:
        raise UserError(
            f"data.bands = {', '.join(ours.bands)}, but the bands of the encoder of {source} are "
            f"{', '.join(theirs.bands)}, in this order."
        )


def compare_statistics(ours: Encoder, theirs: Encoder, source: str) -> None:
    """Prints a warning if the runs normalize images differently; bands are matched by name."""
    shared = [band for band in ours.bands if band in theirs.bands]
    for name in ours.statistics.keys() & theirs.statistics:
        our, their = (
            select_bands(run.statistics[name], run.bands, shared) for run in (ours, theirs)
        )
        if our != their:
            bands = f", for the bands {', '.join(shared)}" if shared else ""
            print(
                f"warning: objective.{name} of {source} is {their}, this run's is {our}{bands}",
                file=sys.stderr,
            )


def select_bands(values: tuple, bands: Sequence[str], chosen: Sequence[str]) -> tuple:
    """Returns the values of the chosen bands, given one value per band or one for all."""
    if not chosen or len(values) not in (1, len(bands)):
        return values
    return tuple(values[bands.index(band) if len(values) > 1 else 0] for band in chosen)


def fit_bands(
    part: str, saved: dict, initial: dict, ours: Encoder, theirs: Encoder, source: str
) -> dict[str, np.ndarray]:
    """Returns the kernel of the patch embedding for the bands of this run, {name: array}.

    The weights of bands that the other run lacks are those of `initial`. Raises UserError if the
    runs share no band, or if the part does not begin with a patch embedding.
    """
    words = {
        "matched": [band for band in ours.bands if band in theirs.bands],
        "new": [band for band in ours.bands if band not in theirs.bands],
        "dropped": [band for band in theirs.bands if band not in ours.bands],
    }
    if part != "encoder" or ours.model is None or ours.model.stem != "none":
        raise UserError(
            f"init_from: the bands of the {part} of {source} are {', '.join(theirs.bands)}, not "
            f"{', '.join(ours.bands)}; only a patch embedding can be matched by band."
        )
    if not words["matched"]:
        raise UserError(
            f"init_from: the bands of {source} are {', '.join(theirs.bands)}; none of them is "
            f"among data.bands = {', '.join(ours.bands)}."
        )
    name = "embed/kernel"  # (p*q*c, d), the channels fastest
    before, kernel = np.asarray(saved[name]), np.array(initial[name])
    pixels = [len(x) // len(run.bands) for x, run in ((before, theirs), (kernel, ours))]
    if pixels[0] != pixels[1] or before.shape[-1] != kernel.shape[-1]:
        return {}  # a different network, which `fit_part` reports
    before = before.reshape(pixels[0], len(theirs.bands), -1)
    by_band = kernel.reshape(pixels[1], len(ours.bands), -1)
    for band in words["matched"]:
        by_band[:, ours.bands.index(band)] = before[:, theirs.bands.index(band)]
    print("bands " + "; ".join(f"{change}: {', '.join(x)}" for change, x in words.items() if x))
    return {name: by_band.reshape(kernel.shape)}


def fit_classes(
    head: dict[str, np.ndarray], ours: Sequence[str], theirs: Sequence[str]
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of a head with its classes in our order, and text about the changes.

    If the classes differ, the classifier's arrays are left out.
    """
    if not (ours and theirs) or list(ours) == list(theirs):
        return head, ""
    if set(ours) != set(theirs):
        rest = {name: x for name, x in head.items() if not CLASSIFIER.search(name)}
        others = ", ".join(sorted(set(ours) ^ set(theirs))[:3])
        return rest, f"; the classes differ, for example {others}"
    order = [list(theirs).index(name) for name in ours]
    matched = {
        name: np.asarray(x)[..., order] if CLASSIFIER.search(name) else x
        for name, x in head.items()
    }
    return matched, "; classes matched by name"


def is_of_head(field: str, part: str, head: tuple[str, ...]) -> bool:
    """Returns whether a part of the params or buffers belongs to a head, not to a tokenizer."""
    return part.startswith(head) and not (field == "buffers" and part in PARTS["tokenizer"])


def summary_of(head: Mapping[str, Any]) -> str:
    """Returns the names of a head's arrays, or those of its parts if there are many."""
    if len(head) <= 8:
        return ", ".join(head) or "new"
    counts = Counter(name.split("/")[0] for name in head)
    return ", ".join(f"{count} arrays of {part}" for part, count in counts.items())


def fit_head(saved: dict, fields: dict, head: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays of a head, {"head/bias": array, ...}, that fit the state.

    A head is copied only together with the norm of its input: features must be the same.
    """

    def norm_and_head(trees: dict) -> tuple[dict, dict]:
        parts = {
            name: x
            for field, tree in trees.items()
            for name, x in flat(tree).items()
            if is_of_head(field, name.split("/")[0], head)
        }
        norm = {name: x for name, x in parts.items() if name.startswith("fc_norm")}
        return norm, {name: x for name, x in parts.items() if name not in norm}

    def same_shapes(a, b):
        return {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}

    (our_norm, our_head), (norm, their_head) = norm_and_head(fields), norm_and_head(saved)
    if not same_shapes(norm, our_norm):
        return {}
    return norm | (their_head if same_shapes(their_head, our_head) else {})


def read_parts(source: str, key: str, head: tuple[str, ...]) -> tuple[dict[str, dict], int]:
    """Reads the newest checkpoint of a run -> {"params": {part: tree}, "buffers": ...}, its step.

    Returns numpy arrays of the parts of init_from's `key` and of the head. The moving average of
    the params is used if the run has one.
    """
    manager, step = open_run(source, f"init_from.{key}")
    state = weights_in(manager, step)
    fields = {"buffers": "buffers", "params": "ema" if state["ema"] else "params"}
    trees = {name: state[field] for name, field in fields.items()}
    holders = [name for name, tree in trees.items() if PARTS[key][0] in tree]
    if not holders:
        parts = {p for tree in trees.values() for p, x in tree.items() if isinstance(x, dict)}
        names = ", ".join(sorted(parts))
        raise UserError(f"init_from.{key}: {source} has no {key}; it has {names}.")

    def is_wanted(name: str, part: str) -> bool:
        of_head = key == "encoder" and is_of_head(name, part, head)
        return of_head or (name in holders and part in PARTS[key])

    like = {
        fields[name]: {part: x for part, x in tree.items() if is_wanted(name, part)}
        for name, tree in trees.items()
    }
    restored = arrays(manager, step, {field: tree for field, tree in like.items() if tree})
    manager.close()
    return {name: restored.get(field, {}) for name, field in fields.items()}, step


def flatten_part(tree: dict, part: str) -> list[tuple[str, Any]]:
    """Returns [("block_0/qkv/kernel", array), ...]."""
    return list(flat(tree.get(part, {})).items())
