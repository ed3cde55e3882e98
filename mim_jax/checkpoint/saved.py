"""Reads what a run has saved: states, its record and weights."""

import math

import jax
import orbax.checkpoint as ocp
from etils import epath

from mim_jax import UserError
from mim_jax.checkpoint.files import DATA, folder_of, newest
from mim_jax.checkpoint.restore import (
    arrays,
    manager_of,
    metadata_of,
    reading,
    restore,
    saved_arrays,
)
from mim_jax.checkpoint.trees import flat, shapes
from mim_jax.storage import read_json
from mim_jax.train import TrainState

FREE = 2**26  # bytes of arrays that a checkpoint of any size may hold
PER_BYTE = 16  # further bytes per byte of its files, which are compressed


def open_run(workdir: str, key: str) -> tuple[ocp.CheckpointManager, int]:
    """Opens a run's checkpoints for reading. Returns the manager and the newest step.

    `key` is the config key or the option that names the run, for messages. Raises UserError if
    there is no checkpoint.
    """
    folder = folder_of(workdir)
    if not folder.is_dir():
        raise UserError(f"{key}: {workdir} is not a run directory: it has no checkpoints.")
    step = newest(folder)
    if step is None:
        raise UserError(f"{key}: the run in {workdir} has not saved a checkpoint yet.")
    return manager_of(workdir, create=False), step


def state_before(workdir: str, like: TrainState, step: int) -> tuple[TrainState, dict] | None:
    """Returns the newest state of a run before a step and its metadata, or None."""
    newest_step = newest(folder_of(workdir), before=step)
    if newest_step is None:
        return None
    manager = manager_of(workdir, create=False)
    restored = restore(manager, newest_step, like._asdict())
    metadata = metadata_of(folder_of(workdir), newest_step)
    manager.close()
    return TrainState(**restored), metadata


def record_in(workdir: str) -> dict:
    """Returns the record of a run from its newest checkpoint. Raises UserError if it has none."""
    folder = folder_of(workdir)
    step = newest(folder)
    try:
        record = read_json(folder / str(step) / "metadata" / "metadata")
        if not all(isinstance(record[name], dict) for name in ("config", "trajectory")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{workdir} has checkpoints without a record of their run: choose another --workdir."
        ) from None
    return record


def peek(workdir: str, like: TrainState) -> TrainState:
    """Restores the newest state of a run except the optimizer state, with `like`'s shardings.

    Raises UserError if the run has another model, or no checkpoint.
    """
    manager, step = open_run(workdir, "--config")
    saved = saved_arrays(manager, step)
    wanted = {name: tree for name, tree in like._asdict().items() if name != "opt_state"}
    different = shapes(wanted).items() ^ shapes({name: saved.get(name) for name in wanted}).items()
    if different:
        first = min(name for name, _ in different)
        raise UserError(
            f"{workdir} has a different network: {first} differs. If it is a classifier, evaluate "
            "it on data with the same number of labels."
        )
    restored = restore(manager, step, wanted)
    manager.close()
    return TrainState(**restored, opt_state=())


def weights_in(manager: ocp.CheckpointManager, step: int) -> dict[str, dict]:
    """Returns the parts of "params", "ema" and "buffers" of a checkpoint; see `saved_arrays`.

    Raises UserError if it has no params, if one of these is not a tree of arrays, or if the files
    of the checkpoint cannot hold the arrays.
    """
    saved = saved_arrays(manager, step)
    weights = {name: saved.get(name) or {} for name in ("params", "ema", "buffers")}
    with reading(manager.directory, step):
        leaves = jax.tree.leaves(weights, is_leaf=lambda x: not isinstance(x, dict))
        if not all(hasattr(x, "shape") for x in leaves) or not all(
            isinstance(tree, dict) for tree in weights.values()
        ):
            raise ValueError("its weights are not a tree of arrays")
        if not weights["params"]:
            raise ValueError("it has no weights")
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in flat(weights).values())
        if size > FREE + PER_BYTE * size_of(epath.Path(manager.directory) / str(step)):
            raise ValueError(f"its weights have {size:,} bytes, more than its files can hold")
    return weights


def size_of(folder: epath.Path) -> int:
    """Returns the bytes of the files in a checkpoint that hold arrays."""
    state = folder / "state"
    paths = [*state.glob(f"{DATA}/*"), *state.glob(f"*/{DATA}/*")]
    return sum(path.stat().length for path in paths)


def load(workdir: str) -> tuple[dict, dict, dict]:
    """Returns params and buffers (NumPy arrays) and the metadata of a run's newest checkpoint.

    If the run has a moving average of the params, it is returned instead of them. Raises UserError
    if there is no checkpoint.
    """
    manager, step = open_run(workdir, "weights")
    saved = weights_in(manager, step)
    source = "ema" if saved["ema"] else "params"
    like = {name: saved[name] for name in (source, "buffers") if saved[name]}
    state = arrays(manager, step, like)
    metadata = metadata_of(folder_of(workdir), step)
    manager.close()
    return state[source], state.get("buffers", {}), metadata | {"step": step}
