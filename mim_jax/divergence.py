"""Recovery from failed steps, whose loss or gradient is not finite or a spike.

The step itself does not apply such an update (train.py). `Failures` records it in RUN/captures. If
several follow each other, the run returns to a checkpoint and continues with later data.
`mim-jax replay RUN` repeats a recorded step.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mim_jax.storage import open_path, storage_of
from mim_jax.train import NO_LIMITS

WARM_UP = 20  # steps before which none is a spike
DECAY = 0.999  # of the largest loss and norm, per step
CAPTURES = 8  # most records of failed steps that a process writes
ADVICE = (
    "Try a lower optimizer.lr or base_lr, a longer warm-up, or optimizer.clip_norm=1; "
    "`mim-jax replay` repeats a failed step"
)


class RollbackError(Exception):
    """The state of a run is not usable: the run must return to a checkpoint."""

    def __init__(self, step: int, last_good: int):
        super().__init__(f"all steps from {last_good + 1:,} to {step:,} failed")
        self.step, self.last_good = step, last_good


class Spikes:
    """Limits on the loss and the norm of the gradient, from those of recent steps.

    A step is a spike if its absolute loss or its gradient norm is more than `factor` times the
    largest so far. Old values decay, by half in 700 steps. In the first steps only values that are
    not finite are over the limit. The limits of a step depend on the steps up to two before, which
    have ended when it begins; so no device waits, and a restart changes nothing.

    Args:
        factor: size of a spike; 0: only values that are not finite are over the limit.
        largest: the attribute of this name at the step that a run continues from.

    Attributes:
        largest: (step, number of steps, largest loss, largest norm) after the two newest steps.
    """

    def __init__(self, factor: float, largest: Iterable[Sequence[float]] = ()):
        self.factor, self.largest = factor, [tuple(map(float, entry)) for entry in largest]

    def limits(self, step: int) -> np.ndarray:
        """Returns the largest loss and norm with which a step is applied, (2,)."""
        earlier = [entry for entry in self.largest if entry[0] <= step - 2]
        if not (self.factor and earlier and earlier[-1][1] >= WARM_UP):
            return NO_LIMITS
        return np.minimum(self.factor * np.array(earlier[-1][2:]), NO_LIMITS).astype(np.float32)

    def check(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Returns the reason why a step was not applied, or records the step and returns ""."""
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        text = f"the loss is {loss} and the norm of the gradient {norm}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return text
        if abs(loss) > (limits := self.limits(step))[0] or norm > limits[1]:
            return f"{text}, more than {self.factor:g} times that of recent steps"
        _, count, *sizes = self.largest[-1] if self.largest else (0, 0, 0.0, 0.0)
        new = zip(sizes, (abs(loss), norm), strict=True)
        entry = (step, count + 1, *(max(DECAY * old, size) for old, size in new))
        self.largest = [*self.largest[-1:], entry]
        return ""


class Failures:
    """Monitors the losses of a run, one step late, so that no device waits.

    Args:
        workdir: the run directory.
        first: number of updates so far.
        patience: consecutive failures after which RollbackError is raised; 0: the first failure
            ends the run with FloatingPointError.
        names_of: step -> names of the images of its batch.
        skips: windows of data that are left out, which captures record.
        say: (step, text) -> None, prints and records a message.
        spikes: the limits of each step.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        first: int,
        patience: int,
        names_of: Callable[[int], list[str]],
        skips: Sequence[tuple[int, int]],
        say: Callable[[int, str], None],
        spikes: Spikes,
    ):
        self.folder = open_path(workdir) / "captures"
        self.patience, self.names_of, self.skips, self.say = patience, names_of, skips, say
        self.spikes = spikes
        self.last_good, self.in_a_row, self.captures = first, 0, 0
        self.pending: tuple[int, Mapping[str, Any]] | None = None

    def limits(self, step: int) -> np.ndarray | None:
        """Returns the limits of a step, or None if the first failure ends the run anyway."""
        return self.spikes.limits(step) if self.patience else None

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
        if not (text := self.spikes.check(step, metrics)):
            self.last_good, self.in_a_row = step, 0
            return
        if not self.patience:
            raise FloatingPointError(f"{text} at step {step}. {ADVICE}.")
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.say(step, f"{text}: the step is not applied")
        self.capture(step, metrics, text)
        if self.in_a_row >= self.patience:
            raise RollbackError(step, self.last_good)

    def finish(self, steps: int) -> None:
        """Checks the last step. Raises RollbackError if too many of the last ones failed."""
        self.check()
        if self.in_a_row and self.in_a_row >= min(self.patience, steps):
            raise RollbackError(self.last_good + self.in_a_row, self.last_good)

    def capture(self, step: int, metrics: Mapping[str, Any], reason: str) -> None:
        """Writes a record that identifies a failed step, for the first few failures."""
        if self.captures == CAPTURES or jax.process_index() > 0:
            return
        self.captures += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {name: str(float(value)) for name, value in metrics.items()}
        record |= dict(step=step, reason=reason, skips=list(self.skips))
        record["images"] = self.names_of(step)
        path = self.folder / f"step_{step:07d}.json"
        storage_of(path).write_text(path, json.dumps(record, indent=1) + "\n")


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
