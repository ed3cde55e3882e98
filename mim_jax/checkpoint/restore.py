"""Restores arrays and metadata of a checkpoint, which may be damaged or a stranger's."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mim_jax import UserError
from mim_jax.bucket import BucketError
from mim_jax.checkpoint.files import folder_of, without_wildcards
from mim_jax.checkpoint.trees import flat
from mim_jax.storage import read_json


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


def arrays(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """Restores the arrays of a checkpoint that are in the tree `like`, as NumPy arrays."""
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = ocp.args.PyTreeRestore(like, restore_args=numpy, partial_restore=True)
    with reading(manager.directory, step):
        return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def metadata_of(folder: epath.Path, step: int) -> dict:
    """Returns the metadata of a checkpoint. Raises UserError if some have other types."""
    with reading(folder, step):
        metadata = read_json(folder / str(step) / "metadata" / "metadata")
        metadata["skips"] = windows_of(metadata.get("skips", []))
        metadata["largest"] = [tuple(map(float, entry)) for entry in metadata.get("largest", [])]
        if any(len(entry) != 4 for entry in metadata["largest"]):
            raise ValueError("its largest losses are incomplete")
        metadata["unfinished"] = [str(name) for name in metadata.get("unfinished", [])]
    return metadata


def windows_of(skips: list) -> list[tuple[int, int]]:
    """Returns the windows of data that a record leaves out: (step, length in steps).

    Raises ValueError or TypeError if they are not pairs of integers of at least 0.
    """
    windows = [(int(start), int(length)) for start, length in skips]
    if any(min(window) < 0 for window in windows):
        raise ValueError("its skips are negative")
    return windows
