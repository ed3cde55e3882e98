r"""Repeats a step of a run that was not applied, and reports which gradients are not finite.

    mim-jax replay runs/mae_base                  # the newest of RUN/captures
    mim-jax replay runs/mae_base --step=12345

Trains from the newest checkpoint before the step up to the step, to restore the state that the run
had then. Computes the loss and the gradient of the step in the run's dtype and in float32. If they
are finite in float32, the dtype is too narrow; if not, look at the listed images and at the
learning rate. Nothing is written. Exit codes: 0 done, 2 user error.
"""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mim_jax import UserError, cli, objectives, recipe, schema, workdir
from mim_jax.checkpoint.restore import windows_of
from mim_jax.checkpoint.saved import state_before
from mim_jax.checkpoint.trees import flat
from mim_jax.divergence import Spikes, data_step
from mim_jax.recipe import Run
from mim_jax.sharding import to_global
from mim_jax.start import Start
from mim_jax.storage import read_json
from mim_jax.train import TrainState, gradient_of, train

SHOWN = 20  # largest number of images and of arrays that are listed


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("replay", __doc__)
    cli.add_config(parser, "a run directory")
    parser.add_argument("--step", type=int, default=0, help="the step; default: the newest capture")
    options, overrides = cli.parse(parser, argv)

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return replay(options.config, config, options.step)

    return cli.exit_code(command, "")


def replay(path: str, config: ConfigDict, step: int) -> int:
    """Repeats a step and prints its loss, its gradient norm and the gradients that are not finite.

    Returns the exit code.
    """
    capture = capture_of(path, step)
    step, skips = capture["step"], capture["skips"]
    run = recipe.build(config)
    if not 0 < step <= run.steps:
        raise UserError(f"step {step:,} is not a step of {path}: they are 1 to {run.steps:,}.")
    state, batch = before(run, config, path, step, skips)
    print(f"step {step:,} of {path}")
    for dtype in dict.fromkeys((run.dtype, "float32")):
        objective = objective_in(run, config, dtype)
        function = jax.jit(
            lambda state, batch, rng, objective=objective: gradient_of(
                state, batch, rng, objective=objective, accumulate=config.accumulate, mesh=run.mesh
            )[:2]
        )
        grads, metrics = function(state, batch, jax.random.key(config.seed))
        print(
            f"  {dtype}: loss {float(metrics['loss'])}, norm of the gradient "
            f"{float(metrics['grad_norm'])}"
        )
        names = [name for name, x in flat(grads).items() if not np.isfinite(x).all()]
        for name in names[:SHOWN]:
            print(f"    the gradient of {name} is not finite")
        if len(names) > SHOWN:
            print(f"    and of {len(names) - SHOWN} others")
    position = data_step(step - 1, skips)
    images = run.data.training_names(config.batch_size, seed=config.seed, step=position)
    print(f"  images: {', '.join(images[:SHOWN])}" + (" ..." if len(images) > SHOWN else ""))
    return 0


def capture_of(path: str, step: int) -> dict:
    """Returns the record of a failed step, the newest for step 0, or a minimal one for other steps.

    Raises UserError for step 0 if there is no record.
    """
    captures = sorted((workdir.open_path(path) / "captures").glob("step_*.json"))
    records = [read_capture(file) for file in captures]
    for record in records:
        if step == record["step"]:
            return record
    if step:
        return {"step": step, "skips": []}
    if not records:
        raise UserError(f"{path} has no captures of failed steps: pass --step=N.")
    return records[-1]


def read_capture(path: epath.Path) -> dict:
    """Reads the record of a failed step. Raises UserError if it is not one."""
    try:
        record = read_json(path)
        return record | {"step": int(record["step"]), "skips": windows_of(record["skips"])}
    except (OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the record of a failed step: remove it.") from error


def before(
    run: Run, config: ConfigDict, path: str, step: int, skips: list
) -> tuple[TrainState, dict]:
    """Returns the state before a step, and the batch of that step."""
    start = Start(run, config)
    restored, metadata = state_before(path, start.like, step) or (start.state(), {})
    first = int(restored.step)
    spikes = Spikes(config.divergence.spike, metadata.get("largest", []))

    def batches_from(at: int):
        position = data_step(at, skips)
        return run.data.training_batches(
            config.batch_size, seed=config.seed, start=position, stop=position + step - at
        )

    state = restored
    steps = train(
        run.objective,
        run.optimizer,
        batches_from,
        state=restored,
        mesh=run.mesh,
        steps=step - 1,
        seed=config.seed,
        accumulate=config.accumulate,
        ema=config.ema,
        limits=spikes.limits,
    )
    for done, after, metrics in steps if first < step - 1 else ():
        state = after
        if problem := spikes.check(done, metrics):
            print(f"  step {done:,}: {problem} too")
    print(f"trained from step {first:,} to {step - 1:,}")
    return state, to_global(next(iter(batches_from(step - 1))), run.mesh)


def objective_in(run: Run, config: ConfigDict, dtype: str) -> objectives.Objective:
    """Returns the run's objective with another compute dtype."""
    settings = config.copy_and_resolve_references()
    for name in schema.NETWORKS:
        if name in settings:
            settings[name].dtype = dtype
    return recipe.rebuild_objective(run, settings)
