"""What commands share: --config.KEY=VALUE, exit codes, a folder and the state to begin with."""

import argparse
import errno
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mim_jax import UserError, recipe
from mim_jax.checkpoint import abstract
from mim_jax.sharding import by_row, place, replicated
from mim_jax.train import TrainState, initialize, jit_step
from mim_jax.transfer import begin_from

NO_ROOM = (
    *(errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """-> options, and the overrides "key=value" that --config.key=value asked for."""
    parser.epilog = "--config.KEY=VALUE changes a key of the config, as --config.optimizer.b2=0.99"
    options, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            parser.error(f"unknown argument {flag}")
        separate = "=" not in flag and rest and not rest[0].startswith("--")
        overrides.append(flag.removeprefix("--config.") + (f"={rest.pop(0)}" if separate else ""))
    return options, overrides


def exit_code(command: Callable[[], int], workdir: str) -> int:
    """What a command returns: 0 done, 1 failed, 2 a mistake of its user, reported in a sentence."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or workdir
        print(f"error: cannot write to {where}: {error.strerror}.", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"failed: process {jax.process_index()} lost another of {jax.process_count()} "
            f"({reason}): the same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1


class Beginning:
    """The state that a run begins with: its shapes at once, its values when they are asked for."""

    def __init__(self, this: recipe.Run, config: ConfigDict):
        if not jax.config.jax_compilation_cache_dir:  # the environment's word goes first
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
        self.config = config
        self.begin = functools.partial(
            initialize, this.objective, this.optimizer, this.example, config.seed, config.ema > 0
        )
        shapes = jax.eval_shape(self.begin)
        self.placed = place(shapes, this.mesh)
        self.like = jax.tree.map(abstract, shapes, self.placed)  # as a checkpoint is restored

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.like.params))

    @property
    def bytes(self) -> int:
        """Of the state, which are a checkpoint's too."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.like))

    def state(self, entire: bool = False) -> TrainState:
        """At random, or in parts from other runs, as the config's init_from says.

        Raises UserError where an `entire` state is asked for, and something would be at random.
        """
        sources = {k: x for k, x in self.config.init_from.items() if x not in ("", "random")}
        for key, source in sources.items():  # before anything is compiled
            if not (Path(source) / "checkpoints").is_dir():
                raise UserError(
                    f"init_from.{key} = {source} is not the folder of a run: {how_to(key, source)}"
                )
        state = jax.jit(self.begin, out_shardings=self.placed)()
        for key, source in sources.items():
            state = begin_from(state, key, source, self.config, entire)
        return state


def how_to(key: str, source: str) -> str:
    """What to do where init_from's `source` is not a run."""
    path = Path(source)
    for folder in path.absolute().parents:
        if (folder / "checkpoints").is_dir() and path.exists():
            return f"say --config.init_from.{key}={os.path.relpath(folder)}."
    weights = path.is_file() and path.suffix not in (".py", ".json")
    if weights or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return f"make one of it by python -m mim_jax.convert {source} RUN --to=mim_jax."
    first = "train it first" + (
        ", as by configs/dvae.py or dvae_emoji.py" if key == "tokenizer" else ""
    )
    return f"{first}, or say --config.init_from.{key}=RUN."


def here(config: ConfigDict) -> ConfigDict:
    """The config of a run for a command that trains nothing, on devices that it may not divide."""
    devices, parts = jax.device_count(), jax.device_count() * config.accumulate
    config.update(
        fsdp=math.gcd(config.fsdp or devices, devices),
        batch_size=-(-config.batch_size // parts) * parts,
    )
    return config


def need_labels(this: recipe.Run, config: ConfigDict) -> None:
    """Raises UserError where a classifier is to be evaluated on images without labels."""
    if this.labelled and not this.data.evaluation_labelled:
        raise UserError(
            f"the images of {config.data.evaluation_split} have no labels: choose another "
            "data.evaluation_split."
        )


def trained(path: str, config: ConfigDict, key: str) -> str:
    """The run whose weights are meant: --config itself, or what init_from's `key` names."""
    run = path if Path(path).is_dir() else config.init_from[key]
    if run in ("", "random"):
        raise UserError(f"{path} is no run: say --config.init_from.{key}=RUN, which one is meant.")
    return run


def trace_step(this: recipe.Run, beginning: Beginning, config: ConfigDict):
    """The run's own step in shapes alone, traced: as `.lower().compile()` goes on from it.

    Raises the UserErrors that the step would.
    """
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for name, x in this.example.items()
    }
    batch = {name: abstract(x, by_row(this.mesh)) for name, x in batch.items()}
    rng = abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(this.mesh))
    step = jit_step(
        this.objective, this.optimizer, beginning.like, mesh=this.mesh,
        accumulate=config.accumulate, ema=config.ema,
    )  # fmt: skip
    return step.trace(beginning.like, batch, rng)


def has_saved(workdir: str) -> bool:
    """Whether a run's folder has a checkpoint."""
    return any(step.name.isdigit() for step in Path(workdir).glob("checkpoints/*"))


def make_folder(config: ConfigDict, this: recipe.Run, workdir: str, state_bytes: int) -> dict:
    """Makes a run's folder, if it is free or this very run's. -> the run's trajectory.

    A run that never saved leaves its folder free. Raises UserError if it is another run's, or has
    no room for two checkpoints.
    """
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: a run's folder must be local, or mounted.")
    path = Path(workdir) / "config.json"
    trajectory = json.loads(json.dumps(recipe.trajectory(config, this.data)))
    if has_saved(workdir) and path.exists():
        begun = json.loads(path.read_text())["trajectory"]
        objective = begun.get("objective.name", config.objective.name)
        if objective != config.objective.name:
            raise UserError(
                f"{workdir} holds a run of {objective}, this is one of {config.objective.name}: "
                "choose another --workdir."
            )
        if "converted from" in begun:
            raise UserError(
                f"{workdir} holds converted weights: say --config.init_from.encoder={workdir}, or "
                "tokenizer, and another --workdir."
            )
        # A key that is newer than the run has its default: the run had no other.
        defaults = recipe.trajectory(recipe.load(workdir), this.data)
        begun = json.loads(json.dumps(defaults)) | begun
        changes = [
            f"{key} is {trajectory.get(key)!r}, was {begun.get(key)!r}"
            for key in sorted(begun | trajectory)
            if trajectory.get(key) != begun.get(key)
        ]
        if changes:
            raise UserError(
                f"{workdir} holds a run that goes another way: {'; '.join(changes)}. "
                "Choose another --workdir, or go on with the same settings."
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {workdir}: {error.strerror}.") from error
    free, needed = shutil.disk_usage(workdir).free, 2 * state_bytes
    if free < needed:
        raise UserError(
            f"{workdir} has {free / 2**30:.1f} GiB free, but two checkpoints take "
            f"{needed / 2**30:.1f} GiB: choose another --workdir."
        )
    return trajectory
