"""Predicts whether a run fits on a TPU slice, CPUs or GPUs, and how long it takes.

    mim-jax plan --config=mae_large --target=v5e:4x4
    mim-jax plan --config=mae_base --config=beit_base --target=v5e:8x8 --markdown
    mim-jax plan --config=mae_base --target=h100:8       # an estimate, nothing is compiled

The devices need not be present. For TPUs (v4, v5e, v5p, v6e; extra [tpu]) and CPUs the run's own
step is compiled ahead of time, at full size; this takes some minutes on one core for a ViT-L, and
results are cached in --config.compile_cache. Times are predictions of the TPU's compiler. If the
step does not fit into memory, the command searches for keys that make it fit. The data set need not
be present if it is well known, or with --images and --classes.
Exit codes: 0 the step fits, 1 it does not, 2 user error.
"""

import argparse
import datetime
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mim_jax import cli
from mim_jax.plan import cache
from mim_jax.plan.cost import Cost, cost_of
from mim_jax.plan.hardware import FORM, GIB, target_of
from mim_jax.plan.search import Fitting, search
from mim_jax.plan.step import Step, load

COLUMNS = (
    *("config", "target", "keys to set", "fits", "GiB", "ms per step", "waiting, ms"),
    *("images/s per device", "MFU", "days", "device-hours", "date"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = cli.parser_of("plan", __doc__)
    cli.add_config(parser, several=True)
    parser.add_argument("--target", default="v5e:4x4", help=FORM)
    parser.add_argument("--images", type=int, default=0, help="size of the training split")
    parser.add_argument("--classes", type=int, default=0, help="number of classes, with --images")
    parser.add_argument(
        "--no-search", action="store_true", help="do not search for keys that make the step fit"
    )
    parser.add_argument("--parts", action="store_true", help="also list the time by part")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print an object on the last line")
    output.add_argument("--markdown", action="store_true", help="print a table")
    options, overrides = cli.parse(parser, argv)
    return cli.exit_code(lambda: plan(options, overrides), "")


def plan(options: argparse.Namespace, overrides: list[str]) -> int:
    """Plans the configs one after another. Returns 0 if all fit, 1 if not."""
    target = target_of(options.target)
    if options.markdown:
        print(row(COLUMNS), row(["---"] * len(COLUMNS)), sep="\n", flush=True)
    fits = []
    for path in options.config:
        sizes = dict(images=options.images, classes=options.classes)
        config = load(path, overrides, target, **sizes, trust_code=options.trust_code)
        step = Step(config, target)
        if not options.markdown:
            device = step.run.mesh.devices.flat[0].device_kind
            summary = step.run.summary.replace(f"on {device},", f"on {target.chip.kind},")
            print(f"{step.start.parameters:,} parameters\n{summary}", flush=True)
        cost = cost_of(step)
        searched = not cost.fits and not options.no_search
        fitting = search(cost, cost_of) if searched else None
        if options.markdown:
            print(table_row(path, cost, fitting), flush=True)
        else:
            print(*describe(cost, options.parts), sep="\n", flush=True)
            if searched:
                print(*describe_search(fitting, options.parts), sep="\n", flush=True)
        if options.json:
            print(json.dumps(as_json(cost) | dict(suggestion=suggestion(fitting))), flush=True)
        fits.append(cost.fits)
    return 0 if all(fits) else 1


# --- As text. ---


def describe_search(fitting: Fitting | None, parts: bool) -> Iterator[str]:
    """Yields the lines that describe the result of a search for keys."""
    if fitting is None:
        yield "none of the combinations of accumulation, rematerialization and fsdp fits"
        return
    keys = " ".join(f"--config.{key}={value}" for key, value in fitting.keys.items())
    yield from ("", f"it fits with {keys}", *describe(fitting.cost, parts))


def describe(cost: Cost, parts: bool) -> Iterator[str]:
    """Yields the lines that describe a cost."""
    step, chip = cost.step, cost.step.target.chip
    name = f"{step.target.name}, {len(step.target.devices)} devices"
    if cost.how == "arithmetic":
        yield f"{name}: estimated by arithmetic, not compiled"
    limit = f" of {chip.memory / GIB:.2f}" if math.isfinite(chip.memory) else ""
    yield f"{name}: {'fits' if cost.fits else 'does not fit'}, {cost.peak / GIB:.2f}{limit} GiB"
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in cost.memory.items())
    yield f"GiB per device: {kinds}"
    model = step.model_flops
    if cost.flops:
        yield (
            f"TFLOP per step and device: {cost.flops / 1e12:.3f}, "
            f"{cost.flops / model:.2f} times those of the model, {model / 1e12:.3f}"
        )
    for kind, entry in cost.collectives.items():
        expected = f", minimum {entry['theory_bytes'] / 1e9:.3f}" if entry["theory_bytes"] else ""
        waiting = 1e3 * entry["waiting_seconds"]
        alone = f", {waiting:.1f} ms without overlap" if waiting else ""
        yield f"{kind}: {entry['count']}, {entry['bytes'] / 1e9:.3f} GB{expected}{alone}"
    if cost.seconds is None:
        if cost.fits:
            yield "no time is predicted, because the compiler for CPUs has no estimates"
        return
    yield from times(cost, parts)


def times(cost: Cost, parts: bool) -> Iterator[str]:
    """Yields the lines about the predicted time."""
    step, computing, seconds = cost.step, cost.computing or 0.0, cost.seconds or 0.0
    if parts:
        for (part, kind), share in cost.parts.items():
            if share > 0.001 * computing:
                yield f"{part:10} {kind:13} {1e3 * share:7.2f} ms {share / computing:6.1%}"
    kernels = f" (attention kernels {1e3 * cost.kernels:.1f})" if cost.kernels else ""
    yield (
        f"ms per step: {1e3 * seconds:.1f} = computing {1e3 * computing:.1f}{kernels}, and waiting "
        f"for collectives {1e3 * cost.waiting:.1f}"
    )
    days, devices = cost.days or 0.0, len(step.target.devices)
    yield (
        f"{cost.images_per_second:,.0f} images/s per device, MFU {cost.mfu or 0:.1%}; "
        f"{step.run.steps:,} steps take {days:.2f} days, {24 * days * devices:,.0f} device-hours"
    )
    yield from (f"note: {note}" for note in cost.notes)


def table_row(path: str, cost: Cost, fitting: Fitting | None) -> str:
    """Returns a row of the table: the step as configured, or with the keys that make it fit."""
    keys, shown = fitting or Fitting({}, cost)
    changes = ", ".join(f"{key}={value}" for key, value in keys.items())
    cells = [Path(path).stem, shown.step.target.name, changes, "yes" if shown.fits else "no"]
    cells.append(f"{shown.peak / GIB:.1f}")
    if shown.seconds is None:
        cells += ["-"] * 6
    else:
        days = shown.days or 0.0
        cells += [f"{1e3 * x:.1f}" for x in (shown.seconds, shown.waiting)]
        cells += [f"{shown.images_per_second:,.0f}", f"{shown.mfu or 0:.0%}", f"{days:.1f}"]
        cells.append(f"{24 * days * len(shown.step.target.devices):,.0f}")
    return row([*cells, datetime.date.today().isoformat()])


def row(cells: Sequence[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


# --- As JSON. ---


def suggestion(fitting: Fitting | None) -> dict[str, Any] | None:
    """Returns the keys with which a step fits and its cost, for JSON."""
    return None if fitting is None else dict(keys=fitting.keys) | as_json(fitting.cost)


def as_json(cost: Cost) -> dict[str, Any]:
    """Returns a cost as a JSON object. Sizes and times are per device; unknown ones are null."""
    step, days, count = cost.step, cost.days, len(cost.step.target.devices)
    return dict(
        target=step.target.name,
        devices=count,
        fits=cost.fits,
        peak_hbm_bytes=round(cost.peak),
        flops=cost.flops or None,
        model_flops=step.model_flops,
        predicted_step_seconds=cost.seconds,
        images_per_second_per_device=cost.images_per_second,
        collectives=cost.collectives,
        how=cost.how,
        memory_bytes=cost.memory,
        available_bytes=None if math.isinf(step.target.chip.memory) else step.target.chip.memory,
        computing_seconds=cost.computing,
        waiting_seconds=cost.waiting,
        kernel_seconds=cost.kernels,
        mfu=cost.mfu,
        days=days,
        device_hours=None if days is None else 24 * days * count,
        steps=step.run.steps,
        images_per_step_and_device=step.images,
        parameters=step.start.parameters,
        versions=cache.versions(),
        notes=list(cost.notes),
    )


if __name__ == "__main__":
    cli.exit_with(main)
