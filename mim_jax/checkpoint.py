"""What outlives a process: Orbax behind one class, and parts of one run that start another."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mim_jax import UserError
from mim_jax.train import TrainState


class Checkpoints:
    """The newest `keep` states of a run, under `workdir`/checkpoints, written while it goes on."""

    def __init__(self, workdir: str, keep: int):
        self.manager = manager_of(workdir, max_to_keep=keep, cleanup_tmp_directories=True)

    @property
    def latest(self) -> int | None:
        """The newest step that was saved."""
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Returns when the state is copied from the devices; the files follow."""
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state._asdict()))
        with room(self.manager.directory):
            self.manager.save(int(state.step), args=args, force=True)

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes and on the devices of `like` (abstract arrays)."""
        restored = restore(self.manager, self.latest, like._asdict())
        return TrainState(**restored)

    def close(self) -> None:
        """Waits until all is written."""
        with room(self.manager.directory):
            self.manager.wait_until_finished()
        self.manager.close()


@contextlib.contextmanager
def room(folder) -> Iterator[None]:
    """A full disk as the OSError that it is: Orbax tells it otherwise, and at its next call."""
    try:
        yield
    except ValueError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def manager_of(workdir: str, **options) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        Path(workdir).absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    )


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """The part of a checkpoint that the tree `like` names, on its devices."""
    args = ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def init_part(state: TrainState, part: str, workdir: str) -> TrainState:
    """`state` with one part of its params or buffers as it is in the newest checkpoint of a run.

    There it is among the params, or their moving average. Raises UserError unless that run has the
    part with the same names and shapes.
    """
    field = "buffers" if part in state.buffers else "params"
    tree = getattr(state, field)
    if part not in tree:
        raise UserError(f"init_from: this objective has no {part}; it has {', '.join(tree)}.")
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"init_from: {workdir} is not the folder of a run: it has no checkpoints.")
    manager = manager_of(workdir, read_only=True)
    step = manager.latest_step()
    if step is None:
        raise UserError(f"init_from: the run in {workdir} has not saved a checkpoint yet.")
    there = manager.item_metadata(step)["state"].tree
    source = "ema" if there.get("ema") else "params"
    saved, wanted = shapes(there[source].get(part, {})), shapes(tree[part])
    if saved != wanted:
        different = sorted({path for path, _ in saved.items() ^ wanted.items()})
        raise UserError(
            f"init_from: {part} of {workdir} is of another model: {len(different)} arrays "
            f"differ, first {different[0]}: here {wanted.get(different[0])}, "
            f"there {saved.get(different[0])}."
        )
    loaded = restore(manager, step, {source: {part: jax.tree.map(abstract, tree[part])}})
    manager.close()
    print(f"{part}: {len(wanted)} arrays from step {step} of {workdir}")
    state = state._replace(**{field: tree | loaded[source]})
    # A copy: the step may write its new average over the old one, but never over the parameters.
    return state if state.ema is None else state._replace(ema=jax.tree.map(jnp.copy, state.params))


def abstract(x: jax.Array | jax.ShapeDtypeStruct, sharding=None) -> jax.ShapeDtypeStruct:
    """The shape and type of an array, to be restored where it is or by another sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)


def shapes(tree) -> dict[str, tuple]:
    """{"block_0/qkv/kernel": (192, 576), ...}"""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
