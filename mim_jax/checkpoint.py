"""Checkpoints of a run, by Orbax.

A checkpoint is a folder, `checkpoints/STEP`: `state`, which any number of devices and processes can
read; `metadata`, a JSON object with the run's record; and `digests.json`, a checksum of every file:
SHA-256, or the CRC32C that a bucket computes. On a disk, all three appear at once. In a bucket, a
checkpoint is complete when Orbax has written `commit_success.txt`, after everything else.
"""

import atexit
import contextlib
import errno
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mim_jax import UserError
from mim_jax.bucket import BucketError
from mim_jax.storage import MAX_JSON, in_bucket, open_path, read_json, storage_of
from mim_jax.train import TrainState

COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket
UNSIGNED = ("digests.json", "_CHECKPOINT_METADATA", COMMITTED)  # files that are written last
STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # names of the folders of checkpoints
DATA = "d"  # folders of files with arrays; all other files are short
FREE = 2**26  # bytes of arrays that a checkpoint of any size may hold
PER_BYTE = 16  # further bytes per byte of its files, which are compressed


class Checkpoints:
    """The newest `keep` states of a run, in `workdir`/checkpoints, written in the background.

    `record` is stored in the metadata of each checkpoint. `latest` is the newest step that can be
    restored; corrupt newer checkpoints are reported and renamed. Raises UserError if another
    process is using the folder.
    """

    def __init__(self, workdir: str, keep: int, record: dict | None = None):
        self.record = record or {}
        self.skips: list[tuple[int, int]] = []  # windows of data left out, see divergence.py
        self.largest: list[Sequence[float]] = []  # losses and norms, see divergence.Spikes
        self.unfinished: list[str] = []  # periodic actions that a signal has prevented
        self.folder = folder_of(workdir)
        self.storage = storage_of(self.folder)
        self.lock = self.storage.lock(self.folder) if jax.process_index() == 0 else None
        self.latest = newest(self.folder, set_aside=True)
        self.unread = True  # whether no save of this process has been read back yet
        self.closed = False
        self.manager = manager_of(
            workdir,
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=functools.partial(sign, self.folder)
            ),
        )

    def save(self, state: TrainState) -> None:
        """Saves a state: returns when it is copied from the devices, and writes files later.

        Raises UserError if another process has taken over the folder.
        """
        if self.lock:
            self.lock.check()
        parts = {field: shapes(tree) for field, tree in state._asdict().items()}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            metadata=ocp.args.JsonSave(
                self.record
                | dict(parts=parts, skips=self.skips, largest=self.largest)
                | dict(unfinished=self.unfinished)
            ),
        )
        with disk_errors(self.folder):
            self.manager.save(int(state.step), args=args, force=True)
        if self.unread:
            self.read_back(state)
            self.unread = False

    def read_back(self, state: TrainState) -> None:
        """Reads the step from the checkpoint just saved, to detect unreadable checkpoints early.

        The files themselves are read back when they are signed. Raises UserError.
        """
        with disk_errors(self.folder):
            self.manager.wait_until_finished()
        step = int(state.step)
        try:
            restore(self.manager, step, {"step": abstract(state.step)})
        except UserError as error:
            raise UserError(
                f"the checkpoint of step {step} in {self.folder} cannot be read back: choose "
                "another --workdir."
            ) from error

    def restore(self, like: TrainState) -> TrainState:
        """Returns the latest state, with the shapes and shardings of `like` (abstract arrays).

        Sets `skips`, `largest` and `unfinished` to those of its run.
        """
        assert self.latest is not None  # there is a checkpoint
        restored = restore(self.manager, self.latest, like._asdict())
        metadata = metadata_of(self.folder, self.latest)
        self.skips, self.largest = metadata["skips"], metadata["largest"]
        self.unfinished = metadata["unfinished"]
        return TrainState(**restored)

    def set_aside(self, after: int) -> None:
        """Renames the checkpoints of later steps than `after`, and updates `latest`."""
        with disk_errors(self.folder):
            self.manager.wait_until_finished()
        if jax.process_index() == 0:
            for step in steps_in(self.folder):
                if step > after:
                    set_aside = f"{step}.set-aside-{time.time():.0f}"
                    (self.folder / str(step)).rename(self.folder / set_aside)
        multihost_utils.sync_global_devices("checkpoints are set aside")
        self.manager.reload()
        self.latest = newest(self.folder)

    def return_to(self, step: int) -> None:
        """Renames the checkpoints after `step`. Raises UserError if `step` has no checkpoint."""
        steps = steps_in(self.folder)
        if step not in steps:
            choices = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"there is no checkpoint of step {step} in {self.folder}; its steps are {choices}."
            )
        self.set_aside(after=step)
        if self.latest != step:
            raise UserError(f"the checkpoint of step {step} in {self.folder} is corrupt.")

    def close(self) -> None:
        """Waits until everything is written, and releases the folder. May be called twice."""
        if self.closed:
            return
        self.closed = True
        with disk_errors(self.folder):
            self.manager.wait_until_finished()
        self.manager.close()
        if self.lock:
            self.lock.close()

    def abandon(self) -> None:
        """Releases the folder without waiting for a save in progress, which stays incomplete."""
        self.closed = True
        if self.lock:
            self.lock.close()


def folder_of(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints."""
    path = open_path(workdir)
    return storage_of(path).absolute(path) / "checkpoints"


def steps_in(folder: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in increasing order."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path))


def has_checkpoints(workdir: str) -> bool:
    """Returns whether a run has saved a checkpoint."""
    return bool(steps_in(folder_of(workdir)))


def sign(folder: epath.Path) -> None:
    """Writes digests.json into a checkpoint after its other files, before Orbax commits it."""
    for path in folder.iterdir():
        step, _, temporary = path.name.partition(".orbax-checkpoint-tmp")
        if step.isdigit() and not ocp.utils.is_checkpoint_finalized(path):
            table = digests(path, storage_of(path).checksum)
            (path / "digests.json").write_text(json.dumps(table, indent=1) + "\n")
            if temporary:  # Orbax renames it when complete; a copy in a bucket needs the mark
                (path / COMMITTED).write_text("")


def digests(folder: epath.Path, kind: str) -> dict[str, str]:
    """Returns {"state/d/0123": checksum, ...} of the files in a checkpoint."""
    return storage_of(folder).checksums(folder, kind, but=UNSIGNED)


def find_fault(folder: epath.Path) -> str:
    """Returns what is wrong with a checkpoint, or "" if it is intact."""
    if not in_bucket(folder) and (reason := find_unusual(Path(folder))):
        return reason
    try:
        saved = read_json(folder / "digests.json")
    except (OSError, ValueError):
        return "digests.json cannot be read"
    if not isinstance(saved, dict):
        return "digests.json is not a table of digests"
    from_bucket = any(str(checksum).startswith("crc32c:") for checksum in saved.values())
    now = digests(folder, "crc32c" if from_bucket else "sha256")
    changed = sorted(name for name in saved.keys() | now if saved.get(name) != now.get(name))
    return f"{changed[0]} has changed since it was written" if changed else ""


def find_unusual(folder: Path) -> str:
    """Returns which file of a checkpoint on a disk must not be read, and why, or "" if all may be.

    Reading a pipe or a device may never end, and a file with holes may be longer than the disk.
    """
    disk = shutil.disk_usage(folder).total  # 0 if unknown
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file():
            return f"{name} is not a file"
        size = path.stat().st_size
        if path.parent.name != DATA and size > MAX_JSON:
            return f"{name} is longer than {MAX_JSON / 2**20:.0f} MiB"
        if 0 < disk < size:
            return f"{name} is longer than the disk"
    return ""


def newest(folder: epath.Path, set_aside: bool = False, before: float = math.inf) -> int | None:
    """Returns the newest intact step in a folder of checkpoints, or None if there is no checkpoint.

    Process 0 verifies the checkpoints and tells the others the result. It reports corrupt ones on
    stderr.

    Args:
        folder: the folder of checkpoints.
        set_aside: rename corrupt checkpoints.
        before: consider only earlier steps.

    Raises:
        UserError: if every checkpoint is corrupt.
    """
    intact, corrupt = -1, {}
    if jax.process_index() == 0:
        for step in reversed([step for step in steps_in(folder) if step < before]):
            if not (reason := find_fault(folder / str(step))):
                intact = step
                break
            corrupt[step] = reason
        for step, reason in corrupt.items() if intact >= 0 else ():
            print(
                f"checkpoint {step} in {folder} is corrupt: {reason}. Using step {intact}.",
                file=sys.stderr,
            )
            if set_aside:
                (folder / str(step)).rename(folder / f"{step}.corrupt-{time.time():.0f}")
    verdict = np.array([intact, len(corrupt)], np.int32)
    intact, count = (int(n) for n in multihost_utils.broadcast_one_to_all(verdict))
    if count and intact < 0:
        raise UserError(
            f"every checkpoint in {folder} is corrupt: delete the folder to start from step 0."
        )
    return None if intact < 0 else intact


@contextlib.contextmanager
def disk_errors(folder: epath.Path) -> Iterator[None]:
    """Converts Orbax's errors about the disk, which it raises in its next call, to OSError."""
    try:
        yield
    except ValueError as error:  # of tensorstore, for example: ... [os_error_code='28']
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(code[1])
        elif "No space left" in str(error):
            number = errno.ENOSPC
        else:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def without_wildcards(folder: epath.Path) -> epath.Path:
    """Returns a path to the folder without [ ] * ?, which Orbax would expand; makes a link."""
    if not set("[]*?") & set(str(folder)):
        return folder
    links = Path(tempfile.mkdtemp(prefix="mim_jax-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    link = links / folder.name
    link.symlink_to(folder)
    return epath.Path(link)


def manager_of(workdir: str, **options) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints. Raises UserError if the metadata of one are malformed."""
    folder = folder_of(workdir)
    try:
        return ocp.CheckpointManager(
            without_wildcards(folder),
            options=ocp.CheckpointManagerOptions(**options),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"the checkpoints in {folder} cannot be read: {error}.") from error


@contextlib.contextmanager
def reading(folder: epath.PathLike, step: int) -> Iterator[None]:
    """Converts any exception about the contents of a checkpoint to UserError.

    Orbax and tensorstore raise exceptions of many types for malformed files.
    """
    try:
        yield
    except (UserError, BucketError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"checkpoint {step} in {folder} cannot be read: {reason}.") from error


def saved_arrays(manager: ocp.CheckpointManager, step: int) -> dict:
    """Returns the tree of a checkpoint; its leaves have the shapes and dtypes of the arrays.

    Raises UserError if they are not arrays of numbers.
    """
    with reading(manager.directory, step):
        tree = manager.item_metadata(step)["state"].tree
        for name, x in flat(tree).items():
            if not is_real(x.dtype):
                raise ValueError(f"{name} has values of {x.dtype}")
            if any(n > max(1, m) for n, m in zip(x.storage.chunk_shape, x.shape, strict=True)):
                raise ValueError(f"{name} is stored in parts that are larger than it")
    return tree


def size_of(folder: epath.Path) -> int:
    """Returns the bytes of the files in a checkpoint that hold arrays."""
    state = folder / "state"
    paths = [*state.glob(f"{DATA}/*"), *state.glob(f"*/{DATA}/*")]
    return sum(path.stat().length for path in paths)


def is_real(dtype) -> bool:
    """Returns whether a dtype is that of real numbers or truth values."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """Restores the arrays of a checkpoint that are in the tree `like`, with its shardings.

    Raises UserError if the checkpoint lacks some of them, or has other shapes or other steps.
    """
    saved, wanted = flat(saved_arrays(manager, step)), flat(like)
    different = [
        name
        for name, x in wanted.items()
        if name not in saved
        or saved[name].shape != x.shape
        or jnp.issubdtype(saved[name].dtype, jnp.floating) != jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if different:
        raise UserError(
            f"checkpoint {step} in {manager.directory} is of a different network or optimizer: "
            f"{min(different)} differs."
        )
    args = ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    with reading(manager.directory, step):
        restored = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        if int(restored["step"]) != step:
            raise ValueError(f"it holds the state of step {restored['step']}")
    return restored


def metadata_of(folder: epath.Path, step: int) -> dict:
    """Returns the metadata of a checkpoint. Raises UserError if some have other types."""
    with reading(folder, step):
        metadata = read_json(folder / str(step) / "metadata" / "metadata")
        skips, largest = metadata.get("skips", []), metadata.get("largest", [])
        metadata["skips"] = [(int(start), int(length)) for start, length in skips]
        metadata["largest"] = [tuple(map(float, entry)) for entry in largest]
        if any(min(skip) < 0 for skip in metadata["skips"]):
            raise ValueError("its skips are negative")
        if any(len(entry) != 4 for entry in metadata["largest"]):
            raise ValueError("its largest losses are incomplete")
        metadata["unfinished"] = [str(name) for name in metadata.get("unfinished", [])]
    return metadata


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


def arrays(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """Restores the arrays of a checkpoint that are in the tree `like`, as NumPy arrays."""
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = ocp.args.PyTreeRestore(like, restore_args=numpy, partial_restore=True)
    with reading(manager.directory, step):
        return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


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


def abstract(x: jax.Array | jax.ShapeDtypeStruct, sharding=None) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of an array; `sharding` replaces its own."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)


def shapes(tree) -> dict[str, tuple]:
    """Returns {"block_0/qkv/kernel": (192, 576), ...}."""
    return {name: x.shape for name, x in flat(tree).items()}


def flat(tree) -> dict:
    """Returns {"block_0/qkv/kernel": array, ...}."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {name_of(path): x for path, x in leaves}


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
