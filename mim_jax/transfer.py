"""What one run takes from another: parts of its newest checkpoint, fitted to the model here."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import UserError
from mim_jax.checkpoint import arrays, flat, open_run
from mim_jax.models.resize import POSITIONS, RELATIVE, fit
from mim_jax.models.vit import SIZES
from mim_jax.train import TrainState

# By key of init_from. The first part lies among the params, the buffers or, where some of it is
# frozen, both; the others are looked for beside it, and nowhere else.
PARTS = {"encoder": ("encoder",), "tokenizer": ("tokenizer", "decoder")}
# Of an encoder, what a run that starts from it may have or not: a head may bring its own norm.
OPTIONAL = ("mask_token", "norm/bias", "norm/scale")
HEAD = ("fc_norm", "head", "batch_statistics")  # how a classifier's other parts begin


class Facts(NamedTuple):
    """What a config says of an encoder beyond the shapes of its arrays; None: it does not say."""

    objective: str | None = None
    patch: tuple[int, int] | None = None
    heads: int | None = None
    positions: str | None = None
    grid: tuple[int, int] | None = None  # rows and columns of patches
    mean: tuple | None = None
    std: tuple | None = None


def facts(config: Mapping[str, Any]) -> Facts:
    """Of the config of a run here or elsewhere, or of converted weights."""
    if "model" not in config:
        return Facts()
    model, objective = config["model"], config["objective"]
    patch = tuple(int(side) for side in np.broadcast_to(model["patch"], 2))
    size = np.broadcast_to(config["data"]["size"], 2)
    return Facts(
        objective=objective["name"],
        patch=patch,
        heads=model["heads"] or SIZES.get(model.get("size"), {}).get("heads"),
        positions=model["positions"],
        grid=tuple(int(side) for side in size // patch),
        **{name: tuple(objective[name]) for name in ("mean", "std") if name in objective},
    )


def begin_from(
    state: TrainState, key: str, workdir: str, config: Mapping[str, Any], entire: bool = False
) -> TrainState:
    """`state` with what init_from's `key` names as it is in the newest checkpoint of a run.

    Says what is resized, new and ignored. Where both runs classify, the head comes along if it is
    of the same shape, and its norm in any case. `config` is of the run here. Raises UserError for
    another model, and, of an `entire` state, if anything stays as it began.
    """
    here = {f: x for f in ("params", "buffers") if PARTS[key][0] in (x := getattr(state, f))}
    if not here:
        there = ", ".join(sorted(state.params.keys() | state.buffers))
        raise UserError(f"init_from.{key}: this objective has no {key}; it has {there}.")
    saved, step = read(workdir, key)
    ours, theirs = facts(config), facts(config_of(workdir))
    found = {}
    for part in PARTS[key]:
        wanted = {name: x.shape for tree in here.values() for name, x in of_part(tree, part)}
        if wanted:
            known = {name: x for tree in saved.values() for name, x in of_part(tree, part)}
            fitted, words = fit_part(part, known, wanted, ours, theirs, workdir)
            if part == "encoder":
                compare(ours, theirs, workdir)
            print(f"{part}: {len(fitted)} arrays from step {step} of {workdir}{words}")
            found |= {f"{part}/{name}": x for name, x in fitted.items()}
    if key == "encoder" and ours.objective == theirs.objective == "classify":
        here = {"params": state.params, "buffers": state.buffers}
        found |= (head := head_of(saved, here))
        print(f"its head: {', '.join(head) or 'new'}")
    whole = flat(state.params) | flat(state.buffers)
    if entire and (missing := sorted(whole.keys() - found)):
        raise UserError(
            f"{workdir} has no {missing[0]}, which the model of this config has: there is not "
            "all of it to be measured."
        )

    def value(path, x):
        array = found.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return x if array is None else jax.device_put(array.astype(x.dtype), x.sharding)

    state = state._replace(**{f: jax.tree.map_with_path(value, x) for f, x in here.items()})
    # A copy: the step may write its new average over the old one, but never over the parameters.
    return state if state.ema is None else state._replace(ema=jax.tree.map(jnp.copy, state.params))


def fit_part(
    part: str, saved: dict, wanted: dict, here: Facts, there: Facts, workdir: str
) -> tuple[dict[str, np.ndarray], str]:
    """-> what a part takes of what was saved, and what is to be said of it."""
    fixed = there.positions == "sincos" and part == "encoder"
    fitted = fit(saved, wanted, before=there.grid, after=here.grid, fixed=fixed)
    new, ignored = sorted(wanted.keys() - fitted), sorted(saved.keys() - wanted - {RELATIVE})
    different = [name for name, x in fitted.items() if x.shape != wanted[name]]
    different += [name for name in new if name not in OPTIONAL and not name.endswith(RELATIVE)]
    different += [name for name in ignored if name not in OPTIONAL]
    if RELATIVE in saved and not any(name.endswith(RELATIVE) for name in wanted):
        different.append(RELATIVE)
    if different:
        first = min(different, key=lambda name: (not name.startswith("embed"), name))
        raise UserError(
            f"init_from: {part} of {workdir} is of another model: {len(different)} arrays "
            f"differ, first {first}: here {wanted.get(first)}, "
            f"there {saved[first].shape if first in saved else None}."
        )
    resized = [n for n in fitted if here.grid != there.grid and n.endswith((POSITIONS, RELATIVE))]
    changes = dict(resized=resized, new=new, ignored=ignored)
    return fitted, "".join(f"; {what}: {', '.join(x)}" for what, x in changes.items() if x)


def compare(here: Facts, there: Facts, workdir: str) -> None:
    """Refuses an encoder that would compute something else with the same arrays."""
    for name in ("patch", "heads", "positions"):
        ours, theirs = getattr(here, name), getattr(there, name)
        may = not (ours and theirs) or ours == theirs or (theirs, ours) == ("sincos", "learned")
        if not may:
            raise UserError(
                f"the encoder of {workdir} is of another model: its model.{name} is "
                f"{theirs!r}, here it is {ours!r}."
            )
    if here.positions == there.positions == "sincos" and here.grid != there.grid:
        raise UserError(
            f"the encoder of {workdir} has fixed positions of {there.grid[0]} x "
            f"{there.grid[1]} patches, here there are {here.grid[0]} x {here.grid[1]}: say "
            "--config.model.positions=learned, which begin as these, interpolated."
        )
    for name in ("mean", "std"):
        ours, theirs = getattr(here, name), getattr(there, name)
        if ours and theirs and ours != theirs:
            print(
                f"warning: objective.{name} of {workdir} is {theirs}, here it is {ours}",
                file=sys.stderr,
            )


def head_of(saved: dict, here: dict) -> dict[str, np.ndarray]:
    """What a classifier's state takes of a classifier's: {"head/bias": array, ...}.

    A head goes with what it is given: features of the same norms.
    """

    def norm_and_head(trees: dict) -> tuple[dict, dict]:
        whole = {name: x for tree in trees.values() for name, x in flat(tree).items()}
        parts = {name: x for name, x in whole.items() if name.startswith(HEAD)}
        norm = {name: x for name, x in parts.items() if name.startswith("fc_norm")}
        return norm, {name: x for name, x in parts.items() if name not in norm}

    (our_norm, our_head), (norm, head) = norm_and_head(here), norm_and_head(saved)

    def alike(a, b):
        return {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}

    if not alike(norm, our_norm):
        return {}
    return norm | (head if alike(head, our_head) else {})


def read(workdir: str, key: str) -> tuple[dict[str, dict], int]:
    """-> {"params": {part: tree}, "buffers": ...} as numpy arrays, and the step.

    Of the newest checkpoint of a run: the parts of init_from's `key`, and the head of a classifier.
    Where the run has an average of its params, it is taken.
    """
    manager, step = open_run(workdir, f"init_from.{key}")
    there = manager.item_metadata(step)["state"].tree
    fields = {"buffers": "buffers", "params": "ema" if there.get("ema") else "params"}
    trees = {name: there[field] for name, field in fields.items()}
    holds = [name for name, tree in trees.items() if PARTS[key][0] in tree]
    if not holds:
        parts = {p for tree in trees.values() for p, x in tree.items() if isinstance(x, dict)}
        has = ", ".join(sorted(parts))
        raise UserError(f"init_from.{key}: {workdir} has no {key}; it has {has}.")

    def asked(name: str, part: str) -> bool:
        beside = key == "encoder" and part.startswith(HEAD)
        return beside or (name in holds and part in PARTS[key])

    like = {
        fields[name]: {part: x for part, x in tree.items() if asked(name, part)}
        for name, tree in trees.items()
    }
    found = arrays(manager, step, {field: tree for field, tree in like.items() if tree})
    manager.close()
    return {name: found.get(field, {}) for name, field in fields.items()}, step


def config_of(workdir: str) -> dict:
    """What a run's config.json says, {} if it has none."""
    path = Path(workdir) / "config.json"
    return json.loads(path.read_text())["config"] if path.exists() else {}


def of_part(tree: dict, part: str) -> list[tuple[str, Any]]:
    """[("block_0/qkv/kernel", array), ...]"""
    return list(flat(tree.get(part, {})).items())
