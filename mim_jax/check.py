"""Tells, in about a minute, what a run would do and whether it would start.

    python -m mim_jax.check --config=configs/mae_base.py --workdir=runs/mae_base
    python -m mim_jax.check --config=configs/mae_base.py --all   # decodes every image

It shows the recipe's arithmetic, decodes a sample of the images, does two steps of the real model
(on a CPU with fewer images), and draws WORKDIR/check.png, images as the model gets them. Exit
codes: 0 the run would start, 1 it would fail, 2 a mistake in what was asked for.
"""

import argparse
import copy
import io
import shutil
import sys
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
from ml_collections import ConfigDict
from tqdm import tqdm

from mim_jax import recipe
from mim_jax.command import (
    Beginning,
    exit_code,
    has_saved,
    make_folder,
    need_labels,
    parse,
    trace_step,
)
from mim_jax.data.decode import BadImageError, decode, header
from mim_jax.data.sources import Source, open_sources
from mim_jax.normalize import unit
from mim_jax.pictures import draw_sheet
from mim_jax.sharding import to_global
from mim_jax.train import TrainState, train

SECONDS = 8  # in which images of a split are decoded
ON_A_CPU = 5e8  # parameters x images, of which a step takes some seconds
PICTURES = 12


def main(argv: list[str] | None = None) -> int:
    """The command. -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.check", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", default="", help="the run's folder; by default runs/CONFIG")
    parser.add_argument("--all", action="store_true", help="decode every image, not a sample")
    options, overrides = parse(parser, argv)
    workdir = options.workdir or f"runs/{Path(options.config).stem}"

    def command() -> int:
        return check(recipe.load(options.config, overrides), workdir, options.all)

    return exit_code(command, workdir)


def check(config: ConfigDict, workdir: str, everything: bool = False) -> int:
    """Reports on a run. -> 0 if it would start, 1 if not. Raises UserError for mistakes."""
    this = recipe.build(config)
    need_labels(this, config)
    beginning = Beginning(this, config)
    trace_step(this, beginning, config)
    make_folder(config, this, workdir, beginning.bytes)
    say("the run", f"{config.objective.name}: {beginning.parameters:,} parameters\n{this.story}")
    problems = look_at_images(this, config, everything)
    problems += look_at_disk(beginning.bytes, config.save.keep, workdir)
    if has_saved(workdir):  # what the run began with may be no more
        config.init_from.update({key: x and "random" for key, x in config.init_from.items()})
    problems += look_at_steps(config, this, beginning, Path(workdir) / "check.png")
    say("it would fail" if problems else "it would start", *problems)
    return 1 if problems else 0


def say(title: str, *lines: str) -> None:
    print(f"{title}:", *(f"  {line}" for text in lines for line in text.splitlines()), sep="\n")


def few(lines: Iterable[str], most: int = 10) -> list[str]:
    """The first of many lines, and how many more there are."""
    lines = list(lines)
    return lines[:most] + ([f"... and {len(lines) - most:,} more"] if len(lines) > most else [])


# --- The images. ---


class Survey(NamedTuple):
    """What was found in a split."""

    sizes: np.ndarray  # (images, 2): height, width
    modes: Counter
    labels: Counter
    bad: list[tuple[str, str]]  # name, reason


def look_at_images(this: recipe.Run, config: ConfigDict, everything: bool) -> list[str]:
    """Says what images there are. -> the problems."""
    given, problems = config.data, []
    if this.data.unread:
        lines = few(f"{name}: {reason}" for name, reason in this.data.unread)
        say(f"{len(this.data.unread):,} files that are no images and do not count", *lines)
    splits = given.split, given.evaluation_split
    sources = open_sources(given.name, splits, data_dir=given.data_dir, labels=given.labels)
    for split, source in zip(splits, sources, strict=True):
        seconds = float("inf") if everything else SECONDS
        found = survey(source, given.channels, this.data.dtype, seconds)
        say(f"images of {split}", *summary(found, source, this.data.views["image"]))
        looked_at = len(found.sizes) + len(found.bad)
        if len(found.bad) > given.max_bad_fraction * looked_at:
            problems.append(
                f"{len(found.bad):,} of {looked_at:,} images of {split} cannot be used, more than "
                f"data.max_bad_fraction = {given.max_bad_fraction:g}: the run would stop."
            )
    return problems


def survey(source: Source, channels: int, dtype: str, seconds: float) -> Survey:
    """Decodes images of a split, in random order, for so long."""
    order = np.random.default_rng(0).permutation(len(source.examples))
    sizes, modes, labels, bad = [], Counter(), Counter(), []

    def look(i: int):
        try:
            example = source.examples[i]
            decode(example["image"], channels, dtype)
            return header(io.BytesIO(example["image"])), example.get("label")
        except BadImageError as error:
            return source.name_of(i), str(error)

    end, at_once = time.monotonic() + seconds, 64
    progress = tqdm(total=len(order), unit=" images", delay=SECONDS + 2)
    with ThreadPoolExecutor() as pool, progress:
        for start in range(0, len(order), at_once):
            for image, more in pool.map(look, order[start : start + at_once].tolist()):
                progress.update()
                if isinstance(image, str):
                    bad.append((image, more))
                    continue
                sizes.append((image.height, image.width))
                modes[image.mode] += 1
                labels.update([] if more is None else [int(more)])
            if time.monotonic() > end:
                break
    return Survey(np.array(sizes).reshape(-1, 2), modes, labels, sorted(bad))


def summary(found: Survey, source: Source, view: tuple[int, int, int]) -> list[str]:
    """A survey, for people."""
    count, bad = len(found.sizes), len(found.bad)
    lines = [f"{len(source.examples):,}, of which {count + bad:,} were decoded; {bad:,} are bad"]
    lines += few(f"{name}: {reason}" for name, reason in found.bad)
    if not count:
        return lines
    by_area = found.sizes[found.sizes.prod(1).argsort()]
    least, median, most = (f"{h} x {w}" for h, w in by_area[[0, count // 2, -1]])
    lines.append(f"height x width: {least} to {most}, median {median}")
    if smaller := (found.sizes < view[:2]).any(1).sum():
        lines.append(f"{smaller / count:.1%} are smaller than {view[0]} x {view[1]}: enlarged")
    shares = (f"{mode} {n / count:.1%}" for mode, n in found.modes.most_common())
    lines.append(f"modes: {', '.join(shares)}")
    if source.num_labels:
        counts = [found.labels[label] for label in range(source.num_labels)]
        lines.append(
            f"{source.num_labels:,} labels, {np.count_nonzero(counts):,} of them met; the most "
            f"frequent on {max(counts) / count:.1%} of the images, the rarest on "
            f"{min(counts) / count:.1%}"
        )
    return lines


# --- The machine. ---


def look_at_disk(state_bytes: int, keep: int, workdir: str) -> list[str]:
    """Says what checkpoints take. -> the problems."""
    free, needed = shutil.disk_usage(workdir).free, (keep + 1) * state_bytes
    say(
        "checkpoints",
        f"{gib(state_bytes)} each; {keep} are kept while one more is written: {gib(needed)}",
        f"{workdir} has {gib(free)} free",
    )
    return [] if needed <= free else [f"{workdir} has no room for {keep + 1} checkpoints."]


def look_at_steps(
    config: ConfigDict, this: recipe.Run, beginning: Beginning, path: Path
) -> list[str]:
    """Does two steps, draws what the model gets and names what does not learn. -> the problems."""
    whole = config.batch_size
    if jax.default_backend() == "cpu":
        needed, free = beginning.bytes + 8 * beginning.parameters, memory()
        if needed > free:
            return [f"two steps take more than {gib(needed)} of memory; {gib(free)} are free."]
        frozen = sum(x.size for x in jax.tree.leaves(beginning.like.buffers))
        config = for_a_cpu(config, this, beginning.parameters + frozen)
    this, count = recipe.build(config), config.batch_size
    this = this._replace(optimizer=optax.chain(watch(), this.optimizer))
    state, losses, times = Beginning(this, config).state(), [], [time.perf_counter()]
    steps = train(
        this.objective, this.optimizer, lambda start: batches(this, config, count, 3), state=state,
        mesh=this.mesh, steps=3, seed=config.seed, accumulate=config.accumulate, ema=config.ema,
    )  # fmt: skip
    try:
        for _, last, metrics in steps:
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter())
            state = last
            idle = without_gradient(state)
            if len(losses) > 1 and not idle:
                break  # a head of zeros hides the encoder until its first rate above 0 moved it
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [
            f"a step does not fit in the devices' memory: say "
            f"--config.accumulate={2 * config.accumulate} "
            "or --config.model.remat=full."
        ]
    first, second = np.diff(times)[:2]
    say(
        "two steps",
        f"of {count:,} images, the run's have {whole:,}: {first:.1f} s with "
        f"compilation, then {second:.2f} s ({count / second:,.1f} images/s)",
        f"loss {losses[0]:.4f}, then {losses[1]:.4f}",
    )
    say("parameters without a gradient", *(few(idle) or ["none: all of them learn"]))
    draw(this, state, config, path)
    say("pictures", f"{path}: training images as the model gets them")
    return [] if np.isfinite(losses).all() else ["the loss is not a number."]


def without_gradient(state: TrainState) -> list[str]:
    """The parameters that `watch` saw none of."""
    leaves = jax.tree.leaves_with_path(state.opt_state[0])
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if not x]


def for_a_cpu(config: ConfigDict, this: recipe.Run, parameters: int) -> ConfigDict:
    """The config with a batch, taken at once, that a CPU does in some seconds.

    The schedule stays, steps and rates.
    """
    config, devices = copy.deepcopy(config), jax.device_count()
    most = max(2, int(ON_A_CPU / parameters) // devices // 2 * 2)  # even, as mixup has it
    each = min(config.batch_size // devices, most)
    durations = {
        f"{what}_steps": recipe.in_steps(config.optimizer, what, this.steps_per_epoch)
        for what in ("warmup", "decay")
    }
    config.optimizer.update(durations, lr=recipe.rate(config), warmup_epochs=0.0, decay_epochs=0.0)
    config.update(batch_size=each * devices, accumulate=1, steps=this.steps)
    for name in ("mixup_group", "batch_norm"):  # of what is computed at once
        if config.objective.get(name):
            config.objective[name] = each
    return config


def batches(this: recipe.Run, config: ConfigDict, count: int, steps: int):
    """The run's first images, so many a step."""
    return this.data.training_batches(count, seed=config.seed, start=0, stop=steps)


def draw(this: recipe.Run, state: TrainState, config: ConfigDict, path: Path) -> None:
    """A sheet of views of training images, and of what is hidden of them."""
    count = -(-PICTURES // this.mesh.size) * this.mesh.size
    batch = next(batches(this, config, count, 1))
    columns = {name: np.asarray(unit(jnp.asarray(batch[name]))) for name in this.data.views}
    pictures = jax.jit(this.objective.pictures)
    made = pictures(
        state.params, state.buffers, to_global(batch, this.mesh), jax.random.key(config.seed)
    )
    columns |= {name: images for name, images in made.items() if name == "masked"}
    draw_sheet(path, columns, f"{config.objective.name}: training images as the model gets them")


def watch() -> optax.GradientTransformation:
    """Changes nothing; notes in its state which parameters have had a gradient."""

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros((), bool), params)

    def update(grads, seen, params=None):
        return grads, jax.tree.map(lambda had, x: had | (x != 0).any(), seen, grads)

    return optax.GradientTransformation(init, update)


def memory() -> float:
    """Bytes of this machine's memory that are free; infinite where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
