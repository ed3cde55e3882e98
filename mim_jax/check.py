"""Checks within about a minute whether a run would start, and reports what it would do.

    mim-jax check --config=configs/mae_base.py --workdir=runs/mae_base
    mim-jax check --config=configs/mae_base.py --all   # decodes every image

Prints a summary of the recipe, decodes a sample of the images, takes two steps of the real model
(on a CPU, with fewer images), and draws training images as the model receives them, in
WORKDIR/check.png. Exit codes: 0 the run would start, 1 it would fail, 2 user error.
"""

import copy
import io
import math
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from mim_jax import cli, recipe, schema, workdir
from mim_jax.checkpoint.files import has_checkpoints
from mim_jax.data.decode import BadImageError, decode, header
from mim_jax.data.sources import Source
from mim_jax.keys import PER_DEVICE
from mim_jax.normalize import unit
from mim_jax.progress import Bar
from mim_jax.recipe import Run
from mim_jax.sharding import to_global
from mim_jax.sheets import draw_sheet
from mim_jax.start import Start, claim_workdir
from mim_jax.train import TrainState, train

SECONDS = 8  # seconds spent on decoding images of a split
CPU_LIMIT = 5e8  # parameters x images of a step that takes a few seconds on a CPU
PICTURES = 12
INPUT_PICTURES = ("masked", "truth")  # captions of pictures that do not show a prediction


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("check", __doc__)
    cli.add_config(parser)
    parser.add_argument("--workdir", default="", help="the run directory; default: runs/CONFIG")
    parser.add_argument("--all", action="store_true", help="decode every image, not a sample")
    options, overrides = cli.parse(parser, argv)
    path = cli.workdir_of(options)

    def command() -> int:
        config = schema.load(options.config, overrides, trust_code=options.trust_code)
        return check(config, path, options.all)

    return cli.exit_code(command, path)


def check(config: ConfigDict, path: str, everything: bool = False) -> int:
    """Reports on a run. Returns 0 if it would start, otherwise 1."""
    run = recipe.build(config)
    run.require_labels(config.data.evaluation_split)
    start = Start(run, config)
    start.trace_step()
    claim_workdir(path, run, config, start.bytes)
    say("run", f"{config.objective.name}: {start.parameters:,} parameters\n{run.summary}")
    problems = check_images(run, config, everything)
    values, problem = recipe.observe_values(run, config)
    say("values", values, *filter(None, [problem]))
    problems += filter(None, [problem])
    problems += check_disk(start.bytes, config.save.keep, path)
    if has_checkpoints(path):  # the runs named by init_from may no longer exist
        config.init_from.update({key: x and "random" for key, x in config.init_from.items()})
    problems += check_steps(config, run, start, workdir.open_path(path) / "check.png")
    say("the run would fail" if problems else "the run would start", *problems)
    return 1 if problems else 0


def say(title: str, *lines: str) -> None:
    """Prints a title and the lines below it."""
    below = [f"  {line}" for text in lines for line in text.splitlines()]
    print(f"{title}:" if below else title, *below, sep="\n")


def first_lines(lines: Iterable[str], most: int = 10) -> list[str]:
    """Returns the first `most` lines, and a line with the number of the others."""
    lines = list(lines)
    return lines[:most] + ([f"... and {len(lines) - most:,} more"] if len(lines) > most else [])


# --- Images. ---


class Survey(NamedTuple):
    """Statistics of the images of a split."""

    sizes: np.ndarray  # (images, 2): height, width
    modes: Counter
    labels: Counter
    bad: list[tuple[str, str]]  # name, reason


def check_images(run: Run, config: ConfigDict, everything: bool) -> list[str]:
    """Prints statistics of the images and returns problems."""
    problems = []
    if run.data.unread:
        lines = first_lines(f"{name}: {reason}" for name, reason in run.data.unread)
        say(f"{len(run.data.unread):,} files that are not images are ignored", *lines)
    splits = {config.data.split: run.data.train, config.data.evaluation_split: run.data.evaluation}
    for split, source in splits.items():
        seconds = float("inf") if everything else SECONDS
        survey = survey_images(source, config.data.channels, run.data.image.dtype, seconds)
        say(f"images of {split}", *summarize(survey, source, run.data.image.size))
        count = len(survey.sizes) + len(survey.bad)
        if len(survey.bad) > config.data.max_bad_fraction * count:
            problems.append(
                f"{len(survey.bad):,} of {count:,} images of {split} cannot be used, more than "
                f"data.max_bad_fraction = {config.data.max_bad_fraction:g}: the run would stop."
            )
    return problems


def survey_images(source: Source, channels: int, dtype: str, seconds: float) -> Survey:
    """Decodes images of a split in random order, until `seconds` have passed."""
    order = np.random.default_rng(0).permutation(len(source.examples))
    sizes, bad = [], []
    modes: Counter[str] = Counter()
    labels: Counter[int] = Counter()

    def look(i: int):
        try:
            example = source.examples[i]
            decode(example["image"], channels, dtype)
            return header(io.BytesIO(example["image"])), example.get("label")
        except BadImageError as error:
            return source.name_of(i), str(error)

    end, at_once = time.monotonic() + seconds, 64
    with ThreadPoolExecutor() as pool, Bar("decoding", len(order), unit="images") as bar:
        for start in range(0, len(order), at_once):
            for image, more in pool.map(look, order[start : start + at_once].tolist()):
                bar.update()
                if isinstance(image, str):
                    bad.append((image, more))
                    continue
                sizes.append((image.height, image.width))
                modes[image.mode] += 1
                labels.update([] if more is None else [int(more)])
            if time.monotonic() > end:
                break
    return Survey(np.array(sizes).reshape(-1, 2), modes, labels, sorted(bad))


def summarize(survey: Survey, source: Source, size: tuple[int, int]) -> list[str]:
    """Returns a survey as lines of text; `size` is that of the training images."""
    count, bad = len(survey.sizes), len(survey.bad)
    lines = [f"{len(source.examples):,}, of which {count + bad:,} were decoded; {bad:,} are bad"]
    lines += first_lines(f"{name}: {reason}" for name, reason in survey.bad)
    if not count:
        return lines
    by_area = survey.sizes[survey.sizes.prod(1).argsort()]
    least, median, most = (f"{h} x {w}" for h, w in by_area[[0, count // 2, -1]])
    lines.append(f"height x width: {least} to {most}, median {median}")
    if smaller := (survey.sizes < size).any(1).sum():
        lines.append(f"{smaller / count:.1%} are smaller than {size[0]} x {size[1]}: enlarged")
    shares = (f"{mode} {n / count:.1%}" for mode, n in survey.modes.most_common())
    lines.append(f"modes: {', '.join(shares)}")
    if source.num_labels:
        counts = [survey.labels[label] for label in range(source.num_labels)]
        lines.append(
            f"{source.num_labels:,} labels, {np.count_nonzero(counts):,} of them found; the most "
            f"frequent on {max(counts) / count:.1%} of the images, the rarest on "
            f"{min(counts) / count:.1%}"
        )
    return lines


# --- Disk, memory and steps. ---


def check_disk(state_bytes: int, keep: int, path: str) -> list[str]:
    """Prints the size of checkpoints and returns problems."""
    free, needed = workdir.free_bytes(path), (keep + 1) * state_bytes
    say(
        "checkpoints",
        f"{gib(state_bytes)} each; {keep} are kept while one more is written: {gib(needed)}",
        f"{path} has {gib(free)} free" if math.isfinite(free) else f"{path} has no limit",
    )
    return [] if needed <= free else [f"{path} has no space for {keep + 1} checkpoints."]


def check_steps(config: ConfigDict, run: Run, start: Start, path: epath.Path) -> list[str]:
    """Takes two steps, draws the model's input, lists parameters without gradient.

    Returns problems.
    """
    full_batch = config.batch_size
    if jax.default_backend() == "cpu":
        needed, free = start.bytes + 8 * start.parameters, free_memory()
        if needed > free:
            return [f"two steps need more than {gib(needed)} of memory; {gib(free)} are free."]
        frozen = sum(x.size for x in jax.tree.leaves(start.like.buffers))
        config = reduce_batch(config, run, start.parameters + frozen)
    run, count = recipe.build(config), config.batch_size
    run = run._replace(optimizer=optax.chain(watch(), run.optimizer))
    state, losses, times = Start(run, config).state(), [], [time.perf_counter()]
    steps = train(
        run.objective,
        run.optimizer,
        lambda start: batches(run, config, count, 3),
        state=state,
        mesh=run.mesh,
        steps=3,
        seed=config.seed,
        accumulate=config.accumulate,
        ema=config.ema,
    )
    try:
        for _, last, metrics in steps:
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter())
            state = last
            idle = without_gradient(state)
            if len(losses) > 1 and not idle:
                break  # a head of zeros hides the encoder until its first nonzero update
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [
            "a step does not fit in the devices' memory: set "
            f"--config.accumulate={2 * config.accumulate} or --config.model.remat=full."
        ]
    first, second = np.diff(times)[:2]
    say(
        "two steps",
        f"of {count:,} images (the run has {full_batch:,}): {first:.1f} s with compilation, then "
        f"{second:.2f} s ({count / second:,.1f} images/s)",
        f"loss {losses[0]:.4f}, then {losses[1]:.4f}",
    )
    say("parameters without a gradient", *(first_lines(idle) or ["none: all of them learn"]))
    draw(run, state, config, path)
    say("pictures", f"{path}: training images as the model receives them")
    return [] if np.isfinite(losses).all() else ["the loss is not finite."]


def without_gradient(state: TrainState) -> list[str]:
    """Returns the parameters for which `watch` saw no gradient."""
    leaves = jax.tree.leaves_with_path(state.opt_state[0])
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if not x]


def reduce_batch(config: ConfigDict, run: Run, parameters: int) -> ConfigDict:
    """Returns the config with a batch that a CPU processes in a few seconds.

    The steps and rates of the schedule do not change.
    """
    config, devices = copy.deepcopy(config), jax.device_count()
    most = max(2, int(CPU_LIMIT / parameters) // devices // 2 * 2)  # even: mixup takes pairs
    each = min(config.batch_size // devices, most)
    durations = {
        f"{name}_steps": recipe.in_steps(config.optimizer, name, run.steps_per_epoch)
        for name in ("warmup", "decay")
    }
    rate = recipe.learning_rate(config)
    config.optimizer.update(durations, lr=rate, warmup_epochs=0.0, decay_epochs=0.0)
    config.update(batch_size=each * devices, accumulate=1, steps=run.steps)
    keys = schema.keys_of(config)
    for key, value in schema.flatten(config).items():
        if PER_DEVICE in keys[key].markers and value:
            schema.set_key(config, keys, key, each)
    return config


def batches(run: Run, config: ConfigDict, count: int, steps: int):
    """Returns the first batches of the run, with `count` images each."""
    return run.data.training_batches(count, seed=config.seed, start=0, stop=steps)


def draw(run: Run, state: TrainState, config: ConfigDict, path: Path) -> None:
    """Draws training images as the model receives them, with the hidden patches."""
    count = -(-PICTURES // run.mesh.size) * run.mesh.size
    batch = next(batches(run, config, count, 1))
    columns = {
        field.name: np.asarray(unit(jnp.asarray(batch[field.name])))
        for field in run.data.image_fields
    }

    def pictures(*inputs):  # without predictions, which are slow on a CPU
        images = run.objective.pictures(*inputs)
        return {name: x for name, x in images.items() if name in INPUT_PICTURES}

    columns |= jax.jit(pictures)(
        state.params, state.buffers, to_global(batch, run.mesh), jax.random.key(config.seed)
    )
    title = f"{config.objective.name}: training images as the model receives them"
    draw_sheet(path, columns, title, legend=run.data.legend)


def watch() -> optax.GradientTransformation:
    """Returns an optimizer that records which parameters had a nonzero gradient.

    It does not change the gradients.
    """

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros((), bool), params)

    def update(grads, seen, params=None):
        return grads, jax.tree.map(lambda before, x: before | (x != 0).any(), seen, grads)

    return optax.GradientTransformation(init, update)


def free_memory() -> float:
    """Returns the free bytes of this machine's memory, or infinity if it is not Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


if __name__ == "__main__":
    cli.exit_with(main)
