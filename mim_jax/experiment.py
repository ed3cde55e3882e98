"""Runs in Python: build, train step by step, evaluate and draw pictures."""

import functools
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mim_jax import UserError, recipe, schema, workdir
from mim_jax.checkpoint.saved import peek
from mim_jax.recipe import Run
from mim_jax.sharding import all_gather, replicated, to_global
from mim_jax.start import Start
from mim_jax.train import TrainState, evaluate, train


class Experiment:
    """A run in memory: nothing is written to disk::

        experiment = mim_jax.build("mae_emoji", steps=100)
        for step, state, metrics in experiment.train():
            print(step, float(metrics["loss"]))
        experiment.evaluate(state)

    If the loop is interrupted, `experiment.train(state)` continues from the last state. Ctrl-C
    takes effect after the current step.

    Attributes:
        config: the complete config.
        run: the networks, objective, optimizer, data and mesh that it describes.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.run = recipe.build(config)

    def __repr__(self) -> str:
        return f"Experiment: {self.config.objective.name}\n{self.run.summary}"

    @functools.cached_property
    def start(self) -> Start:
        """The initial state: its shapes immediately, its values when requested."""
        return Start(self.run, self.config)

    def train(
        self, state: TrainState | None = None
    ) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
        """Yields (step, state, metrics {name: ()}) after every update.

        Args:
            state: the state to start from; by default the initial state, with the parts that the
                config takes from other runs. Its memory is reused: it is not valid afterwards.

        Raises:
            UserError: if `state` is not a state.
        """
        if state is not None:
            require_state(state, "train")

        def batches_from(step: int) -> Iterator[dict]:
            return self.run.data.training_batches(
                self.config.batch_size, seed=self.config.seed, start=step, stop=self.run.steps
            )

        steps = train(
            self.run.objective,
            self.run.optimizer,
            batches_from,
            state=self.start.state() if state is None else state,
            mesh=self.run.mesh,
            steps=self.run.steps,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            ema=self.config.ema,
        )
        yield from interrupted_between(steps)

    def evaluate(self, state: TrainState, limit: int = 0) -> dict[str, Any]:
        """Returns the means over the first `limit` examples of the evaluation split (0: all).

        Raises UserError if `state` is not a state, if `limit` is negative, or if the objective
        needs labels and the split has none.
        """
        require_state(state, "evaluate")
        if limit < 0:
            raise UserError(f"limit = {limit} must be at least 0.")
        self.run.require_labels(self.config.data.evaluation_split)
        batches = self.run.data.evaluation_batches(self.run.rows, limit=limit)
        return evaluate(
            self.run.objective, state, batches, mesh=self.run.mesh, seed=self.config.seed
        )

    def pictures(self, state: TrainState, count: int = 8) -> dict[str, np.ndarray]:
        """Returns {caption: images (n, H, W, c) in [0, 1]} of the first evaluation images."""
        require_state(state, "pictures")
        if count < 1:
            raise UserError(f"count = {count} must be at least 1.")
        return pictures_of(self.run, state, count, self.config.seed)

    def restore(self, path: str) -> TrainState:
        """Returns the newest state of a run directory, for evaluation and pictures.

        Raises UserError if the run has another network.
        """
        return peek(path, self.start.like)


def interrupted_between(steps: Iterator[tuple]) -> Iterator[tuple]:
    """Yields steps. Ctrl-C during a step raises KeyboardInterrupt after that step.

    A step reuses the memory of the last state, which would be lost if the step were interrupted.
    A second Ctrl-C does interrupt it, and so does a Ctrl-C during the first step.
    """
    default = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(default):
        yield from steps
        return
    computing, pending = False, False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if computing and not pending:
            pending = True
        else:
            default(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        for result in steps:
            computing = False
            yield result
            if pending:
                raise KeyboardInterrupt
            computing = True
    finally:
        signal.signal(signal.SIGINT, default)


def require_state(state: Any, method: str) -> None:
    """Raises UserError unless `state` is a state."""
    if not isinstance(state, TrainState):
        raise UserError(
            f"{method}({state!r}): pass a state, from `for step, state, metrics in train()` or "
            "restore(RUN). The number of steps is set by mim_jax.build(..., steps=N)."
        )


def build(
    config: str | Path | ConfigDict, changes: Mapping[str, Any] | None = None, **top_level: Any
) -> Experiment:
    """Builds a run: `mim_jax.build("mae_emoji", {"optimizer.base_lr": 1e-3}, steps=100)`.

    Args:
        config: the name of a config (`mim-jax configs` lists them), a config file, a run directory
            or a complete config.
        changes: values of keys by their full names, or nested: {"optimizer": {"base_lr": 1e-3}}.
        top_level: values of keys outside any block, such as steps, batch_size and seed, or of
            blocks as dicts.

    Raises:
        UserError: if a key does not exist or has a wrong value, or the data cannot be read.
    """
    if isinstance(config, str | Path):
        config = str(config)
        is_run = workdir.is_run(config)
        config = schema.load(config)
        config = recipe.fit_to_devices(config) if is_run else config
    if not isinstance(config, ConfigDict) or "objective" not in config:
        raise UserError("build needs the name of a config, a config file, a run or a ConfigDict.")
    config = config.copy_and_resolve_references()
    keys = schema.keys_of(config)
    if not isinstance(changes or {}, Mapping):
        raise UserError(f"changes = {changes!r} must be a dict of keys and values.")
    changes = schema.flatten({**(changes or {}), **top_level})
    for key, value in changes.items():
        schema.set_key(config, keys, key, value)
    schema.require_effect(config, changes)
    return Experiment(config)


def pictures_of(run: Run, state: TrainState, count: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the objective's pictures {caption: images} of the evaluation split's first images."""
    count = -(-count // run.mesh.size) * run.mesh.size
    batch = to_global(next(run.data.evaluation_batches(count, limit=count)), run.mesh)
    pictures = jax.jit(run.objective.pictures, out_shardings=replicated(run.mesh))
    params, buffers = all_gather((state.averaged, state.buffers), run.mesh)
    columns = pictures(params, buffers, batch, jax.random.key(seed))
    valid = np.asarray(all_gather(batch["valid"], run.mesh)) > 0
    return {caption: np.asarray(images)[valid] for caption, images in columns.items()}
