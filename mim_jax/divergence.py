"""Steps whose loss or gradient is not finite: detection, records and recovery.

The step itself does not apply such an update (train.py). `Failures` records it in RUN/captures. If
several follow each other, the run returns to a checkpoint and continues with later data.
`mim-jax replay RUN` repeats a recorded step.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

CAPTURES = 8  # most records of failed steps that a process writes
ADVICE = (
    "Try a lower optimizer.lr or base_lr, a longer warm-up, or optimizer.clip_norm=1; "
    "`mim-jax replay` repeats a failed step"
)


class RollbackError(Exception):
    """The state of a run is not usable: the run must return to a checkpoint."""

    def __init__(self, step: int, last_finite: int):
        super().__init__(f"no loss was finite from step {last_finite + 1:,} to {step:,}")
        self.step, self.last_finite = step, last_finite


class Failures:
    """Monitors the losses of a run, one step late, so that no device waits.

    Args:
        workdir: the run directory.
        first: number of updates so far.
        patience: consecutive failures after which RollbackError is raised; 0: the first failure
            ends the run with FloatingPointError.
        names_of: step -> names of the images of its batch.
        skips: windows of data that are left out, for the captures.
        say: a function (step, text) that prints and records a message.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        first: int,
        patience: int,
        names_of: Callable[[int], list[str]],
        skips: Sequence[tuple[int, int]],
        say: Callable[[int, str], None],
    ):
        self.folder = Path(workdir) / "captures"
        self.patience, self.names_of, self.skips, self.say = patience, names_of, skips, say
        self.last_finite, self.in_a_row, self.captures = first, 0, 0
        self.pending: tuple[int, Mapping[str, Any]] | None = None

    def after(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records a step and checks the one before.

        Raises:
            RollbackError: after `patience` failures in a row.
            FloatingPointError: at the first failure, without `patience`.
        """
        self.check()
        self.pending = step, metrics

    def check(self) -> None:
        """Checks the pending step."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            self.last_finite, self.in_a_row = step, 0
            return
        text = f"the loss is {loss} and the norm of the gradient {norm}"
        if not self.patience:
            raise FloatingPointError(f"{text} at step {step}. {ADVICE}.")
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.say(step, f"{text}: the step is not applied")
        self.capture(step, loss, norm)
        if self.in_a_row >= self.patience:
            raise RollbackError(step, self.last_finite)

    def finish(self, steps: int) -> None:
        """Checks the last step. Raises RollbackError if too many of the last ones failed."""
        self.check()
        if self.in_a_row and self.in_a_row >= min(self.patience, steps):
            raise RollbackError(self.last_finite + self.in_a_row, self.last_finite)

    def capture(self, step: int, loss: float, norm: float) -> None:
        """Writes a record that identifies a failed step, for the first few failures."""
        if self.captures == CAPTURES or jax.process_index() > 0:
            return
        self.captures += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        record = dict(step=step, loss=str(loss), grad_norm=str(norm), skips=list(self.skips))
        record["images"] = self.names_of(step)
        path = self.folder / f"step_{step:07d}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


@jax.jit
def all_finite(tree):
    """Returns a tree of flags (): whether all values of an array are finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def data_step(step: int, skips: Sequence[Sequence[int]]) -> int:
    """Returns the position in the data after `step` updates, given the windows left out.

    Args:
        skips: (step at which a window begins, its length in steps), in the order of the failures.
    """
    return step + sum(length for start, length in skips if start <= step)
