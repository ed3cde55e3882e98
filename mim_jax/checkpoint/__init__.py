"""Checkpoints of a run, by Orbax.

A checkpoint is a folder, `checkpoints/STEP`: `state`, which any number of devices and processes can
read; `metadata`, a JSON object with the run's record; and `digests.json`, a checksum of every file:
SHA-256, or the CRC32C that a bucket computes. On a disk, all three appear at once. In a bucket, a
checkpoint is complete when Orbax has written `commit_success.txt`, after everything else.
"""

import functools
import time
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mim_jax import UserError
from mim_jax.checkpoint.files import disk_errors, folder_of, newest, sign, steps_in
from mim_jax.checkpoint.restore import manager_of, metadata_of, restore
from mim_jax.checkpoint.trees import abstract, shapes
from mim_jax.storage import storage_of
from mim_jax.train import TrainState


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
