"""The start of a run: its run directory, its initial state, and its compiled step."""

import functools
import json
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mim_jax import UserError, flops, recipe, schema, workdir
from mim_jax.checkpoint.files import has_checkpoints
from mim_jax.checkpoint.saved import record_in
from mim_jax.checkpoint.trees import abstract
from mim_jax.recipe import Run
from mim_jax.sharding import by_row, place, replicated
from mim_jax.train import TrainState, initialize, jit_step
from mim_jax.transfer import start_from


class Start:
    """The initial state of a run: its shapes immediately, its values when requested."""

    def __init__(self, run: Run, config: ConfigDict):
        cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not cache:  # the environment takes precedence
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
        self.run, self.config = run, config
        self.initialize = functools.partial(
            initialize, run.objective, run.optimizer, run.example, config.seed, config.ema > 0
        )
        shapes = jax.eval_shape(self.initialize)
        self.shardings = place(shapes, run.mesh)
        self.like = jax.tree.map(abstract, shapes, self.shardings)  # for restoring a checkpoint

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(x.size for x in jax.tree.leaves(self.like.params))

    @property
    def bytes(self) -> int:
        """Size of the state, and of a checkpoint."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.like))

    def state(self, strict: bool = False) -> TrainState:
        """Returns the initial state: random, except for the parts that `init_from` takes from runs.

        Raises UserError if `strict` is set and any parameter would stay random.
        """
        sources = sources_of(self.config)
        require_runs(sources)  # before anything is compiled
        state = jax.jit(self.initialize, out_shardings=self.shardings)()
        for key, source in sources.items():
            state = start_from(
                state,
                key,
                source,
                self.config.to_dict(),
                head=self.run.objective.head,
                class_names=self.run.data.class_names,
                strict=strict,
            )
        return state

    def trace_step(self):
        """Traces the run's own step with shapes only; `.lower().compile()` compiles it.

        Raises the UserErrors that the step would raise.
        """
        rows, mesh = by_row(self.run.mesh), self.run.mesh
        size = self.config.batch_size
        batch = {
            name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=rows)
            for name, x in self.run.example.items()
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        rng = abstract(key, replicated(mesh))
        step = jit_step(
            self.run.objective,
            self.run.optimizer,
            self.like,
            mesh=mesh,
            accumulate=self.config.accumulate,
            ema=self.config.ema,
        )
        limits = None
        if self.config.divergence.patience:
            limits = jax.ShapeDtypeStruct((2,), "float32", sharding=replicated(mesh))
        return step.trace(self.like, batch, rng, limits)


def model_flops(run: Run, config: ConfigDict) -> float:
    """Returns the FLOPs of a step on each device, without those repeated by rematerialization."""
    plain = config.copy_and_resolve_references()
    if "model" in plain:
        plain.model.remat = "none"
    objective = recipe.rebuild_objective(run, plain)
    return flops.step_flops(Start(run._replace(objective=objective), plain).trace_step().jaxpr)


def sources_of(config: ConfigDict) -> dict[str, str]:
    """Returns the runs of `init_from`: {"encoder": path} and others."""
    return {key: x for key, x in config.init_from.items() if x not in ("", "random")}


def require_runs(sources: Mapping[str, str]) -> None:
    """Raises UserError for a source of init_from that is not a run directory."""
    for key, source in sources.items():
        if not (workdir.open_path(source) / "checkpoints").is_dir():
            raise UserError(
                f"init_from.{key} = {source} is not a run directory: {how_to(key, source)}"
            )


def how_to(key: str, source: str) -> str:
    """Returns advice for a `source` of init_from that is not a run directory."""
    path = Path(source)
    for folder in path.absolute().parents:
        if (folder / "checkpoints").is_dir() and path.exists():
            return f"set --config.init_from.{key}={os.path.relpath(folder)}."
    weights = path.is_file() and path.suffix not in (".py", ".json")
    if weights or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return f"convert it first: mim-jax convert {source} RUN --to=mim_jax."
    return f"train one first, or set --config.init_from.{key}=RUN."


def source_run(path: str, config: ConfigDict, key: str) -> str:
    """Returns the run whose weights to use: `path`, or the value of init_from's `key`."""
    source = path if workdir.is_run(path) else config.init_from[key]
    if source in ("", "random"):
        raise UserError(
            f"{path} is not a run: set --config.init_from.{key}=RUN to the intended run."
        )
    return source


def claim_workdir(
    path: str, run: Run, config: ConfigDict, state_bytes: int, change: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Creates a run directory, or checks that an existing one belongs to the same run.

    Any run may use a directory without a checkpoint.

    Args:
        change: keys that may differ from those of the run that is continued.

    Returns:
        The run's trajectory and its history: [{"changes": {key: [old value, new value]}}, ...].

    Raises:
        UserError: if it belongs to another run, or has no space for two checkpoints.
    """
    trajectory = schema.trajectory(config, run.data.fingerprint)
    trajectory = json.loads(json.dumps(trajectory))  # tuples become lists, as in a record
    for key in change:
        if key not in trajectory:
            raise UserError(
                f"--change={key}: the config has no key {key} that changes what a run learns."
            )
    history: list[dict[str, Any]] = []
    if has_checkpoints(path):
        record = record_of_run(path)
        changes = compare_trajectories(path, record, trajectory, run, config.objective.name, change)
        history = record.get("history", []) + ([{"changes": changes}] * bool(changes))
    folder = workdir.open_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}.") from error
    free, needed = workdir.free_bytes(folder), 2 * state_bytes
    if free < needed:
        raise UserError(
            f"{path} has {free / 2**30:.1f} GiB free, but two checkpoints need "
            f"{needed / 2**30:.1f} GiB: choose another --workdir."
        )
    return trajectory, history


def record_of_run(path: str) -> dict[str, Any]:
    """Returns the record in config.json, or if that is unusable, the one in the checkpoints."""
    try:
        record = workdir.read(path)
    except UserError as error:
        print(f"warning: {error} The newest checkpoint's record is used.", file=sys.stderr)
        record = {}
    return record or record_in(path)


def compare_trajectories(
    path: str,
    record: dict[str, Any],
    trajectory: dict[str, Any],
    run: Run,
    objective: str,
    change: Collection[str] = (),
) -> dict[str, list]:
    """Compares a trajectory with that in the record of the run in a directory.

    Returns {key: [old value, new value]} of the keys in `change` that differ. Raises UserError if
    any other differs.
    """
    if workdir.is_converted(record):
        raise UserError(
            f"{path} holds converted weights: set --config.init_from.encoder={path} (or tokenizer) "
            "and choose another --workdir."
        )
    saved = record["trajectory"]
    theirs = saved.get("objective.name", objective)
    if theirs != objective:
        raise UserError(
            f"{path} holds a run of {theirs}, not of {objective}: choose another --workdir."
        )
    # A key that did not exist when the run was saved had its default value.
    defaults = schema.trajectory(schema.complete(record["config"]), run.data.fingerprint)
    saved = json.loads(json.dumps(defaults)) | saved
    changes = {
        key: [saved.get(key), trajectory.get(key)]
        for key in sorted(saved | trajectory)
        if trajectory.get(key) != saved.get(key)
    }
    refused = [key for key in changes if key not in change]
    if refused:
        text = "; ".join(
            f"{key} is {changes[key][1]!r}, was {changes[key][0]!r}" for key in refused
        )
        option = shlex.quote(f"--change={','.join(refused)}")  # keys of data sets have spaces
        raise UserError(
            f"{path} holds a run with other settings: {text}. Choose another --workdir, continue "
            f"with the same settings, or allow the change: {option}."
        )
    return changes
