"""What outlives a process: Orbax behind one class.

A checkpoint is a folder, `checkpoints/STEP`: `state`, by Orbax, which any number of devices and
processes can read; `metadata`, a JSON object that says what is in it and how it came about;
`digests.json`, the SHA-256 of every file. All three appear at once, or not at all.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mim_jax import UserError
from mim_jax.train import TrainState

UNSIGNED = ("digests.json", "_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them last


class Checkpoints:
    """The newest `keep` states of a run, under `workdir`/checkpoints, written while it goes on.

    `about` goes with each as its metadata. `latest` is the newest step that can be restored: newer
    checkpoints that are broken are reported and set aside. Raises UserError if another run has the
    folder at this moment.
    """

    def __init__(self, workdir: str, keep: int, about: dict | None = None):
        self.about = about or {}
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.lock = lock(self.folder) if jax.process_index() == 0 else None
        self.latest = newest(self.folder, set_aside=True)
        self.manager = manager_of(
            workdir,
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=functools.partial(sign, self.folder)
            ),
        )

    def save(self, state: TrainState) -> None:
        """Returns when the state is copied from the devices; the files follow."""
        parts = {field: shapes(tree) for field, tree in state._asdict().items()}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            metadata=ocp.args.JsonSave(self.about | {"parts": parts, "skips": []}),
        )
        with room(self.folder):
            self.manager.save(int(state.step), args=args, force=True)

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, with the shapes and on the devices of `like` (abstract arrays)."""
        restored = restore(self.manager, self.latest, like._asdict())
        return TrainState(**restored)

    def close(self) -> None:
        """Waits until all is written."""
        with room(self.folder):
            self.manager.wait_until_finished()
        self.manager.close()
        if self.lock:
            self.lock.close()


def lock(folder: Path) -> IO:
    """Holds a folder as long as the file is open: even a process that is killed lets it go."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder.parent} is in use, by {file.read()}: wait or stop it.") from None
    except OSError:  # a file system that knows no locks
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def sign(folder: Path) -> None:
    """Writes the digests of a checkpoint that is complete, just before it gets its name."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        (path / "digests.json").write_text(json.dumps(digests(path), indent=1) + "\n")


def digests(folder: Path) -> dict[str, str]:
    """{"state/d/0123": SHA-256, ...} of the files in a checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in UNSIGNED)

    def digest(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(
            zip((str(p.relative_to(folder)) for p in files), pool.map(digest, files), strict=True)
        )


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if it is as it was written."""
    try:
        signed = json.loads((folder / "digests.json").read_text())
    except (OSError, ValueError):
        return "digests.json cannot be read"
    there = digests(folder)
    changed = sorted(name for name in signed.keys() | there if signed.get(name) != there.get(name))
    return f"{changed[0]} is not what was written" if changed else ""


def newest(folder: Path, set_aside: bool = False) -> int | None:
    """The newest step in a folder of checkpoints that is as it was written; None: none was begun.

    The first process looks, for all. It reports broken ones on stderr, and may rename them.
    Raises UserError if all are broken.
    """
    found, broken = -1, {}
    if jax.process_index() == 0:
        steps = (int(path.name) for path in folder.glob("*") if path.name.isdigit())
        for step in sorted(steps, reverse=True):
            if not (reason := fault(folder / str(step))):
                found = step
                break
            broken[step] = reason
        for step, reason in broken.items() if found >= 0 else ():
            warning = (
                f"checkpoint {step} in {folder} is broken: {reason}. That of step {found} is used."
            )
            print(warning, file=sys.stderr)
            if set_aside:
                (folder / str(step)).rename(folder / f"{step}.broken-{time.time():.0f}")
    verdict = np.int32([found, len(broken)])
    found, count = (int(n) for n in multihost_utils.broadcast_one_to_all(verdict))
    if count and found < 0:
        raise UserError(f"no checkpoint in {folder} is as it was written: remove it to begin anew.")
    return None if found < 0 else found


@contextlib.contextmanager
def room(folder) -> Iterator[None]:
    """A full disk as the OSError that it is: Orbax raises another, and at its next call."""
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
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """The part of a checkpoint that the tree `like` names, on its devices."""
    args = ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def open_run(workdir: str, key: str) -> tuple[ocp.CheckpointManager, int]:
    """-> a run's checkpoints, to be read, and the newest step; `key` is what named the run."""
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{key}: {workdir} is not the folder of a run: it has no checkpoints.")
    step = newest(folder)
    if step is None:
        raise UserError(f"{key}: the run in {workdir} has not saved a checkpoint yet.")
    return manager_of(workdir, create=False), step


def arrays(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """The part of a checkpoint that the tree `like` names, as numpy arrays."""
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = ocp.args.PyTreeRestore(like, restore_args=numpy, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def peek(workdir: str, like: TrainState) -> TrainState:
    """The newest state of a run as it is evaluated, on the devices of `like`: no optimizer state.

    Raises UserError where the run has another model, or none is saved.
    """
    manager, step = open_run(workdir, "--config")
    there = manager.item_metadata(step)["state"].tree
    wanted = {name: tree for name, tree in like._asdict().items() if name != "opt_state"}
    different = shapes(wanted).items() ^ shapes({name: there[name] for name in wanted}).items()
    if different:
        first = min(name for name, _ in different)
        raise UserError(
            f"{workdir} is of another model: {first} differs. Of a classifier this may be the "
            "number of labels: evaluate it on data that has the same."
        )
    found = restore(manager, step, wanted)
    manager.close()
    return TrainState(**found, opt_state=())


def load(workdir: str) -> tuple[dict, dict, dict]:
    """-> params, their average if there is one, buffers, as numpy arrays, and the metadata.

    Of the newest checkpoint of a run, whatever it was trained on. Raises UserError if it has none.
    """
    manager, step = open_run(workdir, "weights")
    there = manager.item_metadata(step)["state"].tree
    source = "ema" if there.get("ema") else "params"
    like = {name: there[name] for name in (source, "buffers") if there.get(name)}
    state = arrays(manager, step, like)
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    metadata = manager.restore(step, args=args)["metadata"]
    manager.close()
    return state[source], state.get("buffers", {}), metadata | {"step": step}


def abstract(x: jax.Array | jax.ShapeDtypeStruct, sharding=None) -> jax.ShapeDtypeStruct:
    """The shape and type of an array, to be restored where it is or by another sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)


def shapes(tree) -> dict[str, tuple]:
    """{"block_0/qkv/kernel": (192, 576), ...}"""
    return {name: x.shape for name, x in flat(tree).items()}


def flat(tree) -> dict:
    """{"block_0/qkv/kernel": array, ...}"""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {name_of(path): x for path, x in leaves}


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
