"""Searches for config keys with which a step fits into the memory of a target."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mim_jax import UserError, schema
from mim_jax.plan.cost import Cost
from mim_jax.plan.step import Step

REMATERIALIZED = 0.3  # approximate share of activations that full rematerialization keeps
MARGIN = 1.25  # candidates with estimates above this multiple of the memory are skipped
TRIES = 6  # largest number of steps to compile


class Fitting(NamedTuple):
    """Keys with which a step fits, and its cost."""

    keys: dict[str, Any]
    cost: Cost


def search(first: Cost, measure: Callable[[Step], Cost]) -> Fitting | None:
    """Returns the cheapest keys with which a step fits, or None if there are none.

    Candidates that are far too large, by an estimate from the steps compiled so far, are skipped.

    Args:
        first: the cost of the step as configured, which does not fit.
        measure: step -> cost; raises UserError for a step that cannot be compiled.
    """
    known, tries = first, 0
    for keys in candidates(first.step):
        try:
            step = Step(changed(first.step.config, keys), first.step.target)
            if estimate(known, step) > MARGIN * step.target.chip.memory:
                continue
            cost = measure(step)
        except UserError:  # for example, a key that must divide the images of a part does not
            continue
        if cost.fits:
            return Fitting(keys, cost)
        known, tries = cost, tries + 1
        if tries == TRIES:
            break
    return None


def candidates(step: Step) -> Iterator[dict[str, Any]]:
    """Yields keys to change, the cheapest first.

    Accumulation costs almost nothing; splitting the state communicates; full rematerialization
    computes the forward pass twice.
    """
    config, mesh = step.config, step.run.mesh
    state: list[dict[str, Any]] = [{}] + (
        [{"fsdp": mesh.size}] if mesh.shape["fsdp"] < mesh.size else []
    )
    remat: list[dict[str, Any]] = [{}]
    if step.run.model and step.remat == "none":
        remat.append({"model.remat": "full"})
    parts = [config.accumulate]
    while step.images % (2 * parts[-1]) == 0:
        parts.append(2 * parts[-1])
    for repeated in remat:
        for split in state:
            for count in parts:
                more = {"accumulate": count} if count > parts[0] else {}
                if keys := more | split | repeated:
                    yield keys


def changed(config: ConfigDict, keys: dict[str, Any]) -> ConfigDict:
    """Returns a copy of a config with other values of some keys."""
    config = config.copy_and_resolve_references()
    known = schema.keys_of(config)
    for key, value in keys.items():
        schema.set_key(config, known, key, value)
    return config


def estimate(known: Cost, step: Step) -> float:
    """Estimates the bytes that a step takes on a device, given the cost of another step.

    Activations are proportional to the number of images that a device processes at a time.
    """

    def remat(step: Step) -> float:
        return REMATERIALIZED if step.remat == "full" else 1.0

    def rows(step: Step) -> float:
        return step.images / step.config.accumulate

    activations = max(known.peak - fixed(known.step), 0.0)
    scale = rows(step) * remat(step) / (rows(known.step) * remat(known.step))
    return fixed(step) + activations * scale


def fixed(step: Step) -> float:
    """Returns the bytes of the state on a device, and of the gradient of all parameters."""
    return sum(step.state_bytes.values()) + 4 * step.start.parameters
